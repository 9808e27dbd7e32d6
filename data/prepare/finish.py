"""The end of a preparation: what its parts add up to becomes the manifests of the shard folders."""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus.tokenizer import TextTokenizer
from data.prepare.output import TOKENIZER, remove_work
from data.prepare.part import EXAMPLES
from data.prepare.plan import Plan
from data.prepare.spec import PrepareSpec
from data.prepare.stages import Records
from data.shards.writer import read_arrays, write_manifest

_REASONS = {"short": "shorter than min_chars", "null": "without text"}


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
