"""Prompts that begin alike: logits are those of whole passes, and what is known is not computed again."""

import pytest
import torch

from s2.inference import PrefixCache, generate
from s2.model.config import ModelConfig
from s2.model.transformer import Transformer


@pytest.fixture(scope="module", params=["dense", "L2V4-inter"])
def model(request):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, attention_layout=request.param, block_size=16,
        initializer_range=0.3,
    )  # fmt: skip
    return Transformer(config).eval()


def test_logits_are_those_of_whole_passes_and_shared_tokens_are_computed_once(model):
    first = torch.randint(97, (2, 120), generator=torch.Generator().manual_seed(1))
    second, third = first.clone(), first[:, :90].clone()
    second[0, 70], third[1, 40] = (second[0, 70] + 1) % 97, (third[1, 40] + 1) % 97
    cached = PrefixCache(model, 2, 120)
    for rows, computed in ((first, 120), (second, 50), (third, 50), (third, 4), (first, 80)):
        before = cached.computed
        logits = cached(rows, logits_to_keep=4)
        with torch.inference_mode():
            torch.testing.assert_close(logits, model(rows, logits_to_keep=4), rtol=1e-4, atol=1e-4)
        assert cached.computed - before == computed


def test_a_pass_that_fails_leaves_only_what_is_known_to_be_held(model):
    rows = torch.randint(97, (1, 60), generator=torch.Generator().manual_seed(1))
    cached = PrefixCache(model, 1, 50)
    cached(rows[:, :40], logits_to_keep=1)
    with pytest.raises(ValueError, match="do not fit in a cache"):
        cached(rows, logits_to_keep=1)
    with torch.inference_mode():
        torch.testing.assert_close(cached(rows[:, :50], logits_to_keep=1), model(rows[:, :50], logits_to_keep=1))


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


def test_rows_that_the_caller_overwrites_are_computed_anew(model):
    rows = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(1))
    cached = PrefixCache(model, 2, 60)
    cached(rows, logits_to_keep=1)
    rows[:, 30] = (rows[:, 30] + 1) % 97
    with torch.inference_mode():
        torch.testing.assert_close(cached(rows, 1), model(rows, logits_to_keep=1), rtol=1e-4, atol=1e-4)
    assert cached.computed == 60 + 30


@pytest.mark.parametrize(("shape", "keep"), [((2, 3), 5), ((2, 3), 0), ((1, 9), 1), ((3, 9), 1)])
def test_rows_that_do_not_fit_a_prefix_cache_are_refused(model, shape, keep):
    cached = PrefixCache(model, 2, 60)
    cached(torch.zeros(2, 9, dtype=torch.int64), logits_to_keep=1)
    with pytest.raises(ValueError, match=rf"rows \[{shape[0]}, {shape[1]}\] with logits_to_keep={keep} do not fit"):
        cached(torch.zeros(shape, dtype=torch.int64), logits_to_keep=keep)


def test_what_is_enough_is_said_of_each_row(model):
    prompt = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = generate(model, prompt, 6)
    for said in ([True], [True] * 3, True):
        with pytest.raises(ValueError, match=r"is_enough gave \[.*\] for 2 rows"):
            generate(model, prompt, 6, is_enough=lambda new, said=said: said)
    for said in (torch.tensor([True, False]), [1, 0]):
        some = generate(model, prompt, 6, is_enough=lambda new, said=said: said)
        assert torch.equal(some[1], whole[1]) and set(some[0].tolist()) == {int(whole[0, 0])}
