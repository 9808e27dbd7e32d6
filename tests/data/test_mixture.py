"""The sample order: bijections, quotas, windows against brute force, and the errors of too little data."""

import functools
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.section import Component
from data.shards import TokenShards
from data.shards.mixture import Curriculum, Mixture, PackedStream
from data.shards.order import PERIOD, Permutation, Quotas
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
@pytest.mark.parametrize("seq_len", [1, 3, 50, 128, 2000])
def test_windows_hold_every_target_of_the_kept_documents_once(shards, bounds, seq_len):
    documents = [d for d in random_documents(LENGTHS) if bounds[0] <= len(d) <= (bounds[1] or 10**9)]
    stream = PackedStream(shards, seq_len, min_tokens=bounds[0], max_tokens=bounds[1])
    pairs, whole = [], []
    for index in range(stream.num_windows):
        tokens, starts = stream.window(index)
        assert tokens.dtype == starts.dtype == np.int64
        assert 1 <= len(tokens) <= seq_len + 1
        for piece in np.split(tokens, starts):
            pairs += list(zip(piece[:-1].tolist(), piece[1:].tolist(), strict=True))
            whole.append(piece.tolist())
    wanted = [pair for d in documents for pair in zip(d[:-1].tolist(), d[1:].tolist(), strict=True)]
    assert sorted(pairs) == sorted(wanted)
    for document in documents:
        if len(document) <= seq_len + 1:
            assert document.tolist() in whole, "a document that fits is never cut"
    assert stream.num_tokens == sum(map(len, documents))
    assert stream.num_bytes == 2 * stream.num_tokens


def test_a_stream_of_one_source_sees_only_its_documents(tmp_path):
    sources = {"web": random_documents([30] * 40, seed=1), "books": random_documents([900] * 3, seed=2)}
    shards = TokenShards(write_shards(tmp_path / "s", sources))
    assert shards.sources == ["web", "books"]
    stream = PackedStream(shards, 16, source="books", min_tokens=10)
    assert stream.num_tokens == 2700
    pieces = [piece for i in range(stream.num_windows) for piece in np.split(*stream.window(i))]
    seen = sorted(int(t) for piece in pieces for t in piece[1:])
    assert seen == sorted(int(t) for d in sources["books"] for t in d[1:])
    with pytest.raises(ValueError, match=r"mixture\[3\]\.source: .* has no source 'code'; it has: web, books"):
        PackedStream(shards, 16, source="code", where="data.mixture[3]")


def test_filter_that_leaves_nothing_says_how_long_documents_are(shards):
    with pytest.raises(ValueError, match=r"none of the 12 documents.*at least 2000 tokens; the longest has 1,000"):
        PackedStream(shards, 16, min_tokens=2000)
    with pytest.raises(ValueError, match="single token, so there is no target"):
        PackedStream(shards, 16, max_tokens=1)


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


