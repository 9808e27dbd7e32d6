"""S2-Attention through PyTorch's scaled_dot_product_attention: a mask for sparse patterns (what a CPU trains with),
and the fastest dense kernel the device has for dense ones.
"""

from __future__ import annotations

import contextlib
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kept import Kept
from .modes import is_plain
from .pattern import Pattern, first_alike, pattern_from_key
from .reference import check_borders, token_mask

# fastest first, each with the function that says whether it is enabled
_DENSE_ORDER = (
    (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.cudnn_sdp_enabled),
    (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled),
    (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.mem_efficient_sdp_enabled),
    (SDPBackend.MATH, torch.backends.cuda.math_sdp_enabled),
)
_ORDER_OF_TORCH = torch._C._get_sdp_priority_order()


@torch.compiler.assume_constant_result
def _chosen_backends() -> list[SDPBackend]:
    """Those that are enabled in the order to try them; empty: as torch does, since the caller has set an order."""
    if torch._C._get_sdp_priority_order() != _ORDER_OF_TORCH:
        return []
    return [backend for backend, is_enabled in _DENSE_ORDER if is_enabled()]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Dense causal attention, q and k/v of one length: `[B, S, Hq, D]`, `[B, S, Hkv, D]` -> `[B, S, Hq, D]`.

    Of torch's kernels those that are enabled (`torch.nn.attention.sdpa_kernel`, `torch.backends.cuda.enable_*_sdp`), in
    the order that the caller has set, else the fastest first. cuDNN's backward does not repeat bit for bit;
    `torch.use_deterministic_algorithms(True)` excludes it.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    gqa = q.shape[1] != k.shape[1]
    chosen = _chosen_backends() if q.is_cuda else []
    with sdpa_kernel(chosen, set_priority=True) if chosen else contextlib.nullcontext():
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
    borders = check_borders(cu_seqlens.tolist(), q.shape[0])
    bounds = [(b, e) for b, e in itertools.pairwise(borders) if e > b] or [(0, 0)]
    documents = [
        _attend(q[None, begin:end], k[None, begin:end], v[None, begin:end], pattern, heads, softmax_scale)[0]
        for begin, end in bounds
    ]
    return torch.cat([*documents, q.new_zeros(q.shape[0] - borders[-1], *q.shape[1:])])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, heads: tuple[int, int, int], softmax_scale: float
) -> Tensor:
    q_len, kv_len = q.shape[1], k.shape[1]
    if pattern.is_dense and q_len == kv_len:
        return dense_attention(q, k, v, softmax_scale)
    if kv_len > _longest(pattern):
        covered, needed = _longest(pattern) // pattern.block_size, -(-kv_len // pattern.block_size)
        raise ValueError(f"the block mask covers {covered} blocks but {needed} are needed")
    mask = _mask_of(pattern, kv_len, k.shape[2], heads, q)[:, kv_len - q_len : kv_len, :kv_len]
    return _attend_masked(q, k, v, mask, pattern, softmax_scale)


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, pattern: Pattern, heads: tuple[int, int, int], scale: float
) -> Tensor:
    """All documents at once, `[T, H, D]`, for torch.compile: a graph cannot depend on where the borders are. It takes a
    mask over all pairs of tokens. Rows behind the last border are zero, and borders that do not fit give NaN, as does a
    document with NaN or Inf in q, k or v, which keeps its neighbours from it: 0 times NaN is NaN."""
    cu_seqlens = cu_seqlens.to(q.device).contiguous()
    token = torch.arange(q.shape[0], device=q.device, dtype=cu_seqlens.dtype)
    inside = token < cu_seqlens[-1]
    never_falls = (cu_seqlens.cummax(0).values == cu_seqlens).all()
    fits = (cu_seqlens[0] == 0) & never_falls & (cu_seqlens[-1] <= q.shape[0])
    document = torch.searchsorted(cu_seqlens, token, right=True, out_int32=True) - 1
    together = document[:, None] == document  # [T, T]
    position = torch.where(inside, token - cu_seqlens[document], 0).clamp(0, q.shape[0] - 1)
    bad = ~torch.stack([x.isfinite().flatten(1).all(dim=1) for x in (q, k, v)]).all(dim=0) & inside
    spoiled = (together & bad).any(dim=1) | ~fits
    mask = _mask_of(pattern, q.shape[0], k.shape[1], heads, q)
    mask = mask[:, position[:, None], position] & together  # [Hkv, T, T]
    q, k, v = (torch.where(x.isfinite() & inside[:, None, None], x, 0.0)[None] for x in (q, k, v))
    out = torch.where(inside[:, None, None], _attend_masked(q, k, v, mask, pattern, scale)[0], 0.0)
    return torch.where(spoiled[:, None, None], float("nan"), out)


def _mask_of(pattern: Pattern, length: int, num_heads: int, heads: tuple[int, int, int], x: Tensor) -> Tensor:
    """`[Hkv, n, n]` beside x, with n at least `length` (or as far as the pattern goes). Patterns count from the start
    of the document, so one mask of a rounded-up length serves every shorter one."""
    rounded = max(256, 1 << (length - 1).bit_length())
    make_mask = _mask if is_plain(x) else _traced_mask
    return make_mask(pattern.key, min(rounded, _longest(pattern)), num_heads, *heads, x.device)


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


def _make_mask(
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


_masks = Kept(_make_mask, lambda mask: (mask,))


def _mask(
    key: str, length: int, num_heads: int, layer: int, head_offset: int, total_heads: int, device: torch.device
) -> Tensor:
    """The kept one, which serves all layers with the same rules."""
    return _masks(key, length, num_heads, first_alike(key, layer, total_heads), head_offset, total_heads, device)


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
    """`_mask` as one opaque step, for torch.compile and whatever else watches."""
    return _mask(key, length, num_heads, layer, head_offset, total_heads, device).clone()


@_traced_mask.register_fake
def _(key, length, num_heads, layer, head_offset, total_heads, device):
    return torch.empty((num_heads, length, length), dtype=torch.bool, device=device)
