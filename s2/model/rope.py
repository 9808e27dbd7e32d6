"""Rotary position embedding: frequencies for every supported `rope_scaling`, fp32 angles, the rotation.

Kinds and keys follow Hugging Face Llama: None (plain), `linear`, `llama3`, `yarn`. The rotation pairs
dimension d with d + D/2 (Hugging Face's half-split convention, not the interleaved one of the original Llama
weights).

Shapes: B batch, S sequence, H heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_KEYS = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}
KINDS = tuple(_KEYS)
_LAYERS = ("dense", "sparse")
_LARGEST = 1e15  # of numbers that torch multiplies frequencies by


def scales_by_kind(scaling: Mapping[str, Any] | None) -> bool:
    """Whether a `rope_scaling` says one thing for dense layers and another for sparse ones."""
    return isinstance(scaling, Mapping) and not scaling.keys().isdisjoint(_LAYERS)


def rope_of_kind(
    theta: float, scaling: Mapping[str, Any] | None, *, dense: bool
) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of one kind of layers, from `rope_theta` and a `rope_scaling` that is by kind or is not."""
    if scaling is not None and scales_by_kind(scaling):
        scaling = dict(scaling["dense" if dense else "sparse"] or {})
        theta = scaling.pop("rope_theta", theta)
    return theta, dict(scaling) if scaling and scaling.get("rope_type", "default") != "default" else None


def validate_rope_scaling(scaling: Mapping[str, Any] | None, source: str, key: str = "rope_scaling") -> None:
    """Check a `rope_scaling` mapping (`rope_type` plus the keys of its kind), or two of them by kind of layer.

    Raises:
        ValueError: names `source` (a file or "ModelConfig"), the key, its value and what would be right.
    """
    if scaling is None or not scales_by_kind(scaling):
        return _validate(scaling, f"{source}: {key}")
    if scaling.keys() != set(_LAYERS):
        raise ValueError(
            f"{source}: {key} by kind of layer has the keys {sorted(scaling)}, must have dense and sparse; null "
            f"leaves a kind unscaled"
        )
    for kind, each in scaling.items():
        where = f"{source}: {key}.{kind}"
        if isinstance(each, Mapping):
            require_positive(each.get("rope_theta", 1.0), f"{where}.rope_theta")
            each = {name: value for name, value in each.items() if name != "rope_theta"}
            if each in ({}, {"rope_type": "default"}):
                continue
        _validate(each, where)


def _validate(scaling: Mapping[str, Any] | None, where: str) -> None:
    if scaling is None:
        return
    if not isinstance(scaling, Mapping) or "rope_type" not in scaling:
        raise ValueError(f"{where}={scaling!r} must be null or have a rope_type, one of {list(KINDS)}")
    kind = scaling["rope_type"]
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(f"{where}.rope_type={kind!r} is not supported; use one of {list(KINDS)}")
    required, optional = _KEYS[kind]
    given = set(scaling) - {"rope_type"}
    if missing := required - given:
        raise ValueError(f"{where} of type {kind!r} lacks {sorted(missing)}")
    if unknown := given - required - optional:
        raise ValueError(
            f"{where} of type {kind!r} has unknown keys {sorted(unknown)}; it takes {sorted(required | optional)}"
        )
    for key in given - {"truncate"}:
        value = scaling[key]
        if key in required and value is None:
            raise ValueError(f"{where}.{key} is null but type {kind!r} needs a number")
        if value is not None:
            require_positive(value, f"{where}.{key}")
    if not isinstance(scaling.get("truncate", True), bool):
        raise ValueError(f"{where}.truncate={scaling['truncate']!r} must be true or false")
    if scaling["factor"] < 1:
        raise ValueError(f"{where}.factor={scaling['factor']!r} must be at least 1")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(
            f"{where}.low_freq_factor={scaling['low_freq_factor']!r} must be below "
            f"high_freq_factor={scaling['high_freq_factor']!r}"
        )


