"""The stages of a preparation that take their time: finding duplicates, and encoding. Each goes on with what is done.

Sources with a limit are read only as far as it reaches: their parts are begun a little ahead of what is taken so far.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.corpus.dedup import Deduplicator
from data.corpus.limit import Limit
from data.corpus.parts import Part
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
                pool.in_order(scan_part, (Task(spec, number, part) for part in every), _ahead(pool, limits[number]))
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
