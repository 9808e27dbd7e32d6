"""One block of the network: norm, grouped-query attention under the layer's pattern, SwiGLU.

Every weight is used only inside the forward of the block that owns it, and drawn in its module's constructor, which is
what DeepSpeed ZeRO-3 needs to gather and partition it.

Shapes: B batch, S sequence, T = B * S packed tokens, E hidden size, H heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2.attention import Pattern, s2_attention

from .compiling import compile_whole
from .config import ModelConfig
from .recompute import CheckpointMode, Halves, run_in_halves, run_selectively
from .rope import apply_rotary


class Cache(Protocol):
    """Keys and values of earlier tokens (`s2.inference.cache.KVCache`)."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held of each sequence."""

    @property
    def positions(self) -> Tensor:
        """Of the tokens of the call that has begun, `[B or 1, S]`."""

    def begin(self, batch_size: int, num_tokens: int, counts: Sequence[int] | None = None) -> None:
        """A call with so many new tokens of each sequence, of which `counts[b]` are real."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, rotation: int) -> Tensor:
        """Attention of a layer's new tokens to what is held and to their own k, v `[B, S, Hkv, D]`, which are kept."""

    def advance(self) -> None:
        """All layers have attended."""


class Linear(nn.Linear):
    """`x @ weight.T` (and a bias, zero at first), weight `[out, in]` drawn from N(0, std**2)."""

    def __init__(self, in_features: int, out_features: int, std: float, bias: bool = False) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Token embedding, weight `[V, E]` drawn from N(0, std**2)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Attention(nn.Module):
    """Grouped-query attention under the layer's pattern."""

    def __init__(self, config: ModelConfig, layer: int, pattern: Pattern, rotation: int) -> None:
        super().__init__()
        self.layer, self.pattern, self.rotation = layer, pattern, rotation
        self.head_dim = config.head_dim
        width, std = config.num_attention_heads * config.head_dim, config.initializer_range
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, std, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, std, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, std, config.qkv_bias)
        self.o_proj = Linear(width, config.hidden_size, _residual_std(config))
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        B, S, _ = x.shape
        q = apply_rotary(self.q_norm(self.q_proj(x).view(B, S, -1, self.head_dim)), cos, sin)
        k = apply_rotary(self.k_norm(self.k_proj(x).view(B, S, -1, self.head_dim)), cos, sin)
        v = self.v_proj(x).view(B, S, -1, self.head_dim)
        if cu_seqlens is not None:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # [T, H, D]
        if cache is not None:
            out = cache.attend(self.layer, q, k, v, self.pattern, self.rotation)
        else:
            out = s2_attention(q, k, v, self.pattern, rotation=self.rotation, cu_seqlens=cu_seqlens)
        return self.o_proj(out.reshape(B, S, -1))


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        std = config.initializer_range
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, std)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, std)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, _residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream `[B, S, E]`.

    Checkpointing and compilation happen inside `forward`, so hooks on the block (DeepSpeed ZeRO-3 gathers and releases
    the weights of a whole block in them) run once a pass, outside of what is recomputed or compiled.
    """

    def __init__(self, config: ModelConfig, layer: int, pattern: Pattern, rotation: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, pattern, rotation)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.checkpointing: CheckpointMode = "none"
        self._compiled: _Programs | None = None
        self._narrow = max(config.hidden_size, config.num_attention_heads * config.head_dim)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        if cache is not None:  # eager: it would be compiled anew for every cache length
            return self._mlp(self._attend(x, cos, sin, cu_seqlens, cache))
        if self._compiled is not None and cu_seqlens is not None:
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        programs = self._compiled or self._programs()
        if self.checkpointing == "full":
            return run_in_halves(self._halves(programs), x, cos, sin, cu_seqlens)
        return programs.whole(x, cos, sin, cu_seqlens)

    def compile(self, graphs: int, *, backend: str = "inductor") -> None:
        """Compile what the block computes, but not the hooks on it; decoding with a cache stays eager.

        Args:
            graphs: most that all blocks of the model together need.
            backend: of torch.compile.
        """
        self._compiled = _Programs(*(compile_whole(program, graphs, backend=backend) for program in self._programs()))

    def _programs(self) -> _Programs:
        return _Programs(self._whole, self._attend, self._hidden)

    def _whole(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if self.checkpointing == "selective":
            return run_selectively(self._forward, self._narrow, x, cos, sin, cu_seqlens)
        return self._forward(x, cos, sin, cu_seqlens)

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return self._mlp(self._attend(x, cos, sin, cu_seqlens))

    def _attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        return x + self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens, cache)

    def _mlp(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.post_attention_layernorm(h))

    def _hidden(self, h: Tensor) -> Tensor:
        return self.mlp.hidden(self.post_attention_layernorm(h))

    def _halves(self, programs: _Programs) -> Halves:
        norm, mlp = self.post_attention_layernorm, self.mlp
        return Halves(
            programs.attend,
            programs.hidden,
            mlp.down_proj,
            attend_modules=(self.input_layernorm, self.self_attn),
            hidden_modules=(norm, mlp.gate_proj, mlp.up_proj),
        )


class _Programs(NamedTuple):
    """What a block computes, compiled or not."""

    whole: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    hidden: Callable[..., Tensor]


def _residual_std(config: ModelConfig) -> float:
    return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
