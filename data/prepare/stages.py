"""The stages of a preparation that take their time: finding duplicates, the split, and encoding.

Of sources with a limit, parts are begun only a little ahead of what is taken so far.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.corpus.dedup import Deduplicator, select
from data.corpus.limit import Limit
from data.corpus.parts import Part
from data.corpus.readers import Document
from data.prepare.part import Task, encode_part, scan_part
from data.prepare.plan import KEPT, Plan
from data.prepare.pool import Results, Workers, workers
from data.prepare.spec import PrepareSpec
from data.shards.writer import read_arrays, write_array
from s2 import files

Parts = list[list[Part]]  # of each source, in reading order
Records = list[list[tuple[Task, dict[str, Any]]]]  # of each source, what was taken of it


def deduplicate(spec: PrepareSpec, plan: Plan, work: Path) -> tuple[Parts, list[Counter[str]]]:
    """Write which documents of each part stay; `work/kept.json` says that it is done.

    Returns the parts (of a source with a limit only as many as it takes) and what was dropped, by source and reason.
    """
    if spec.deduplicate is None:
        return plan.sources, [Counter() for _ in plan.sources]
    file, parts = work / KEPT, plan.sources
    if not file.is_file():
        limits = [Limit.of(source) for source in spec.sources]
        judge = Deduplicator(spec.deduplicate)
        with workers("scanning for duplicates", spec, parts) as pool:
            scans = [
                pool.in_order(scan_part, [Task(spec, number, part) for part in every], _ahead(pool, limits[number]))
                for number, every in enumerate(parts)
            ]
            files.write_json(file, [_judge(judge, limit, scan) for limit, scan in zip(limits, scans, strict=True)])
    judged = files.read_json(file)
    return (
        [every[:taken] for every, (taken, _) in zip(parts, judged, strict=True)],
        [Counter(reasons) for _, reasons in judged],
    )


def _judge(judge: Deduplicator, limit: Limit, scanned: Results) -> tuple[int, dict[str, int]]:
    """Decide about a source's parts in order; returns how many it takes and what was dropped."""
    taken, reasons = 0, Counter[str]()
    with closing(scanned):
        for task, _ in scanned:
            keep, dropped = judge.keep(read_arrays(task.file(".scan.npz")), limit.takes)
            write_array(task.file(".keep.npy"), keep)
            reasons.update(dropped)
            taken += 1
            if limit.reached:
                break
    return taken, dict(reasons)


def heldout_below(spec: PrepareSpec, parts: Parts, *, only_tokenizer: bool = False) -> int:
    """The bound: documents with a smaller place (`PrepareSpec.place`) are held out.

    Of a small corpus it can happen that none would be, or all; then the bound moves just so far that one is on the
    other side. Reads until it has seen a document on either side, which on average are 1 / fraction of them.
    only_tokenizer: duplicates have not been looked for; a single document will do, and is not held out.

    Raises ValueError for a corpus of a single document (or of a single id).
    """
    asked = spec.heldout_below
    if asked == 0:
        return 0
    count, lowest, highest = 0, (2**64, ""), (-1, "")
    for document in _documents(spec, parts, is_judged=not only_tokenizer):
        count += 1
        place = (spec.place(document.id), document.id)
        lowest, highest = min(lowest, place), max(highest, place)
        if lowest[0] < asked <= highest[0]:
            return asked
    if count == 0:
        return asked
    if lowest[0] == highest[0] and only_tokenizer:
        return 0
    if lowest[0] == highest[0]:
        what = "a single document" if count == 1 else f"{count:,} documents with one id ({lowest[1]})"
        raise ValueError(
            f"{spec.output}: the corpus is {what}, so none can be held out; set heldout_fraction to 0"
            " (--heldout-fraction 0) to train on all of it, or split it into several documents"
        )
    fraction = f"heldout_fraction {spec.heldout_fraction:g}"
    if lowest[0] >= asked:
        said, below = f"no document falls below {fraction}, so one is held out: {lowest[1]}", lowest[0] + 1
    else:
        said, below = f"every document falls below {fraction}, so one is trained on: {highest[1]}", highest[0]
    print(f"{spec.output}: of {count:,} documents {said}", file=sys.stderr, flush=True)
    return below


def _documents(spec: PrepareSpec, parts: Parts, *, is_judged: bool) -> Iterator[Document]:
    """The documents of all sources, up to their limits."""
    for number, (source, every) in enumerate(zip(spec.sources, parts, strict=True)):
        tasks = [Task(spec, number, part) for part in every]
        found = (d for task in tasks for d in select(task.documents(Counter(), []), task.keep if is_judged else None))
        yield from Limit.of(source).within(found)


def encode(spec: PrepareSpec, parts: Parts, tokenizer: str, below: int, splits: tuple[str, ...]) -> Records:
    """Encode all parts; the tasks and records of each source in order, up to its limit. Arguments as of `Task`."""
    limits = [Limit.of(source) for source in spec.sources]

    def tasks(number: int, limit: Limit) -> Iterator[Task]:
        for part in parts[number]:
            yield Task(spec, number, part, tokenizer, replace(limit), below, splits)

    with workers("tokenizing", spec, parts) as pool:
        encoded = [
            pool.in_order(encode_part, tasks(number, limit), _ahead(pool, limit)) for number, limit in enumerate(limits)
        ]
        return [_up_to(limit, done) for limit, done in zip(limits, encoded, strict=True)]


def _ahead(pool: Workers, limit: Limit) -> int | None:
    return None if limit.is_none else 2 * pool.size


def _up_to(limit: Limit, encoded: Results) -> list[tuple[Task, dict[str, Any]]]:
    """What a source's limit takes. A part was begun before it was known what those before it take: where that would
    have changed it, it is made again."""
    taken = []
    with closing(encoded):
        for task, record in encoded:
            now = replace(task, limit=replace(limit))
            if not now.is_within_limit(record):
                record = encode_part(now)
            taken.append((now, record))
            limit.add(record["bytes"], record["documents"])
            if record["limited"] or limit.reached:
                break
    return taken
