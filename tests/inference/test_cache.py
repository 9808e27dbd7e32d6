"""The shrinking cache: what it gives is attention over the whole context, whatever the pattern, the calls and the
lengths; it holds as many bytes as it says; it goes back as far as its rings do."""

import itertools
import warnings
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from s2.attention import s2_attention, store
from s2.inference import KVCache
from s2.model import ModelConfig, Transformer
from tests.attention.test_write import write_both_ways

LAYOUTS = [
    "dense", "W1", "W3+sink1", "L2V4", "L1V3+sink2", "L2V5", "L1V2<6V4", "L2V3<7", "L1V2<4V6<9", "L2V2<6V3+sink1",
    "dense|L1V3", "L1V4+sink1|W2", "dense|W1|L1V2|L2V3", "L1V2<20V4+sink1", "L1V2<9",
]  # fmt: skip


def config_of(layout, *, heads=4, kv_heads=2, layers=1, block_size=16, longest=8000, **more):
    return ModelConfig(
        **{
            "vocab_size": 61, "hidden_size": 8 * heads, "intermediate_size": 32, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8, "initializer_range": 0.2,
            "max_position_embeddings": longest, "attention_layout": layout, "block_size": block_size, **more,
        }
    )  # fmt: skip


def new_cache(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KVCache(*args, **options)


class Feed:
    """Random q, k and v of a layer, fed to a cache in calls, each compared with attention over the whole context."""

    def __init__(self, config, lengths, **options):
        self.config, self.cache = config, new_cache(config, len(lengths), max(lengths), **options)
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        generator = torch.Generator().manual_seed(1)
        self.qkv = [
            torch.randn(len(lengths), max(lengths), h, config.head_dim, generator=generator) for h in (heads, kv, kv)
        ]
        rotations = config.layout.distinct_rotations(kv)
        self.layers = [(config.layout[i], rotations[i]) for i in range(len(rotations))]
        self.wanted = [
            s2_attention(*self.qkv, pattern, rotation=rotation, backend="reference")
            for pattern, rotation in self.layers
        ]

    def call(self, counts):
        starts = self.cache.lengths
        width = max(counts)
        self.cache.begin(len(counts), width, None if min(counts) == width else counts)
        new = [torch.full((len(counts), width, *x.shape[2:]), 9.0) for x in self.qkv]
        for x, whole in zip(new, self.qkv, strict=True):
            for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
                x[row, :count] = whole[row, start : start + count]
        for layer, (pattern, rotation) in enumerate(self.layers):
            out = self.cache.attend(layer, *new, pattern, rotation)
            for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
                wanted = self.wanted[layer][row, start : start + count]
                torch.testing.assert_close(out[row, :count], wanted, atol=2e-6, rtol=1e-4)
        self.cache.advance()


@st.composite
def feeds(draw):
    """A layer and, for each call, the new tokens of each sequence."""
    block_size = draw(st.sampled_from([16, 16, 32, 64]))
    layout = draw(st.sampled_from(LAYOUTS))
    kv_heads = layout.count("|") + 1 if "|" in layout else draw(st.integers(1, 3))
    group, batch = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
    border = st.integers(1, 6).map(lambda blocks: blocks * block_size)
    prompt = st.builds(lambda length, more: max(1, length + more), border, st.integers(-2, 2))
    calls = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["alike", "mixed", "step", "tokens"]))
        if kind == "tokens":
            calls += [[1] * batch] * draw(st.integers(1, 2 * block_size))
        elif kind == "mixed":
            calls.append([draw(prompt) if draw(st.booleans()) else 0 for _ in range(batch - 1)] + [draw(prompt)])
        else:
            calls.append([draw(prompt if kind == "alike" else st.integers(1, 8))] * batch)
    return config_of(layout, heads=kv_heads * group, kv_heads=kv_heads, block_size=block_size, layers=2), calls


def feed_all(drawn):
    config, calls = drawn
    feed = Feed(config, [sum(row) for row in zip(*calls, strict=True)])
    for counts in calls:
        feed.call(counts)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(feeds())
def test_any_calls_give_attention_over_the_whole_context(drawn):
    feed_all(drawn)


def test_a_sequence_that_gets_no_tokens_keeps_what_it_has():
    for layout in ("dense", "L1V3"):
        feed_all((config_of(layout), [[40, 35], [0, 40], [50, 20], [1, 1]]))


