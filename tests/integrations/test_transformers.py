"""An exported folder in transformers: our logits, tokens and gradients, and refusals of what would change them."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from s2.inference import generate
from s2.integrations import HF_FILES, plain_s2_llama
from s2.integrations import modeling_s2_llama as modeling
from s2.model import ModelConfig, Transformer
from s2.model.hf import load_config, load_pretrained, save_pretrained

LAYOUTS = ["L2V4-inter", "L1V3+sink1+dense1", "dense|L1V2<4V6", "2*L1V2|W2|3*L2V3", "W2"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BY_KIND = {"dense": YARN, "sparse": {"rope_theta": 2e4}}


def build(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "attention_layout": "L2V4-inter", "block_size": 16,
        "initializer_range": 0.1, "rope_theta": 5e4, "bos_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    model = Transformer(ModelConfig(**{**sizes, **changes}))
    for parameter in model.parameters():  # norms and biases too: a lost one must show
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def opened(ours, folder, **options):
    save_pretrained(ours, ours.config, folder, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tokens(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def plain(monkeypatch):
    monkeypatch.setattr(modeling, "s2_attention", None)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(params=["package", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        plain(monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_are_ours_at_lengths_across_the_borders_of_blocks(layout, tmp_path, path):
    ours = build(attention_layout=layout)
    theirs = opened(ours, tmp_path)
    for length in (1, 15, 16, 17, 63, 64, 65, 200):
        assert_close(theirs(tokens(2, length)).logits, ours(tokens(2, length)))


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True}, {"rope_scaling": YARN},
     {"rope_scaling": BY_KIND}, {"rope_scaling": {"dense": {"rope_theta": 2e5}, "sparse": None}},
     {"rope_scaling": BY_KIND, "qk_norm": True}, {"head_dim": 20}],
    ids=["tied", "biases", "norms", "yarn", "rope by kind", "theta by kind", "rope by kind, norms", "head_dim"],
)  # fmt: skip
def test_every_part_of_a_model_comes_there_and_back(changes, tmp_path):
    ours = build(**changes)
    theirs = opened(ours, tmp_path / "ours")
    with torch.no_grad():
        expected = ours(tokens(2, 100))
        assert_close(theirs(tokens(2, 100)).logits, expected)
        theirs.save_pretrained(tmp_path / "theirs")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
        assert_close(again(tokens(2, 100)).logits, expected)
        assert_close(load_pretrained(tmp_path / "theirs")(tokens(2, 100)), expected)
    read, written = load_config(tmp_path / "theirs"), ours.config
    assert all(read.rope(dense=kind) == written.rope(dense=kind) for kind in (True, False))
    assert read.replace(rope_scaling=None) == written.replace(rope_scaling=None)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is ours.config.tie_word_embeddings


def test_what_transformers_saves_holds_all_that_opens_it_elsewhere(tmp_path):
    theirs = opened(build(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert all((tmp_path / folder / file.name).read_bytes() == file.read_bytes() for file in HF_FILES)
        values = json.loads((tmp_path / folder / "config.json").read_text())
        assert values["auto_map"] == {
            "AutoConfig": "modeling_s2_llama.S2LlamaConfig",
            "AutoModel": "modeling_s2_llama.S2LlamaModel",
            "AutoModelForCausalLM": "modeling_s2_llama.S2LlamaForCausalLM",
        }
        assert values["model_type"] == "s2_llama"
        with pytest.raises(ValueError, match="s2_attention"):
            LlamaForCausalLM.from_pretrained(tmp_path / folder)


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": BY_KIND, "qk_norm": True}])
@torch.no_grad()
def test_the_model_without_its_head_opens_saves_and_gives_the_same_hidden_states(changes, tmp_path, path):
    ours = build(**changes)
    whole = opened(ours, tmp_path / "ours")
    bare = AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert type(bare) is modeling.S2LlamaModel
    hidden = bare(tokens(2, 100)).last_hidden_state
    assert torch.equal(hidden, whole.model(tokens(2, 100)).last_hidden_state)
    assert_close(ours.lm_head(hidden), ours(tokens(2, 100)))
    bare.save_pretrained(tmp_path / "bare")
    assert all((tmp_path / "bare" / file.name).is_file() for file in HF_FILES)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "bare")(tokens(2, 100)).last_hidden_state, hidden)
    with pytest.raises(ValueError, match="output_attentions=True"):
        bare(tokens(1, 5), output_attentions=True)
    bare.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="would ignore the attention_layout"):
        bare(tokens(1, 5))


def test_a_dense_export_is_a_plain_llama_and_leaves_no_modeling_file_of_an_earlier_one(tmp_path):
    opened(build(), tmp_path)
    theirs = opened(build(attention_layout="dense"), tmp_path)
    assert type(theirs) is LlamaForCausalLM and not hasattr(theirs.config, "auto_map")
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": BY_KIND, "attention_layout": "L1V3+sink1+dense1"}])
def test_greedy_generation_gives_our_tokens(changes, tmp_path, path):
    ours = build(**changes).eval()
    theirs = opened(ours, tmp_path)
    prompt = tokens(2, 37)
    got = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200, do_sample=False)
    assert torch.equal(got[:, 37:], generate(ours, prompt, 200))
    assert len(set(got[0, 37:].tolist())) > 5


@torch.no_grad()
def test_generation_of_a_batch_padded_on_the_left_gives_each_prompts_own_tokens(tmp_path, path):
    ours = build().eval()
    theirs = opened(ours, tmp_path)
    prompts = [tokens(1, length) + shift for shift, length in ((0, 50), (-1, 33), (0, 1), (-1, 17))]
    prompts = [prompt.clamp(0) for prompt in prompts]
    batch = torch.cat([torch.nn.functional.pad(x, (50 - x.shape[1], 0)) for x in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(x), (50 - x.shape[1], 0)) for x in prompts])
    got = theirs.generate(batch, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    for row, prompt in zip(got[:, 50:], prompts, strict=True):
        assert torch.equal(row, generate(ours, prompt, 40)[0])
    logits = theirs(batch, attention_mask=mask).logits
    for row, prompt in zip(logits, prompts, strict=True):
        assert_close(row[50 - prompt.shape[1] :], ours(prompt)[0])


@torch.no_grad()
def test_padding_on_the_right_changes_no_token_before_it(tmp_path, path):
    ours = build()
    theirs = opened(ours, tmp_path)
    ids, mask = tokens(3, 70), torch.ones(3, 70, dtype=torch.long)
    mask[1, 40:], mask[2, 1:] = 0, 0
    logits = theirs(ids, attention_mask=mask).logits
    for row, length in enumerate((70, 40, 1)):
        assert_close(logits[row, :length], ours(ids[row : row + 1, :length])[0])


@pytest.mark.parametrize("layout", ["dense", "L1V3+sink1+dense1"])
@torch.no_grad()
def test_a_pad_token_in_a_prompt_without_a_mask_is_left_out_as_transformers_own_llama_does(layout, tmp_path, path):
    ours = build(attention_layout=layout).eval()
    ids = tokens(2, 70).clamp(1)
    ids[0, 33:40], ids[0, 50], ids[1, :21], ids[1, 40:60] = 0, 0, 0, 0
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if layout == "dense":
        config = modeling.S2LlamaConfig(**ours.config.replace(attention_layout="W2").to_hf_dict())
        config.attention_layout = layout
        theirs = modeling.S2LlamaForCausalLM(config).eval()
        llama = opened(ours, tmp_path)
        theirs.load_state_dict(llama.state_dict())
        assert type(llama) is LlamaForCausalLM
        assert torch.equal(theirs.generate(ids, **options), llama.generate(ids, **options))
        mask = ids.ne(0).long()
        got, expected = (model(ids, attention_mask=mask).logits for model in (theirs, llama))
        assert_close(got * mask[..., None], expected * mask[..., None])
    else:
        theirs = opened(ours, tmp_path)
    for row, got in zip(ids, theirs.generate(ids, **options)[:, 70:], strict=True):
        assert torch.equal(got, generate(ours, row[row != 0][None], 30)[0])


def test_padding_between_tokens_gets_no_gradient_and_changes_none(tmp_path, path):
    theirs = opened(build(), tmp_path)
    ids, mask = tokens(1, 60), torch.ones(1, 60, dtype=torch.long)
    mask[0, 20:35] = 0
    kept = mask[0].bool()
    embeds = theirs.get_input_embeddings()(ids).detach().requires_grad_()
    positions = (mask.cumsum(-1) - 1) * mask
    theirs(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[:, kept].square().sum().backward()
    alone = embeds.detach()[:, kept].requires_grad_()
    theirs(inputs_embeds=alone).logits.square().sum().backward()
    torch.testing.assert_close(embeds.grad[:, kept], alone.grad, atol=1e-4, rtol=1e-3)
    assert not embeds.grad[:, ~kept].any()


@pytest.mark.parametrize("mask", ["none", "ones", "right"])
def test_packed_documents_by_position_are_apart_forward_and_backward(mask, tmp_path, path):
    ours = build()
    theirs = opened(ours, tmp_path)
    lengths, ids = [[16, 1, 53, 30], [100]], tokens(2, 100)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    real = torch.ones_like(ids)
    if mask == "right":
        real[:, 90:] = 0
    given = {} if mask == "none" else {"attention_mask": real}
    logits = theirs(ids, position_ids=positions, **given).logits
    borders = torch.tensor([0, *(n for row in lengths for n in row)]).cumsum(0).int()
    expected = ours(ids, cu_seqlens=borders)
    keep = real.bool()[..., None]
    assert_close(logits * keep, expected * keep)
    direction = torch.randn_like(expected) * keep
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close(theirs.model.layers[0].self_attn.k_proj.weight.grad, ours.model.layers[0].self_attn.k_proj.weight.grad)


@torch.no_grad()
def test_packed_documents_by_borders_are_apart(tmp_path, path):
    ours = build()
    theirs = opened(ours, tmp_path)
    borders = torch.tensor([0, 16, 17, 70], dtype=torch.int32)
    logits = theirs(tokens(1, 70), cu_seq_lens_q=borders).logits
    assert_close(logits, ours(tokens(1, 70), cu_seqlens=borders))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_ours(checkpointing, tmp_path, path, monkeypatch):
    ours = build(tie_word_embeddings=True, qk_norm=True, rope_scaling=BY_KIND)
    theirs = opened(ours, tmp_path).train()
    if checkpointing:
        monkeypatch.setattr(plain_s2_llama, "MOST_SCORES", 6 * 100 * 30)
        theirs.gradient_checkpointing_enable()
    ids = tokens(2, 100)
    loss = theirs(ids, labels=ids, use_cache=False).loss
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    total, count = ours(ids, labels=targets)
    assert_close(loss, total / count)
    loss.backward()
    (total / count).backward()
    expected = {name: x.grad for name, x in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def test_frozen_weights_with_small_trained_ones_beside_them(tmp_path):
    """As PEFT does it: only what was put around the projections gets a gradient."""
    theirs = opened(build(), tmp_path).requires_grad_(False)
    theirs.enable_input_require_grads()
    theirs.gradient_checkpointing_enable()

    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.down = torch.nn.Linear(inner.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, inner.out_features, bias=False)

        def forward(self, x):
            return self.inner(x) + self.up(self.down(x))

    for layer in theirs.model.layers:
        layer.self_attn.q_proj = Around(layer.self_attn.q_proj)
    theirs.train()(tokens(2, 50), labels=tokens(2, 50)).loss.backward()
    trained = [name for name, x in theirs.named_parameters() if x.requires_grad]
    assert len(trained) == 6
    assert all(x.grad.abs().sum() > 0 for x in theirs.parameters() if x.requires_grad)


def test_the_trainer_lowers_the_loss(tmp_path):
    theirs = opened(build(), tmp_path / "hf")
    rows = [{"input_ids": tokens(64), "labels": tokens(64), "attention_mask": torch.ones(64).long()} for _ in range(8)]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_checkpointing=True, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(theirs, settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_a_model_made_of_its_config_draws_weights_for_every_part():
    config = modeling.S2LlamaConfig(**{**build(qk_norm=True, rope_scaling=BY_KIND).config.to_hf_dict()})
    theirs = AutoModelForCausalLM.from_config(config)
    assert type(theirs) is modeling.S2LlamaForCausalLM
    for name, parameter in theirs.named_parameters():
        assert parameter.isfinite().all(), name
        assert (parameter == 1).all() if "norm" in name else 0.05 < parameter.std() < 0.2, name
    assert theirs(tokens(1, 40)).logits.isfinite().all()


@torch.no_grad()
def test_any_llama_attends_by_a_layout_of_its_config():
    config = LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, attn_implementation="s2",
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"config\.attention_layout"):
        theirs(tokens(1, 50))
    theirs.config.attention_layout = "L1V3+dense1"
    with pytest.raises(ValueError, match=r"config\.block_size"):
        theirs(tokens(1, 50))
    theirs.config.block_size = 16
    ours = Transformer(ModelConfig.from_hf_dict({**theirs.config.to_dict(), "model_type": "s2_llama"}))
    ours.load_state_dict(theirs.state_dict())
    assert_close(theirs(tokens(2, 100)).logits, ours(tokens(2, 100)))
    mask = torch.ones(2, 100).long()
    mask[0, :30] = 0
    assert_close(theirs(tokens(2, 100), attention_mask=mask).logits[0, 30:], ours(tokens(2, 100)[:1, 30:])[0])


@torch.no_grad()
def test_autocast_on_weights_in_fp32_attends_in_its_dtype(tmp_path, path):
    theirs, ids = opened(build(), tmp_path), tokens(2, 80)
    expected = theirs(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = theirs(ids, use_cache=True)
        theirs(ids[:, :1], past_key_values=got.past_key_values)
    torch.testing.assert_close(got.logits.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("layout", ["dense", "L1V3+sink1+dense1"])
@torch.no_grad()
def test_padding_on_the_left_may_be_longer_than_a_chunk_of_the_prompt(layout, tmp_path, path):
    theirs, ids = opened(build(attention_layout=layout), tmp_path), tokens(3, 60)
    mask = torch.ones_like(ids)
    mask[0, :45] = mask[1, :20] = 0
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(theirs.generate(ids, prefill_chunk_size=20, **given), theirs.generate(ids, **given))


@torch.no_grad()
def test_borders_may_name_a_document_without_tokens_and_leave_some_behind(tmp_path, path):
    theirs, ids = opened(build(), tmp_path), tokens(1, 100)
    for borders in ([0, 30, 30, 100], [0, 30, 90]):
        given = {"cu_seq_lens_q": torch.tensor(borders, dtype=torch.int32)}
        logits = theirs(ids, position_ids=torch.arange(100)[None], **given).logits
        for begin, end in itertools.pairwise(borders):
            if begin < end:
                assert_close(logits[:, begin:end], theirs(ids[:, begin:end]).logits)
    for borders in ([0, 30, 120], [10, 100], [0, 60, 30, 100]):
        with pytest.raises(ValueError, match=r"borders|cu_seqlens"):
            theirs(ids, cu_seq_lens_q=torch.tensor(borders, dtype=torch.int32))


@torch.no_grad()
def test_early_exit_drafts_with_the_first_layers_of_the_same_layout(tmp_path, path):
    theirs, ids = opened(build(attention_layout="L1V3+sink1+dense2"), tmp_path), tokens(1, 60)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = theirs.generate(ids, **given)
    assert torch.equal(theirs.generate(ids, assistant_early_exit=2, **given), expected)


# ---------------------------------------------------------------- what is refused


@torch.no_grad()
def test_a_mask_beside_borders_positions_within_a_chunk_and_odd_blocks_are_refused(tmp_path, path):
    theirs, ids, mask = opened(build(), tmp_path), tokens(1, 60), torch.ones(1, 60).long()
    borders = torch.tensor([0, 60], dtype=torch.int32)
    assert theirs(ids, attention_mask=mask, cu_seq_lens_q=borders).logits.isfinite().all()
    mask[0, 50:] = 0
    with pytest.raises(ValueError, match="attention_mask with padding beside cu_seq_lens_q"):
        theirs(ids, attention_mask=mask, cu_seq_lens_q=borders)
    for positions in ([40, 41, 41, 42], [40, 41, 43, 44], [40, 41, 0, 1]):
        cache = theirs(ids[:, :40]).past_key_values
        with pytest.raises(ValueError, match="must grow by 1 from token to token behind the 40"):
            theirs(ids[:, 40:44], past_key_values=cache, position_ids=torch.tensor([positions]))
    theirs.config.block_size = 17
    with pytest.raises(ValueError, match=r"block_size=17 is not supported"):
        type(theirs)(theirs.config)


@torch.no_grad()
def test_classes_with_other_masks_than_causal_ones_are_refused_by_the_name_of_the_mask():
    sizes = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "s2",
    }  # fmt: skip
    experts = {"intermediate_size_mlp": 96, "num_local_experts": 2, "interleave_moe_layer_step": 99}
    full = {"sliding_window": 512, "layer_types": ["full_attention"] * 2}
    for config, name in (
        (LlamaConfig(**sizes, is_causal=False), "is_causal=False is not supported"),
        (
            Gemma3TextConfig(**sizes, **full, use_bidirectional_attention=True),
            "is causal, and this model's mask|is_causal=False",
        ),
        (Llama4TextConfig(**sizes, **experts, attention_chunk_size=32), "this model's mask is not .*: chunked_overlay"),
        (Gemma3TextConfig(**sizes, **full), ""),
    ):
        theirs = AutoModelForCausalLM.from_config(config).eval()
        theirs.config.attention_layout, theirs.config.block_size = "dense", 16
        if name:
            with pytest.raises(ValueError, match=name):
                theirs(tokens(1, 50))
        else:
            assert theirs(tokens(1, 50)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_another_attention_is_refused_whenever_it_is_asked_for(name, tmp_path):
    with pytest.raises(ValueError, match="would ignore the attention_layout"):
        opened(build(), tmp_path, attn_implementation=name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.config._attn_implementation = name
    with pytest.raises(ValueError, match="would ignore the attention_layout"):
        theirs(tokens(1, 5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"position_ids": torch.tensor([[0, 1, 0, 0, 1, 2]]), "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])},
            "packed documents with padding between tokens",
        ),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, r"\[1, 1, 6, 6\]"),
        ({"attention_mask": torch.ones(1, 9).long()}, "an attention_mask of 9 for 6 tokens"),
        ({"position_ids": torch.tensor([[0, 1, 2, 7, 8, 9]])}, "position_ids must grow by 1"),
        (
            {"position_ids": torch.tensor([[0, 0, 1, 0, 1, 2]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
            "packed documents with padding on the left",
        ),
    ],
)
def test_masks_and_positions_that_no_pattern_fits_are_refused(given, message, tmp_path, path):
    theirs = opened(build(), tmp_path)
    with pytest.raises(ValueError, match=message):
        theirs(tokens(1, 6), **given)


@torch.no_grad()
def test_a_cache_is_continued_by_tokens_of_one_document_alone(tmp_path):
    theirs = opened(build(), tmp_path)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    cache = theirs(tokens(1, 6), position_ids=positions).past_key_values
    with pytest.raises(ValueError, match="fewer tokens than the 6 in the cache"):
        theirs(tokens(1, 1), position_ids=torch.tensor([[3]]), past_key_values=cache)
    ours, ids, shift = build(), tokens(2, 40), 5  # a shift of all positions turns nothing
    cache = theirs(ids[:, :33], position_ids=torch.arange(33)[None] + shift).past_key_values
    rest = theirs(ids[:, 33:], position_ids=torch.arange(33, 40)[None] + shift, past_key_values=cache)
    assert_close(rest.logits, ours(ids)[:, 33:])


def test_a_cache_of_fixed_size_is_refused(tmp_path):
    theirs = opened(build(), tmp_path)
    with pytest.raises(ValueError, match="DynamicCache"):
        theirs.generate(tokens(1, 6), max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_layout": None}, "lacks attention_layout"),
        ({"attention_layout": "L2"}, "attention_layout='L2'"),
        ({"attention_layout": "3*L2V4"}, "rules for 3 heads"),
        ({"qkv_bias": True, "qk_norm": True}, "qkv_bias and qk_norm"),
    ],
)
def test_a_config_that_is_no_model_is_refused_when_it_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        modeling.S2LlamaForCausalLM(modeling.S2LlamaConfig(**{**build().config.to_hf_dict(), **changes}))


def test_a_rope_beside_those_by_kind_of_layer_is_refused(tmp_path):
    ours = build(rope_scaling=BY_KIND)
    opened(ours, tmp_path)
    with pytest.raises(ValueError, match=r"rope_parameters=.*500.* would be ignored.*assign rope_by_kind"):
        AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    linear = {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0}
    changed = {"dense": linear, "sparse": {"rope_type": "default", "rope_theta": 500.0}}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, rope_by_kind=changed)
    wanted = load_pretrained(tmp_path, overrides={"rope_scaling": changed})
    with torch.no_grad():
        assert_close(theirs(tokens(1, 100)).logits, wanted(tokens(1, 100)))
    with pytest.raises(ValueError, match=r"rope_by_kind\.dense=5 must be null or a mapping"):
        AutoModelForCausalLM.from_pretrained(tmp_path, rope_by_kind={"dense": 5, "sparse": linear})
    unsaid = {"dense": None, "sparse": linear}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, rope_by_kind=unsaid)
    wanted = load_pretrained(tmp_path, overrides={"rope_scaling": unsaid})
    with torch.no_grad():
        assert_close(theirs(tokens(1, 100)).logits, wanted(tokens(1, 100)))


def test_probabilities_dropout_and_heads_of_one_rank_are_refused(tmp_path):
    theirs = opened(build(), tmp_path)
    with pytest.raises(ValueError, match="output_attentions=True"):
        theirs.generate(tokens(1, 6), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    theirs.train().model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        theirs(tokens(1, 6))
    theirs.eval().config.num_key_value_heads = 4
    with pytest.raises(ValueError, match="tensor parallelism"):
        theirs(tokens(1, 6))


def test_the_demos_start_is_an_export_as_they_are_now(tmp_path):
    model = load_pretrained("recipes/demo/start", dtype=torch.bfloat16)
    written = save_pretrained(model, model.config, tmp_path / "hf", source="recipes/demo/start")
    names = [path.name for path in written.iterdir() if not path.name.startswith(".")]
    for name in names:
        assert (written / name).read_bytes() == Path("recipes/demo/start", name).read_bytes(), name
    assert set(names) == {path.name for path in Path("recipes/demo/start").iterdir()} - {"README.md"}


def test_an_export_without_files_of_its_own_opens_with_the_package(tmp_path):
    """As they were written at first."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(Path("recipes/demo/start", name).read_bytes())
    said = json.loads((tmp_path / "config.json").read_text())
    said = {key: value for key, value in said.items() if key not in ("auto_map", "attn_implementation")}
    (tmp_path / "config.json").write_text(json.dumps(said))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_pretrained("recipes/demo/start", dtype=torch.float32)
    ids = torch.arange(300)[None] % 97
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-3, rtol=1e-3)
    assert AutoConfig.from_pretrained(tmp_path).attention_layout == "L4V4-inter"
