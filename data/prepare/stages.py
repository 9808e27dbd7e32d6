"""The stages of a preparation: finding duplicates, the split, encoding, the manifests of the shard folders.

Of sources with a limit, parts are begun only a little ahead of what is taken so far.
"""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus.dedup import Deduplicator, select
from data.corpus.parts import Part
from data.corpus.readers import Document
from data.corpus.sources import Limit
from data.corpus.tokenizer import TextTokenizer
from data.prepare.output import TOKENIZER, remove_work
from data.prepare.part import EXAMPLES, Task, encode_part, scan_part
from data.prepare.plan import KEPT, Plan
from data.prepare.pool import Results, Workers, workers
from data.prepare.spec import PrepareSpec
from data.shards.writer import read_arrays, write_array, write_manifest
from s2 import files

Parts = list[list[Part]]  # of each source, in reading order
Records = list[list[tuple[Task, dict[str, Any]]]]  # of each source, what was taken of it
_REASONS = {"short": "shorter than min_chars", "null": "without text"}


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
            if not limit.is_none:
                task = replace(task, limit=replace(limit))
                record = encode_part(task)
            taken.append((task, record))
            limit.add(record["bytes"], record["documents"])
            if record["limited"] or limit.reached:
                break
    return taken


def finish(
    spec: PrepareSpec,
    plan: Plan,
    records: Records,
    duplicates: Sequence[Counter[str]],
    missing: dict[str, Path],
    tokenizer: TextTokenizer,
    below: int,
) -> None:
    """Write the manifests of the splits that are `missing`, and remove `work/`.

    Raises ValueError for a source without documents, or a split without any.
    """
    sources = _summaries(spec, plan, records, duplicates)
    # Of the manifests that of the training data comes last: whoever finds it finds everything.
    for split, folder in reversed(missing.items()):
        shards = [shard for done in records for _, record in done for shard in record["shards"][split]]
        if not shards:
            raise ValueError(f"{spec.output}: no document fell into the {split} split; run again to decide anew")
        counts = {source.label: np.zeros((2, tokenizer.vocab_size), dtype=np.int64) for source in spec.sources}
        for source, done in zip(spec.sources, records, strict=True):
            for task, _ in done:
                counts[source.label] += read_arrays(task.file(".counts.npz"))[split]
        write_manifest(
            folder,
            tokenizer.dtype,
            shards,
            counts,
            _files_read(records),
            tokenizer={**tokenizer.describe(), "file": f"../{TOKENIZER}"},
            split={"name": split, "heldout_fraction": spec.heldout_fraction, "seed": spec.seed, "below": below},
            sources=sources,
            settings=plan.settings,
        )
    remove_work(spec)


def _summaries(
    spec: PrepareSpec, plan: Plan, records: Records, duplicates: Sequence[Counter[str]]
) -> list[dict[str, Any]]:
    """What the manifest says about each source. Raises ValueError for one without documents."""
    sources = []
    for number, (source, done, dropped) in enumerate(zip(spec.sources, records, duplicates, strict=True)):
        skipped = sum((Counter(record["skipped"]) for _, record in done), Counter()) + dropped
        totals = {key: sum(record[key] for _, record in done) for key in ("documents", "tokens", "bytes")}
        if not totals["documents"]:
            reasons = ", ".join(f"{n:,} {_REASONS.get(why, why)}" for why, n in skipped.items())
            left = f"no document is left of it; left out: {reasons}" if reasons else "it has no rows"
            raise ValueError(f"source {source.path!r}: {left}")
        is_cut = len(done) < len(plan.sources[number]) or any(record["limited"] for _, record in done)
        sources.append(
            {
                "name": source.label,
                "path": source.path,
                "revision": plan.revisions[number],
                "files": len({file.path for task, _ in done for file in task.part.files}),
                "all_read": not is_cut,
                **totals,
                **({"filler": source.retrieval.text} if source.retrieval and source.retrieval.filler else {}),
                "skipped": dict(skipped),
                "bad_rows": list(itertools.chain.from_iterable(record["bad_rows"] for _, record in done))[:EXAMPLES],
            }
        )
    return sources


def _files_read(records: Records) -> list[dict[str, Any]]:
    """Of each source the local files, as `TokenShards.source_files` returns them."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for number, done in enumerate(records):
        for _, record in done:
            for file in record["files"]:
                before = found.setdefault((number, file["name"]), {"source": number, **file})
                before["xxh3_128"] = before["xxh3_128"] or file["xxh3_128"]
    return list(found.values())
