"""What Megatron is told of a model of ours: `TransformerConfig`, and the arguments of `GPTModel`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from s2.model import ModelConfig
from s2.model.rope import scales_by_kind

# what Megatron's llama3 scaling has built in
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def transformer_config(config: ModelConfig, **changes: Any) -> TransformerConfig:
    """Megatron's config of the network that `config` describes.

    Args:
        config: ours.
        changes: further fields of `TransformerConfig`: parallel sizes, dtypes, recomputation, fusions.

    Raises:
        ValueError: a `rope_scaling` that Megatron does not have.
    """
    _position_arguments(config)
    made = TransformerConfig(
        **{
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads,
            "kv_channels": config.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.rms_norm_eps,
            "qk_layernorm": config.qk_norm,
            "add_qkv_bias": config.qkv_bias,
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "init_method_std": config.initializer_range,
            "rotary_interleaved": False,
        }
        | changes
    )
    for key, value in _yarn_attributes(config).items():  # GPTModel reads them there, no field declares them
        setattr(made, key, value)
    return made


def gpt_model_arguments(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `GPTModel` but for its config and layer spec.

    Raises:
        ValueError: a `rope_scaling` that Megatron does not have.
    """
    return {
        "vocab_size": config.vocab_size,
        "max_sequence_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        **_position_arguments(config),
    }


def _position_arguments(config: ModelConfig) -> dict[str, Any]:
    if scales_by_kind(config.rope_scaling):
        raise ValueError(
            f"rope_scaling={config.rope_scaling} is by kind of layer, but Megatron's GPTModel rotates all layers alike"
        )
    theta, scaling = config.rope(dense=True)
    kind = None if scaling is None else scaling["rope_type"]
    arguments: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": theta}
    if scaling is None:
        return arguments
    if kind == "linear":
        return arguments | {"seq_len_interpolation_factor": scaling["factor"]}
    if kind == "llama3":
        for key, value in _LLAMA3.items():
            if scaling[key] != value:
                raise ValueError(
                    f"rope_scaling.{key}={scaling[key]!r} of type 'llama3' must be {value}: Megatron's GPTModel has no "
                    f"argument for it"
                )
        return arguments | {"rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
    if scaling.get("attention_factor") is not None:
        raise ValueError(
            f"rope_scaling.attention_factor={scaling['attention_factor']!r} must be null: Megatron's GPTModel has no "
            f"argument for it"
        )
    return arguments | {"position_embedding_type": "yarn"}


def _yarn_attributes(config: ModelConfig) -> dict[str, Any]:
    _, scaling = config.rope(dense=True)
    if scaling is None or scaling["rope_type"] != "yarn":
        return {}
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    both = bool(mscale and mscale_all)
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": float(scaling["factor"]),
        "yarn_original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "yarn_beta_fast": float(scaling.get("beta_fast") or 32),
        "yarn_beta_slow": float(scaling.get("beta_slow") or 1),
        "yarn_mscale": mscale if both else None,
        "yarn_mscale_all_dim": mscale_all if both else None,
        "yarn_correction_range_round_to_int": scaling.get("truncate", True),
    }
