"""Prompts that begin alike: logits are those of whole passes, what is known is not computed again, and what the layers'
patterns do not see is not kept for it."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2.inference import KVCache, PrefixCache, generate
from s2.model.config import ModelConfig
from s2.model.transformer import Transformer

LAYOUTS = [
    "dense", "L2V4-inter", "W1", "L1V3+sink2", "L1V2<4V6<9", "L2V2<6V3+sink1", "dense|L1V3", "L2V3<7", "2*dense|2*L1V4",
]  # fmt: skip


def build(layout, block_size=16, longest=256):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=longest, attention_layout=layout,
        block_size=block_size, initializer_range=0.3,
    )  # fmt: skip
    return Transformer(config).eval()


@pytest.fixture(scope="module", params=["dense", "L2V4-inter"])
def model(request):
    return build(request.param)


def prompts(rows, length, leaves, seed=1):
    """Batches of rows that leave one text at these tokens: what a number hidden at some depth does to a haystack."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(97, (rows, length), generator=generator)
    found = []
    for leave in leaves:
        batch = text.clone()
        batch[:, leave + 3 :] = text[:, leave:-3]
        batch[:, leave : leave + 3] = torch.randint(97, (rows, 3), generator=generator)
        batch[:, leave] = (text[:, leave] + 1) % 97
        found.append(batch)
    return found


