"""Attention to keys in pages, as servers keep them: the newest queries of each sequence, decoding and chunked prefill
in one batch, against pages of a block each that a table of the sequence names; and its definition.

Neither entries of the table nor pages that the pattern shows to none of a sequence's queries are read: pages that no
later query sees may be freed and their entries be anything.

Shapes: T new tokens of all sequences, B sequences, Hq query heads, H KV heads, D head dimension, P pages of `block`
tokens, n entries of a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .call import Call, call_of
from .kernels.triton.paged_launch import Pages, heads_of, kernels_of, run_paged, run_write
from .pattern import Pattern
from .reference import reference_attention, token_mask

BACKENDS = ("reference", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Heads = Tensor | Sequence[Tensor]


@overload
def paged_attention(
    q: Tensor, k_cache: Heads, v_cache: Heads, block_table: Heads, seq_lens: Tensor, cu_seqlens_q: Tensor,
    pattern: Pattern, *, max_query_len: int, max_seq_len: int, rotation: int = ..., softmax_scale: float | None = ...,
    head_offset: int = ..., total_kv_heads: int | None = ..., out: Tensor | None = ...,
    return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def paged_attention(
    q: Tensor, k_cache: Heads, v_cache: Heads, block_table: Heads, seq_lens: Tensor, cu_seqlens_q: Tensor,
    pattern: Pattern, *, max_query_len: int, max_seq_len: int, rotation: int = ..., softmax_scale: float | None = ...,
    head_offset: int = ..., total_kv_heads: int | None = ..., out: Tensor | None = ..., return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def paged_attention(
    q: Tensor,
    k_cache: Heads,
    v_cache: Heads,
    block_table: Heads,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    pattern: Pattern,
    *,
    max_query_len: int,
    max_seq_len: int,
    rotation: int = 0,
    softmax_scale: float | None = None,
    head_offset: int = 0,
    total_kv_heads: int | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last tokens of each sequence to its keys in pages, which those tokens' own are among.

    The kernel reads nothing on the host, so a CUDA graph of it may be replayed with other lengths and tables. No
    gradients. Its results repeat bit for bit.

    Args:
        q: `[T, Hq, D]`: the queries of sequence b are rows `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1] - 1`, and the last
            of its `seq_lens[b]` tokens.
        k_cache, v_cache: pages `[P, block, H, D]`, or of each KV head its own `[P, block, D]`, all with the same
            strides. Any strides but of the last dimension, which must be dense.
        block_table: page of each block of each sequence, int32 `[B, n]`, or one for each KV head.
        seq_lens: int32 `[B]`, tokens of each sequence with the new ones; at least as many as it has queries.
        cu_seqlens_q: int32 `[B + 1]`, never falling. It need not begin at 0: a part of a batch is a slice of it.
        pattern: which blocks each KV head sees; a page holds one of its blocks.
        max_query_len: most queries of a sequence, at least.
        max_seq_len: tokens of the longest sequence, or an upper bound: it decides among how many programs few queries
            are divided, nothing else.
        rotation, softmax_scale, head_offset, total_kv_heads: as of `s2_attention`.
        out: where the output goes, `[T, Hq, D]`; rows of no sequence stay as they are. By default a new tensor, where
            they are 0.
        return_lse: return the log-sum-exp of the scores too.
        backend: "triton", the kernel, which takes rules in closed form (`schedule.has_closed_form`); "reference", the
            definition. None: the kernel for tensors on a GPU, else the definition.

    Returns:
        out, with `return_lse` also lse, float32 `[T, Hq]` (float64 where q is), undefined in rows of no sequence.

    Raises:
        ValueError: shapes, dtypes, devices or the pattern do not fit together or are not supported.
    """
    backend = backend or ("triton" if q.is_cuda else "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; use one of {BACKENDS} or None")
    pages = _pages(k_cache, v_cache, block_table)
    _check(q, "q", "Hq", pages, seq_lens, cu_seqlens_q, backend)
    heads, kv_heads = q.shape[1], len(pages.keys)
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    if pages.keys[0].shape[1] != pattern.block_size:
        raise ValueError(
            f"pages hold {pages.keys[0].shape[1]} tokens, but the pattern's blocks {pattern.block_size}: they must be "
            f"the same"
        )
    total = kv_heads if total_kv_heads is None else total_kv_heads
    if head_offset < 0 or head_offset + kv_heads > total:
        raise ValueError(f"heads {head_offset} to {head_offset + kv_heads - 1} do not fit in total_kv_heads={total}")
    scale = 1.0 / math.sqrt(q.shape[2]) if softmax_scale is None else float(softmax_scale)
    if not scale > 0:
        raise ValueError(f"softmax_scale={softmax_scale!r} must be positive")
    if out is None:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    elif out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or out.stride(-1) != 1:
        raise ValueError(f"out must be like q {list(q.shape)}, with a dense last dimension, got {list(out.shape)}")
    call = call_of(pattern.key, rotation, head_offset, total, scale, backend)
    if backend == "reference":
        lse = _reference(q, pages, seq_lens, cu_seqlens_q, out, call)
    else:
        visible = _visible_keys(call, kv_heads, max_seq_len)
        lse = run_paged(q, pages, seq_lens, cu_seqlens_q, out, call, max_query_len, visible)
    return (out, lse) if return_lse else out


