"""Host side of the Triton kernels: shapes, schedules and grids. No autograd here (see `s2.attention.op`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import schedule
from ...pattern import Pattern
from . import backward, forward
from .config import (
    TileConfig,
    backward_kv_config,
    backward_q_config,
    forward_config,
    pack_heads,
    split_head_dim,
)
from .documents import Fill, document_tiles, unowned


@dataclass(frozen=True)
class Problem:
    """One attention call as the kernels see it: `[B, S, H, D]`, packed batches as B = 1 with `cu_seqlens`."""

    pattern: Pattern
    layer: int
    head_offset: int
    total_kv_heads: int
    softmax_scale: float
    cu_seqlens: Tensor | None

    def batched(self, x: Tensor) -> Tensor:
        return x[None] if self.cu_seqlens is not None else x

    def unbatched(self, x: Tensor) -> Tensor:
        return x[0] if self.cu_seqlens is not None else x

    @property
    def has_no_documents(self) -> bool:
        return self.cu_seqlens is not None and self.cu_seqlens.shape[0] == 1


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Schedule:
    """The pattern's side of a launch: table or lists, and the constants that go with them."""

    def __init__(self, problem: Problem, k: Tensor) -> None:
        pattern, size = problem.pattern, problem.pattern.block_size
        heads = (k.shape[2], problem.layer, problem.head_offset, problem.total_kv_heads)
        self.lists = not schedule.has_closed_form(pattern)
        num_blocks = -(-k.shape[1] // size)
        if self.lists:
            if pattern.mask is not None:
                num_blocks = _mask_blocks(problem, num_blocks)
            lists = schedule.list_schedule(pattern.key, num_blocks, *heads, k.device)
            self.key_lists = (lists.key_offsets, lists.key_blocks)
            self.query_lists = (lists.query_offsets, lists.query_blocks)
            self.list_stride = lists.key_offsets.shape[1]
            self.table, self.levels, self.sinks = lists.key_offsets, 0, False
            self.table_columns = 0
        else:
            rules = schedule.rule_schedule(pattern.key, *heads, k.device)
            self.table, self.levels, self.sinks = rules.table, rules.num_levels, rules.has_sinks
            self.key_lists = self.query_lists = (rules.table, rules.table)
            self.list_stride = 0
            self.table_columns = schedule.TABLE_COLUMNS
        self.num_blocks = -(-k.shape[1] // size)

    def constants(self, problem: Problem) -> dict[str, Any]:
        return {
            "TABLE": self.table_columns,
            "BLOCK": problem.pattern.block_size,
            "LEVELS": self.levels,
            "SINKS": self.sinks,
            "LISTS": self.lists,
            "PACKED": problem.cu_seqlens is not None,
        }


def _mask_blocks(problem: Problem, num_blocks: int) -> int:
    """Blocks of the lists of a mask pattern. Packed documents may be shorter than all the tokens: where these exceed
    the mask, `cu_seqlens` is read."""
    assert problem.pattern.mask is not None
    size, covered = problem.pattern.block_size, problem.pattern.mask.shape[1]
    if problem.cu_seqlens is None or num_blocks <= covered:
        return num_blocks
    longest = -(-int(problem.cu_seqlens.diff().max()) // size)
    if longest > covered:
        raise ValueError(f"the block mask covers {covered} blocks but a document has {longest}")
    return covered


def _query_tiles(
    problem: Problem, q: Tensor, k: Tensor, config: TileConfig, lists: bool, fill: Fill | None = None
) -> tuple[int, int, Tensor, int]:
    """`(block_m, pack, table of tiles, num_tiles)` of kernels that walk queries."""
    size, group = problem.pattern.block_size, q.shape[2] // k.shape[2]
    block_m = config.block_m
    pack = pack_heads(group, size, block_m)
    if lists and block_m // pack > size:  # a tile must stay inside one query block
        block_m = size * pack
    if problem.cu_seqlens is None:  # few queries (decoding) do not pay for a tall tile
        rows = max(16, 1 << (q.shape[1] * pack - 1).bit_length())
        block_m = min(block_m, max(rows, pack))
    tokens = block_m // pack
    if problem.cu_seqlens is None:
        offset = k.shape[1] - q.shape[1]
        return block_m, pack, q, -(-k.shape[1] // tokens) - offset // tokens
    return block_m, pack, *document_tiles(problem.cu_seqlens, q.shape[1], tokens, fill=fill)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, config: TileConfig | None = None
) -> tuple[Tensor, Tensor]:
    """q `[B, Sq, Hq, D]`, k/v `[B, Skv, Hkv, D]` -> out, lse `[B, Hq, Sq]`; packed `[T, H, D]` -> lse `[Hq, T]`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (_unit_stride(problem.batched(x)) for x in (q, k, v))
    o = problem.batched(out)
    batch, q_len, num_heads, head_dim = q.shape
    lse = torch.empty(batch, num_heads, q_len, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or problem.has_no_documents:
        return out.zero_(), problem.unbatched(lse.fill_(float("-inf")))
    capability = _capability(q.device)
    d0, d1 = split_head_dim(head_dim, q.element_size(), capability)
    config = config or forward_config(head_dim, q.element_size(), capability)
    plan = _Schedule(problem, k)
    fill = None if problem.cu_seqlens is None else unowned(out, lse=lse[0])
    block_m, pack, documents, num_tiles = _query_tiles(problem, q, k, config, plan.lists, fill)
    block_n = min(config.block_n, problem.pattern.block_size) if plan.lists else config.block_n
    num_packs = num_heads // pack
    forward.attention_forward[(num_tiles * num_packs * batch,)](
        q, k, v, o, lse,
        plan.table, *plan.key_lists, plan.list_stride,
        documents, q_len, k.shape[1], problem.softmax_scale * forward.LOG2E.value, num_tiles, num_packs,
        num_heads // k.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *lse.stride()[:2],
        D=head_dim, D0=d0, D1=d1, BLOCK_M=block_m, BLOCK_N=block_n, PACK=pack, STAGES=config.num_stages,
        **plan.constants(problem), num_warps=config.num_warps,
    )  # fmt: skip
    return out, problem.unbatched(lse)


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    problem: Problem,
    q_config: TileConfig | None = None,
    kv_config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output and (if used) of the log-sum-exp. Bitwise repeatable."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0 or problem.has_no_documents:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad_q, grad_k, grad_v = (problem.batched(x) for x in (dq, dk, dv))
    q, k, v, out, dout = (_unit_stride(problem.batched(x)) for x in (q, k, v, out, dout))
    lse = problem.batched(lse)
    batch, q_len, num_heads, head_dim = q.shape
    kv_heads, group = k.shape[2], num_heads // k.shape[2]
    capability = _capability(q.device)
    d0, d1 = split_head_dim(head_dim, q.element_size(), capability)
    q_config = q_config or backward_q_config(head_dim, q.element_size(), capability)
    kv_config = kv_config or backward_kv_config(head_dim, q.element_size(), capability)
    plan = _Schedule(problem, k)
    size = problem.pattern.block_size

    delta = torch.empty_like(lse)
    gradient_lse = lse if dlse is None else problem.batched(dlse)
    gradient_lse = gradient_lse if gradient_lse.stride(-1) == 1 else gradient_lse.contiguous()
    rows = 64
    backward.attention_delta[(-(-q_len // rows) * num_heads * batch,)](
        out, dout, gradient_lse, delta, q_len, num_heads,
        *out.stride()[:3], *dout.stride()[:3], *delta.stride()[:2], *gradient_lse.stride()[:2],
        D=head_dim, D0=d0, D1=d1, BLOCK_M=rows, HAS_DLSE=dlse is not None,
    )  # fmt: skip

    block_n = min(kv_config.block_n, size) if plan.lists else kv_config.block_n
    block_m = min(kv_config.block_m, size) if plan.lists else kv_config.block_m
    extra = plan.levels + 1 if block_n > size else 0
    documents, num_tiles = q, -(-plan.num_blocks * size // block_n) + extra
    if problem.cu_seqlens is not None:
        fill = unowned(dq, dk, dv)
        documents, num_tiles = document_tiles(
            problem.cu_seqlens, q_len, block_n, block=size, extra=extra, fill=fill
        )  # fmt: skip
    backward.attention_backward_kv[(kv_heads * num_tiles * batch,)](
        q, k, v, dout, lse, delta, grad_k, grad_v,
        plan.table, *plan.query_lists, plan.list_stride,
        documents, q_len, k.shape[1], problem.softmax_scale, num_tiles, kv_heads, group,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *lse.stride()[:2],
        *grad_k.stride()[:3], *grad_v.stride()[:3],
        D=head_dim, D0=d0, D1=d1, BLOCK_M=block_m, BLOCK_N=block_n, STAGES=kv_config.num_stages,
        **plan.constants(problem), num_warps=kv_config.num_warps,
    )  # fmt: skip

    block_m, pack, documents, num_tiles = _query_tiles(problem, q, k, q_config, plan.lists)
    block_n = min(q_config.block_n, size) if plan.lists else q_config.block_n
    num_packs = num_heads // pack
    backward.attention_backward_q[(num_tiles * num_packs * batch,)](
        q, k, v, dout, lse, delta, grad_q,
        plan.table, *plan.key_lists, plan.list_stride,
        documents, q_len, k.shape[1], problem.softmax_scale, num_tiles, num_packs, group,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *grad_q.stride()[:3],
        *lse.stride()[:2],
        D=head_dim, D0=d0, D1=d1, BLOCK_M=block_m, BLOCK_N=block_n, PACK=pack, STAGES=q_config.num_stages,
        **plan.constants(problem), num_warps=q_config.num_warps,
    )  # fmt: skip
    return dq, dk, dv