def require_positive(value: Any, key: str) -> None:
    """Raises ValueError, naming the key, for what is no positive number, or one that no rotation can have."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise ValueError(f"{key}={value!r} must be a positive number of at most {_LARGEST:.0e}")


def rope_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> tuple[Tensor, float]:
    """Inverse frequencies (fp32 `[D/2]`, radians per token, on the CPU) and the factor on cos and sin.

    Plain: `theta ** (-2d / D)`. The factor is 1 except for yarn, whose attention temperature it carries.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    inv_freq = 1.0 / (theta**exponent)
    if scaling is None:
        return inv_freq, 1.0
    return _SCALE[scaling["rope_type"]](inv_freq, head_dim, theta, scaling)


def _linear(inv_freq: Tensor, head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al., arXiv 2306.15595): every position divided by `factor`."""
    return inv_freq / scaling["factor"], 1.0


def _llama3(inv_freq: Tensor, head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Llama 3.1: interpolate waves that do not fit the original context `low_freq_factor` times, keep those
    that fit `high_freq_factor` times, blend linearly in between."""
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # waves per original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"], 1.0


def _yarn(inv_freq: Tensor, head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071): as llama3 with the ramp linear in the dimension index, and a
    temperature `0.1 ln(factor) + 1` on cos and sin."""
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def dimension_with(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = dimension_with(scaling.get("beta_fast") or 32)
    last = dimension_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    index = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    interpolate = ((index - first) / (last - first)).clamp(0, 1)
    inv_freq = interpolate * inv_freq / factor + (1 - interpolate) * inv_freq

    temperature = scaling.get("attention_factor")
    if temperature is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            temperature = _yarn_temperature(factor, mscale) / _yarn_temperature(factor, mscale_all)
        else:
            temperature = _yarn_temperature(factor, 1.0)
    return inv_freq, float(temperature)


def _yarn_temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


_SCALE: dict[str, Callable[[Tensor, int, float, Mapping[str, Any]], tuple[Tensor, float]]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


class RotaryEmbedding:
    """Turns positions into fp32 cos and sin.

    Deliberately not a module with a buffer: `.to(bfloat16)` and DeepSpeed's parameter initialisation would round the
    frequencies, and at 128k tokens a bf16 frequency is off by hundreds of radians.
    """

    def __init__(self, head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> None:
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        self._inv_freq: Tensor | None = None
        self._factor = 1.0

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin, fp32 `[..., S, D/2]`, of integer positions `[..., S]`."""
        if self._inv_freq is None or self._inv_freq.device != positions.device:
            inv_freq, self._factor = rope_frequencies(self.head_dim, self.theta, self.scaling)
            self._inv_freq = inv_freq.to(positions.device)
        angles = positions[..., None].float() * self._inv_freq
        return angles.cos() * self._factor, angles.sin() * self._factor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` `[B, S, H, D]` by `cos`, `sin` `[B or 1, S, D/2]`, in fp32; returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [B, S, 1, D/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def document_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Position of each packed token within its document, int32 `[num_tokens]`, without a host synchronisation.

    Args:
        cu_seqlens: int32 `[n + 1]`, document borders; zero-length documents (repeated borders) are allowed.
        num_tokens: cu_seqlens[-1], known on the host.
    """
    token = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return token - cu_seqlens[document]


def cut_documents(cu_seqlens: Tensor, num_tokens: int, longest: int) -> Tensor:
    """Borders, int32 `[m + 1]`, after documents were cut from their beginning on into pieces of `longest` tokens.

    Args:
        cu_seqlens, num_tokens: as `document_positions` takes them.
    """
    starts = (document_positions(cu_seqlens, num_tokens) % longest == 0).nonzero().flatten()
    return torch.cat((starts, starts.new_tensor([num_tokens]))).to(cu_seqlens.dtype)