def check(model, batches, *, announces, chunk, keep=4):
    """Logits and likeliest tokens of batches of one size are those of whole passes. Returns the cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that keep every key
        cached = PrefixCache(model, len(batches[0]), max(batch.shape[1] for batch in batches), chunk)
    for i, batch in enumerate(batches):
        logits = cached(batch, keep, *(batches[i + 1 : i + 2] if announces else []))
        with torch.inference_mode():
            expected = model(batch, logits_to_keep=keep)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    return cached


@st.composite
def sweeps(draw):
    layout, block_size = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([16, 32]))
    length, rows = draw(st.integers(40, 230)), draw(st.integers(1, 2))
    leaves = draw(st.lists(st.integers(0, length - 8), min_size=2, max_size=5))
    leaves = sorted(leaves) if draw(st.booleans()) else leaves
    batches = prompts(rows, length, leaves, draw(st.integers(0, 9)))
    if draw(st.booleans()):  # rows that differ at different places, and lengths that do
        batches = [batch[:, : draw(st.integers(8, length))] for batch in batches]
        batches[-1] = torch.cat([batches[-1][:1], (batches[-1][1:] + draw(st.integers(0, 1))) % 97])
    return layout, block_size, batches, draw(st.booleans()), draw(st.sampled_from([1 << 15, 64, 17]))


def check_sweep(drawn):
    layout, block_size, batches, announces, chunk = drawn
    check(build(layout, block_size), batches, announces=announces, chunk=chunk)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(sweeps())
def test_any_batches_have_the_logits_of_whole_passes(drawn):
    check_sweep(drawn)


@pytest.mark.nightly
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(sweeps())
def test_many_batches_have_the_logits_of_whole_passes(drawn):
    check_sweep(drawn)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_announced_batches_share_is_computed_once_for_every_pattern(layout):
    """Each leaves the text behind the one before it, at the ends of blocks and within, and is all that is left."""
    leaves = [0, 5, 48, 100, 131, 190]
    cached = check(build(layout), prompts(2, 200, leaves), announces=True, chunk=50)
    assert cached.computed == 200 + sum(200 - leave for leave in leaves[:-1])


def test_a_batch_that_goes_back_further_than_was_announced_is_computed_from_where_the_cache_can():
    first, second, third = prompts(1, 200, [150, 100, 120])
    # 150 and 100 have 100 tokens in common, 100 and 120 too; the mark is where the first two part
    cached = check(build("W1"), [first, second, third], announces=True, chunk=64)
    assert cached.computed == 200 + 100 + 100
    cached = check(build("W1"), [first, second, third], announces=False, chunk=64)
    assert cached.computed == 3 * 200
    cached = check(build("dense"), [first, second, third], announces=False, chunk=64)
    assert cached.computed == 200 + 100 + 100


def test_logits_are_those_of_whole_passes_and_shared_tokens_are_computed_once():
    first = torch.randint(97, (2, 120), generator=torch.Generator().manual_seed(1))
    second, third = first.clone(), first[:, :90].clone()
    second[0, 70], third[1, 40] = (second[0, 70] + 1) % 97, (third[1, 40] + 1) % 97
    cached, model = PrefixCache(build("dense"), 2, 120), build("dense")
    for rows, computed in ((first, 120), (second, 50), (third, 50), (third, 4), (first, 80)):
        before = cached.computed
        logits = cached(rows, logits_to_keep=4)
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(rows, logits_to_keep=4), rtol=1e-4, atol=1e-4)
        assert cached.computed - before == computed


def test_shared_beginnings_take_the_shrunk_cache_and_a_copy_of_its_rings():
    """Of 250 tokens a window of two blocks has three in its ring, and that much again is copied."""
    for layout, copied in (("dense", 0), ("W2", 48), ("L2V4", 48), ("L2V4+sink1", 48)):
        model = build(layout)
        cached = check(model, prompts(2, 250, [30, 120, 240]), announces=True, chunk=100)
        alone = KVCache(model.config, 2, 250).num_bytes
        assert cached.num_bytes - alone == 2 * 2 * 2 * 2 * copied * 8 * 4, layout  # layers, k and v, rows, heads


def test_no_pass_is_longer_than_a_chunk(monkeypatch):
    model, seen = build("L2V4"), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **more: seen.append(ids.shape[1]) or forward(ids, **more))
    cached = PrefixCache(model, 1, 250, prefill_chunk=60)
    first, second = prompts(1, 250, [130, 200])
    cached(first, 4, second)
    cached(second, 70)
    assert seen == [60, 60, 10, 60, 60, 60, 60]


def test_a_pass_that_fails_leaves_only_what_is_known_to_be_held(model):
    rows = torch.randint(97, (1, 60), generator=torch.Generator().manual_seed(1))
    cached = PrefixCache(model, 1, 50)
    cached(rows[:, :40], logits_to_keep=1)
    with pytest.raises(ValueError, match="do not fit in a cache"):
        cached(rows, logits_to_keep=1)
    with torch.inference_mode():
        torch.testing.assert_close(cached(rows[:, :50], logits_to_keep=1), model(rows[:, :50], logits_to_keep=1))


def test_rows_that_are_too_long_are_refused_before_any_work():
    rows = prompts(1, 120, [60])[0]
    cached = PrefixCache(build("W1"), 1, 100, prefill_chunk=50)
    cached(rows[:, :100], 1)
    with pytest.raises(ValueError, match="rows of 120 tokens do not fit in a cache of max_length=100"):
        cached(rows, 1)
    cached(rows[:, :100], 1)
    assert cached.computed == 101


@pytest.mark.parametrize("fails_in", range(6))
def test_a_pass_that_is_interrupted_anywhere_changes_no_later_one(fails_in, monkeypatch):
    """Also between the rings and the lengths of a cache that goes back."""
    model = build("L2V4")
    batches = prompts(1, 230, [60, 120, 200])
    cached = PrefixCache(model, 1, 230, prefill_chunk=50)
    cached(batches[0], 2, batches[1])
    calls = []

    def interrupted(call):
        def run(*args, **more):
            calls.append(call)
            if len(calls) == fails_in + 1:
                raise KeyboardInterrupt
            return call(*args, **more)

        return run

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.model, "forward", interrupted(model.model.forward))
        patch.setattr(torch.Tensor, "copy_", interrupted(torch.Tensor.copy_))
        cached(batches[1], 2, batches[2])
    for batch, following in ((batches[1], batches[2]), (batches[2], None)):
        logits = cached(batch, 2, following)
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(batch, logits_to_keep=2), rtol=1e-4, atol=1e-4)


def test_a_copy_of_rings_that_has_no_room_changes_no_later_batch(monkeypatch):
    model = build("W1")
    batches, clone = prompts(1, 200, [60, 150, 100, 120]), torch.Tensor.clone

    def full(x):
        if x.dim() == 4:  # of keys or values
            raise torch.OutOfMemoryError
        return clone(x)

    cached = PrefixCache(model, 1, 200)
    cached(batches[0], 2, batches[1])
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "clone", full)
        cached(batches[1], 2, batches[2])
    for batch in batches[2:]:
        logits = cached(batch, 2)
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(batch, logits_to_keep=2), rtol=1e-4, atol=1e-4)


def test_generation_ends_where_it_is_enough_with_the_same_tokens(model):
    prompt = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = generate(model, prompt, 12)
    some = generate(model, prompt, 12, is_enough=lambda new: [new.shape[1] == 5] * 2)
    assert some.tolist() == whole[:, :5].tolist()


@pytest.mark.parametrize("enough_at", [2, 8])
def test_generation_ends_when_each_row_has_ended_or_is_enough(model, enough_at):
    """One row ends by itself, of the other somebody has enough: neither goes on for the other's sake."""
    prompt = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = generate(model, prompt, 12).tolist()
    [stop] = [token for token in whole[0][4:5] if token not in whole[0][:4] + whole[1]]
    some = generate(
        model, prompt, 12, eos_token_id=stop, is_enough=lambda new: [False, new.shape[1] == enough_at]
    ).tolist()
    length = max(5, enough_at)
    assert len(some[0]) == length and some[0] == whole[0][:5] + [stop] * (length - 5)
    assert some[1][:enough_at] == whole[1][:enough_at]


