"""vLLM's Llama with our attention: per-layer patterns, rotary frequencies by kind of layer in fp32 as in training,
Qwen2's biases and Qwen3's norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from s2.model.rope import apply_rotary, rope_frequencies

from .config import model_config
from .layer import PagedAttention


class Rotary(nn.Module):
    """Rotation by position."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, Any] | None) -> None:
        super().__init__()
        inv_freq, self.factor = rope_frequencies(head_dim, theta, scaling)
        self.register_buffer("inv_freq", inv_freq.to(torch.empty(0).device), persistent=False)  # where vLLM builds

    def forward(self, positions: Tensor, *rows: Tensor) -> list[Tensor]:
        """Each of `rows` `[T, H, D]`, turned."""
        angles = positions[:, None].float() * self.inv_freq
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        return [apply_rotary(x, cos, sin) for x in rows]


class ShardedAttention(nn.Module):
    """Projections around `PagedAttention`; takes what vLLM's Llama layer passes."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        quant_config: Any = None,
        cache_config: Any = None,
        prefix: str = "",
        **others: Any,
    ) -> None:
        super().__init__()
        ours, layer = model_config(config), extract_layer_index(prefix)
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if max(num_kv_heads, ranks) % min(num_kv_heads, ranks) or num_heads % ranks:
            raise ValueError(
                f"tensor_parallel_size={ranks} does not divide {num_heads} query heads and {num_kv_heads} KV heads"
            )
        self.head_dim = ours.head_dim
        self.num_heads, self.num_kv_heads = num_heads // ranks, max(1, num_kv_heads // ranks)
        self.qkv_proj = QKVParallelLinear(
            hidden_size, self.head_dim, num_heads, num_kv_heads, bias=ours.qkv_bias, quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim, hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if ours.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=ours.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=ours.rms_norm_eps)
        pattern = ours.layout[layer]
        self.rotary_emb = Rotary(self.head_dim, *ours.rope(dense=pattern.is_dense))
        self.attn = PagedAttention(
            self.num_heads, self.head_dim, self.num_kv_heads, pattern,
            rotation=ours.layout.distinct_rotations(num_kv_heads)[layer],
            head_offset=rank * num_kv_heads // ranks, total_kv_heads=num_kv_heads,
            cache_config=cache_config, quant_config=quant_config, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        rows = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = rows.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)
        q, k = self.rotary_emb(positions, self.q_norm(q), self.k_norm(k))
        out = self.attn(q.flatten(-2), k.flatten(-2), v.flatten(-2))
        return self.o_proj(out)[0]


class ShardedDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix=prefix, config=config, attn_layer_type=ShardedAttention)


class S2LlamaForCausalLM(LlamaForCausalLM):
    """A hybrid Llama. Weights have the names of the export."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=ShardedDecoderLayer)
