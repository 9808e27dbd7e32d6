"""S2-Attention through PyTorch's scaled_dot_product_attention: a mask for sparse patterns (what a CPU trains with),
and the fastest dense kernel the device has for dense ones.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .pattern import Pattern, pattern_from_key
from .reference import token_mask

_DENSE_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Dense causal attention, q and k/v of one length: `[B, S, Hq, D]`, `[B, S, Hkv, D]` -> `[B, S, Hq, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    gqa = q.shape[1] != k.shape[1]
    if q.is_cuda:
        with sdpa_kernel(_DENSE_ORDER, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=gqa)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def masked_attention(
    q: Tensor,  # [B, Sq, Hq, D] or [T, Hq, D]
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    layer: int,
    cu_seqlens: Tensor | None,
    softmax_scale: float,
    head_offset: int,
    total_kv_heads: int,
) -> Tensor:
    """Attention output with an explicit token mask. Packed documents are attended one by one."""
    heads = (layer, head_offset, total_kv_heads)
    if cu_seqlens is None:
        return _attend(q, k, v, pattern, heads, softmax_scale)
    if torch.compiler.is_compiling():
        return _attend_packed(q, k, v, cu_seqlens, pattern, heads, softmax_scale)
    borders = cu_seqlens.tolist()
    documents = [
        _attend(q[None, begin:end], k[None, begin:end], v[None, begin:end], pattern, heads, softmax_scale)[0]
        for begin, end in itertools.pairwise(borders)
        if end > begin
    ]
    return torch.cat(documents) if documents else torch.zeros_like(q)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, heads: tuple[int, int, int], softmax_scale: float
) -> Tensor:
    q_len, kv_len = q.shape[1], k.shape[1]
    if pattern.is_dense and q_len == kv_len:
        return dense_attention(q, k, v, softmax_scale)
    if kv_len > _longest(pattern):
        covered, needed = _longest(pattern) // pattern.block_size, -(-kv_len // pattern.block_size)
        raise ValueError(f"the block mask covers {covered} blocks but {needed} are needed")
    mask = _mask_of(pattern, kv_len, k.shape[2], heads, q.device)[:, kv_len - q_len : kv_len, :kv_len]
    return _attend_masked(q, k, v, mask, pattern, softmax_scale)


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, pattern: Pattern, heads: tuple[int, int, int], scale: float
) -> Tensor:
    """All documents at once, `[T, H, D]`, for torch.compile: a graph cannot depend on where the borders are. It takes a
    mask over all pairs of tokens; rows behind the last border are zero."""
    token = torch.arange(q.shape[0], device=q.device)
    document = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
    position = token - cu_seqlens[document]
    mask = _mask_of(pattern, q.shape[0], k.shape[1], heads, q.device)
    inside = (token < cu_seqlens[-1])[:, None, None]
    position = torch.where(inside[:, 0, 0], position, 0)
    mask = mask[:, position[:, None], position] & (document[:, None] == document)  # [Hkv, T, T]
    out = _attend_masked(q[None], k[None], v[None], mask, pattern, scale)[0]
    return torch.where(inside, out, 0.0)


def _mask_of(
    pattern: Pattern, length: int, num_heads: int, heads: tuple[int, int, int], device: torch.device
) -> Tensor:
    """`[Hkv, n, n]` with n at least `length` (or as far as the pattern goes). Patterns count from the start of the
    document, so one mask of a rounded-up length serves every shorter one."""
    rounded = max(256, 1 << (length - 1).bit_length())
    make_mask = _traced_mask if torch.compiler.is_compiling() else _mask
    return make_mask(pattern.key, min(rounded, _longest(pattern)), num_heads, *heads, device)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pattern: Pattern, softmax_scale: float) -> Tensor:
    group = q.shape[2] // k.shape[2]
    if group > 1:  # torch's fused CPU kernel takes neither grouped heads nor a mask without a batch dimension
        mask, k, v = mask.repeat_interleave(group, dim=0), *(x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=softmax_scale)
    if pattern.mask is not None:  # a mask may leave a row without any key
        out = out.masked_fill(~mask.any(dim=-1)[..., None], 0.0)
    return out.transpose(1, 2)


def _longest(pattern: Pattern) -> int:
    """The longest sequence a pattern covers, in tokens: mask patterns end somewhere."""
    return 1 << 30 if pattern.mask is None else pattern.mask.shape[1] * pattern.block_size


@lru_cache(maxsize=16)
def _mask(
    key: str,
    length: int,
    num_heads: int,
    layer: int,
    head_offset: int,
    total_heads: int,
    device: torch.device,
) -> Tensor:
    mask = token_mask(
        pattern_from_key(key), length, length, num_heads,
        layer=layer, head_offset=head_offset, total_heads=total_heads,
    )  # fmt: skip
    return mask.to(device)


@torch.library.custom_op("s2::token_mask", mutates_args=())
def _traced_mask(
    key: str,
    length: int,
    num_heads: int,
    layer: int,
    head_offset: int,
    total_heads: int,
    device: torch.device,
) -> Tensor:
    """`_mask` as one opaque step, for torch.compile."""
    return _mask(key, length, num_heads, layer, head_offset, total_heads, device).clone()


@_traced_mask.register_fake
def _(key, length, num_heads, layer, head_offset, total_heads, device):
    return torch.empty((num_heads, length, length), dtype=torch.bool, device=device)
