"""The unigram baseline: what a model that only knows token frequencies would score on held-out text.

A language model's held-out loss means something below this number only; the training log prints both.
"""

from collections.abc import Sequence

import numpy as np

from data.shards.mixture import PackedStream
from data.shards.reader import TokenShards


def target_counts(stream: PackedStream) -> np.ndarray:
    """How often each token is a target in one pass over `stream`, int64 [vocab_size].

    The first token of a document is no target (its label is ignored, see `data.shards.loader`), every other one is.
    """
    shards = stream.shards
    if len(stream.documents) == len(shards.documents_of(stream.source)):
        every, first = shards.counts(stream.source)
        return every - first
    counts = np.zeros(shards.vocab_size, dtype=np.int64)
    for document in stream.documents.tolist():
        tokens = shards.read(int(shards.offsets[document]) + 1, int(shards.offsets[document + 1]))
        counts += np.bincount(tokens, minlength=shards.vocab_size)
    return counts


def unigram_loss(train: Sequence[tuple[TokenShards, str | None, float]], heldout: PackedStream) -> float:
    """Cross entropy, nats per target token, of `heldout` under the token frequencies of the training data.

    train: shard folder, source in it (None for all) and weight of each component. Frequencies are add-one smoothed
    target counts, p(t) = (count(t) + 1) / (targets + V), mixed by the weights. The length filters of a training mixture
    are not applied to its counts (that would take a pass over the corpus); those of `heldout` are. The targets are
    those of a full pass of the held-out loader, of which `max_windows` makes a sample.
    """
    counts = target_counts(heldout)
    total_weight = sum(weight for _, _, weight in train)
    probability = np.zeros(len(counts))
    for shards, source, weight in train:
        every, first = shards.counts(source)
        targets = every - first
        probability += weight / total_weight * (targets + 1) / (targets.sum() + len(targets))
    return float(-(counts * np.log(probability)).sum() / counts.sum())