def write_pages(
    k: Tensor,
    v: Tensor,
    k_cache: Heads,
    v_cache: Heads,
    block_table: Heads,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Put the keys and values `[T, H, D]` of new tokens into their pages; arguments as of `paged_attention`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    backend = backend or ("triton" if k.is_cuda else "reference")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist; use one of {BACKENDS} or None")
    pages = _pages(k_cache, v_cache, block_table)
    for name, x in (("k", k), ("v", v)):
        _check(x, name, "H", pages, seq_lens, cu_seqlens_q, backend)
    if k.shape != v.shape or k.shape[1] != len(pages.keys):
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must be of the {len(pages.keys)} heads of the pages")
    if backend == "triton":
        run_write(k, v, pages, seq_lens, cu_seqlens_q)
        return
    block = pages.keys[0].shape[1]
    for b, begin, end, length in _sequences(seq_lens, cu_seqlens_q):
        position = torch.arange(length - (end - begin), length, device=k.device)
        for h, (keys, values, table) in enumerate(zip(pages.keys, pages.values, pages.tables, strict=True)):
            page = table[b, position // block].long()
            keys[page, position % block] = k[begin:end, h]
            values[page, position % block] = v[begin:end, h]


def warm_up(
    pattern: Pattern,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    apart: bool = False,
    rotation: int = 0,
    head_offset: int = 0,
    total_kv_heads: int | None = None,
) -> None:
    """Compiles and loads every kernel that calls on such pages may take, by a small call of each: which one depends on
    how many queries, sequences and keys there are, and a CUDA graph can only capture one that is there.

    Args:
        pattern, rotation, head_offset, total_kv_heads: as the calls will have.
        apart: KV heads have pages of their own, `[P, 2, block, 1, D]` each; else there are pages `[P, 2, block, H, D]`.
    """
    block, total = pattern.block_size, kv_heads if total_kv_heads is None else total_kv_heads
    call = call_of(pattern.key, rotation, head_offset, total, 1.0, "triton")
    kernels = kernels_of(torch.empty(0, num_heads, head_dim, dtype=dtype, device=device), kv_heads)
    most = max(queries for queries, _ in kernels)
    table = torch.arange(-(-most // block), dtype=torch.int32, device=device)[None]
    held = 1 if apart else kv_heads
    caches = [
        torch.zeros(table.numel(), 2, block, held, head_dim, dtype=dtype, device=device)
        for _ in range(kv_heads // held)
    ]
    keys, values = ([x[:, side, :, h] for x in caches for h in range(held)] for side in (0, 1))
    pages = _pages(keys, values, table)
    for queries, splits in kernels:
        q, out = torch.zeros(2, queries, num_heads, head_dim, dtype=dtype, device=device)
        lengths = torch.tensor([queries], dtype=torch.int32, device=device)
        borders = torch.tensor([0, queries], dtype=torch.int32, device=device)
        run_paged(q, pages, lengths, borders, out, call, queries, queries, splits)
    run_write(q[:, :kv_heads], q[:, :kv_heads], pages, lengths, borders)


def _visible_keys(call: Call, kv_heads: int, seq_len: int) -> int:
    """About how many keys the last of so many tokens sees, of the head that sees most."""
    block = call.pattern.block_size
    if call.pattern.mask is not None:
        return seq_len
    return block * max(rule.most_visible(-(-seq_len // block)) for rule in set(call.rules(kv_heads)))


# ---------------------------------------------------------------- the definition


def _sequences(seq_lens: Tensor, cu_seqlens_q: Tensor) -> list[tuple[int, int, int, int]]:
    """`(sequence, first row, row behind the last, tokens)` of those with queries."""
    borders, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    return [(b, borders[b], borders[b + 1], n) for b, n in enumerate(lengths) if borders[b + 1] > borders[b]]


def _reference(q: Tensor, pages: Pages, seq_lens: Tensor, cu_seqlens_q: Tensor, out: Tensor, call: Call) -> Tensor:
    """`s2_attention`'s definition on the keys of the pages that are seen; others stay 0, which nobody sees."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[:2], dtype=compute, device=q.device)
    block, kv_heads = call.pattern.block_size, len(pages.keys)
    for b, begin, end, length in _sequences(seq_lens, cu_seqlens_q):
        seen = token_mask(call, end - begin, length, kv_heads).any(dim=1).to(q.device)  # [H, length]
        k, v = q.new_zeros(2, length, kv_heads, q.shape[2])
        for h, (keys, values, table) in enumerate(zip(pages.keys, pages.values, pages.tables, strict=True)):
            position = seen[h].nonzero()[:, 0]
            page = table[b, position // block].long()
            k[position, h], v[position, h] = keys[page, position % block], values[page, position % block]
        found, found_lse = reference_attention(q[None, begin:end], k[None], v[None], None, None, call)
        out[begin:end], lse[begin:end] = found[0], found_lse[0].T
    return lse


# ---------------------------------------------------------------- arguments


def _pages(k_cache: Heads, v_cache: Heads, block_table: Heads) -> Pages:
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if isinstance(x, Tensor) and x.dim() != 4:
            raise ValueError(f"{name} must be [P, block, H, D], got shape {list(x.shape)}")
    keys, values = heads_of(k_cache), heads_of(v_cache)
    tables = (block_table,) * len(keys) if isinstance(block_table, Tensor) else tuple(block_table)
    if not len(keys) == len(values) == len(tables) > 0:
        raise ValueError(f"pages of {len(keys)} heads of keys, {len(values)} of values and tables for {len(tables)}")
    for name, places, dims in (("k_cache", keys, 3), ("v_cache", values, 3), ("block_table", tables, 2)):
        first = places[0]
        if first.dim() != dims or first.stride(-1) != 1:
            wanted = "int32 [B, n]" if dims == 2 else "[P, block, H, D] or of each head [P, block, D]"
            raise ValueError(
                f"{name} must be {wanted} with a dense last dimension, got shape {list(first.shape)} with strides "
                f"{list(first.stride())}"
            )
        for x in places:
            if x.stride() != first.stride() or x.shape[1:] != first.shape[1:] or x.dtype != first.dtype:
                raise ValueError(
                    f"{name} must have the same shape, strides and dtype for all heads, got {list(first.shape)} with "
                    f"{list(first.stride())} and {list(x.shape)} with {list(x.stride())}"
                )
    return Pages(keys, values, tables)


def _check(
    x: Tensor, name: str, heads: str, pages: Pages, seq_lens: Tensor, cu_seqlens_q: Tensor, backend: str
) -> None:
    keys, values, tables = pages.keys[0], pages.values[0], pages.tables[0]
    if x.dim() != 3 or x.stride(-1) != 1:
        raise ValueError(f"{name} must be [T, {heads}, D] with a dense last dimension, got shape {list(x.shape)}")
    if x.dtype not in (*KERNEL_DTYPES, *([] if backend == "triton" else [torch.float64])):
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"attention to pages has no gradients, but {name} wants one: call it under torch.no_grad")
    for other, pages_of in (("k_cache", keys), ("v_cache", values)):
        if pages_of.dtype != x.dtype or pages_of.device != x.device or pages_of.shape[2] != x.shape[2]:
            raise ValueError(
                f"{other} is {pages_of.dtype} on {pages_of.device} with head dimension {pages_of.shape[2]}, but {name} "
                f"is {x.dtype} on {x.device} with {x.shape[2]}"
            )
    if keys.shape[1] != values.shape[1]:
        raise ValueError(f"pages hold {keys.shape[1]} keys, but {values.shape[1]} values")
    batch = len(seq_lens) if seq_lens.dim() == 1 else -1
    for other, y, shape in (
        ("block_table", tables, [batch, tables.shape[1]]),
        ("seq_lens", seq_lens, [batch]),
        ("cu_seqlens_q", cu_seqlens_q, [batch + 1]),
    ):
        if y.dtype != torch.int32 or list(y.shape) != shape or y.device != x.device or y.stride(-1) != 1:
            raise ValueError(
                f"{other} must be int32 on {x.device} with shape {[n if n >= 0 else 'B' for n in shape]}, got "
                f"{y.dtype} {list(y.shape)} on {y.device}"
            )
