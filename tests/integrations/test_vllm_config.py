"""What of vLLM's options goes with our models, and which keep every page."""

from types import SimpleNamespace

import pytest

from s2.integrations.hf import S2LlamaConfig
from s2.model.config import ModelConfig

pytest.importorskip("vllm.v1.core.kv_cache_manager", reason="needs vLLM 0.24")

from s2.integrations.vllm.config import ServingConfig, keeps_all


def served(layout="L1V3+dense1", cache=(), **changes):
    """vLLM's configuration as far as it is read."""
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_layout=layout, block_size=32,
    )  # fmt: skip
    values = {
        "model_config": SimpleNamespace(hf_config=S2LlamaConfig(**config.to_hf_dict())),
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
        ({"cache": {"cache_dtype": "fp8"}}, "--kv-cache-dtype=fp8"),
        ({"layout": "2*dense|2*W2"}, "a rule for each of 4 query heads, but .* 2 KV heads"),
        ({"layout": "L1V2<4V3"}, "strides divide each other, not L1V2<4V3"),
        ({"layout": "L1V2<4V4<8V8"}, "up to 2 stride levels"),
    ],
)
def test_what_is_not_supported_stops_before_anything_is_built(changes, said):
    with pytest.raises(ValueError, match=said):
        ServingConfig.verify_and_update_config(served(**changes))


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
