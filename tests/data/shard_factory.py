"""Shard folders with known tokens, for the data tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.shards import ShardWriter, write_manifest

VOCAB_SIZE = 500


def write_shards(
    folder: Path,
    documents: Sequence[np.ndarray] | dict[str, Sequence[np.ndarray]],
    *,
    tokenizer: str = "a",
    shard_tokens: int = 700,
):
    """A finished shard folder holding `documents` (by source, or of one called "s"); each token counts as two bytes of
    text."""
    by_source = documents if isinstance(documents, dict) else {"s": documents}
    shards, sources = [], []
    counts = {}
    for number, (source, each) in enumerate(by_source.items()):
        ids = [f"{source}/{i}" for i in range(len(each))]
        with ShardWriter(folder, f"shard-{number}", source, np.dtype(np.uint16), VOCAB_SIZE, shard_tokens) as writer:
            writer.add(each, [2 * len(document) for document in each], ids, [""] * len(each))
        shards += writer.shards
        counts[source] = writer.counts
        tokens = sum(map(len, each))
        sources.append(
            {
                "name": source,
                "path": source,
                "revision": None,
                "files": 1,
                "documents": len(each),
                "tokens": tokens,
                "bytes": 2 * tokens,
                "skipped": {},
            }
        )
    write_manifest(
        folder,
        np.dtype(np.uint16),
        shards,
        counts,
        tokenizer={
            "sha256": tokenizer,
            "vocab_size": VOCAB_SIZE,
            "bos_id": 0,
            "eos_id": 1,
            "file": "../tokenizer.json",
        },
        sources=sources,
        settings={},
    )
    return folder


def random_documents(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Documents of `lengths` tokens: 0, random tokens >= 2, 1."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(2, VOCAB_SIZE, size=length, dtype=np.int64) for length in lengths]
    for document in documents:
        document[0], document[-1] = 0, 1
    return documents
