"""GGUF checkpoints become folders to start from. The files are written by the `gguf` package, as llama.cpp's converter
writes them, from models of transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from s2.model.hf import load_config, load_pretrained

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import convert_gguf
from convert_gguf import convert

VOCABULARY = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd",
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
]  # fmt: skip
SIZES = {
    "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
    "rms_norm_eps": 1e-5, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def vocabulary(family: str) -> list[str]:
    return VOCABULARY if family == "llama" else [token.replace("▁", "Ġ") for token in VOCABULARY]


def tensors_of(model: PreTrainedModel, family: str) -> dict[str, np.ndarray]:
    """Names and values as llama.cpp has them: in a Llama, rows of a head are pairs of a rotation, not halves."""
    found = {}
    for name, value in model.state_dict().items():
        place, _, kind = name.rpartition(".")
        if place == "lm_head" and model.config.tie_word_embeddings:
            continue
        if place.startswith("model.layers."):
            _, _, layer, part = place.split(".", 3)
            if family == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                value = as_pairs(value, model.config.head_dim)
            found[f"blk.{layer}.{NAMES[part]}.{kind}"] = value.numpy()
        else:
            found[f"{NAMES[place]}.{kind}"] = value.numpy()
    return found


def as_pairs(weight: Tensor, head_dim: int) -> Tensor:
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape).contiguous()


def write(
    path: Path,
    family: str = "llama",
    *,
    keys: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    more: Mapping[str, np.ndarray] | None = None,
    **sizes: Any,
) -> PreTrainedModel:
    """A model and its file. `keys` replaces keys (None leaves one out), `without` drops tensors, `more` adds some."""
    torch.manual_seed(0)
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**SIZES | sizes)).eval()
    config = model.config
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:  # norms and biases, which begin alike
                weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    said = {
        f"{family}.context_length": config.max_position_embeddings,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.feed_forward_length": config.intermediate_size,
        f"{family}.attention.head_count": config.num_attention_heads,
        f"{family}.attention.head_count_kv": config.num_key_value_heads,
        f"{family}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{family}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{family}.rope.dimension_count": getattr(config, "head_dim", 16),
        f"{family}.vocab_size": config.vocab_size,
        "tokenizer.chat_template": "{{ messages }}",
        **(keys or {}),
    }
    writer = gguf.GGUFWriter(str(path), family)
    for key, value in said.items():
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(key, value)
            case str():
                writer.add_string(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case list():
                writer.add_array(key, value)
    if family == "llama":  # SentencePiece
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * 3 + [-1.0] * (len(VOCABULARY) - 3))
        writer.add_unk_token_id(0)
    else:  # BPE of bytes
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(["a b", "c d"])
    writer.add_token_list(vocabulary(family))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(VOCABULARY) - 262) + [3] * 3)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in (tensors_of(model, family) | dict(more or {})).items():
        if name not in without:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def assert_equal(folder: Path, model: PreTrainedModel) -> None:
    ids = torch.randint(3, len(VOCABULARY), (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(folder)(ids), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_the_model_of_the_file(tmp_path: Path, family: str, tied: bool) -> None:
    theta = {"rope_type": "default", "rope_theta": 5e5}
    head_dim = 128 if family == "qwen3" else 16  # transformers reads no other of Qwen3
    model = write(tmp_path / "small.gguf", family, tie_word_embeddings=tied, rope_parameters=theta, head_dim=head_dim)
    folder = convert(tmp_path / "small.gguf", tmp_path / "hf")
    assert_equal(folder, model)
    config = load_config(folder)
    assert config.tie_word_embeddings is tied and config.rope_theta == 5e5 and config.max_position_embeddings == 256
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert set(vocabulary(family)) <= set(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_quantised_weights_are_written_as_the_file_rounds_them(tmp_path: Path) -> None:
    model = write(tmp_path / "small.gguf")
    name = "blk.0.ffn_up.weight"
    rounded = gguf.quants.quantize(tensors_of(model, "llama")[name], gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(str(tmp_path / "rounded.gguf"), "llama")
    reader = gguf.GGUFReader(tmp_path / "small.gguf")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            element = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, rounded, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = convert(tmp_path / "rounded.gguf", tmp_path / "hf")
    expected = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0)
    taken = load_pretrained(folder).state_dict()
    weight = next(
        value for key, value in taken.items() if value.shape == (96, 64) and "layers.0" in key and "up" in key
    )
    torch.testing.assert_close(weight, torch.from_numpy(expected))


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.original_context_length": 256, "llama.rope.scaling.finetuned": False},
        {"llama.expert_count": 0, "llama.expert_used_count": 0},
        {"llama.attention.key_length": 16, "llama.attention.value_length": 16, "llama.rope.dimension_count": None},
        {"llama.vocab_size": None, "llama.rope.freq_base": None, "general.size_label": "tiny"},
    ],
)
def test_keys_that_change_nothing_are_taken(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = write(tmp_path / "small.gguf", keys=keys)
    assert_equal(convert(tmp_path / "small.gguf", tmp_path / "hf"), model)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"llama.rope.scaling.type": "linear"}, r"RoPE is scaled.*llama.rope.scaling.type: 'linear'"),
        ({"llama.rope.scaling.factor": 4.0}, r"RoPE is scaled.*llama.rope.scaling.factor: 4.0"),
        ({"llama.rope.scaling.attn_factor": 1.5}, r"RoPE is scaled.*attn_factor: 1.5"),
        ({"llama.rope.scale_linear": 4.0}, r"RoPE is scaled.*llama.rope.scale_linear: 4.0"),
        ({"llama.attention.sliding_window": 32}, r"llama.attention.sliding_window: 32"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, r"llama.expert_count: 8"),
        ({"llama.logit_scale": 0.5}, r"llama.logit_scale: 0.5"),
        ({"llama.rope.dimension_count": 8}, r"tensor blk.0.attn_q.weight has shape \[64, 64\], and .* it is 32 x 64"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\]"),
        ({"llama.attention.head_count_kv": None}, r"has no key llama.attention.head_count_kv"),
        ({"llama.attention.head_count": 0}, r"head_count is 0"),
        ({"llama.block_count": 3}, r"no tensor blk.2.attn_norm.weight"),
        ({"llama.block_count": 2**32 - 1}, r"no tensor blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, r"has no tensor blk.1.attn_k.weight"),
    ],
)
def test_a_file_that_says_another_model_than_is_read_is_refused(
    tmp_path: Path, keys: dict[str, Any], sentence: str
) -> None:
    write(tmp_path / "other.gguf", keys=keys)
    with pytest.raises(ValueError, match=f"other.gguf: .*{sentence}"):
        convert(tmp_path / "other.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("without", "more", "sentence"),
    [
        ("blk.0.ffn_gate.weight", None, "no tensor blk.0.ffn_gate.weight"),
        ("output_norm.weight", None, "no tensor output_norm.weight"),
        ("", "blk.0.attn_q.bias", "a llama model has no tensor blk.0.attn_q.bias"),
        ("", "blk.1.attn_sub_norm.weight", "a llama model has no tensor blk.1.attn_sub_norm.weight"),
        ("", "rope_freqs.weight", "its RoPE is scaled"),
        ("blk.1.ffn_up.weight", "blk.1.ffn_up_exps.weight", "no tensor blk.1.ffn_up.weight"),
    ],
)
def test_missing_and_unknown_tensors_are_named(tmp_path: Path, without: str, more: str | None, sentence: str) -> None:
    added = {more: np.ones(64, np.float32)} if more else None
    write(tmp_path / "other.gguf", without=(without,), more=added)
    with pytest.raises(ValueError, match=f"other.gguf: .*{sentence}"):
        convert(tmp_path / "other.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    write(tmp_path / "other.gguf", more={"blk.0.ffn_up.weight": np.ones((48, 64), np.float32)})
    with pytest.raises(
        ValueError, match=r"other.gguf: tensor blk.0.ffn_up.weight has shape \[48, 64\], .* it is 96 x 64"
    ):
        convert(tmp_path / "other.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_sizes_that_transformers_assumes_are_not_taken_for_the_files(tmp_path: Path) -> None:
    write(tmp_path / "small.gguf", "qwen3")
    with pytest.raises(ValueError, match=r"small.gguf: rope.dimension_count is 16, and transformers takes 128 from it"):
        convert(tmp_path / "small.gguf", tmp_path / "hf")


def test_what_is_no_gguf_file_or_cut_off_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.gguf: no such GGUF file"):
        convert(tmp_path / "none.gguf", tmp_path / "hf")
    write(tmp_path / "small.gguf")
    whole = (tmp_path / "small.gguf").read_bytes()
    for size in (0, 3, 10, 23, 200, 5000, len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.gguf: no GGUF file, or cut off"):
            convert(tmp_path / "cut.gguf", tmp_path / "hf")
    (tmp_path / "wrong.gguf").write_bytes(b"no such thing, but long enough to be looked at" * 9)
    with pytest.raises(ValueError, match=r"wrong.gguf: no GGUF file"):
        convert(tmp_path / "wrong.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_without_the_package_the_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "small.gguf")
    monkeypatch.setattr(convert_gguf, "GGUFReader", None)
    with pytest.raises(ValueError, match=r"small.gguf: reading it needs the gguf package \(pip install gguf\)"):
        convert(tmp_path / "small.gguf", tmp_path / "hf")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "other.gguf"), "gemma")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general.architecture is 'gemma'; taken are llama, qwen2, qwen3"):
        convert(tmp_path / "other.gguf", tmp_path / "hf")