@pytest.mark.parametrize("layout", ["dense|L1V2<4V4", "L1V3+sink1", "2*dense|2*L1V2"])
def test_the_kernel_writes_what_plain_torch_writes(layout, monkeypatch):
    """Prompts, chunks and steps of rows with several lengths, and after tokens have been taken back."""
    monkeypatch.setattr(store._Part, "write", torch.no_grad()(write_both_ways))
    feed = Feed(config_of(layout), [130, 120])
    for counts in ([70, 9], [1, 1], [0, 40], [33, 50], [8, 8], [2, 3]):
        feed.call(counts)
    feed.cache.truncate(feed.cache.length - 8)
    feed.call([3, 3])


@pytest.mark.nightly
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(feeds())
def test_many_calls_give_attention_over_the_whole_context(drawn):
    feed_all(drawn)


@pytest.mark.parametrize("layout", [*LAYOUTS, "4*L1V4|4*W2"])
def test_a_long_continuation_of_prompts_of_several_lengths(layout):
    per_head = layout.count("|") + 1 if "|" in layout else 2
    config = config_of(layout, heads=8, kv_heads=2 if "*" in layout else per_head, layers=3)
    feed = Feed(config, [300, 245, 231])
    feed.call([100, 45, 31])
    for step in itertools.chain([1] * 80, [3, 8, 5, 1, 7] * 5):
        feed.call([step] * 3)


def test_a_cache_with_one_rule_a_query_head_keeps_everything_and_says_so():
    config = config_of("2*dense|2*L1V4", layers=2)
    with pytest.warns(UserWarning, match=r"'2\*dense\|2\*L1V4': layers 0-1 have one rule a query head"):
        cache = KVCache(config, 1, 100)
    assert cache.whole_layers == (0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert KVCache(config_of("dense|L1V4"), 1, 100).whole_layers == ()
        assert KVCache(config_of("L1V4-inter", layers=3), 1, 100, keep_all=True).whole_layers == (0, 2)


def tensors_of(value, found=None):
    """Every tensor that an object holds."""
    found = {} if found is None else found
    if isinstance(value, torch.Tensor):
        found[id(value)] = value
    elif isinstance(value, list | tuple | set):
        for each in value:
            tensors_of(each, found)
    elif isinstance(value, dict):
        tensors_of(list(value.values()), found)
    elif type(value).__module__.startswith("s2.inference"):
        tensors_of(vars(value), found)
    return found.values()


@pytest.mark.parametrize("layout", ["dense", "L2V4+sink1-inter", "dense|L1V3", "2*dense|2*W2"])
def test_bytes_are_those_of_the_tensors_that_it_holds(layout):
    cache = new_cache(config_of(layout, layers=3), 2, 300, dtype=torch.bfloat16)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(cache)}
    assert cache.num_bytes == sum(storages.values())
    cache.mark()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(cache)}
    assert cache.num_bytes == sum(storages.values()) and (cache.marked_bytes > 0) == (
        "V" in layout and "*" not in layout
    )
    cache.truncate(0)
    cache.reset()
    assert len(cache.layer_bytes) == 3 and 0 < cache.num_bytes - sum(cache.layer_bytes) < 500
    if layout == "dense":
        assert cache.layer_bytes == (2 * 2 * 304 * 2 * 8 * 2,) * 3  # keys and values of whole blocks


@pytest.mark.parametrize("spec", ["L8V16", "L8V16+sink1", "L4V24", "L1V15", "W16", "L8V12+sink1"])
def test_bytes_at_128k_are_sinks_window_and_strides(spec):
    config = config_of(spec, kv_heads=4, block_size=64, longest=1 << 17)
    cache = KVCache(config, 1, 1 << 17, device="meta", dtype=torch.bfloat16)
    rule = config.layout[0].rules(4)[0]
    strided = (1 << 17) / rule.levels[0].stride if rule.levels else 0
    tokens = (rule.sinks + rule.local) * 64 + strided
    spare = 64 if rule.levels else 128
    assert tokens <= cache.layer_bytes[0] / (4 * 2 * 8 * 2) <= max(1.03 * tokens, tokens + spare)


