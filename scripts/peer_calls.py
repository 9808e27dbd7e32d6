"""Calls of other libraries' inference kernels, where they are installed: FlashInfer, MInference, Quest.

A call whose library is not there, or does not take the case, raises `Skipped` with the reason. What is done once for
many calls (plans, layouts of queries and keys) happens before the call that is returned, so that it is not timed.

Shapes: S tokens, B sequences, Hq query heads, H KV heads, D head dimension, P pages of `page` tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from bench_kernels import Skipped
from peer_selection import TILE, Lists, Pages, all_pages, line_pairs, lines, lines_for
from torch import Tensor

FLOAT_WORKSPACE, INT_WORKSPACE = 512 << 20, 64 << 20  # bytes; a plan of 65,536 rows needs more than FlashInfer's own
MINFERENCE, QUEST = "minference.ops.pit_sparse_flash_attention_v2", "quest.utils"
QUEST_HEADS, QUEST_PAGE = 32, 16  # what its top-k is compiled for, and its page

Call = Callable[[], Tensor]


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library of another CUDA raises OSError, RuntimeError and what not
        raise Skipped(f"{name.partition('.')[0]} does not import: {type(error).__name__}: {error}") from error


def versions() -> dict[str, str]:
    """Of the peers that are installed as packages."""
    found = {}
    for name in ("flashinfer-python", "minference", "quest"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(FLOAT_WORKSPACE, dtype=torch.uint8, device=device)


def _more_room(wrapper: Any, device: torch.device) -> None:
    wrapper.reset_workspace_buffer(_workspace(device), torch.empty(INT_WORKSPACE, dtype=torch.uint8, device=device))


# ---------------------------------------------------------------- FlashInfer, prefill


def flashinfer_dense(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Causal attention of one sequence, q `[S, Hq, D]`, k and v `[S, H, D]`."""
    wrapper = library("flashinfer").BatchPrefillWithRaggedKVCacheWrapper(_workspace(q.device), "NHD")
    ends = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    wrapper.plan(ends, ends, q.shape[1], k.shape[1], q.shape[2], causal=True, q_data_type=q.dtype, kv_data_type=k.dtype)
    return partial(wrapper.run, q, k, v)


def flashinfer_sparse(q: Tensor, k: Tensor, v: Tensor, lists: Lists, block: int, backend: str) -> tuple[Call, Call]:
    """A pattern by `block_lists`: its KV heads stand one below the other, since its block lists are one for all heads.
    Returns the call, and the same with its result as `[S, Hq, D]`."""
    wrapper = library("flashinfer").BlockSparseAttentionWrapper(_workspace(q.device), backend)
    _more_room(wrapper, q.device)
    tokens, kv_heads = k.shape[:2]
    if tokens % block:
        raise Skipped(f"its rows of blocks of {block} do not end with {tokens} tokens")
    group = q.shape[1] // kv_heads
    below = q.unflatten(1, (kv_heads, group)).transpose(0, 1).flatten(0, 1).contiguous()  # [H S, G, D]
    keys, values = (x.transpose(0, 1).flatten(0, 1)[:, None].contiguous() for x in (k, v))  # [H S, 1, D]
    wrapper.plan(
        *(x.to(q.device) for x in lists), len(below), len(keys), block, block, group, 1, q.shape[2], causal=True,
        q_data_type=q.dtype, kv_data_type=k.dtype, o_data_type=q.dtype,
    )  # fmt: skip
    call = partial(wrapper.run, below, keys, values)
    return call, lambda: call().unflatten(0, (kv_heads, tokens)).transpose(0, 1).flatten(1, 2)


# ---------------------------------------------------------------- FlashInfer, decode


def flashinfer_decode(
    q: Tensor, kept: list[Tensor], pages: Pages, page: int, kv_heads: int, *, tensor_cores: bool,
    indices: Tensor | None = None,
) -> list[Call]:  # fmt: skip
    """One new token a row, a call for each of `kept`: keys and values `[2, pages, kv_heads, page, D]`.

    Args:
        q: `[rows, heads, D]`.
        indices: a buffer that holds the pages' numbers from then on, to change them between calls.
    """
    module, device = library("flashinfer"), q.device
    pages = Pages(*(x.to(device) for x in pages))
    buffers: dict[str, Any] = {}
    if indices is not None:
        buffers = {
            "use_cuda_graph": True,
            "paged_kv_indptr_buffer": torch.empty_like(pages.indptr),
            "paged_kv_indices_buffer": indices,
            "paged_kv_last_page_len_buffer": torch.empty_like(pages.last_length),
        }
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(device), "HND", use_tensor_cores=tensor_cores, **buffers
    )
    wrapper.plan(*pages, q.shape[1], kv_heads, q.shape[2], page, q_data_type=q.dtype, kv_data_type=q.dtype)
    return [partial(wrapper.run, q, tuple(x)) for x in kept]


