"""Generation token by token: the same tokens, which rows have ended, and what a caller keeps when it stops early."""

import pytest
import torch

from s2.inference import KVCache, generate, stream
from tests.inference.test_generate import build, tokens

PROMPTS = [33, 70, 5]


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def prompts():
    return [(tokens(1, length)[0] + length) % 61 for length in PROMPTS]


def new_cache(model, length=150):
    return KVCache(model.config, len(PROMPTS), length)


def test_tokens_come_as_generate_returns_them_with_the_rows_that_have_ended(model, prompts):
    free = generate(model, prompts, 30)
    stop = [int(free[0, 4]), int(free[1, 9]), int(free[2, 13])]
    whole = generate(model, prompts, 30, eos_token_id=stop)
    ends = [min(i for i, token in enumerate(row.tolist()) if token in stop) for row in free]
    assert len(set(ends)) > 1
    steps = list(stream(model, prompts, 30, eos_token_id=stop))
    assert torch.equal(torch.stack([drawn.tokens for drawn in steps], dim=1), whole) and len(steps) == max(ends) + 1
    for count, drawn in enumerate(steps):
        assert drawn.ended == tuple(count >= end for end in ends)
        assert drawn.ids == drawn.tokens.tolist()


def test_a_token_is_computed_when_it_is_asked_for(model, prompts, monkeypatch):
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **options: calls.append(1) or forward(*args, **options))
    steps = stream(model, prompts, 30)
    assert not calls
    next(steps)
    assert len(calls) == 1
    next(steps)
    assert len(calls) == 2


def test_wrong_arguments_are_refused_before_the_first_token_is_asked_for(model, prompts):
    for options, words in (
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 100}, "70 prompt tokens and max_new_tokens=100"),
        ({"cache": KVCache(model.config, 2, 100)}, "the cache was made for 2 sequences, and there are 3 prompts"),
        ({"cache": new_cache(model, 98)}, "max_new_tokens=30 make 99 tokens to keep, more than its max_length=98"),
    ):
        with pytest.raises(ValueError, match=words):
            stream(model, prompts, **{"max_new_tokens": 30, **options})


def test_a_caller_is_not_put_into_inference_mode(model, prompts):
    for _ in stream(model, prompts, 3):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_a_cache_of_the_caller_goes_on_where_a_stream_was_closed(model, prompts):
    whole = generate(model, prompts, 20)
    cache = new_cache(model)
    steps = stream(model, prompts, 20, cache=cache)
    for _ in range(7):
        last = next(steps)
    steps.close()
    assert cache.lengths == tuple(length + 6 for length in PROMPTS)  # but for the last token
    rest = generate(model, last.tokens[:, None], 13, cache=cache)
    assert torch.equal(rest, whole[:, 7:])
    assert cache.lengths == tuple(length + 19 for length in PROMPTS)


@pytest.mark.parametrize("chunk", [1000, 16])
def test_prompts_continue_what_a_cache_holds(model, prompts, chunk):
    cache = new_cache(model)
    first = generate(model, prompts, 4, cache=cache)
    more = [(row[:n] * 7 + 1) % 61 for row, n in zip(prompts, (20, 33, 4), strict=True)]
    said = [torch.cat([first[row, -1:], text]) for row, text in enumerate(more)]
    second = generate(model, said, 10, cache=cache, prefill_chunk=chunk)
    for row, prompt in enumerate(prompts):
        alone = torch.cat([prompt, first[row], more[row]])
        assert torch.equal(generate(model, alone[None], 10)[0], second[row])
    with pytest.raises(ValueError, match=r"make 151 tokens to keep, more than its max_length=150"):
        generate(model, said, 151 - cache.length - 33, cache=cache)


def test_an_error_while_a_row_is_read_leaves_the_cache_with_all_but_the_last_token(model, prompts):
    class CancelledError(Exception):
        pass

    def is_enough(new):
        if new.shape[1] == 5:
            raise CancelledError
        return [False] * 3

    cache, whole = new_cache(model), generate(model, prompts, 20)
    with pytest.raises(CancelledError):
        generate(model, prompts, 20, cache=cache, is_enough=is_enough)
    assert cache.lengths == tuple(length + 4 for length in PROMPTS)
    assert torch.equal(generate(model, whole[:, 4:5], 15, cache=cache), whole[:, 5:])


@pytest.mark.parametrize("where", ["model.layers.1.mlp", "lm_head"])
def test_an_error_in_the_model_leaves_the_cache_as_it_was_before_that_token(model, prompts, monkeypatch, where):
    cache, whole = new_cache(model), generate(model, prompts, 20)
    steps = stream(model, prompts, 20, cache=cache)
    for _ in range(4):
        next(steps)

    def fails(*inputs):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(model.get_submodule(where), "forward", fails)
        next(steps)
    assert cache.lengths == tuple(length + 3 for length in PROMPTS)
    assert torch.equal(generate(model, whole[:, 3:4], 16, cache=cache), whole[:, 4:])


def test_rows_that_end_are_asked_about_on_the_host(model, prompts):
    seen = []

    def is_enough(new):
        seen.append(new.clone())
        return [False] * 3

    whole = generate(model, prompts, 6, is_enough=is_enough)
    assert [new.shape[1] for new in seen] == [1, 2, 3, 4, 5, 6] and all(new.device.type == "cpu" for new in seen)
    assert torch.equal(seen[-1], whole)
