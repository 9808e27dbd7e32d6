"""The unigram baseline against a count by hand."""

import math
from collections import Counter

import pytest

from data.shards import TokenShards
from data.shards.mixture import PackedStream
from data.shards.unigram import unigram_loss
from tests.data.shard_factory import VOCAB_SIZE, random_documents, write_shards


def targets(documents):
    return [int(token) for document in documents for token in document[1:]]


@pytest.mark.parametrize("min_tokens", [0, 50])
def test_unigram_loss_equals_brute_force(tmp_path, min_tokens):
    first, second = random_documents([300, 40, 500], seed=1), random_documents([90] * 9, seed=2)
    heldout = random_documents([20, 70, 2, 400], seed=3)
    train = [
        (TokenShards(write_shards(tmp_path / "first", {"other": heldout, "s": first})), "s", 3.0),
        (TokenShards(write_shards(tmp_path / "second", second)), None, 1.0),
    ]
    counts = [Counter(targets(documents)) for documents in (first, second)]
    totals = [len(targets(documents)) for documents in (first, second)]

    def probability(token):
        p = [(c[token] + 1) / (n + VOCAB_SIZE) for c, n in zip(counts, totals, strict=True)]
        return 0.75 * p[0] + 0.25 * p[1]

    assert math.isclose(sum(probability(t) for t in range(VOCAB_SIZE)), 1)
    wanted = targets([d for d in heldout if len(d) >= min_tokens])
    expected = -sum(math.log(probability(token)) for token in wanted) / len(wanted)
    shards = TokenShards(write_shards(tmp_path / "heldout", heldout))
    stream = PackedStream(shards, 32, min_tokens=min_tokens)
    assert math.isclose(unigram_loss(train, stream), expected, rel_tol=1e-12)
