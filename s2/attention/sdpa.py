"""S2-Attention through PyTorch's scaled_dot_product_attention: a mask for sparse patterns (what a CPU trains with),
and the fastest dense kernel the device has for dense ones.

Masks are of some rows of queries at a time, so that none takes more than `MOST_OF_A_MASK` bytes at any length. On a CPU
only the key blocks that these rows see are gathered, for each KV head its own.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .call import SCHEMA, Call, call_of
from .kept import Kept
from .modes import is_plain, sdp_order
from .pattern import HeadRule, Pattern
from .reference import documents_of

ROWS = 256  # most queries that have a mask of their own on a CPU
MOST_OF_A_MASK = 32 << 20  # bytes
MOST_ON_A_GPU = 256 << 20  # likewise: few rows would leave it idle
MOST_KEPT = 64 << 20  # bytes of masks on a CPU, of one call at most half

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
    (q_len, kv_len), pattern = (q.shape[1], k.shape[1]), call.pattern
    if pattern.is_dense and q_len == kv_len:
        return dense_attention(q, k, v, call.softmax_scale)
    if kv_len > _longest(pattern):
        covered, needed = _longest(pattern) // pattern.block_size, -(-kv_len // pattern.block_size)
        raise ValueError(f"the block mask covers {covered} blocks but {needed} are needed")
    if q.device.type == "cpu" and q_len > 0 and is_plain(q, k, v):
        return _attend_seen(q, k, v, call)
    first, outs = kv_len - q_len, []
    for begin, end in _pieces(call, q_len, k):
        query = torch.arange(first + begin, first + end, device=q.device)
        key = torch.arange(first + end, device=q.device)
        mask = _mask_of(call, query, key, kv_len, k.shape[2])
        keys, values = (x[:, : first + end].transpose(1, 2) for x in (k, v))
        outs.append(_attend_masked(q[:, begin:end], keys, values, mask, call))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _pieces(call: Call, num_queries: int, k: Tensor) -> list[tuple[int, int]]:
    """Queries cut where masks `[Hkv or 1, n, keys]`, in the type in which torch adds them to scores, would be larger
    than they may be: the first of each piece and the one behind its last."""
    most = MOST_OF_A_MASK if k.device.type == "cpu" else MOST_ON_A_GPU
    row_bytes = k.shape[-3] * _num_masks(call.pattern, k.shape[-2]) * k.element_size()
    if num_queries * row_bytes <= most:  # nothing else that compiled graphs would have to be made again for
        return [(0, num_queries)]
    rows = max(1, most // row_bytes)
    return [(begin, min(begin + rows, num_queries)) for begin in range(0, num_queries, rows)]


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, call: Call
) -> Tensor:
    """All documents at once, `[T, H, D]`, for torch.compile: a graph cannot depend on where the borders are. It masks
    all pairs of tokens. Rows behind the last border are zero, and borders that do not fit give NaN, as does a
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
    q = torch.where(q.isfinite() & rows.inside[:, None, None], q, 0.0)
    num_keys, num_heads, pieces = k.shape[0], k.shape[1], _pieces(call, q.shape[0], k)
    k, v = (torch.where(x.isfinite() & keys.inside[:, None, None], x, 0.0)[None].transpose(1, 2) for x in (k, v))
    outs = []
    for begin, end in pieces:
        mask = _mask_of(call, row[begin:end], key, num_keys, num_heads)
        mask = mask & (rows.document[begin:end, None] == keys.document)  # [Hkv or 1, n, Tk]
        outs.append(_attend_masked(q[None, begin:end], k, v, mask, call)[0])
    out = torch.where(rows.inside[:, None, None], torch.cat(outs), 0.0)
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
    """q `[B, n, Hq, D]`, k and v `[B, Hkv, keys, D]`, mask `[Hkv or 1, n, keys]`, bool or what is added to the scores:
    `[B, n, Hq, D]`."""
    B, H = k.shape[:2]
    group = q.shape[2] // H
    if group == 1:
        q = q.transpose(1, 2)
    else:  # a batch for each query head of a KV head: all of them take one mask, and without a copy for a batch of one
        q = q.unflatten(2, (H, group)).permute(0, 3, 2, 1, 4).flatten(0, 1)  # [B * G, Hkv, n, D]
        k, v = (x[:, None].expand(-1, group, -1, -1, -1).flatten(0, 1) for x in (k, v))
    # with a batch dimension, without which torch's fused CPU kernel takes no mask
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=call.softmax_scale)
    if call.pattern.mask is not None:  # a mask may leave a row without any key
        hidden = ~mask if mask.dtype == torch.bool else mask.isinf()
        out = out.masked_fill(hidden.all(dim=-1)[..., None], 0.0)
    if group == 1:
        return out.transpose(1, 2)
    return out.unflatten(0, (B, group)).permute(0, 3, 2, 1, 4).flatten(2, 3)


