"""Batches that share memory and captured steps give what each gives with a new cache, and cost as much, however the
generation before them ended."""

import gc
import sys
import threading
import weakref
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from s2.inference import DecodeGraph, DecodePool, KVCache, generate, stream
from s2.inference import pool as pooling
from s2.inference.generate import Drawn
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
    """Of each cache that is made for itself: whether its memory is free again, its rows and its length."""
    made, new_cache = [], pooling.new_cache

    def new(*args):
        cache = new_cache(*args)
        storage = StorageWeakRef(cache._memory.values.untyped_storage())
        made.append((storage.expired, len(cache.lengths), cache.max_length))
        return cache

    monkeypatch.setattr(pooling, "new_cache", new)
    return made


def sizes(caches):
    return [made[1:] for made in caches]


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
            pool._kept.cache._memory.values.fill_(torch.nan)
    captured = [recording.captured for recording in recordings]
    assert captured == [1, 1, 1], "for three rows of up to 96 and of up to 64 tokens, and for two of up to 96"
    assert sum(recording.replayed for recording in recordings) == 4 * 11 - 3 * WARM_UP


def test_memory_is_reused_by_what_fits_and_given_up_before_more_is_taken(caches, recordings, monkeypatch):
    model = build("dense")
    pool = DecodePool(model)
    generate(model, prompts([50, 20]), 11, pool=pool)
    assert sizes(caches) == [(2, 64)]
    for lengths in ([50, 7], [3], [61 - 11, 1], [110], [20] * 3, [5] * 8):  # fewer, longer and more, shorter
        assert torch.equal(generate(model, prompts(lengths), 11, pool=pool), generate(model, prompts(lengths), 11))
    assert len(caches) == 1
    new_cache = pooling.new_cache

    def new(*args):
        assert caches[-1][0](), "two caches at a time"
        return new_cache(*args)

    monkeypatch.setattr(pooling, "new_cache", new)
    generate(model, prompts([5] * 9), 11, pool=pool)
    generate(model, prompts([149]), 11, pool=pool)
    assert sizes(caches) == [(2, 64), (9, 16), (1, 160)]
    del pool
    assert caches[-1][0]()


@pytest.mark.parametrize("layout", ["dense", "L2V4+dense1", "L1V2<4V4+sink1"])
@pytest.mark.parametrize("is_captured", [False, True])
def test_a_short_batch_costs_as_much_in_a_pool_of_long_ones_as_alone(layout, is_captured, recordings):
    """A step on a CPU attends to all slots there are, on a GPU it has programs for them."""
    model = build(layout, max_position_embeddings=4096)
    pool = DecodePool(model)
    with pool.lend(2, 4000, 8, None):
        pass
    values = pool._kept.cache._memory.values
    for length, longest in ((1, 16), (33, 64 if is_captured else 48), (700, 1024 if is_captured else 704)):
        values.fill_(torch.nan)
        with pool.lend(2, length, 8, is_captured) as (cache, _):
            alone = KVCache(model.config, 2, longest)
            assert cache.max_length == longest and cache.num_bytes == alone.num_bytes
            assert [part.k.shape for layer in cache._layers for part in layer.parts] == [
                part.k.shape for layer in alone._layers for part in layer.parts
            ]
            assert 4 * values.isfinite().sum() == sum(cache.layer_bytes), "more was zeroed, or less"


def test_few_steps_are_captured_whatever_the_order_of_lengths(recordings):
    model = build(max_position_embeddings=4096)
    for lengths in (range(40, 3000, 50), range(2990, 39, -50)):
        pool = DecodePool(model)
        pool.reserve(2, 3000)
        before = len(recordings)
        for length in lengths:
            with pool.lend(2, length, 32, None):
                pass
        assert len(recordings) - before == 7  # 64, 128, ... 2,048 and 3,072


def test_no_more_steps_are_kept_than_said(recordings, monkeypatch):
    steps, make = [], pooling.DecodeGraph

    def graph(*args, **options):
        made = make(*args, **options)
        steps.append(weakref.ref(made))
        return made

    monkeypatch.setattr(pooling, "DecodeGraph", graph)
    pool = DecodePool(build("dense"))
    pool.reserve(20, 20)
    for rows in (*range(1, 13), 5, 13):  # the one for 5 is younger than that for 6
        with pool.lend(rows, 20, 32, None):
            pass
    assert [rows for rows, step in enumerate(steps, 1) if step() is not None] == [5, 7, 8, 9, 10, 11, 12, 13]