WEIGHTS = {
    "thirds": [1, 1, 1],
    "a rare one": [1, 1, 1e-5],
    "as floats": [0.12, 0.28, 0.1 + 0.2, 0.3],
    "rarer than one period": [1e-9, 1],
    "many": np.random.default_rng(0).random(30) ** 8,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_any_weights_are_met_exactly_in_the_long_run(name):
    quotas, asked = Quotas(WEIGHTS[name]), np.array(WEIGHTS[name]) / np.sum(WEIGHTS[name])
    before = np.zeros(len(asked), dtype=np.int64)
    for period in range(300):
        here = quotas.in_period(period)
        assert quotas.before(period).tolist() == before.tolist()
        assert here.sum() == PERIOD and here.min() >= 0
        before += here
        assert np.abs(before - asked * before.sum()).max() < 4
    far = 10**8
    assert quotas.before(far).sum() == far * PERIOD
    assert np.abs(quotas.before(far) - asked * far * PERIOD).max() < 20, "of 10^11 samples"


def test_weights_that_a_period_meets_keep_the_order_that_they_had():
    """Shares that are whole numbers of a thousand have the same quotas in every period."""
    for weights in ([6, 3, 1], [0.7, 0.2, 0.1], [0.4 * 0.3, 0.4 * 0.7, 0.6]):
        quotas = Quotas(weights)
        assert {tuple(quotas.in_period(period)) for period in (0, 1, 17, 10**6)} == {tuple(quotas.exact.astype(int))}


def test_a_mixture_of_thirds_goes_through_every_window_once_an_epoch(mixture):
    thirds = Mixture(mixture.streams, [1, 1, 1], seed=0)
    seen: dict[tuple[int, int], list[int]] = {}
    for index in range(5 * PERIOD):
        component, epoch, window = thirds.locate(index)
        seen.setdefault((component, epoch), []).append(window)
    for (component, epoch), windows in seen.items():
        last = (component, epoch + 1) not in seen
        assert len(set(windows)) == len(windows)
        assert last or len(windows) == thirds.streams[component].num_windows
    counts = [sum(len(w) for (c, _), w in seen.items() if c == component) for component in range(3)]
    assert thirds.drawn(5 * PERIOD).tolist() == counts and max(counts) - min(counts) <= 3
    assert thirds.drawn(1234).sum() == 1234
    assert thirds.fingerprint() != Mixture(mixture.streams, [334, 333, 333], seed=0).fingerprint()
    assert pickle.loads(pickle.dumps(thirds)).locate(77) == thirds.locate(77)


def test_passes_say_how_often_a_run_goes_through_each_component(mixture):
    rows = Curriculum([mixture], [])
    for index in (0, 999, 2500):
        owners = [mixture.locate(i)[0] for i in range(index)]
        found = rows.passes(index)
        assert [each.asked for each in found] == [10 * owners.count(i) for i in range(3)]
    assert [each.available for each in found] == [2000, 500, 90]
    assert [each.passes for each in found] == [owners.count(i) / s.num_windows for i, s in enumerate(mixture.streams)]
    assert found[2].component == str(mixture.streams[2].shards.folder)


def test_passes_say_which_share_of_a_components_tokens_is_synthetic(tmp_path):
    documents = {"web": random_documents([30] * 8), "retrieval": random_documents([10] * 3 + [50] * 3)}
    shards = TokenShards(write_shards(tmp_path / "mixed", documents))  # a source's path is its name here
    parts = [{}, {"min_tokens": 20}, {"source": "web"}, {"source": "retrieval"}]
    streams = [PackedStream(shards, 16, **part) for part in parts]
    found = Curriculum([Mixture(streams, [1.0] * 4, seed=0)], []).passes(10)
    assert [each.synthetic for each in found] == [180 / 420, 150 / 390, 0.0, 1.0]


def test_passes_add_up_over_the_phases_of_a_curriculum(curriculum):
    [found] = curriculum.passes(20)
    windows = (5 * 8, 10 * 2, 5)
    assert found.asked == 20 * 64
    expected = sum(n / m.streams[0].num_windows for n, m in zip(windows, curriculum.mixtures, strict=True))
    assert found.passes == pytest.approx(expected)
    assert curriculum.passes(3)[0].passes == pytest.approx(24 / curriculum.mixtures[0].streams[0].num_windows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight: expected a positive number, got 0"),
        *(
            ({"weight": w}, "weight: expected a (positive )?number, got")
            for w in (-1, float("nan"), float("inf"), "1", True)
        ),
        ({"min_tokens": 10, "max_tokens": 5}, "max_tokens: 5 is below min_tokens 10, so no document is left"),
        ({"min_tokens": "many"}, "min_tokens: expected a whole number"),
        ({"long": {"min_tokens": 8}}, "long: missing key 'share'"),
        ({"long": {"min_tokens": 8, "share": 1.0}}, "long.share: expected a number between 0 and 1, got 1.0"),
        ({"long": {"min_tokens": 8, "share": "half"}}, "long.share: expected a number, got 'half'"),
        ({"long": {"min_tokens": 8, "share": 0.5}, "max_tokens": 7}, "leaves no short or no long documents"),
        ({"long": {"min_tokens": 8, "share": 0.5}, "min_tokens": 8}, "leaves no short or no long documents"),
    ],
)
def test_wrong_component_settings_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        Component(path="x", **settings)


