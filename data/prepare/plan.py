"""Which parts a preparation has: planned once, and again where it was interrupted and files have changed since.

A part keeps its number, and with it what is done of it, as long as it reads the same places of the same files; which
state of them a finished part has read, its own record says (`data.prepare.part`).
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.corpus.parts import Part
from data.prepare.spec import PrepareSpec
from data.prepare.stamps import Stamp, stamps
from s2 import files

PLAN = "plan.json"


@dataclass(frozen=True)
class Planned:
    """A part with its number, which names its files, and the stamps of the local files that it reads."""

    number: int
    part: Part
    stamps: tuple[Stamp, ...] = ()

    @property
    def place(self) -> list[Any]:
        """What tells parts of a source apart, as JSON holds it: format, names of the files, span."""
        part = self.part
        return [part.format, [name for _, name in part.files], list(part.span) if part.span else None]


@dataclass(frozen=True)
class Plan:
    """sources: the parts of each, in reading order. revisions: of hub datasets, None for other sources.

    part_bytes: that the parts were made with. state: tells apart plans whose parts or local files differ in anything.
    """

    settings: Mapping[str, Any]
    part_bytes: int
    sources: list[list[Planned]]
    revisions: list[str | None]

    @property
    def state(self) -> str:
        every = [
            [[*part.place, [(s.name, s.size, s.mtime_ns) for s in part.stamps]] for part in parts]
            for parts in self.sources
        ]
        return hashlib.blake2b(json.dumps([every, self.revisions]).encode(), digest_size=16).hexdigest()

    def write(self, file: Path) -> None:
        sources = [
            {"revision": revision, "parts": [{"number": p.number, **p.part.to_json()} for p in parts]}
            for parts, revision in zip(self.sources, self.revisions, strict=True)
        ]
        values = {"settings": self.settings, "part_bytes": self.part_bytes, "state": self.state, "sources": sources}
        files.write_json(file, values)


def make_plan(spec: PrepareSpec, work: Path) -> tuple[Plan, bool]:
    """The plan for the sources as they are now, written nowhere yet, and whether it goes on with what an interrupted
    run has done in `work`.

    Hub datasets stay at the revision at which they were begun, and `part_bytes` is that of the beginning. As long as no
    part is done, anything may have changed; then it begins anew.

    Raises ValueError where parts are done and the settings are others, or for a source whose columns are wrong.
    """
    settings = spec.settings()
    begun = files.read_json(work / PLAN) if (work / PLAN).is_file() else None
    if begun is None:
        return _new(spec, settings), False
    is_any_done = any(work.glob("[0-9]*.json"))
    if changed := spec.changes(begun["settings"]):
        if is_any_done:
            raise ValueError(
                f"{spec.output}: an interrupted preparation is here, and since then {'; '.join(changed[:3])}"
                f" (then != now). Undo that to go on with it, or choose another `output`, or delete {work} to start"
                " again"
            )
        _say(spec, f"begins anew, with other settings than the interrupted preparation here: {'; '.join(changed[:3])}")
        return _new(spec, settings), False
    if begun["part_bytes"] != spec.part_bytes:
        _say(spec, f"goes on with part_bytes {begun['part_bytes']}, with which it was begun")
    plan = _again(spec, settings, begun)
    if plan.state == begun["state"]:
        return plan, True
    if not is_any_done:
        _say(spec, "begins anew: files of the sources have changed since the interrupted preparation here")
        return _new(spec, settings), False
    _probe(spec, plan)
    _say_changed(spec, plan, work)
    return plan, True


def _new(spec: PrepareSpec, settings: Mapping[str, Any]) -> Plan:
    sources, revisions = [], []
    for source in spec.sources:
        parts, revision = source.parts(spec.part_bytes)
        sources.append([_stamped(number, part) for number, part in enumerate(parts)])
        revisions.append(revision)
    plan = Plan(settings, spec.part_bytes, sources, revisions)
    _probe(spec, plan)
    return plan


def _again(spec: PrepareSpec, settings: Mapping[str, Any], begun: Mapping[str, Any]) -> Plan:
    """The plan for the files as they are now; what reads the same places of the same files keeps its number."""
    sources = []
    for source, planned in zip(spec.sources, begun["sources"], strict=True):
        parts = [Planned(values["number"], Part.from_json(values)) for values in planned["parts"]]
        if not any("://" in path for each in parts for path, _ in each.part.files):  # else pinned, and not asked again
            numbers = {json.dumps(each.place): each.number for each in parts}
            before = {name: each.number for each in parts for _, name in each.part.files}
            fresh = itertools.count(1 + max(numbers.values(), default=-1))
            new = [_stamped(-1, part) for part in source.parts(begun["part_bytes"], before)[0]]
            known = [numbers.get(json.dumps(each.place)) for each in new]
            parts = [
                replace(each, number=next(fresh) if number is None else number)
                for each, number in zip(new, known, strict=True)
            ]
        sources.append(parts)
    return Plan(settings, begun["part_bytes"], sources, [planned["revision"] for planned in begun["sources"]])


def _say_changed(spec: PrepareSpec, plan: Plan, work: Path) -> None:
    """Which files of finished parts have changed, and how many parts that are."""
    changed: dict[str, None] = {}
    parts = 0
    for number, every in enumerate(plan.sources):
        now = {stamp.name: stamp for planned in every for stamp in planned.stamps}
        for file in sorted(work.glob(f"{number:03d}-*.json")):
            read = files.read_json(file)["files"]
            paths = [now[r["name"]].path for r in read if r["name"] in now and not now[r["name"]].matches(r)]
            changed.update(dict.fromkeys(paths))
            parts += bool(paths)
    if changed:
        more = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        again = f"{parts} finished part{'s' * (parts != 1)} will be made again"
        _say(spec, f"{next(iter(changed))}{more} changed since the interruption; {again}")


def _probe(spec: PrepareSpec, plan: Plan) -> None:
    """A wrong column or format shows before any work is done."""
    for source, parts in zip(spec.sources, plan.sources, strict=True):
        source.probe([planned.part for planned in parts])


def _stamped(number: int, part: Part) -> Planned:
    return Planned(number, part, tuple(stamps(part.files)))


def _say(spec: PrepareSpec, what: str) -> None:
    print(f"{spec.output}: {what}", file=sys.stderr, flush=True)