def test_memory_is_reserved_for_the_largest_of_the_batches_to_come(caches):
    model = build("L2V4+dense1")
    batches = [[140, 100], [60] * 5, [20] * 16]  # the more rows, the more bytes
    for is_reserved, made in ((False, 3), (True, 1)):
        caches.clear()
        pool = DecodePool(model)
        if is_reserved:
            pool.reserve(16, 27)
        for lengths in batches:
            assert torch.equal(generate(model, prompts(lengths), 8, pool=pool), generate(model, prompts(lengths), 8))
        assert len(caches) == made
    with pool.lend(1, 20, 8, None), pytest.raises(ValueError, match="the pool's memory is lent: reserve before"):
        pool.reserve(1, 20)
    with pytest.raises(ValueError, match="a cache of 161 tokens is longer than max_position_embeddings=160"):
        pool.reserve(1, 161)


@pytest.mark.parametrize("tokens", [1, 31, 33, 150, 159, 160])
def test_a_length_is_rounded_up_by_a_sixteenth_or_to_a_block_and_to_what_the_model_reads(tokens):
    rounded = pooling._rounded(tokens, build())
    assert tokens <= rounded <= min(160, max(tokens + 15, tokens + tokens / 16))
    assert pooling._rounded(2049, build(max_position_embeddings=4096)) == 2176
    assert pooling._rounded(150, build(max_position_embeddings=155)) == 155


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


def test_generations_in_several_threads_have_caches_of_their_own(recordings):
    model = build()
    pool, batches = DecodePool(model), [prompts([40, 9], seed) for seed in range(3)]
    expected, given = [generate(model, batch, 12) for batch in batches], {}
    all_are_at_work = threading.Barrier(3, timeout=60)

    def work(seed):
        def is_enough(new):
            if new.shape[1] in (2, 7):
                all_are_at_work.wait()
            return [False, False]

        given[seed] = generate(model, batches[seed], 12, pool=pool, is_enough=is_enough)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(given[seed], expected[seed]) for seed in range(3))
    assert len(recordings) == 1 and not pool._lent.locked()


def test_memory_that_kernels_of_another_stream_may_still_read_is_not_reused(caches, monkeypatch):
    """As if there were a GPU."""
    model, current = build(), iter("aabba")
    monkeypatch.setattr(pooling, "_stream", lambda model: next(current))
    pool = DecodePool(model)
    for _ in range(5):
        generate(model, prompts([40, 9]), 3, pool=pool)
    assert len(caches) == 3


class BrokenError(Exception):
    pass


def is_closed(model, pool, patch):
    steps = stream(model, prompts([40, 9]), 12, pool=pool)
    for _ in range(5):
        next(steps)
    steps.close()


def is_left_alone(model, pool, patch):
    steps = stream(model, prompts([40, 9]), 12, pool=pool)
    next(steps)


def is_interrupted_by_its_reader(model, pool, patch):
    with pytest.raises(KeyboardInterrupt):
        for count, _ in enumerate(stream(model, prompts([40, 9]), 12, pool=pool)):
            if count == 5:
                raise KeyboardInterrupt


def is_cancelled_by_a_callback(model, pool, patch):
    def is_enough(new):
        if new.shape[1] == 5:
            raise BrokenError
        return [False, False]

    with pytest.raises(BrokenError):
        generate(model, prompts([40, 9]), 12, pool=pool, is_enough=is_enough)


def is_thrown_at(model, pool, patch):
    steps = stream(model, prompts([40, 9]), 12, pool=pool)
    next(steps)
    with pytest.raises(BrokenError):
        steps.throw(BrokenError())


def breaks(error, call):
    """In the prompt, or in a step: if it was captured, while it is replayed."""

    def is_broken(model, pool, patch):
        left = iter(range(call))

        def broken(*inputs, forward=model.model.layers[1].mlp.forward):
            if next(left, None) is None:
                raise error("broken")
            return forward(*inputs)

        [lent] = pool._kept._lent.values()
        if call and lent.graph:
            patch.setattr(lent.graph, "_replay", partial(broken, forward=lent.graph._replay))
        else:
            patch.setattr(model.model.layers[1].mlp, "forward", broken)
        with pytest.raises(error, match="broken"):
            generate(model, prompts([40, 9]), 12, pool=pool)

    return is_broken


