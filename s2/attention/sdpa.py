"""S2-Attention through PyTorch's scaled_dot_product_attention: a mask for sparse patterns (what a CPU trains with),
and the fastest dense kernel the device has for dense ones.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .call import SCHEMA, Call, call_of
from .kept import Kept
from .modes import is_plain, sdp_order
from .pattern import Pattern
from .reference import documents_of, token_mask

# fastest first, each with the function that says whether it is enabled
_DENSE_ORDER = (
    (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.cudnn_sdp_enabled),
    (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled),
    (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.mem_efficient_sdp_enabled),
    (SDPBackend.MATH, torch.backends.cuda.math_sdp_enabled),
)
_ORDER_OF_TORCH = sdp_order()


@torch.compiler.assume_constant_result
def _chosen_backends() -> list[SDPBackend]:
    """Those that are enabled in the order to try them; empty: as torch does, since the caller has set an order, or
    may have."""
    if _ORDER_OF_TORCH is None or sdp_order() != _ORDER_OF_TORCH:
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
    q: Tensor,  # [B, Sq, Hq, D] or [Tq, Hq, D]
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    call: Call,
) -> Tensor:
    """Attention output with an explicit token mask. Packed documents are attended one by one."""
    if cu_seqlens is None:
        return _attend(q, k, v, call)
    if torch.compiler.is_compiling():
        return _attend_packed(q, k, v, cu_seqlens, cu_seqlens_k, call)
    documents = documents_of(cu_seqlens, cu_seqlens_k, q, k, v)
    out = torch.cat([_attend(*document, call)[0] for document in documents])
    return torch.cat([out, q.new_zeros(q.shape[0] - out.shape[0], *q.shape[1:])])


def _attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    q_len, kv_len, pattern = q.shape[1], k.shape[1], call.pattern
    if pattern.is_dense and q_len == kv_len:
        return dense_attention(q, k, v, call.softmax_scale)
    if kv_len > _longest(pattern):
        covered, needed = _longest(pattern) // pattern.block_size, -(-kv_len // pattern.block_size)
        raise ValueError(f"the block mask covers {covered} blocks but {needed} are needed")
    mask = _mask_of(call, kv_len, k.shape[2], q)[:, kv_len - q_len : kv_len, :kv_len]
    return _attend_masked(q, k, v, mask, call)


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, call: Call
) -> Tensor:
    """All documents at once, `[T, H, D]`, for torch.compile: a graph cannot depend on where the borders are. It takes a
    mask over all pairs of tokens. Rows behind the last border are zero, and borders that do not fit give NaN, as does a
    document with NaN or Inf in q, k or v, which keeps its neighbours from it: 0 times NaN is NaN."""
    rows = keys = _Side.of(cu_seqlens, q)
    fits = rows.fits
    if cu_seqlens_k is not None:
        keys = _Side.of(cu_seqlens_k, k)
        fits = fits & keys.fits & (rows.lengths <= keys.lengths).all()
    bad = rows.documents_with(_is_bad(q) & rows.inside) | keys.documents_with((_is_bad(k) | _is_bad(v)) & keys.inside)
    spoiled = bad[rows.document] | ~fits
    before = (keys.lengths - rows.lengths)[rows.document]  # keys before the first query
    row = torch.where(rows.inside, rows.position + before, 0).clamp(0, k.shape[0] - 1)
    # keys of documents without queries, which may be longer than a mask, are hidden whatever their position
    key = torch.where((rows.lengths > 0)[keys.document], keys.position, 0).clamp(0, k.shape[0] - 1)
    mask = _mask_of(call, k.shape[0], k.shape[1], q)
    mask = mask[:, row[:, None], key] & (rows.document[:, None] == keys.document)  # [Hkv, Tq, Tk]
    q = torch.where(q.isfinite() & rows.inside[:, None, None], q, 0.0)[None]
    k, v = (torch.where(x.isfinite() & keys.inside[:, None, None], x, 0.0)[None] for x in (k, v))
    out = torch.where(rows.inside[:, None, None], _attend_masked(q, k, v, mask, call)[0], 0.0)
    return torch.where(spoiled[:, None, None], float("nan"), out)


def _is_bad(x: Tensor) -> Tensor:
    """Which tokens of `[T, H, D]` have NaN or Inf."""
    return ~x.isfinite().flatten(1).all(dim=1)


class _Side(NamedTuple):
    """Where packed tokens are."""

    inside: Tensor  # bool [T]: in some document
    document: Tensor  # int [T]
    position: Tensor  # int [T], in the document
    lengths: Tensor  # int [n + 1], of documents; the last, behind the last border, has 0
    fits: Tensor  # bool: the borders begin with 0, never fall and end in time

    @classmethod
    def of(cls, borders: Tensor, x: Tensor) -> _Side:
        """For x `[T, H, D]`."""
        borders = borders.to(x.device).contiguous()
        token = torch.arange(x.shape[0], device=x.device, dtype=borders.dtype)
        never_falls = (borders.cummax(0).values == borders).all()
        fits = (borders[0] == 0) & never_falls & (borders[-1] <= x.shape[0])
        document = (torch.searchsorted(borders, token, right=True, out_int32=True) - 1).clamp(min=0)
        lengths = (borders.roll(-1) - borders).clamp(min=0)  # `diff` would make a graph for a single document
        return cls(token < borders[-1], document, token - borders[document], lengths, fits)

    def documents_with(self, tokens: Tensor) -> Tensor:
        """bool `[n + 1]`: which have one of the tokens that are marked."""
        return torch.zeros_like(self.lengths).index_add(0, self.document, tokens.to(self.lengths.dtype)) > 0


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, call: Call) -> Tensor:
    group = q.shape[2] // k.shape[2]
    if group > 1:  # torch's fused CPU kernel takes neither grouped heads nor a mask without a batch dimension
        mask, k, v = mask.repeat_interleave(group, dim=0), *(x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=call.softmax_scale)
    if call.pattern.mask is not None:  # a mask may leave a row without any key
        out = out.masked_fill(~mask.any(dim=-1)[..., None], 0.0)
    return out.transpose(1, 2)


def _longest(pattern: Pattern) -> int:
    """The longest sequence a pattern covers, in tokens: mask patterns end somewhere."""
    return 1 << 30 if pattern.mask is None else pattern.mask.shape[1] * pattern.block_size


# ---------------------------------------------------------------- kept masks


MASKS: Kept[Tensor] = Kept(lambda mask: (mask,))


def _mask_of(call: Call, length: int, num_heads: int, x: Tensor) -> Tensor:
    """`[Hkv, n, n]` beside x, with n at least `length` (or as far as the pattern goes). Patterns count from the start
    of the document, so one mask of a rounded-up length serves every shorter one."""
    rounded = min(max(256, 1 << (length - 1).bit_length()), _longest(call.pattern))
    if is_plain(x):
        return _mask(call, rounded, num_heads, x.device)
    return torch.ops.s2.token_mask(rounded, num_heads, x.device, *call.settings)


def _mask(call: Call, length: int, num_heads: int, device: torch.device) -> Tensor:
    key = (call.rules_key, length, num_heads)
    return MASKS.get(key, device, lambda: token_mask(call, length, length, num_heads).to(device))


# `_mask` as one opaque step, for torch.compile and whatever else watches
_library = torch.library.Library("s2", "FRAGMENT")
_library.define(f"token_mask(int length, int num_heads, Device device, {SCHEMA}) -> Tensor")


@torch.library.impl(_library, "token_mask", "CompositeExplicitAutograd")
def _traced_mask(length: int, num_heads: int, device: torch.device, *settings) -> Tensor:
    return _mask(call_of(*settings), length, num_heads, device).clone()


@torch.library.register_fake("s2::token_mask", lib=_library)
def _mask_shape(length: int, num_heads: int, device: torch.device, *settings) -> Tensor:
    return torch.empty((num_heads, length, length), dtype=torch.bool, device=device)
