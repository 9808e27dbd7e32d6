"""Which parts a preparation has: planned once, and again where it was interrupted and files have changed since.

A part keeps its number, and with it what is done of it, as long as it reads the same places of the same files; which
state of them a finished part has read, its own record says (`data.prepare.work`).
"""

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.corpus.sources import Part
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
        return _place(self.part)


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
        every_stamp = [stamp for planned in every for stamp in planned.stamps]
        known = {stamp.name: stamp for stamp in with_known_content(every_stamp, read)}
        by_name: dict[str, list[Any]] = {}
        for record in read:
            by_name.setdefault(record["name"], []).append(record)
        differ = {
            name for name, stamp in known.items() if not all(stamp.matches(record) for record in by_name.get(name, []))
        }
        changed += [known[name].path for name in sorted(differ)]
        parts += sum(any(record["name"] in differ for record in records) for records in done)
        sources.append([replace(p, stamps=tuple(known[stamp.name] for stamp in p.stamps)) for p in every])
    if changed:
        more = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
        _say(
            spec,
            f"{changed[0]}{more} changed since the interruption; {parts} finished part{'s' * (parts != 1)} will be made"
            " again",
        )
    return replace(plan, sources=sources)


def _probe(spec: PrepareSpec, plan: Plan) -> None:
    """A wrong column or format shows before any work is done."""
    for source, parts in zip(spec.sources, plan.sources, strict=True):
        source.probe([planned.part for planned in parts])


def _stamped(number: int, part: Part) -> Planned:
    return Planned(number, part, tuple(stamps(part.files)))


def _place(part: Part) -> list[Any]:
    return [part.format, [name for _, name in part.files], list(part.span) if part.span else None]


def _renumbered(new: Sequence[Part], old: Sequence[tuple[int, Part]]) -> list[tuple[int, Part]]:
    """The files of `new` in parts that are those of `old` where possible: files that shared a part share it still, even
    where one of them has grown or is gone."""
    home = {name: number for number, part in old if part.span is None for _, name in part.files}
    spans = {json.dumps(_place(part)): number for number, part in old if part.span is not None}
    fresh = itertools.count(1 + max((number for number, _ in old), default=-1))
    free = set(home.values())
    result: list[tuple[int, Part]] = []
    for key, group in itertools.groupby(_with_homes(new, home), key=lambda entry: entry[0]):
        pieces = [part for _, part in group]
        if pieces[0].span is not None:
            for part in pieces:
                number = spans.get(json.dumps(_place(part)))
                result.append((next(fresh) if number is None else number, part))
            continue
        number = key[1]
        if key[0] != "old" or number not in free:
            number = next(fresh)
        free.discard(number)
        every = tuple(file for part in pieces for file in part.files)
        result.append((number, Part(pieces[0].format, every, None, sum(part.size for part in pieces))))
    return result


def _with_homes(new: Sequence[Part], home: Mapping[str, int]) -> Iterator[tuple[tuple[str, int], Part]]:
    """One file after another (or span of one), with what those that stay together have in common: the number of the
    old part, or the index of the new one. A file between two of one old part joins them."""
    pieces = [(i, piece) for i, part in enumerate(new) for piece in ([part] if part.span else _files_of(part))]
    homes = [None if piece.span else home.get(piece.files[0][1]) for _, piece in pieces]
    after: list[int | None] = [*homes]
    for k in reversed(range(len(pieces) - 1)):
        if after[k] is None and pieces[k][1].span is None:
            after[k] = after[k + 1]
    before = None
    for (i, piece), own, following in zip(pieces, homes, after, strict=True):
        if own is None and before is not None and before == following and piece.span is None:
            own = before
        yield (("new", i) if own is None else ("old", own)), piece
        before = own


def _files_of(part: Part) -> list[Part]:
    """A part of whole local files as one part a file."""
    return [Part(part.format, ((path, name),), None, os.stat(path).st_size) for path, name in part.files]


def _say(spec: PrepareSpec, what: str) -> None:
    print(f"{spec.output}: {what}", file=sys.stderr, flush=True)