def finds_no_memory_for_a_cache(model, pool, patch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    patch.setattr(pooling, "new_cache", full)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, prompts([100] * 4), 12, pool=pool)


ENDS = {
    "closed": (is_closed, True),
    "left alone": (is_left_alone, True),
    "interrupted by its reader": (is_interrupted_by_its_reader, True),
    "cancelled by a callback": (is_cancelled_by_a_callback, False),
    "thrown at": (is_thrown_at, False),
    "interrupted in a prompt": (breaks(KeyboardInterrupt, 0), False),
    "interrupted in a step": (breaks(KeyboardInterrupt, 2), False),
    "out of memory in a prompt": (breaks(torch.OutOfMemoryError, 0), False),
    "out of memory in a step": (breaks(torch.OutOfMemoryError, 2), False),
    "no memory for a cache": (finds_no_memory_for_a_cache, False),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("is_captured", [False, True])
def test_however_a_generation_ends_the_next_one_is_as_with_a_new_cache(end, is_captured, caches, request, monkeypatch):
    """Memory is kept where nothing failed, and is free at once where something did."""
    if is_captured:
        request.getfixturevalue("recordings")
    model, (run, is_kept) = build("L2V4+dense1"), ENDS[end]
    pool, fresh = DecodePool(model), [generate(model, prompts(lengths), 12) for lengths in ([40, 9], [30, 61])]
    assert torch.equal(generate(model, prompts([40, 9]), 12, pool=pool), fresh[0])
    caches.clear()
    kept = pool._kept.cache._memory.values
    storage = StorageWeakRef(kept.untyped_storage())
    del kept
    with monkeypatch.context() as patch:
        run(model, pool, patch)
    assert storage.expired() != is_kept and not pool._lent.locked()
    assert torch.equal(generate(model, prompts([40, 9]), 12, pool=pool), fresh[0])
    assert torch.equal(generate(model, prompts([30, 61]), 12, pool=pool), fresh[1])
    assert not pool._lent.locked()


def test_a_traceback_that_somebody_keeps_lends_nothing(monkeypatch):
    class Interrupting(Drawn):
        @property
        def tokens(self):
            if self.count == 3:
                raise KeyboardInterrupt
            return self._tokens

        @tokens.setter
        def tokens(self, tokens):
            self._tokens = tokens
            Interrupting.count += 1

        count = 0

    model = build()
    pool = DecodePool(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(sys.modules["s2.inference.generate"], "Drawn", Interrupting)
        generate(model, prompts([40, 9]), 12, pool=pool)
    assert caught.tb and not pool._lent.locked()


def test_what_is_refused_leaves_the_pool_as_it_was(caches):
    model = build()
    pool = DecodePool(model)
    generate(model, prompts([40, 9]), 12, pool=pool)
    kept = pool._kept
    for refused, words in (
        (lambda: generate(model, prompts([150]), 12, pool=pool), "150 prompt tokens and max_new_tokens=12 make 162"),
        (lambda: generate(model, prompts([9]), 12, pool=pool, graph=True), "graph=True: the model is on cpu"),
        (lambda: pool.lend(1, 161, 12, None).__enter__(), "a cache of 161 tokens is longer"),
        (lambda: pool.lend(0, 20, 12, None).__enter__(), "batch_size=0 must be a whole number of at least 1"),
        (lambda: pool.reserve(1, 2.5), r"max_length=2\.5 must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
        assert pool._kept is kept and not pool._lent.locked()
    assert len(caches) == 1


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
        assert [is_free() for is_free, _, _ in caches] == [True, False]
    finally:
        gc.enable()


def test_a_pool_of_another_model_or_beside_a_cache_is_refused():
    model = build()
    for given in ({"pool": DecodePool(build())}, {"pool": DecodePool(model), "cache": KVCache(model.config, 1, 50)}):
        with pytest.raises(ValueError, match="pool= lends a cache of the model it was made for"):
            generate(model, tokens(1, 5), 3, **given)
