"""Checkpoints of Llama, Mistral, Qwen2 and Qwen3: the logits of transformers' own classes, there and back."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from s2.model import ModelConfig, Transformer
from s2.model.flops import matmul_parameters
from s2.model.hf import load_config, load_pretrained, load_state_dict, save_pretrained
from s2.model.rope import RotaryEmbedding
from s2.training.optim import OptimizerConfig, build_adamw

SIZES = {
    "vocab_size": 120, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 0,
    "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}  # fmt: skip
PLAIN = {key: SIZES[key] for key in SIZES if key != "rope_parameters"} | {"rope_theta": 5e4, "head_dim": 16}
FAMILIES = {
    "llama": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A small model of transformers, all weights random (biases and norms too), and its folder."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SIZES, **FAMILIES[request.param]))
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    return request.param, theirs.eval(), tmp_path / "theirs"


def logits(model):
    ids = torch.randint(120, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_every_family_has_the_logits_of_its_own_class_there_and_back(family, tmp_path):
    name, theirs, folder = family
    ours = load_pretrained(folder)
    expected = logits(theirs)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    assert ours.config.num_parameters() == theirs.num_parameters()
    save_pretrained(ours, ours.config, tmp_path / "ours", dtype=torch.float32)
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert back.config.model_type == {"mistral": "llama"}.get(name, name)
    torch.testing.assert_close(logits(back), expected, atol=1e-5, rtol=1e-5)
    before, after = load_state_dict(folder), load_state_dict(tmp_path / "ours")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_sparse_layout_on_any_family_is_a_type_of_our_own_and_comes_back(family, tmp_path):
    _, _, folder = family
    layout = {"attention_layout": "L2V4+sink1+dense1", "block_size": 16, "max_position_embeddings": 512}
    ours = load_pretrained(folder, overrides=layout)
    save_pretrained(ours, ours.config, tmp_path / "ours", dtype=torch.float32, source=folder)
    assert json.loads((tmp_path / "ours/config.json").read_text())["model_type"] == "s2_llama"
    assert load_config(tmp_path / "ours") == ours.config
    assert torch.equal(logits(load_pretrained(tmp_path / "ours")), logits(ours))


def test_matrices_alone_are_decayed_and_counted_as_work(family):
    ours = load_pretrained(family[2])
    groups = build_adamw(ours, OptimizerConfig(weight_decay=0.1), fused=False).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, rest = (group["params"] for group in groups)
    names = {parameter: name for name, parameter in ours.named_parameters()}
    assert all(("bias" in names[p] or "norm" in names[p]) for p in rest)
    assert not any("bias" in names[p] or "norm" in names[p] for p in decayed)
    looked_up = 0 if ours.config.tie_word_embeddings else ours.model.embed_tokens.weight.numel()
    assert matmul_parameters(ours.config) == sum(p.numel() for p in decayed) - looked_up


def test_new_weights_of_every_family_begin_with_zero_biases_and_unit_norms(family):
    with torch.device("meta"):
        ours = Transformer(load_config(family[2]))
    ours.to_empty(device="cpu").reset_parameters()
    for name, parameter in ours.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (1 if "norm" in name else 0)).all(), name


def test_layers_rotate_by_their_kind(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0}
    config = ModelConfig(**PLAIN, attention_layout="L2V4+dense1", block_size=16, rope_scaling=scaling)
    torch.manual_seed(0)
    plain = Transformer(config)
    alike, mixed = (
        Transformer(config.replace(rope_scaling={"dense": scaling, "sparse": sparse}))
        for sparse in (scaling, {"rope_theta": 1e3})
    )
    for other in (alike, mixed):
        other.load_state_dict(plain.state_dict())
    assert alike.model.ropes[0] is alike.model.ropes[1]
    assert torch.equal(logits(alike), logits(plain))
    assert not torch.allclose(logits(mixed), logits(plain), atol=1e-3)
    ids, positions = torch.arange(100)[None], torch.arange(100)[None]
    ropes = RotaryEmbedding(16, 1e3, None), RotaryEmbedding(16, 5e4, scaling)  # of the sparse and of the dense layer
    with torch.no_grad():
        hidden = mixed.model.embed_tokens(ids)
        for block, rope in zip(mixed.model.blocks, ropes, strict=True):
            hidden = block(hidden, *rope(positions))
        assert torch.equal(mixed.model(ids, None, None), mixed.model.norm(hidden))
    save_pretrained(mixed, mixed.config, tmp_path, dtype=torch.float32)
    assert torch.equal(logits(load_pretrained(tmp_path)), logits(mixed))


def test_a_model_that_attends_as_another_rotates_as_it():
    by_kind = {"dense": {"rope_theta": 2e5}, "sparse": None}
    mixed = ModelConfig(**PLAIN, attention_layout="L2V4+dense1", block_size=16, rope_scaling=by_kind)
    dense = mixed.replace(attention_layout="dense", rope_scaling=None)
    torch.manual_seed(0)
    model, expected = Transformer(dense), Transformer(mixed)
    expected.load_state_dict(model.state_dict())
    before = logits(model)
    model.attend_as(mixed)
    assert torch.equal(logits(model), logits(expected))
    model.attend_as(dense)
    assert torch.equal(logits(model), before)