def test_upsampling_long_documents_keeps_the_share_of_the_component():
    books = Component(path="books", long={"min_tokens": 100, "share": 0.7})
    plain, short, long = [part for each in (Component(path="web", weight=3), books) for part in each.by_length()]
    assert (plain.path, plain.weight) == ("web", 3)
    assert short.weight + long.weight == pytest.approx(1) and long.weight == pytest.approx(0.7)
    assert (short.min_tokens, short.max_tokens, long.min_tokens, long.max_tokens) == (0, 99, 100, None)


@pytest.fixture
def curriculum(tmp_path):
    shards = TokenShards(write_shards(tmp_path / "c", random_documents([7, 30, 90] * 40, seed=4)))
    mixtures = [Mixture([PackedStream(shards, seq_len)], [1], seed=3) for seq_len in (8, 32, 64)]
    return Curriculum(mixtures, [5, 10])


def test_rows_of_a_curriculum_are_windows_side_by_side(curriculum):
    for index in [0, 4, 5, 14, 15, 10**6]:
        phase = 0 if index < 5 else 1 if index < 15 else 2
        windows = curriculum[index]
        mixture, count = curriculum.mixtures[phase], (8, 2, 1)[phase]
        first = (index - (0, 5, 15)[phase]) * count
        assert len(windows) == count
        for i, (tokens, starts) in enumerate(windows):
            assert tokens.tolist() == mixture[first + i][0].tolist()
            assert starts.tolist() == mixture[first + i][1].tolist()


def test_fingerprints_tell_sequences_apart(curriculum):
    same = Curriculum(curriculum.mixtures, [5, 10])
    assert same.fingerprint() == curriculum.fingerprint()
    assert Curriculum(curriculum.mixtures, [5, 11]).fingerprint() != curriculum.fingerprint()
    assert Curriculum(curriculum.mixtures[1:], [10]).fingerprint() != curriculum.fingerprint()


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [0.62, 0.005, 0.375], [7, 11, 3]])
def test_shares_of_ten_thousand_samples_are_within_half_a_percent(mixture, weights):
    asked = np.array(weights) / sum(weights)
    mixed = Mixture(mixture.streams, weights, seed=1)
    for begin in (0, 123, 10**7 + 77):
        drawn = np.bincount([mixed.locate(begin + i)[0] for i in range(10_000)], minlength=3) / 10_000
        assert np.abs(drawn - asked).max() < 0.005


def test_more_shards_than_a_process_may_open_files(tmp_path, monkeypatch):
    import resource

    import data.shards.reader as shards_module

    documents = random_documents([20] * 300, seed=5)
    folder = write_shards(tmp_path / "many", documents, shard_tokens=20)
    monkeypatch.setattr(shards_module, "_mapped", functools.lru_cache(maxsize=16)(shards_module._mapped.__wrapped__))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, hard))
    try:
        shards = TokenShards(folder)
        assert len(shards.manifest["shards"]) == 300
        for i in np.random.default_rng(0).permutation(300).tolist():
            assert shards.read(20 * i, 20 * i + 20).tolist() == documents[i].tolist()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shards_written_anew_under_the_same_names_are_read_anew(tmp_path):
    for seed in (1, 2):
        documents = random_documents([50] * 4, seed=seed)
        shards = TokenShards(write_shards(tmp_path / "s", documents))
        assert shards.read(0, 50).tolist() == documents[0].tolist()