def _longest(pattern: Pattern) -> int:
    """The longest sequence a pattern covers, in tokens: mask patterns end somewhere."""
    return 1 << 30 if pattern.mask is None else pattern.mask.shape[1] * pattern.block_size


# ---------------------------------------------------------------- on a CPU


_HOST = torch.device("cpu")  # whatever the default device is


class _Heads(NamedTuple):
    """The KV heads of a call."""

    rules: tuple[HeadRule, ...]  # of each, none of masks
    runs: tuple[tuple[int, int], ...]  # first and behind the last, of those side by side that differ in residues alone
    num_masks: int  # 1 where all see the same


@functools.lru_cache(maxsize=512)
def _heads_of_rules(call: Call, num_heads: int) -> _Heads:
    rules = call.rules(num_heads)
    kinds = [(rule.local, rule.sinks, *((level.stride, level.end) for level in rule.levels)) for rule in rules]
    begins = [h for h in range(num_heads) if h == 0 or kinds[h] != kinds[h - 1]]
    runs = tuple(zip(begins, [*begins[1:], num_heads], strict=True))
    return _Heads(rules, runs, 1 if len(set(rules)) == 1 else num_heads)


def _heads_of(call: Call, num_heads: int) -> _Heads:
    if call.pattern.mask is None:
        return _heads_of_rules(call, num_heads)
    return _Heads((), ((0, num_heads),), 1 if call.pattern.mask.shape[0] == 1 else num_heads)


