"""Packing against best fit one by one, and what it promises about documents."""

import numpy as np
import pytest

import data.shards.packing as packing_module
from data.shards.packing import best_fit_decreasing, pack


def one_by_one(lengths, capacity):
    """Rooms left after best-fit decreasing, item by item."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(100))
def test_best_fit_equals_the_algorithm_item_by_item(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 70))
    lengths = rng.integers(1, capacity + 1, size=rng.integers(1, 120))
    bins, count = best_fit_decreasing(lengths, capacity)
    used = np.bincount(bins, weights=lengths, minlength=count).astype(int)
    assert sorted((capacity - used).tolist()) == one_by_one(lengths.tolist(), capacity)


def windows_of(packing):
    for w in range(packing.num_windows):
        pieces = range(packing.borders[w], packing.borders[w + 1])
        yield [(int(packing.document[p]), int(packing.start[p]), int(packing.length[p])) for p in pieces]


@pytest.mark.parametrize("seed", range(40))
def test_every_target_is_in_one_window_and_no_document_that_fits_is_cut(seed):
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(1, 40))
    longest = int(rng.choice([2, seq_len + 1, 10 * seq_len]))
    lengths = rng.integers(1, longest + 1, size=rng.integers(1, 60))
    packing = pack(lengths, seq_len)
    targets = {document: [] for document in range(len(lengths))}
    for window in windows_of(packing):
        assert 1 <= sum(length for _, _, length in window) <= seq_len + 1
        assert window == sorted(window)
        for document, start, length in window:
            targets[document] += range(start + 1, start + length)
            if lengths[document] <= seq_len + 1:
                assert (start, length) == (0, lengths[document])
    for document, length in enumerate(lengths):
        assert sorted(targets[document]) == list(range(1, length))


def test_long_documents_fill_what_medium_ones_leave_free():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(520, 1000, size=400), rng.integers(1100, 9000, size=60)])
    packing = pack(rng.permutation(lengths), 1024)
    assert packing.waste < 0.01
    only_medium = pack(lengths[:400], 1024)
    assert only_medium.num_windows == 400, "without long documents the gaps stay: what fits is not cut"


def test_long_documents_are_laid_end_to_end_only_where_that_saves_windows():
    lengths = np.full(50, 160)  # one full window of 100 and a rest of 60 each, which do not go together
    packing = pack(lengths, 99)
    assert packing.num_windows == pytest.approx(50 * 160 / 100, rel=0.02)
    packing = pack(np.concatenate([lengths, np.full(50, 39)]), 99)
    assert packing.waste == 0
    assert len(packing.document) == 50 * 2 + 50, "with short documents to fill in, no rest is cut again"


@pytest.mark.parametrize("seq_len", [2048, 8192, 32768])
def test_waste_is_below_one_percent_for_web_like_lengths(seq_len):
    lengths = np.random.default_rng(0).lognormal(6.3, 1.1, size=60_000).astype(np.int64) + 2
    assert pack(lengths, seq_len).waste < 0.001
    books = np.random.default_rng(1).integers(80_000, 300_000, size=43)
    assert pack(books, seq_len).waste < 0.01


def test_groups_bound_the_work_and_change_little(monkeypatch):
    lengths = np.random.default_rng(0).integers(2, 3000, size=5000)
    whole = pack(lengths, 1024)
    monkeypatch.setattr(packing_module, "GROUP_TOKENS", 1 << 20)
    grouped = pack(lengths, 1024)
    assert len(grouped.document) >= len(lengths)
    assert sorted(set(grouped.document.tolist())) == list(range(len(lengths)))
    assert grouped.num_windows == pytest.approx(whole.num_windows, rel=0.01)
