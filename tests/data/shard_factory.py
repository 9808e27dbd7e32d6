"""Shard folders with known tokens, for the data tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.shards import ShardWriter

VOCAB_SIZE = 500


def write_shards(folder: Path, documents: Sequence[np.ndarray], *, tokenizer: str = "a", shard_tokens: int = 700):
    """A finished shard folder holding `documents`; each token counts as two bytes of text."""
    writer = ShardWriter(folder, np.dtype(np.uint16), VOCAB_SIZE, shard_tokens)
    writer.add(documents, [2 * len(document) for document in documents])
    writer.finish(
        tokenizer={
            "sha256": tokenizer,
            "vocab_size": VOCAB_SIZE,
            "bos_id": 0,
            "eos_id": 1,
            "file": "../tokenizer.json",
        },
        skipped={},
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
