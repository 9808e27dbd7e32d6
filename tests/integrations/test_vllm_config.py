"""What of vLLM's options goes with our models, and which keep every page."""

from types import SimpleNamespace

import pytest
import torch

from s2.integrations.hf import S2LlamaConfig
from s2.model.config import ModelConfig

pytest.importorskip("vllm.v1.core.kv_cache_manager", reason="needs vLLM 0.24")

from vllm.config.model import _get_and_verify_max_len
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.v1.engine.input_processor import InputProcessor

from s2.integrations.vllm.config import ServingConfig, keeps_all


def hf_config(layout="L1V3+dense1", rope=None):
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_layout=layout, block_size=32, max_position_embeddings=4096, rope_scaling=rope,
    )  # fmt: skip
    return S2LlamaConfig(**config.to_hf_dict())


def served(layout="L1V3+dense1", cache=(), **changes):
    """vLLM's configuration as far as it is read."""
    values = {
        "model_config": SimpleNamespace(hf_config=hf_config(layout), dtype=torch.bfloat16),
        "attention_config": SimpleNamespace(backend=None),
        "cache_config": SimpleNamespace(
            **{"block_size": 16, "user_specified_block_size": False, "cache_dtype": "auto", **dict(cache)}
        ),
        "parallel_config": SimpleNamespace(tensor_parallel_size=1),
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**{**values, **changes})


def test_pages_hold_a_block_of_the_attention():
    config = served()
    ServingConfig.verify_and_update_config(config)
    assert config.cache_config.block_size == 32 and config.cache_config.user_specified_block_size
    ServingConfig.verify_and_update_config(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache": {"block_size": 64, "user_specified_block_size": True}}, "--block-size=64, but .* block_size=32"),
        ({"cache": {"cache_dtype": "fp8"}}, "--kv-cache-dtype=fp8, but .* dtype, bfloat16"),
        ({"cache": {"cache_dtype": "float16"}}, "--kv-cache-dtype=float16, but .* dtype, bfloat16"),
        (
            {"attention_config": SimpleNamespace(backend=SimpleNamespace(name="FLASHINFER"))},
            "--attention-backend=FLASHINFER",
        ),
        ({"layout": "2*dense|2*W2"}, "a rule for each of 4 query heads, but .* 2 KV heads"),
        ({"layout": "L1V2<4V3"}, "strides divide each other, not L1V2<4V3"),
        ({"layout": "L1V2<4V4<8V8"}, "up to 2 stride levels"),
    ],
)
def test_what_is_not_supported_stops_before_anything_is_built(changes, said):
    with pytest.raises(ValueError, match=said):
        ServingConfig.verify_and_update_config(served(**changes))


def test_the_order_of_sums_depends_on_the_batch_which_vllm_can_forbid(monkeypatch):
    ServingConfig.verify_and_update_config(served(cache={"cache_dtype": "bfloat16"}))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT=1 is not supported"):
        ServingConfig.verify_and_update_config(served())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
ROPES = [
    None, {"rope_type": "linear", "factor": 4.0}, YARN, {**YARN, "original_max_position_embeddings": 512}, LLAMA3,
    {"dense": YARN, "sparse": None},
]  # fmt: skip


def longest(rope, asked):
    """The model's part of vLLM's configuration, when vLLM has come to its own bound."""
    config = hf_config(rope=rope)
    bound = ModelArchConfigConvertorBase(config, config).derive_max_model_len_and_key()
    found = _get_and_verify_max_len(
        config, SimpleNamespace(derived_max_model_len_and_key=bound), None, asked, False, None
    )
    model = SimpleNamespace(hf_config=config, original_max_model_len=asked, max_model_len=found, runner_type="generate")
    ServingConfig.verify_and_update_model_config(model)
    return model


@pytest.mark.parametrize("rope", ROPES)
def test_texts_are_as_long_as_the_model_was_trained_for_whatever_rope_does(rope):
    assert longest(rope, None).max_model_len == longest(rope, -1).max_model_len == 4096
    assert longest(rope, 2048).max_model_len == 2048
    processor = SimpleNamespace(
        model_config=longest(rope, None), supports_mm_inputs=False, skip_prompt_length_check=False
    )
    InputProcessor._validate_prompt_len(processor, 4095, "decoder")
    with pytest.raises(ValueError, match=r"prompt \(length 4097\) is longer than the maximum model length of 4096"):
        InputProcessor._validate_prompt_len(processor, 4097, "decoder")


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, YARN])
def test_longer_texts_than_trained_for_are_refused_unless_vllm_is_told_otherwise(monkeypatch, rope):
    with pytest.raises(ValueError, match=r"--max-model-len=8192, but .* max_position_embeddings=4096"):
        longest(rope, 8192)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert longest(rope, 8192).max_model_len == 8192


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"parallel_config": SimpleNamespace(tensor_parallel_size=2)}, "tensor parallelism"),
        ({"scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=True)}, "manager is disabled"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "connectors"),
    ],
)
def test_what_keeps_every_page_is_said(changes, reason):
    found = keeps_all(served(**changes))
    assert found is None if reason is None else reason in found