def test_slack_can_be_taken_back_at_any_time_and_no_less_than_what_rings_hold():
    for layout, slack in itertools.product(("W2", "L2V4+sink1", "L1V2<5", "L2V3<6V9-inter"), (8, 40)):
        feed = Feed(config_of(layout, layers=2), [300], slack=slack)
        for end, count in ((3, 3), (100, 97), (107, 7), (151, 44), (153, 2), (240, 87), (241, 1)):
            feed.call([count])
            oldest = feed.cache.oldest_length
            assert feed.cache.length == end and oldest <= max(0, end - slack)
            if oldest > 1:
                with pytest.raises(ValueError, match=f"cannot truncate to {oldest - 1} tokens.*context of {oldest} "):
                    feed.cache.truncate(oldest - 1)
            back = end - max(oldest, end - 50)
            feed.cache.truncate(end - back)
            for piece in [1] * min(back, 9) + [back - 9] * (back > 9):  # what was there before, and nothing else
                feed.call([piece])
        feed.cache.truncate(0)
        assert feed.cache.oldest_length == 0
        feed.call([50])
        with pytest.raises(ValueError, match="cannot truncate to 51 tokens: the cache holds 50"):
            feed.cache.truncate(51)


def test_a_cache_that_keeps_all_goes_back_to_any_length():
    feed = Feed(config_of("L1V3+sink1-inter", layers=2), [200, 170], keep_all=True)
    feed.call([150, 120])
    for length in (140, 3, 101):
        feed.cache.truncate(length)
        assert feed.cache.lengths == (length, min(length, 120)) and feed.cache.oldest_length == 0
        feed.call([150 - length, 120 - min(length, 120)])
    assert feed.cache.layer_bytes[0] == feed.cache.layer_bytes[1]


@pytest.mark.parametrize("layout", [*LAYOUTS, "2*dense|2*L1V4"])
def test_a_cache_goes_back_to_its_mark_however_many_tokens_follow(layout):
    kv_heads = 2 if "*" in layout else layout.count("|") + 1 if "|" in layout else 2
    feed = Feed(config_of(layout, heads=2 * kv_heads, kv_heads=kv_heads, layers=2), [500, 300])
    for counts in ([90, 37], [60, 0], [5, 5], [1, 1]):
        feed.call(counts)
        feed.cache.mark()
        marked = feed.cache.lengths
        for more in ([320, 240], [1, 3], [40, 0]):
            feed.call(more)
            feed.call([1, 1])
            feed.cache.rewind()
            assert feed.cache.lengths == marked
            feed.call([1, 1])
            feed.cache.rewind()
        assert feed.cache.oldest_length <= max(0, feed.cache.length - 8)  # as without the mark
    feed.call([200, 200])


def test_a_mark_that_cannot_be_gone_back_to_is_refused():
    feed = Feed(config_of("W2", layers=2), [300])
    said = "the cache has no mark to go back to: mark it, and feed it from no further back than that"
    with pytest.raises(ValueError, match=said):
        feed.cache.rewind()
    feed.call([100])
    feed.cache.mark()
    with pytest.raises(ValueError, match="or mark what to come back to"):
        feed.call([100])
        feed.cache.truncate(100)
    feed.cache.rewind()
    feed.cache.truncate(96)
    feed.cache.rewind()  # nothing was fed
    feed.cache.truncate(96)
    feed.call([1])
    with pytest.raises(ValueError, match=said):
        feed.cache.rewind()
    feed.cache.mark()
    other = Feed(feed.config, [200])
    other.cache = feed.cache.first(1, 200)
    with pytest.raises(ValueError, match=said):
        other.cache.rewind()
    other.call([50])
    with pytest.raises(ValueError, match=said):
        feed.cache.rewind()
    with pytest.raises(ValueError, match="another cache in the memory"):
        feed.cache.mark()
    feed.cache.reset()
    with pytest.raises(ValueError, match=said):
        feed.cache.rewind()


@pytest.mark.parametrize("after", range(6))
def test_a_cache_that_is_interrupted_while_it_goes_back_holds_nothing_or_what_was_marked(after, monkeypatch):
    feed = Feed(config_of("W2", layers=2), [300])
    feed.call([100])
    feed.cache.mark()
    feed.call([150])
    copy, copies = torch.Tensor.copy_, []

    def interrupted(*args):
        copies.append(copy(*args))
        if len(copies) == after + 1:
            raise KeyboardInterrupt
        return copies[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupted)
        if after < 5:  # keys and values of two layers, and lengths
            with pytest.raises(KeyboardInterrupt):
                feed.cache.rewind()
        else:
            feed.cache.rewind()
    assert feed.cache.lengths == ((0,) if after < 5 else (100,))
    feed.call([120])
    if after < 5:
        with pytest.raises(ValueError, match="no mark to go back to"):  # of other tokens, perhaps
            feed.cache.rewind()
    feed.cache.truncate(0)
    feed.call([90])