def test_rows_that_the_caller_overwrites_are_computed_anew():
    model = build("dense")
    rows = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(1))
    cached = PrefixCache(model, 2, 60)
    cached(rows, logits_to_keep=1)
    rows[:, 30] = (rows[:, 30] + 1) % 97
    with torch.inference_mode():
        torch.testing.assert_close(cached(rows, 1), model(rows, logits_to_keep=1), rtol=1e-4, atol=1e-4)
    assert cached.computed == 60 + 30


@pytest.mark.parametrize(("shape", "keep"), [((2, 3), 5), ((2, 3), 0), ((1, 9), 1), ((3, 9), 1), ((2, 9, 1), 1)])
def test_rows_that_do_not_fit_a_prefix_cache_are_refused(model, shape, keep):
    cached = PrefixCache(model, 2, 60)
    known = torch.zeros(2, 9, dtype=torch.int64)
    cached(known, logits_to_keep=1)
    said = rf"rows \[{', '.join(map(str, shape))}\] with logits_to_keep={keep} do not fit"
    with pytest.raises(ValueError, match=said):
        cached(torch.zeros(shape, dtype=torch.int64), logits_to_keep=keep)
    if keep == 1:
        with pytest.raises(ValueError, match=said):
            cached(known, 1, torch.zeros(shape, dtype=torch.int64))
    for wrong in (-1, 97):
        with pytest.raises(ValueError, match=f"input_ids have token {wrong}, and the model has tokens 0 to 96"):
            cached(known + wrong, 1)
    with pytest.raises(ValueError, match=r"input_ids must be token ids, int64, got torch\.float32"):
        cached(known.float(), 1)
    with pytest.raises(ValueError, match="prefill_chunk=0 must be a whole number of at least 1"):
        PrefixCache(model, 2, 60, prefill_chunk=0)


def test_what_is_enough_is_said_of_each_row(model):
    prompt = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = generate(model, prompt, 6)
    for said in ([True], [True] * 3, True):
        with pytest.raises(ValueError, match=r"is_enough gave \[.*\] for 2 rows"):
            generate(model, prompt, 6, is_enough=lambda new, said=said: said)
    for said in (torch.tensor([True, False]), [1, 0]):
        some = generate(model, prompt, 6, is_enough=lambda new, said=said: said)
        assert torch.equal(some[1], whole[1]) and set(some[0].tolist()) == {int(whole[0, 0])}
