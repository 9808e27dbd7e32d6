"""Batches that share a cache and its captured steps give what each gives with a new one."""

import gc
import weakref

import numpy
import pytest
import torch

from s2.inference import DecodeGraph, DecodePool, KVCache, generate, stream
from s2.inference import pool as pooling
from s2.inference.graph import WARM_UP
from tests.inference.recording import Recording
from tests.inference.test_generate import build, tokens

BATCHES = [[70, 33, 5], [9, 60], [40, 40, 40], [66, 2]]  # lengths of prompts


def prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (length,), generator=generator) for length in lengths]


@pytest.fixture
def recordings(monkeypatch):
    """As if there were a GPU: a list that grows by a recording with each step that is made."""
    made = []

    def graph(model, cache, memory):
        made.append(Recording(cache._lengths))
        return DecodeGraph(model, cache, capture=made[-1])

    monkeypatch.setattr(pooling, "takes_graph", lambda model, cache, new_tokens, graph: graph is not False)
    monkeypatch.setattr(pooling, "DecodeGraph", graph)
    return made


@pytest.fixture
def caches(monkeypatch):
    """References to the memory of each new cache, which views of it hold too."""
    made, new_cache = [], pooling.new_cache

    def new(*args):
        cache = new_cache(*args)
        part = cache._layers[0].parts[0]
        memory = numpy.zeros(tuple(part.k.shape), dtype="float32")
        part.k = torch.from_numpy(memory)
        made.append((weakref.ref(memory), len(cache.lengths), cache.max_length))
        return cache

    monkeypatch.setattr(pooling, "new_cache", new)
    return made


@pytest.mark.parametrize(
    ("layout", "options"),
    [("dense", {}), ("L2V4+dense1", {"prefill_chunk": 20}), ("L1V2<4V4+sink1", {"temperature": 0.9}), ("W2", {})],
)
def test_later_batches_of_several_lengths_are_as_with_a_new_cache(layout, options, recordings):
    """Whatever an earlier batch left: longer rows, and values that are no numbers."""
    model = build(layout)
    pool = DecodePool(model)

    def new(seed, **more):
        random = torch.Generator().manual_seed(seed)
        return generate(model, prompts(BATCHES[seed], seed), 12, generator=random, **options, **more)

    for seed in range(len(BATCHES)):
        assert torch.equal(new(seed, pool=pool), new(seed))
        with torch.inference_mode():
            for part in (part for layer in pool._kept._cache._layers for part in layer.parts):
                part.k.fill_(torch.nan)
                part.v.fill_(torch.inf)
    captured = [recording.captured for recording in recordings]
    assert captured == [1, 1], "one for three rows and one for two"
    assert sum(recording.replayed for recording in recordings) == 4 * 11 - 2 * WARM_UP


def test_memory_is_reused_by_what_fits_and_given_up_before_more_is_taken(caches, recordings, monkeypatch):
    model = build()
    pool = DecodePool(model)
    generate(model, prompts([50, 20]), 11, pool=pool)
    assert [made[1:] for made in caches] == [(2, 60)]
    for lengths in ([50, 7], [3], [61 - 11, 1]):
        generate(model, prompts(lengths), 11, pool=pool)
    assert len(caches) == 1 and len(recordings) == 2
    new_cache = pooling.new_cache

    def new(*args):
        assert caches[-1][0]() is None, "two caches at a time"
        return new_cache(*args)

    monkeypatch.setattr(pooling, "new_cache", new)
    generate(model, prompts([5, 5, 5]), 11, pool=pool)
    generate(model, prompts([80]), 11, pool=pool)
    generate(model, prompts([149]), 11, pool=pool)
    assert [made[1:] for made in caches] == [(2, 60), (3, 15), (1, 92), (1, 160)]
    assert len(recordings) == 5
    del pool
    assert caches[-1][0]() is None


@pytest.mark.parametrize("tokens", [1, 31, 33, 150, 159, 160])
def test_a_length_is_rounded_up_by_a_sixteenth_at_most_and_to_what_the_model_reads(tokens):
    rounded = pooling._rounded(tokens, build())
    assert tokens <= rounded <= min(160, tokens + tokens / 16)
    assert pooling._rounded(2049, build(max_position_embeddings=4096)) == 2176


def test_generations_side_by_side_have_caches_of_their_own(recordings):
    model = build()
    pool, batches = DecodePool(model), [prompts([40, 9], 1), prompts([30, 30], 2), prompts([5, 38], 3)]
    expected = [generate(model, batch, 12) for batch in batches]
    first, second = (stream(model, batch, 12, pool=pool) for batch in batches[:2])
    drawn = [(next(first).tokens, next(second).tokens) for _ in range(6)]
    first.close()
    assert torch.equal(generate(model, batches[2], 12, pool=pool), expected[2]), (
        "a stream that was closed is no hindrance"
    )
    drawn_later = [each.tokens for each in second]
    assert torch.equal(torch.stack([one for one, _ in drawn], dim=1), expected[0][:, :6])
    assert torch.equal(torch.stack([two for _, two in drawn] + drawn_later, dim=1), expected[1])
    assert len(recordings) == 1


def test_nothing_is_reused_after_an_error(recordings, caches):
    model = build()
    pool, batch = DecodePool(model), prompts([40, 9])

    def fails(new):
        if new.shape[1] == 5:
            raise RuntimeError("broken")
        return [False, False]

    with pytest.raises(RuntimeError, match="broken"):
        generate(model, batch, 12, pool=pool, is_enough=fails)
    assert pool._kept is None and caches[0][0]() is None
    assert torch.equal(generate(model, batch, 12, pool=pool), generate(model, batch, 12))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_nothing_is_reused_after_an_interrupt(error):
    pool = DecodePool(build())
    with pytest.raises(error), pool.lend(1, 20, 5, None):
        raise error
    assert pool._kept is None


def test_a_step_without_memory_for_its_graph_leaves_none_behind(caches, monkeypatch):
    def full(call):
        raise torch.OutOfMemoryError("full")

    model = build()
    monkeypatch.setattr(pooling, "takes_graph", lambda *args: True)
    monkeypatch.setattr(pooling, "DecodeGraph", lambda model, cache, memory: DecodeGraph(model, cache, capture=full))
    pool = DecodePool(model)
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="memory ran out"):
            generate(model, prompts([9, 5]), 12, pool=pool)
        generate(model, prompts([80, 5, 7]), 3, pool=pool)
        assert [memory() is None for memory, _, _ in caches] == [True, False]
    finally:
        gc.enable()


def test_a_pool_of_another_model_or_beside_a_cache_is_refused():
    model = build()
    for given in ({"pool": DecodePool(build())}, {"pool": DecodePool(model), "cache": KVCache(model.config, 1, 50)}):
        with pytest.raises(ValueError, match="pool= lends a cache of the model it was made for"):
            generate(model, tokens(1, 5), 3, **given)


def test_the_first_rows_of_a_cache_are_a_cache():
    model = build()
    cache = KVCache(model.config, 3, 60)
    for rows in (0, 4):
        with pytest.raises(ValueError, match=rf"rows={rows} must be 1 to 3"):
            cache.first(rows)
    first = cache.first(2)
    assert first.lengths == (0, 0) and first.num_bytes < cache.num_bytes
    assert torch.equal(generate(model, tokens(2, 30), 10, cache=first), generate(model, tokens(2, 30), 10))
    assert first._layers[0].parts[0].k.data_ptr() == cache._layers[0].parts[0].k.data_ptr()
    with pytest.raises(ValueError, match="made for 2 sequences"):
        generate(model, tokens(3, 20), 10, cache=first)
