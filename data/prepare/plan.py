"""Which parts a preparation has: planned once, and again where it was interrupted and files have changed since.

A part keeps its number, and with it what is done of it, as long as it reads the same places of the same files; which
state of them a finished part has read, its own record says (`data.prepare.part`).
"""

import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.corpus.parts import Part, plain
from data.prepare.spec import PrepareSpec
from s2 import files

PLAN, KEPT = "plan.json", "kept.json"


@dataclass(frozen=True)
class Plan:
    """sources: the parts of each, in reading order. revisions: of hub datasets, None for other sources.

    part_bytes: that the parts were made with.
    """

    settings: Mapping[str, Any]
    part_bytes: int
    sources: list[list[Part]]
    revisions: list[str | None]

    def to_json(self) -> dict[str, Any]:
        sources = [
            {"revision": revision, "parts": [asdict(part) for part in parts]}
            for parts, revision in zip(self.sources, self.revisions, strict=True)
        ]
        return {"settings": self.settings, "part_bytes": self.part_bytes, "sources": sources}


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
        return _plan(spec, settings), False
    is_any_done = any(work.glob("[0-9]*.json"))
    if changed := spec.changes(begun["settings"]):
        if is_any_done:
            raise ValueError(
                f"{spec.output}: an interrupted preparation is here, and since then {'; '.join(changed[:3])}"
                f" (then != now). Undo that to go on with it, or choose another `output`, or delete {work} to start"
                " again"
            )
        _say(spec, f"begins anew, with other settings than the interrupted preparation here: {'; '.join(changed[:3])}")
        return _plan(spec, settings), False
    if begun["part_bytes"] != spec.part_bytes:
        _say(spec, f"goes on with part_bytes {begun['part_bytes']}, with which it was begun")
    plan = _plan(spec, settings, begun)
    if json.loads(json.dumps(plan.to_json()["sources"])) == begun["sources"]:
        return plan, True
    if not is_any_done:
        _say(spec, "begins anew: files of the sources have changed since the interrupted preparation here")
        return _plan(spec, settings), False
    _say_changed(spec, plan, work)
    files.remove_files(work, KEPT)
    return plan, True


def _plan(spec: PrepareSpec, settings: Mapping[str, Any], begun: Mapping[str, Any] | None = None) -> Plan:
    """The plan for the files as they are now; what reads the same places of the same files as in the plan `begun` keeps
    its number. A wrong column or format shows here, before any work is done."""
    plan = Plan(settings, begun["part_bytes"] if begun else spec.part_bytes, [], [])
    for i, source in enumerate(spec.sources):
        parts, revision = [], None
        if begun:
            parts, revision = list(map(Part.from_json, begun["sources"][i]["parts"])), begun["sources"][i]["revision"]
        if not any("://" in file.path for part in parts for file in part.files):  # else pinned, and not asked again
            numbers = {json.dumps(part.place): part.number for part in parts}
            before = {file.name: part.number for part in parts for file in part.files}
            fresh = itertools.count(1 + max(numbers.values(), default=-1))
            parts, revision = source.parts(plan.part_bytes, before)
            known = [numbers.get(json.dumps(part.place)) for part in parts]
            parts = [
                replace(part, number=next(fresh) if number is None else number)
                for part, number in zip(parts, known, strict=True)
            ]
        source.probe(parts)
        plan.sources.append(parts)
        plan.revisions.append(revision)
    return plan


def _say_changed(spec: PrepareSpec, plan: Plan, work: Path) -> None:
    """Which files of finished parts have changed, and how many parts that are."""
    changed: dict[str, None] = {}
    parts = 0
    for number, every in enumerate(plan.sources):
        now = {plain(file.name): file for part in every for file in part.local_files}
        for file in sorted(work.glob(f"{number:03d}-*.json")):
            read = files.read_json(file)["files"]
            paths = [now[r["name"]].path for r in read if r["name"] in now and not now[r["name"]].matches(r)]
            changed.update(dict.fromkeys(paths))
            parts += bool(paths)
    if changed:
        more = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        again = f"{parts} finished part{'s' * (parts != 1)} will be made again"
        _say(spec, f"{next(iter(changed))}{more} changed since the interruption; {again}")


def _say(spec: PrepareSpec, what: str) -> None:
    print(f"{spec.output}: {what}", file=sys.stderr, flush=True)