def flashinfer_decode_all(q: Tensor, kept: list[Tensor], *, tensor_cores: bool) -> list[Call]:
    """On all keys, `[2, B, P, H, page, D]` each; q `[B, Hq, D]`."""
    _, batch, pages, kv_heads, page, _ = kept[0].shape
    lists = all_pages(batch, pages, page)
    return flashinfer_decode(q, [x.flatten(1, 2) for x in kept], lists, page, kv_heads, tensor_cores=tensor_cores)


# ---------------------------------------------------------------- MInference


class Lines(NamedTuple):
    """How many lines MInference chooses, and what its kernel then computes."""

    vertical: int
    slash: int
    pairs: float  # a head


def minference_lines(scores: tuple[Tensor, Tensor], tokens: int, pairs: float) -> Lines:
    """As many columns and diagonals as come nearest to `pairs` a head, where `scores` (of `line_scores`) choose."""
    module = library(MINFERENCE)
    lengths = torch.tensor([tokens], dtype=torch.int32, device=scores[0].device)

    def count(vertical: int, slash: int) -> float:
        columns, diagonals = (x.int()[None] for x in lines(scores, vertical, slash))
        tiles, _, single, _ = module.convert_vertical_slash_indexes(
            lengths, columns.sort(dim=-1)[0], diagonals.sort(dim=-1, descending=True)[0], tokens, TILE, TILE
        )
        return line_pairs(tiles, single)

    vertical, slash = lines_for(pairs, count, tokens)
    return Lines(vertical, slash, count(vertical, slash))


def minference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """Its vertical-slash attention of one sequence to columns and diagonals that are chosen (of `lines`), with the
    result as `[S, Hq, D]`, and which kernel that is. It wants keys for each query head: q, k, v `[S, .., D]`."""
    module = library(MINFERENCE)
    group = q.shape[1] // k.shape[1]
    inputs = [
        x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1)[None].contiguous() for x in (q, k, v)
    ]
    fast = getattr(module, "sparse_attn_func", None) is not None
    repeated = f", keys repeated {group} times before" if group > 1 else ""

    def attend(columns: Tensor, diagonals: Tensor) -> Tensor:
        out = module.vertical_slash_sparse_attention(*inputs, columns[None], diagonals[None])
        return out[0].transpose(0, 1)

    return attend, f"its {'FlashAttention' if fast else 'Triton'} kernel{repeated}"


# ---------------------------------------------------------------- Quest


def quest(q: Tensor, k: Tensor, v: Tensor, pages: int) -> Call:
    """Its own kernels (bounds, top-k, attention to the pages) for one new token of one sequence. q `[Hq, D]`, k and v
    `[S, H, D]`; they compute in float16."""
    heads, kv_heads = len(q), k.shape[1]
    if heads != kv_heads or heads != QUEST_HEADS:
        raise Skipped(f"its kernels take {QUEST_HEADS} query heads with keys of their own, not {heads}/{kv_heads}")
    module = library(QUEST)
    q, k, v = (x.half() for x in (q, k, v))
    tokens = len(k)
    control = module.InferenceController(
        1, heads, q.shape[-1], QUEST_PAGE, pages, tokens, torch.float16, torch.device(q.device)
    )
    for first, last in ((0, tokens - 1), (tokens - 1, tokens)):
        control.prepare_metadata(last - first)
        control.begin_forward(last - first)
        module.append_kv(k[first:last].contiguous(), v[first:last].contiguous(), control, 0)
        if last < tokens:
            control.end_forward()
    query = q[None].contiguous()

    def call() -> Tensor:
        scores = module.decode_estimate(query, control, 0)
        module.decode_topk(scores, control)
        return module.decode_sparse_attn(query, control, 0, control.topk_dindices_buffer)[0]

    return call