def test_a_call_that_failed_is_gone_back_over_but_not_marked():
    feed = Feed(config_of("W2", layers=2), [200])
    feed.call([100])
    feed.cache.mark()
    feed.cache.begin(1, 60)
    feed.cache.attend(0, *(x[:, 100:160] for x in feed.qkv), *feed.layers[0])
    with pytest.raises(ValueError, match="overwritten keys before token 128 of sequence 0"):
        feed.cache.mark()
    feed.cache.rewind()
    feed.call([1])
    feed.call([99])


def test_truncating_leaves_shorter_sequences_as_they_are():
    feed = Feed(config_of("W2"), [60, 40])
    feed.call([50, 20])
    feed.cache.truncate(45)
    assert feed.cache.lengths == (45, 20)
    feed.call([8, 8])


def test_what_does_not_fit_is_refused_and_the_cache_unharmed():
    feed = Feed(config_of("L2V4"), [120, 100])
    feed.call([90, 70])
    for counts, words in (
        ([31, 1], "121 tokens do not fit in a cache of max_length=120"),
        ([5], "made for 2 sequences, got 1"),
        ([5, 6, 6], "made for 2 sequences, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            feed.cache.begin(len(counts), max(counts), counts)
    for counts in ([5, -1], [5, 4], [7, 2], [6]):
        with pytest.raises(ValueError, match=r"lengths=.*must be 2 numbers of new tokens, the largest of them 6"):
            feed.cache.begin(2, 6, counts)
    with pytest.raises(ValueError, match="no call has begun"):
        feed.cache.advance()
    feed.call([30, 30])


def test_a_layer_that_attends_otherwise_than_the_cache_was_made_for_is_named():
    feed = Feed(config_of("L2V4", layers=2), [20])
    feed.cache.begin(1, 20)
    with pytest.raises(ValueError, match=r"layer 1 attends by W2 \(rotation 0\).*made for L2V4 \(rotation 1\)"):
        feed.cache.attend(1, *feed.qkv, config_of("W2").layout[0], 0)


def test_a_failed_call_that_overwrote_what_is_seen_is_not_continued():
    feed = Feed(config_of("W2", layers=2), [200])
    feed.call([100])
    for count in (8, 60):
        feed.cache.begin(1, count)  # and one layer of two is done
        feed.cache.attend(0, *(x[:, 100 : 100 + count] for x in feed.qkv), *feed.layers[0])
        if count == 8:
            feed.call([2])  # the ring has room for them
            feed.cache.truncate(100)
    with pytest.raises(ValueError, match=r"overwritten keys before token 128 .* has 100 tokens: truncate\(0\)"):
        feed.call([1])
    feed.cache.truncate(0)
    feed.call([100])


def test_the_memory_of_a_cache_serves_any_size_that_fits():
    for layout in ("dense", "L2V4+sink1", "dense|L1V3"):
        feed = Feed(config_of(layout, kv_heads=2, layers=2), [90, 60, 40])
        whole = feed.cache
        for lengths in ([80, 50, 33], [90, 70], [96], [20] * 5):
            feed = Feed(feed.config, lengths)
            alone, feed.cache = feed.cache, whole.first(len(lengths), max(lengths))
            assert feed.cache.max_length == max(lengths) and feed.cache.num_bytes == alone.num_bytes
            first = feed.cache._layers[0].parts[0].k
            assert first.untyped_storage().data_ptr() == whole._memory.values.untyped_storage().data_ptr()
            whole._memory.values.fill_(torch.nan)  # of which the part that it stands in is zeroed
            feed.cache.reset()
            for counts in ([length - 9 for length in lengths], [8] * len(lengths), [1] * len(lengths)):
                feed.call(counts)
        assert whole.first(2).max_length == 90
    for rows, length, words in (
        (4, 90, "4 sequences of 90 tokens do not fit into the memory of 3 of 90"),
        (2, 200, "2 sequences of 200 tokens do not fit into the memory of 3 of 90"),
        (0, 90, "batch_size=0 must be a whole number of at least 1"),
        (1, 9000, "a cache of 9000 tokens is longer than max_position_embeddings=8000; lower max_length"),
    ):
        with pytest.raises(ValueError, match=words):
            whole.first(rows, length)


@pytest.mark.parametrize("layout", ["dense", "L2V4+sink1"])
def test_of_caches_in_one_memory_the_one_that_is_fed_holds_tokens_and_the_others_none(layout):
    feed = Feed(config_of(layout), [90, 60])
    whole = feed.cache
    feed.call([50, 20])
    first = Feed(feed.config, [90])
    first.cache = whole.first(1)
    assert whole.lengths == (0, 0) and whole.length == whole.oldest_length == 0
    first.call([60])
    with pytest.raises(ValueError, match=r"another cache in the memory of this one has overwritten its tokens: trunc"):
        feed.call([1, 1])
    with pytest.raises(ValueError, match="cannot truncate to 20 tokens: the cache holds 0"):
        whole.truncate(20)
    assert first.cache.lengths == (60,)
    whole.truncate(0)
    first.call([1])  # nobody was fed meanwhile
    feed.call([50, 20])
    feed.call([1, 1])
    assert first.cache.lengths == (0,) and whole.lengths == (51, 21)
    first.cache.reset()
    first.call([60])
    assert whole.lengths == (0, 0) and first.cache.lengths == (60,)


def test_a_copy_of_a_cache_is_a_cache_for_itself():
    feed = Feed(config_of("L2V4"), [90, 60])
    feed.call([50, 20])
    kept, copied = feed.cache, deepcopy(feed.cache)
    copied.first(1)
    feed.call([8, 8])
    assert kept.lengths == (58, 28) and copied.lengths == (0, 0)


class Waits(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
            torch.ops.aten.equal, torch.ops.aten.unique_consecutive,
        ), func  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [None, [50, 21]])
def test_a_decode_step_does_not_wait_for_the_device(lengths):
    config = config_of("L1V3+sink1-inter", layers=3)
    model = Transformer(config).eval()
    ids = torch.randint(61, (2, 60), generator=torch.Generator().manual_seed(0))
    cache = KVCache(config, 2, 60)
    with torch.inference_mode():
        model(ids[:, :50], cache=cache, lengths=lengths)
        with Waits():
            for width in (1, 1, 4):
                model(ids[:, :width], cache=cache, logits_to_keep=1)
    assert cache.lengths == ((56, 56) if lengths is None else (56, 27))


@pytest.mark.parametrize("layout", ["dense", "W2"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 1}, r"layer 0 has 2 KV heads of 8 in torch.float32, but .* for 1 of 8 in torch.float32"),
        ({"kv_heads": 4}, r"layer 0 has 2 KV heads of 8 .* for 4 of 8"),
        ({"head_dim": 4}, r"layer 0 has 2 KV heads of 8 .* for 2 of 4"),
        ({"layers": 1}, "layer 1 attends, but the cache was made for 1 layers"),
        ({"block_size": 32}, "in blocks of 16, but the cache was made for .* in blocks of 32"),
        ({"dtype": torch.bfloat16}, r"in torch.float32, but .* in torch.bfloat16"),
    ],
)
def test_a_cache_made_for_another_model_is_refused_at_once(layout, changes, message):
    model, dtype = Transformer(config_of(layout, layers=2)), changes.get("dtype")
    other = config_of(layout, **{"layers": 2} | {key: value for key, value in changes.items() if key != "dtype"})
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 40, dtype=torch.int64), cache=KVCache(other, 2, 80, dtype=dtype))


def test_the_longest_context_bounds_each_sequence_and_not_the_padding():
    model = Transformer(config_of("L2V4", longest=160)).eval()
    ids = torch.randint(61, (2, 110), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 2, 160)
    model(ids[:, :100], cache=cache, lengths=[100, 10])
    logits = model(torch.stack([ids[0].roll(-100), ids[1].roll(-10)])[:, :100], cache=cache, lengths=[10, 100])
    assert cache.lengths == (110, 110)
    with torch.no_grad():
        torch.testing.assert_close(logits[1], model(ids)[1, 10:], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="a row of 161 tokens is longer than max_position_embeddings=160"):
        model(ids[:, :51], cache=cache)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_nobody_takes_gradients_that_lack_what_goes_through_a_cache(checkpointing):
    model = Transformer(config_of("L2V4", layers=2))
    model.set_activation_checkpointing(checkpointing)
    cache = KVCache(model.config, 1, 80)
    for _ in range(2):
        assert not model(torch.zeros(1, 40, dtype=torch.int64), cache=cache).requires_grad
    assert model(torch.zeros(1, 40, dtype=torch.int64)).requires_grad
