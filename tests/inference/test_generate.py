"""Cached decoding equals the full forward on sparse layouts; generation repeats, stops and refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from s2.inference import DecodeGraph, KVCache, generate, stream
from s2.model import ModelConfig, Transformer


def build(layout="L2V4+dense1", **changes):
    torch.manual_seed(0)
    config = ModelConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 160,
            "attention_layout": layout,
            "block_size": 16,
            "initializer_range": 0.1,
            **changes,
        }
    )
    return Transformer(config).eval()


def tokens(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", ["dense", "L2V4+dense1", "L1V3-inter", "W2", "L1V2<4V4+sink1", "dense|L1V3"])
@pytest.mark.parametrize("pieces", [[100] + [1] * 20, [1] * 40, [16, 3, 61, 40]], ids=["decode", "tokens", "chunks"])
def test_cached_forward_equals_full_forward(layout, pieces):
    model = build(layout)
    ids = tokens(2, sum(pieces))
    cache = KVCache(model.config, 2, ids.shape[1])
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
        expected = model(ids)
    assert cache.length == ids.shape[1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


SCALED = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "chunk", [pytest.param(1000, marks=pytest.mark.nightly), 7, pytest.param(40, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("dense", {}),
        ("L1V4+sink1+dense1", {"rope_scaling": {"dense": SCALED, "sparse": None}}),
        ("L1V2<4V4+sink1", {"qk_norm": True}),
        ("L1V3-inter", {"block_size": 32, "max_position_embeddings": 300}),
        ("W1|L1V3", {"num_hidden_layers": 2}),
    ],
)
def test_rows_of_several_lengths_are_continued_as_if_alone(layout, changes, chunk):
    model = build(layout, **changes)
    lengths = [33, 100, 64, 1]
    prompts = [tokens(1, length)[0] + i for i, length in enumerate(lengths)]
    prompts = [prompt % 61 for prompt in prompts]
    new = generate(model, prompts, 40, prefill_chunk=chunk)
    padded = torch.stack([torch.nn.functional.pad(prompt, (0, 110 - len(prompt)), value=60) for prompt in prompts])
    assert torch.equal(generate(model, padded, 40, prefill_chunk=chunk, lengths=torch.tensor(lengths)), new)
    for prompt, row in zip(prompts, new, strict=True):
        assert torch.equal(generate(model, prompt[None], 40)[0], row)


def test_lengths_that_do_not_fit_are_refused():
    model, ids = build(), tokens(2, 20)
    for lengths in ([20], [20, 21], [0, 20], [20, 20, 20], [20, 2.5], torch.tensor([20.0, 3.0]), [20, "3"]):
        with pytest.raises(ValueError, match=r"lengths=\[.*must be 2 numbers from 1 to 20"):
            generate(model, ids, 5, lengths=lengths)
    with pytest.raises(ValueError, match=r"lengths=\[20\] must be 2 numbers"):
        generate(model, ids, 5, lengths=20)
    for prompts in ([], [ids], [ids[0], ids[:1]]):
        with pytest.raises(ValueError, match=r"input_ids must be \[B, S\], with lengths, or prompts \[S\] one by one"):
            generate(model, prompts, 5)
    with pytest.raises(ValueError, match=r"145 prompt tokens and max_new_tokens=20 make 165"):
        generate(model, [ids[0], tokens(1, 145)[0]], 20)
    assert generate(model, tokens(2, 200), 20, lengths=[5, 140]).shape == (2, 20), "padding takes no room"
    with pytest.raises(ValueError, match="lengths cannot be combined with labels or cu_seqlens"):
        model(ids, labels=ids, lengths=[20, 3])
    with pytest.raises(ValueError, match=r"lengths=\[20, 21\] do not fit input_ids \[2, 20\]"):
        model(ids, lengths=[20, 21])
    with pytest.raises(ValueError, match=r"lengths=\[20, -1\] do not fit input_ids \[2, 20\]"):
        model(ids, lengths=[20, -1])


def test_the_last_positions_of_rows_of_several_lengths_are_those_of_their_tokens():
    model, ids = build(), tokens(2, 30)
    with torch.no_grad():
        whole = model(ids)
        for cache in (None, KVCache(model.config, 2, 40)):
            last = model(ids, lengths=[30, 17], logits_to_keep=3, cache=cache)
            torch.testing.assert_close(last, torch.stack([whole[0, 27:], whole[1, 14:17]]), atol=1e-5, rtol=1e-4)
    assert cache.lengths == (30, 17)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_greedy_generation_takes_the_likeliest_token_of_the_full_forward(chunk):
    model = build()
    prompt = tokens(2, 50)
    new = generate(model, prompt, 30, prefill_chunk=chunk)
    assert new.shape == (2, 30)
    ids = prompt
    with torch.no_grad():
        for step in range(30):
            best = model(ids, logits_to_keep=1)[:, -1].argmax(-1)
            assert torch.equal(best, new[:, step])
            ids = torch.cat([ids, best[:, None]], dim=1)


def test_generation_repeats_exactly_with_a_seed_and_differs_without_it():
    model, prompt = build(), tokens(1, 20)
    assert torch.equal(generate(model, prompt, 40), generate(model, prompt, 40))

    def sample(seed):
        return generate(model, prompt, 40, 1.0, 0.9, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_sampling_follows_temperature_and_nucleus():
    model, prompt = build(), tokens(1, 20).expand(400, 20)
    with torch.no_grad():
        logits = model(prompt[:1], logits_to_keep=1)[0, 0]
    drawn = generate(model, prompt, 1, 0.5, 0.6, generator=torch.Generator().manual_seed(0)).flatten()
    probs, order = (logits / 0.5).softmax(-1).sort(descending=True)
    size = int((probs.cumsum(0) < 0.6).sum()) + 1
    assert 2 <= size < 61
    assert set(drawn.tolist()) <= set(order[:size].tolist())
    expected = probs[0] / probs[:size].sum()
    assert abs((drawn == order[0]).float().mean() - expected) < 0.1
    nearly_zero = generate(model, prompt, 1, 1e-4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearly_zero, generate(model, prompt, 1))


def test_top_k_draws_from_the_likeliest_alone_and_before_the_nucleus():
    model, prompt = build(), tokens(1, 20).expand(400, 20)
    with torch.no_grad():
        order = model(prompt[:1], logits_to_keep=1)[0, 0].argsort(descending=True).tolist()

    def drawn(**options):
        return set(
            generate(model, prompt, 1, 3.0, generator=torch.Generator().manual_seed(0), **options).flatten().tolist()
        )

    assert drawn(top_k=5) == set(order[:5]) and len(drawn()) > 20
    assert drawn(top_k=1) == {order[0]}
    assert drawn(top_k=2, top_p=0.4) == {order[0]}  # one of two has more than 0.4, one of all 61 has not
    assert drawn(top_k=0) == drawn(top_k=61) == drawn()


def test_logits_of_a_bf16_model_are_not_rounded_before_the_largest_is_taken():
    model = build(vocab_size=4096).to(torch.bfloat16)
    prompt = torch.randint(4096, (4, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.model(prompt, None, None)
        logits, exact = model(prompt), hidden.double() @ model.lm_head.weight.double().T
        rounded = exact.to(torch.bfloat16)
    ties = (rounded == rounded.amax(-1, keepdim=True)).sum(-1) > 1
    assert ties.any()
    assert logits.dtype == torch.float32 and torch.equal(logits.argmax(-1), exact.argmax(-1))
    assert torch.equal(
        generate(model, prompt[:, :50], 1)[:, 0], model(prompt[:, :50], logits_to_keep=1)[:, -1].argmax(-1)
    )


def test_rows_stop_at_eos_and_generation_when_all_have():
    model, prompt = build(), tokens(2, 20)
    free = generate(model, prompt, 30)
    stop = [int(free[0, 4]), int(free[1, 9])]
    ends = [min(i for i, t in enumerate(row.tolist()) if t in stop) for row in free]
    assert max(ends) < 29
    new = generate(model, prompt, 30, eos_token_id=stop)
    assert new.shape[1] == max(ends) + 1
    for row, unstopped, end in zip(new.tolist(), free.tolist(), ends, strict=True):
        assert row[: end + 1] == unstopped[: end + 1]
        assert set(row[end:]) == {unstopped[end]}


def test_ends_may_be_given_as_any_whole_numbers():
    model, prompt = build(), tokens(1, 20)
    free = generate(model, prompt, 12)[0]
    end = int(free[3])
    expected = generate(model, prompt, 12, eos_token_id=end)
    assert expected.shape[1] < 12
    for given in (torch.tensor(end), torch.tensor([end]), np.int64(end), [np.int64(end)]):
        assert torch.equal(generate(model, prompt, 12, eos_token_id=given), expected)
    with pytest.raises(ValueError, match=r"eos_token_id=1\.5 must be token ids"):
        generate(model, prompt, 12, eos_token_id=1.5)


@pytest.mark.parametrize("options", [{"temperature": 1e-46}, {"temperature": 1.0, "top_p": 1e-46}])
def test_what_float32_rounds_to_nothing_takes_the_likeliest(options):
    model, prompt = build(), tokens(2, 20)
    assert torch.equal(generate(model, prompt, 8, **options), generate(model, prompt, 8))


def test_prompt_and_new_tokens_may_fill_the_context_but_not_exceed_it():
    model, prompt = build(), tokens(1, 150)
    assert generate(model, prompt, 10).shape == (1, 10)
    with pytest.raises(ValueError, match=r"150 prompt tokens and max_new_tokens=11 make 161.*=160"):
        generate(model, prompt, 11)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"max_new_tokens": x}, rf"max_new_tokens={x!r} must be a whole number of at least 1") for x in (0, -3, 2.5)),
        *(({"max_new_tokens": x}, "must be a whole number of at least 1") for x in ("5", True, None, torch.ones(1))),
        ({"temperature": -1.0}, r"temperature=-1.0 must be 0 \(greedy\) or positive"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": float("inf")}, "temperature=inf must be"),
        *(({"temperature": x}, f"temperature={x!r} must be a number") for x in ("hot", "0.7", True, None)),
        ({"temperature": torch.ones(2)}, "must be a number"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p=nan must be above 0"),
        ({"top_p": "all"}, "top_p='all' must be a number"),
        *(({"top_k": x}, f"top_k={x!r} must be a whole number of tokens, or 0 for all") for x in (-1, 2.5, "5", None)),
        *(({"prefill_chunk": x}, f"prefill_chunk={x!r} must be a whole number of at least 1") for x in (0, 2.5, None)),
        *(
            ({"eos_token_id": x}, "eos_token_id=.* must be token ids, or None: no token")
            for x in ("a", -1, [5, 1.5], [True], [5, None])
        ),
        ({"generator": 7}, r"generator=7 must be a torch\.Generator"),
        ({"is_enough": True}, "is_enough=True must be a function of the new tokens"),
        ({"pool": "x"}, "pool='x' must be a DecodePool"),
        ({"cache": "x"}, "cache='x' must be a KVCache"),
        ({"graph": []}, r"graph=\[\] must be True, False or None"),
        ({"graph": "no"}, "graph='no' must be True, False or None"),
    ],
)
def test_options_of_another_type_or_out_of_range_are_named_before_any_work(options, words, monkeypatch):
    model = build()
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=words):
        stream(model, tokens(1, 8), **{"max_new_tokens": 4, **options})  # not read yet


@pytest.mark.parametrize("said", [None, "yes", [None], [object()]])
def test_an_answer_that_is_none_is_named(said):
    with pytest.raises(ValueError, match=r"is_enough gave .* it must say (true or false|it) of each row"):
        generate(build("L2V4"), torch.ones(1, 3, dtype=torch.int64), 3, is_enough=lambda new: said)


def test_numbers_of_other_kinds_are_numbers():
    model, ids = build(), tokens(2, 20)
    expected = generate(model, ids, 6, 0.5, 0.9, top_k=3, generator=torch.Generator().manual_seed(0))
    given = np.int64(6), np.float32(0.5), torch.tensor(0.9)
    options = {"top_k": np.int32(3), "prefill_chunk": np.int64(7), "lengths": np.array([20, 20])}
    new = generate(model, ids.int(), *given, generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(new, expected)


@pytest.mark.parametrize("wrong", [-1, 61, 1 << 40])
def test_a_token_that_the_model_has_not_is_refused_before_any_work(wrong, monkeypatch):
    """On a GPU it would be a device assert, after which the process can do nothing more there."""
    model, ids = build(), tokens(2, 20)
    ids[1, 7] = wrong
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", None)
        for given in (ids, list(ids)):
            with pytest.raises(ValueError, match=rf"input_ids have token {wrong}, and the model has tokens 0 to 60"):
                stream(model, given, 4)
    expected = generate(model, [ids[0], ids[1, :7]], 4)
    assert torch.equal(generate(model, ids, 4, lengths=[20, 7]), expected), "padding is any token"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(1, 5), r"input_ids must be token ids, int64, got torch\.float32"),
        (torch.zeros(1, 5, dtype=torch.bool), r"int64, got torch\.bool"),
        ([torch.zeros(5, dtype=torch.int64), torch.zeros(3)], r"int64, got torch\.float32"),
        ([[1, 2, 3]], r"prompts \[S\] one by one, got \['list'\]"),
        ([1, 2], r"prompts \[S\] one by one, got \['int', 'int'\]"),
        ("text", r"got \['str', 'str', 'str', 'str'\]"),
        (None, r"got \['NoneType'\]"),
    ],
)
def test_prompts_of_another_type_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        stream(build(), given, 4)


def test_cache_refuses_what_does_not_fit_and_can_be_cut_back():
    model = build()
    with pytest.raises(ValueError, match="161 tokens is longer than max_position_embeddings=160"):
        KVCache(model.config, 1, 161)
    for sizes in ((1.5, 40), ("2", 40), (2, 40.0), (True, 40)):
        with pytest.raises(ValueError, match=r"(batch_size|max_length)=.* must be a whole number of at least 1"):
            KVCache(model.config, *sizes)
    with pytest.raises(ValueError, match=r"slack=2\.5 must be a number of tokens, 0 or more"):
        KVCache(model.config, 1, 40, slack=2.5)
    cache = KVCache(model.config, 2, 40)
    for length in (-1, 2.5):
        with pytest.raises(ValueError, match=f"length={length} must be a whole number of at least 0"):
            cache.truncate(length)
    with pytest.raises(ValueError, match=r"num_tokens=1\.5 must be 1 to 8"):
        DecodeGraph(model, cache, 1.5, capture=lambda call: call)
    assert cache.layer_bytes[1] == 2 * 2 * 48 * 2 * 8 * 4  # whole blocks
    with torch.no_grad():
        with pytest.raises(ValueError, match="41 tokens do not fit in a cache of max_length=40"):
            model(tokens(2, 41), cache=cache)
        with pytest.raises(ValueError, match="made for 2 sequences, got 1"):
            model(tokens(1, 4), cache=cache)
        assert cache.length == 0
        first = model(tokens(2, 30), cache=cache)
        cache.truncate(20)
        again = model(tokens(2, 30)[:, 20:], cache=cache)
    torch.testing.assert_close(again, first[:, 20:], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot truncate to 31 tokens"):
        cache.truncate(31)


def test_cache_and_documents_exclude_each_other():
    model = build()
    cache = KVCache(model.config, 1, 40)
    with pytest.raises(ValueError, match="cu_seqlens cannot be combined with cache"):
        model(tokens(1, 8), cache=cache, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))


def test_a_generator_of_another_device_is_refused_where_tokens_are_drawn(monkeypatch):
    model, prompt = build("dense"), torch.tensor([[1, 2, 3]])
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch, "Generator", SimpleNamespace)
    assert torch.equal(generate(model, prompt, 3, 0.0, generator=elsewhere), generate(model, prompt, 3, 0.0))
    with pytest.raises(ValueError, match="generator is on cuda, and the model draws on cpu"):
        generate(model, prompt, 3, 0.5, generator=elsewhere)
