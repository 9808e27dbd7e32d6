"""Caches of transformers that drop keys: the numbers of one that keeps them all, in the memory that patterns need."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

from s2.integrations import lazy
from s2.integrations import modeling_s2_llama as modeling
from s2.integrations.kept_layer import LAYER_TYPE, KeptLayer
from s2.model import ModelConfig
from s2.model.layouts import kv_bytes_per_token

LAYOUTS = [
    "L2V4-inter", "L1V3+sink1+dense1", "L1V3<5V4", "L2V3<5+sink2", "W2", "dense|L1V2<4V6", "W1|L2V3+sink1-inter",
]  # fmt: skip


def build(layout="L2V4+dense1", seed=0, **changes):
    sizes = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 16384, "attention_layout": layout, "block_size": 16,
        "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    return modeling.S2LlamaForCausalLM(modeling.S2LlamaConfig(**{**sizes, **changes})).eval()


def tokens(*shape, seed=1):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def caches(model):
    """One that drops keys, and one that keeps them."""
    return DynamicCache(config=model.config), DynamicCache()


def kept(cache):
    return [layer for layer in cache.layers if isinstance(layer, KeptLayer)]


def drops(cache):
    return bool(kept(cache)) and all(layer._store is not None for layer in kept(cache))


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def both(model, pair, ids, mask=None):
    """Logits of the two caches, which are fed the same."""
    given = {} if mask is None else {"attention_mask": mask, "position_ids": positions(mask)[:, -ids.shape[1] :]}
    got, expected = (model(ids, past_key_values=cache, **given).logits for cache in pair)
    assert_close(got, expected)
    return got


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_are_those_of_a_cache_that_keeps_every_key(layout):
    model, prompt = build(layout), tokens(2, 37)
    options = {"max_new_tokens": 200, "do_sample": False, "return_dict_in_generate": True}
    given = {"attention_mask": torch.ones_like(prompt), **options}
    got = model.generate(prompt, **given)
    whole = DynamicCache()
    expected = model.generate(prompt, past_key_values=whole, **given)
    assert torch.equal(got.sequences, expected.sequences)
    assert len(set(got.sequences[0, 37:].tolist())) > 5
    cache = got.past_key_values
    assert drops(cache) and not kept(whole)
    for layer, other in zip(cache.layers, whole.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length() == 236
        if isinstance(layer, KeptLayer):
            assert layer.num_bytes < 2 * other.keys.nbytes
    sparse = [type(layer) is KeptLayer for layer in cache.layers]
    assert sparse == [not pattern.is_dense for pattern in ModelConfig.from_hf_dict(model.config.to_dict()).layout]


@pytest.mark.parametrize("case", range(12))
@torch.no_grad()
def test_any_calls_give_the_logits_of_a_cache_that_keeps_every_key(case, seed):
    """Prompts padded on the left, chunks of any length, steps, rows chosen and tokens taken back."""
    draw = random.Random(seed + case)
    model = build(draw.choice(LAYOUTS), num_hidden_layers=2)
    rows, total = draw.choice([1, 3]), draw.randint(1, 120)
    pair = caches(model)
    mask = torch.ones(rows, total, dtype=torch.long)
    for row in range(1, rows):
        mask[row, : draw.choice([0, draw.randrange(total)])] = 0
    recording = draw.random() < 0.5
    if recording and draw.random() < 0.5:
        for cache in pair:
            cache.activate_past_recording()
    logits = both_padded(model, pair, tokens(rows, total, seed=draw.randrange(1000)), mask)
    assert logits.isfinite().all() and drops(pair[0])
    if recording and not kept(pair[0])[0].record_past:
        pair[0].activate_past_recording()
    floor, written = kept(pair[0])[0]._floor, total
    for _ in range(12):
        what = draw.choice(["step", "step", "few", "chunk", "rows", "crop", "copy"])
        if what == "rows":
            chosen = torch.tensor([draw.randrange(len(mask)) for _ in range(draw.choice([1, 2, 4]))])
            for cache in pair:
                draw.choice([cache.reorder_cache, cache.batch_select_indices])(chosen)
            mask = mask[chosen]
        elif what == "crop":
            length = draw.randint(floor, mask.shape[1]) if recording else max(mask.shape[1] - 20, written - 16)
            if 0 < length <= mask.shape[1] and mask[:, :length].sum(dim=1).min() > 0:
                for cache in pair:
                    cache.crop(length - mask.shape[1])
                mask, floor = mask[:, :length], length
        elif what == "copy":
            pair = tuple(copy.deepcopy(cache) for cache in pair)
        else:
            count = {"step": 1, "few": draw.randint(2, 8), "chunk": draw.randint(9, 100)}[what]
            mask = torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)
            both(model, pair, tokens(len(mask), count, seed=draw.randrange(1000)), mask)
            written = max(written, mask.shape[1])
        assert pair[0].get_seq_length() == pair[1].get_seq_length() == mask.shape[1]
        assert pair[0].get_mask_sizes(3, 0) == pair[1].get_mask_sizes(3, 0) == (mask.shape[1] + 3, 0)


def both_padded(model, pair, ids, mask):
    given = {"attention_mask": mask, "position_ids": positions(mask)}
    got, expected = (model(ids, past_key_values=cache, **given).logits for cache in pair)
    assert_close(got, expected)
    return got


def test_beams_are_those_of_a_cache_that_keeps_every_key():
    model, prompt = build(), tokens(2, 50)
    mask = torch.ones_like(prompt)
    mask[0, :19] = 0
    for extra in ({}, {"do_sample": True, "top_k": 5}):
        options = {"attention_mask": mask, "max_new_tokens": 60, "num_beams": 3, "num_return_sequences": 2, **extra}
        found = []
        for cache in caches(model):
            torch.manual_seed(0)
            found.append(model.generate(prompt, past_key_values=cache, pad_token_id=0, **options))
            assert bool(kept(cache)) == drops(cache)
        assert torch.equal(*found)


@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_assisted_tokens_are_the_greedy_ones(helper):
    model, prompt = build(), tokens(1, 70)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 50}
    expected = model.generate(prompt, **options)
    if helper == "prompt lookup":
        given = {"prompt_lookup_num_tokens": 40, "max_matching_ngram_size": 1}
    else:
        assistant = build("L1V3")  # of the same weights, so that some tokens are right
        assistant.generation_config.num_assistant_tokens = 24
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0
        given = {"assistant_model": assistant}
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options, **given), expected)
    assert drops(cache)


@torch.no_grad()
def test_tokens_are_taken_back_as_far_as_rings_hold_what_is_seen_or_as_was_asked_for():
    model, ids = build("L2V4+sink1"), tokens(1, 400)
    cache = DynamicCache(config=model.config)
    model(ids[:, :200], past_key_values=cache)
    with pytest.raises(ValueError, match=r"cannot crop 200 tokens to 140.*a context of 176 or more.*activate_past_rec"):
        cache.crop(-60)
    with pytest.raises(ValueError, match=r"crop\(5\) must be negative"):
        cache.crop(5)
    cache.activate_past_recording()
    for begin in range(200, 260, 5):
        model(ids[:, begin : begin + 5], past_key_values=cache)
    cache.crop(-60)
    again = model(ids[:, 200:], past_key_values=cache).logits
    assert_close(again, model(ids, use_cache=False).logits[:, 200:])
    with pytest.raises(ValueError, match="cannot crop 400 tokens to 170"):
        cache.crop(-230)
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    assert_close(model(ids[:, :90], past_key_values=cache).logits, model(ids[:, :90], use_cache=False).logits)


@torch.no_grad()
def test_a_prompt_that_may_be_taken_back_is_dropped_once_none_of_it_was():
    model, ids = build("L1V4+dense1"), tokens(1, 1000)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :900], past_key_values=cache)
    layer = cache.layers[0]
    before = layer.num_bytes
    cache.crop(-10)
    assert layer.num_bytes < 0.5 * before
    assert_close(model(ids[:, 890:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 890:])


@torch.no_grad()
def test_longer_rings_do_not_claim_what_the_shorter_ones_had_dropped():
    model, ids = build("W2"), tokens(1, 400)
    cache = DynamicCache(config=model.config)
    model(ids[:, :200], past_key_values=cache)
    cache.activate_past_recording()
    model(ids[:, 200:300], past_key_values=cache)
    cache.crop(-100)
    with pytest.raises(ValueError, match="cannot crop 200 tokens to 170"):
        cache.crop(-30)
    assert_close(model(ids[:, 200:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 200:])


@torch.no_grad()
def test_rows_go_on_without_those_that_were_padded():
    model, ids = build(), tokens(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    pair = caches(model)
    both_padded(model, pair, ids, mask)
    for cache in pair:
        cache.batch_select_indices(torch.tensor([True, False, True]))
    both(model, pair, ids[:2, :9])


@torch.no_grad()
def test_rows_are_repeated_and_copies_are_apart():
    model, ids = build("L1V3+sink1"), tokens(2, 90)
    pair = caches(model)
    both(model, pair, ids)
    for cache in pair:
        cache.batch_repeat_interleave(3)
    twins = [copy.deepcopy(cache) for cache in pair]
    both(model, pair, tokens(6, 40, seed=2))
    logits = both(model, twins, tokens(6, 1, seed=3))
    assert not torch.equal(logits[0], logits[3])
    pair[0].reset()
    assert pair[0].get_seq_length() == 0 and not sum(layer.num_bytes for layer in kept(pair[0]))
    both(model, (pair[0], DynamicCache()), tokens(3, 30, seed=4))


def test_a_returned_cache_is_continued_by_another_prompt():
    model, prompt = build(), tokens(1, 60)
    options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    ids = torch.cat([first.sequences, tokens(1, 80, seed=5)], dim=1)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **options)
    assert drops(got.past_key_values)
    assert torch.equal(got.sequences, model.generate(ids, attention_mask=torch.ones_like(ids), **options).sequences)
    assert got.past_key_values.get_seq_length() == 219


@pytest.mark.parametrize("fed", ["at once", "in chunks and steps"])
@torch.no_grad()
def test_memory_at_8k_tokens_is_what_the_pattern_needs(fed):
    model = build("L8V16-inter", block_size=64, num_hidden_layers=2, hidden_size=12, head_dim=2, intermediate_size=8)
    cache, ids = DynamicCache(config=model.config), tokens(1, 8192)
    pieces = [ids] if fed == "at once" else [*ids[:, :8128].split(1016, dim=1), *ids[:, 8128:].split(1, dim=1)]
    for piece in pieces:
        model(piece, past_key_values=cache, logits_to_keep=1)
    held = sum(layer.num_bytes if isinstance(layer, KeptLayer) else 2 * layer.keys.nbytes for layer in cache.layers)
    needed = kv_bytes_per_token(ModelConfig.from_hf_dict(model.config.to_dict()), 8192) * 8192 * 2  # in float32
    assert needed < 0.6 * 8192 * 2 * 2 * 2 * 2 * 4  # of 2 layers with 2 heads of 2, keys and values in float32
    assert needed <= held < 1.03 * needed


def test_gradients_go_through_a_cache_that_was_filled_with_them_and_to_new_tokens_behind_one_that_was_not():
    model, ids = build("dense|L1V3+sink1"), tokens(1, 120)
    embeds = model.get_input_embeddings()(ids).detach()

    def gradient(cache, is_recorded):
        x = embeds.clone().requires_grad_()
        with torch.set_grad_enabled(is_recorded):
            model(inputs_embeds=x[:, :70], past_key_values=cache)
        logits = [
            model(inputs_embeds=x[:, begin:end], past_key_values=cache).logits for begin, end in ((70, 74), (74, 120))
        ]
        torch.cat(logits, dim=1).square().sum().backward()
        return x.grad

    for is_recorded in (True, False):
        dropping, whole = caches(model)
        got, expected = gradient(dropping, is_recorded), gradient(whole, is_recorded)
        assert drops(dropping) != is_recorded
        if is_recorded:
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
            assert got[:, :70].abs().sum() > 0
        else:  # keys that were kept are constants
            torch.testing.assert_close(got[:, 74:], expected[:, 74:], atol=1e-4, rtol=1e-3)


def test_a_cache_filled_under_inference_mode_goes_on_without_it():
    model, ids = build(), tokens(1, 100)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :50], past_key_values=cache)
    with torch.no_grad():
        assert_close(model(ids[:, 50:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 50:])


@torch.no_grad()
def test_another_scale_of_the_scores_holds_in_every_call():
    model, ids = build(), tokens(1, 100)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.5
    pair = caches(model)
    for piece in ids.split([60, 1, 39], dim=1):
        both(model, pair, piece)


# ---------------------------------------------------------------- what keeps everything


@torch.no_grad()
def test_rows_padded_on_the_right_or_within_and_packed_documents_are_kept_whole():
    model, ids = build(), tokens(2, 60)
    right, within = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 50:], within[0, 20:30] = 0, 0
    for mask in (right, within):
        pair = caches(model)
        both_padded(model, pair, ids, mask)
        assert kept(pair[0]) and not drops(pair[0])
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        both(model, pair, ids[:, :1], mask)
        assert torch.equal(pair[0].layers[0].keys, pair[1].layers[0].keys)
        pair[0].crop(-1)
        assert pair[0].get_seq_length() == 60
    cache = DynamicCache(config=model.config)
    packed = torch.cat([torch.arange(20), torch.arange(40)])[None]
    model(ids[:1], position_ids=packed, past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 60


def test_layers_whose_rules_are_of_query_heads_have_plain_caches():
    model = build("2*L1V2|W2|3*L2V3")
    assert all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def test_without_the_package_there_are_no_types_of_layers(monkeypatch):
    model = build()
    assert model.config.layer_types == [LAYER_TYPE, "full_attention", LAYER_TYPE]
    monkeypatch.setattr(modeling, "s2_attention", None)
    assert not hasattr(model.config, "layer_types")
    assert all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def test_types_of_layers_are_neither_saved_nor_in_the_way_of_it(tmp_path):
    config = build().config
    config.save_pretrained(tmp_path)
    assert "layer_types" not in config.to_dict()
    assert type(config).from_pretrained(tmp_path).layer_types == config.layer_types
    config.attention_layout = "L2"
    assert not hasattr(config, "layer_types")


def test_the_type_is_registered_by_the_import_alone():
    assert DYNAMIC_LAYER_TYPE_MAPPING[LAYER_TYPE] is KeptLayer and lazy._CACHE_LAYER == LAYER_TYPE
    assert type(lazy._cache_layer()) is KeptLayer


def test_flags_are_those_of_a_cache_that_grows():
    cache = DynamicCache(config=build().config)
    assert not cache.is_compileable and cache.is_croppable and not any(cache.is_sliding)
    assert cache.get_max_length() == -1


# ---------------------------------------------------------------- what is refused


@torch.no_grad()
def test_another_model_is_told_that_it_cannot_use_such_a_cache():
    model, ids = build(), tokens(1, 5)
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("auto_map", "model_type")}
    for name in ("sdpa", "eager"):
        other = LlamaForCausalLM(LlamaConfig(**{**config, "attn_implementation": name})).eval()
        with pytest.raises(ValueError, match="which the attention 's2' alone can attend to"):
            other(ids, past_key_values=DynamicCache(config=model.config))


@torch.no_grad()
def test_what_does_not_continue_a_cache_is_refused():
    model, ids = build(), tokens(2, 50)
    mask = torch.ones(2, 51, dtype=torch.long)
    mask[1, :7] = 0
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask[:, :50], past_key_values=cache)
    with pytest.raises(ValueError, match="has no keys and values of all tokens"):
        list(cache)
    other = mask.clone()
    other[1, 7] = 0
    with pytest.raises(ValueError, match=r"rows that begin at \[0, 8\], but those in the cache begin at \[0, 7\]"):
        model(ids[:, :1], attention_mask=other, past_key_values=cache)
    other = mask.clone()
    other[0, 50] = 0
    with pytest.raises(ValueError, match="cannot follow tokens whose keys were dropped"):
        model(ids[:, :1], attention_mask=other, past_key_values=cache)
    with pytest.raises(ValueError, match=r"3 rows in torch\.float32 cannot continue a cache of 2"):
        model(tokens(3, 1), attention_mask=mask[[0, 1, 1]], past_key_values=cache)
    model.config.attention_layout = "L1V4"
    with pytest.raises(ValueError, match=r"attends by L1V4 .* filled by L2V4"):
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_a_cache_made_of_data_keeps_all_of_it():
    model, ids = build(), tokens(2, 60)
    whole = DynamicCache()
    model(ids[:, :50], past_key_values=whole)
    cache = DynamicCache([(layer.keys, layer.values) for layer in whole.layers], config=model.config)
    assert kept(cache) and cache.get_seq_length() == 50
    expected = model(ids[:, 50:], past_key_values=whole).logits
    assert_close(model(ids[:, 50:], past_key_values=cache).logits, expected)
