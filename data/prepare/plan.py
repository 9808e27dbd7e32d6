"""Which parts a preparation has: planned once, and again where it was interrupted and files have changed since.

A part keeps its number, and with it what is done of it, as long as it reads the same places of the same files; which
state of them a finished part has read, its own record says (`data.prepare.part`).
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.corpus.parts import Part, joined
from data.prepare.spec import PrepareSpec
from data.prepare.stamps import Stamp, stamps, with_known_content
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
    return _compared(spec, plan, work), True


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
    sources = []
    for source, planned in zip(spec.sources, begun["sources"], strict=True):
        old = [(values["number"], Part.from_json(values)) for values in planned["parts"]]
        is_remote = any("://" in path for _, part in old for path, _ in part.files)
        if is_remote or planned["revision"] is not None:  # pinned, so the hub need not be asked again
            sources.append([Planned(number, part) for number, part in old])
        else:
            new = source.parts(begun["part_bytes"])[0]
            sources.append([_stamped(number, part) for number, part in _renumbered(new, old)])
    return Plan(settings, begun["part_bytes"], sources, [planned["revision"] for planned in begun["sources"]])


def _compared(spec: PrepareSpec, plan: Plan, work: Path) -> Plan:
    """The plan with what records of finished parts tell about files whose time alone has changed; says which files have
    changed otherwise."""
    sources, changed, parts = [], [], 0
    for number, every in enumerate(plan.sources):
        done = [files.read_json(file)["files"] for file in sorted(work.glob(f"{number:03d}-*.json"))]
        read = [record for records in done for record in records]
        stamps_now = [stamp for planned in every for stamp in planned.stamps]
        known = {stamp.name: stamp for stamp in with_known_content(stamps_now, read)}
        differ = {r["name"] for r in read if r["name"] in known and not known[r["name"]].matches(r)}
        changed += [known[name].path for name in sorted(differ)]
        parts += sum(any(record["name"] in differ for record in records) for records in done)
        sources.append([replace(p, stamps=tuple(known[stamp.name] for stamp in p.stamps)) for p in every])
    if changed:
        more = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        again = f"{parts} finished part{'s' * (parts != 1)} will be made again"
        _say(spec, f"{changed[0]}{more} changed since the interruption; {again}")
    return replace(plan, sources=sources)


def _probe(spec: PrepareSpec, plan: Plan) -> None:
    """A wrong column or format shows before any work is done."""
    for source, parts in zip(spec.sources, plan.sources, strict=True):
        source.probe([planned.part for planned in parts])


def _stamped(number: int, part: Part) -> Planned:
    return Planned(number, part, tuple(stamps(part.files)))


def _renumbered(new: Sequence[Part], old: Sequence[tuple[int, Part]]) -> list[tuple[int, Part]]:
    """The parts of `old` whose files stand together still, and between them those of `new`, less these files."""
    pieces = [(index, piece) for index, part in enumerate(new) for piece in part.pieces()]
    keys = [_keys(piece)[0] for _, piece in pieces]
    known = {_keys(part)[0]: (number, _keys(part)) for number, part in old}
    fresh = itertools.count(1 + max((number for number, _ in old), default=-1))
    result, at = [], 0
    while at < len(pieces):
        number, own = known.get(keys[at], (-1, []))
        end = at + len(own)
        if not own or keys[at:end] != own:
            number, end = next(fresh), at + 1
            while end < len(pieces) and pieces[end][0] == pieces[at][0] and keys[end] not in known:
                end += 1
        result.append((number, joined([piece for _, piece in pieces[at:end]])))
        at = end
    return result


def _keys(part: Part) -> list[str]:
    """What tells the files of a part, or the span of its one file, from others."""
    return [json.dumps([part.format, name, part.span]) for _, name in part.files]


def _say(spec: PrepareSpec, what: str) -> None:
    print(f"{spec.output}: {what}", file=sys.stderr, flush=True)
