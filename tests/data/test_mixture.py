"""The sample order: bijections, quotas, windows against brute force, and the errors of too little data."""

import numpy as np
import pytest

from data.mixture import PERIOD, Component, Mixture, PackedStream, largest_remainder
from data.permutation import Permutation
from data.shards import TokenShards
from tests.data.shard_factory import random_documents, write_shards

LENGTHS = [5, 300, 2, 2, 77, 1000, 13, 64, 1, 250, 3, 128]


@pytest.fixture
def shards(tmp_path):
    return TokenShards(write_shards(tmp_path / "s", random_documents(LENGTHS)))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permutation_is_a_bijection(size):
    for key in (0, ("windows", 1, 2)):
        assert sorted(Permutation(size, key)[i] for i in range(size)) == list(range(size))


def test_permutation_mixes_and_depends_on_its_key():
    size = 10_000
    order = np.array([Permutation(size, "a")[i] for i in range(size)])
    other = np.array([Permutation(size, "b")[i] for i in range(size)])
    assert (order == other).mean() < 0.01
    assert (order == np.arange(size)).mean() < 0.01
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
    assert (np.diff(order) == 1).mean() < 0.01
    with pytest.raises(IndexError):
        Permutation(5, 0)[5]


def test_permutation_of_a_huge_domain_costs_nothing():
    huge = Permutation(10**15 + 3, 0)
    assert len({huge[i] for i in range(1000)}) == 1000


@pytest.mark.parametrize("bounds", [(0, None), (3, None), (0, 100), (64, 300), (2, 2)])
@pytest.mark.parametrize("seq_len", [1, 3, 50, 128])
@pytest.mark.parametrize("keep_tail", [False, True])
def test_windows_equal_brute_force(shards, bounds, seq_len, keep_tail):
    documents = [d for d in random_documents(LENGTHS) if bounds[0] <= len(d) <= (bounds[1] or 10**9)]
    row = np.concatenate(documents)
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    if len(row) < seq_len + 1 and not keep_tail:
        with pytest.raises(ValueError, match=rf"{len(row)} tokens.*less than one window of seq_len {seq_len}"):
            PackedStream(shards, seq_len, min_tokens=bounds[0], max_tokens=bounds[1])
        return
    stream = PackedStream(shards, seq_len, min_tokens=bounds[0], max_tokens=bounds[1], keep_tail=keep_tail)
    round_up = seq_len - 1 if keep_tail else 0
    assert stream.num_windows == (len(row) - 1 + round_up) // seq_len
    for index in range(stream.num_windows):
        part = slice(index * seq_len, (index + 1) * seq_len + 1)
        tokens, starts = stream.window(index)
        assert tokens.tolist() == row[part].tolist()
        assert starts.tolist() == (np.flatnonzero(np.diff(owner[part])) + 1).tolist()
    assert stream.num_bytes == 2 * len(row)


def test_filter_that_leaves_nothing_says_how_long_documents_are(shards):
    with pytest.raises(ValueError, match=r"none of the 12 documents.*at least 2000 tokens; the longest has 1,000"):
        PackedStream(shards, 16, min_tokens=2000)


def test_largest_remainder_is_exact():
    assert largest_remainder(np.array([0.6, 0.4]), 1000).tolist() == [600, 400]
    assert largest_remainder(np.array([1 / 3, 1 / 3, 1 / 3]), 1000).tolist() == [334, 333, 333]
    assert largest_remainder(np.array([0.0015, 0.9985]), 1000).tolist() == [2, 998]


@pytest.fixture
def mixture(tmp_path):
    streams = [
        PackedStream(TokenShards(write_shards(tmp_path / str(i), random_documents([n], seed=i))), 10)
        for i, n in enumerate([2000, 500, 90])
    ]
    return Mixture(streams, [6, 3, 1], seed=7)


def test_every_period_meets_its_quotas_exactly(mixture):
    for period in (0, 1, 10**9):
        owners = [mixture.locate(period * PERIOD + i)[0] for i in range(PERIOD)]
        assert np.bincount(owners).tolist() == [600, 300, 100]
        assert np.bincount(owners[:100], minlength=3).min() > 0, "the interleave should be shuffled"


def test_every_epoch_of_a_component_sees_each_window_once(mixture):
    seen: dict[tuple[int, int], list[int]] = {}
    for index in range(3 * PERIOD):
        component, epoch, window = mixture.locate(index)
        seen.setdefault((component, epoch), []).append(window)
    for component, stream in enumerate(mixture.streams):
        epochs = sorted(epoch for c, epoch in seen if c == component)
        assert len(epochs) > 2
        for epoch in epochs[:-1]:
            assert sorted(seen[component, epoch]) == list(range(stream.num_windows))
        assert seen[component, 0] != seen[component, 1], "epochs should differ in order"


def test_order_is_a_function_of_seed_and_index(mixture):
    other = Mixture(mixture.streams, [6, 3, 1], seed=7)
    order = [mixture.locate(i) for i in range(500)]
    assert [other.locate(i) for i in reversed(range(500))] == order[::-1]
    assert [Mixture(mixture.streams, [6, 3, 1], seed=8).locate(i) for i in range(500)] != order


def test_shares_too_small_to_be_met_are_refused(mixture):
    with pytest.raises(ValueError, match="below one sample in 1000"):
        Mixture(mixture.streams, [1, 1, 1e-5], seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight: 0, expected a positive number"),
        ({"weight": float("nan")}, "weight: nan"),
        ({"min_tokens": 10, "max_tokens": 5}, "max_tokens: expected a whole number >= 10, got 5"),
        ({"min_tokens": "many"}, "min_tokens: expected a whole number"),
    ],
)
def test_wrong_component_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        Component("x", **settings)
