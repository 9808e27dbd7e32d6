"""The definition of S2-Attention: masked softmax attention, in float32 or float64. Every other path is tested
against it, forward and backward. It materialises the mask and the scores: use it for small shapes.

Shapes: B batch, S sequence, T packed tokens, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dimension.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .pattern import Pattern


def token_mask(
    pattern: Pattern,
    q_len: int,
    kv_len: int,
    num_heads: int,
    *,
    layer: int = 0,
    head_offset: int = 0,
    total_heads: int | None = None,
) -> Tensor:
    """Bool `[num_heads, q_len, kv_len]`: which key tokens each query token sees (query at the end of the keys)."""
    size = pattern.block_size
    total = num_heads if total_heads is None else total_heads
    blocks = pattern.block_mask(-(-kv_len // size), total, layer=layer)[head_offset : head_offset + num_heads]
    query = torch.arange(kv_len - q_len, kv_len, device=blocks.device)
    key = torch.arange(kv_len, device=blocks.device)
    kept = blocks[:, query // size][:, :, key // size]
    return kept & (key[None, :] <= query[:, None])


def reference_attention(
    q: Tensor,  # [B, Sq, Hq, D] or [T, Hq, D]
    k: Tensor,  # [B, Skv, Hkv, D] or [T, Hkv, D]
    v: Tensor,
    pattern: Pattern,
    *,
    layer: int = 0,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float,
    head_offset: int = 0,
    total_kv_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (dtype and shape of `q`) and log-sum-exp (`[B, Hq, Sq]` or `[Hq, T]`).

    Computes in float64 for float64 inputs, else in float32. A row that sees no key, as those behind the last border,
    gives 0 and lse = -inf.
    """
    if cu_seqlens is not None:
        borders = check_borders(cu_seqlens.tolist(), q.shape[0])
        bounds = [(b, e) for b, e in itertools.pairwise(borders) if e > b] or [(0, 0)]
        documents = [
            _attend(
                q[None, begin:end], k[None, begin:end], v[None, begin:end],
                pattern, layer, softmax_scale, head_offset, total_kv_heads,
            )
            for begin, end in bounds
        ]  # fmt: skip
        rest, compute = q.shape[0] - borders[-1], _compute_dtype(q)
        out = torch.cat([*(out[0] for out, _ in documents), q.new_zeros(rest, *q.shape[1:])])
        no_lse = torch.full((q.shape[1], rest), float("-inf"), dtype=compute, device=q.device)
        return out, torch.cat([*(lse[0] for _, lse in documents), no_lse], dim=1)
    return _attend(q, k, v, pattern, layer, softmax_scale, head_offset, total_kv_heads)


def check_borders(borders: list[int], num_tokens: int) -> list[int]:
    """The borders of packed documents. ValueError: they do not begin with 0, fall, or exceed the tokens."""
    if borders[0] != 0 or borders[-1] > num_tokens or borders != sorted(borders):
        shown = f"{borders}" if len(borders) <= 20 else f"{borders[:10]} ... {borders[-10:]}"
        wanted = f"begin with 0, never fall and end at {num_tokens} tokens or before"
        raise ValueError(f"cu_seqlens must {wanted}, got {shown}")
    return borders


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    layer: int,
    softmax_scale: float,
    head_offset: int,
    total_kv_heads: int | None,
) -> tuple[Tensor, Tensor]:
    compute = _compute_dtype(q)
    group = q.shape[2] // k.shape[2]
    mask = token_mask(
        pattern, q.shape[1], k.shape[1], k.shape[2],
        layer=layer, head_offset=head_offset, total_heads=total_kv_heads,
    )  # fmt: skip
    mask = mask.repeat_interleave(group, dim=0).to(q.device)  # [Hq, Sq, Skv]
    k = k.repeat_interleave(group, dim=2).to(compute)
    v = v.repeat_interleave(group, dim=2).to(compute)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(compute), k) * softmax_scale
    empty = ~mask.any(dim=-1)  # [Hq, Sq]
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(empty[..., None], 0.0)
    lse = torch.logsumexp(scores, dim=-1)  # [B, Hq, Sq]
    probs = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", probs, v)
    return out.to(q.dtype), lse.masked_fill(empty, float("-inf"))