def _attend_seen(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Attention to the key blocks that are seen, for up to `ROWS` queries at a time."""
    (q_len, kv_len), num_heads, size = (q.shape[1], k.shape[1]), k.shape[2], call.pattern.block_size
    heads, num_blocks, first = _heads_of(call, num_heads), -(-kv_len // size), kv_len - q_len
    if len(heads.runs) > 1 and kv_len > ROWS:
        group, outs = q.shape[2] // num_heads, []
        for begin, end in heads.runs:
            own = replace(call, head_offset=call.head_offset + begin)
            outs.append(_attend_seen(q[:, :, begin * group : end * group], k[:, :, begin:end], v[:, :, begin:end], own))
        return torch.cat(outs, dim=2)
    if heads.rules and q_len in (1, kv_len) and all(rule.local >= num_blocks for rule in heads.rules):
        if q_len == kv_len:
            return dense_attention(q, k, v, call.softmax_scale)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=call.softmax_scale, enable_gqa=True).transpose(1, 2)
    seen = heads.rules[0].most_visible(num_blocks) * size if heads.rules and len(heads.runs) == 1 else kv_len
    row_bytes = heads.num_masks * min(4 * (seen + ROWS) // 3, kv_len) * q.element_size()
    keeps = kv_len * row_bytes <= MOST_KEPT // 2
    rows = ROWS
    while rows > 1 and rows * row_bytes > MOST_OF_A_MASK:
        rows //= 2
    recomputes = not keeps and q_len > rows and torch.is_grad_enabled()
    outs = []
    for begin in range(first - first % rows, kv_len, rows):
        low, high = max(begin, first), min(begin + rows, kv_len)
        piece = q if high - low == q_len else q[:, low - first : high - first]
        inputs = piece, k, v, call, low, (begin, min(begin + rows, _longest(call.pattern))) if keeps else None
        if recomputes:  # or the masks of all rows would be saved
            outs.append(checkpoint(_attend_rows, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(_attend_rows(*inputs))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, call: Call, low: int, kept: tuple[int, int] | None) -> Tensor:
    """Attention of the queries `[B, n, Hq, D]` from position `low` on. Their mask is made for them alone, or it is part
    of that of the positions `kept`, which is kept."""
    high, num_heads = low + q.shape[1], k.shape[2]
    if kept is None:
        tokens, bias = _rows(call, low, high, num_heads, q.dtype)
    else:
        key = (call.rules_key, num_heads, kept, q.dtype)
        tokens, bias = MASKS.get(key, q.device, lambda: _rows(call, *kept, num_heads, q.dtype))
        bias = bias[:, low - kept[0] : high - kept[0]]
    if tokens is None:
        if high < k.shape[1]:
            k, v = k[:, :high], v[:, :high]
        k, v, bias = k.transpose(1, 2), v.transpose(1, 2), bias[..., :high]
    else:
        tokens = tokens.clamp(max=k.shape[1] - 1)  # behind the last token, which nobody sees
        head = torch.arange(num_heads, device=_HOST)[:, None]
        k, v = k[:, tokens, head], v[:, tokens, head]  # [B, H, n, D]
    return _attend_masked(q, k, v, bias, call)


class _Rows(NamedTuple):
    """What some rows see."""

    tokens: Tensor | None  # int64 [H or 1, n]: keys in order, some that none sees among them; None: all up to the last
    bias: Tensor  # [H or 1, rows, n]: 0 where a key is seen, else -inf


def _rows(call: Call, begin: int, end: int, num_heads: int, dtype: torch.dtype) -> _Rows:
    """Of the positions from `begin` to `end - 1`."""
    size = call.pattern.block_size
    first, num_blocks = begin // size, -(-end // size)
    seen = _seen(call, torch.arange(first, num_blocks, device=_HOST), num_blocks, num_heads)
    used = seen.any(dim=1)
    count, before, tokens = max(1, int(used.sum(dim=1).max())), first, None
    key = torch.arange(num_blocks * size, device=_HOST)[None]
    if 4 * count <= 3 * num_blocks:  # else a copy of what is seen is not worth its time
        chosen = used.int().sort(dim=1, descending=True, stable=True).indices[:, :count]
        seen = seen.gather(2, chosen[:, None].expand(-1, seen.shape[1], -1))
        tokens = key = (chosen[..., None] * size + torch.arange(size, device=_HOST)).flatten(1)
        before = min(int(used[:, :first].sum(dim=1).min()), count)
    query = torch.arange(begin, end, device=_HOST)
    bias = torch.zeros(seen.shape, dtype=dtype, device=_HOST).masked_fill_(~seen, float("-inf"))
    bias = bias[:, query // size - first].repeat_interleave(size, dim=2)
    near = slice(before * size, None)  # the others are all earlier than these queries
    bias[..., near].masked_fill_(key[:, None, near] > query[:, None], float("-inf"))
    return _Rows(tokens, bias)


def _seen(call: Call, query: Tensor, num_blocks: int, num_heads: int) -> Tensor:
    """Bool `[Hkv, n, num_blocks]`, or of one head where all are alike: which key blocks the query blocks `query` `[n]`
    see."""
    if call.pattern.mask is not None:
        size = call.pattern.mask.shape[1]
        key = (call.rules_key, num_heads)
        blocks = BLOCKS.get(key, query.device, lambda: call.block_mask(size, num_heads).to(query.device))
        return blocks[: _heads_of(call, num_heads).num_masks, query, :num_blocks]
    block = torch.arange(num_blocks, device=query.device)
    distance, rules = query[:, None] - block, call.rules(num_heads)
    visible = {rule: rule.visible(distance, block) for rule in set(rules)}
    return torch.stack([visible[rule] for rule in (rules if len(visible) > 1 else rules[:1])])


# of short sequences alone: training comes back to the first rows with every document and in every step
MASKS: Kept[_Rows] = Kept(lambda rows: [x for x in rows if x is not None], MOST_KEPT)
BLOCKS: Kept[Tensor] = Kept(lambda mask: (mask,))  # of mask patterns


# ---------------------------------------------------------------- elsewhere


def _num_masks(pattern: Pattern, num_heads: int) -> int:
    """1 where all heads see the same blocks, however many there are."""
    return 1 if pattern.mask is None and not pattern.heads and not pattern.ranges else num_heads


def _mask_of(call: Call, query: Tensor, key: Tensor, length: int, num_heads: int) -> Tensor:
    """Bool `[Hkv or 1, n, m]`: which of the positions `key` `[m]` those of `query` `[n]` see, all before `length`."""
    num_blocks = -(-length // call.pattern.block_size)
    num_masks = _num_masks(call.pattern, num_heads)
    return torch.ops.s2.token_mask(query, key, num_blocks, num_heads, num_masks, *call.settings)


# one opaque step, for torch.compile and whatever else watches; it does not wait for the device
_library = torch.library.Library("s2", "FRAGMENT")
_library.define(
    f"token_mask(Tensor query, Tensor key, SymInt num_blocks, int num_heads, int num_masks, {SCHEMA}) -> Tensor"
)


@torch.library.impl(_library, "token_mask", "CompositeExplicitAutograd")
def _token_mask(query: Tensor, key: Tensor, num_blocks: int, num_heads: int, num_masks: int, *settings) -> Tensor:
    call = call_of(*settings)
    size = call.pattern.block_size
    seen = _seen(call, query // size, num_blocks, num_heads).expand(num_masks, -1, -1)
    return seen[:, :, key // size] & (key <= query[:, None])


@torch.library.register_fake("s2::token_mask", lib=_library)
def _mask_shape(query: Tensor, key: Tensor, num_blocks: int, num_heads: int, num_masks: int, *settings) -> Tensor:
    return torch.empty((num_masks, query.shape[0], key.shape[0]), dtype=torch.bool, device=query.device)
