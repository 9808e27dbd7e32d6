"""Host side of the Triton kernels: shapes, schedules and grids. No autograd here (see `s2.attention.op`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ... import schedule
from ...call import Call
from . import backward, forward
from .config import TileConfig, backward_kv_config, backward_q_config, forward_config, pack_heads, split_head_dim
from .documents import Fill, document_tiles, unowned

_DELTA_ROWS = 64  # that a program of `attention_delta` works on


class _Plan:
    """What the kernels of a call share: the pattern as a table or as block lists, and constants. q `[B, Sq, Hq, D]`,
    k `[B, Skv, Hkv, D]`."""

    def __init__(
        self, call: Call, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
    ) -> None:
        self.q_len, self.kv_len, self.group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        self.cu_seqlens, self.cu_seqlens_k, self.size = cu_seqlens, cu_seqlens_k, call.pattern.block_size
        self.num_blocks = max(1, -(-self.kv_len // self.size))
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
        self.chip = (q.shape[3], q.element_size(), capability)
        self.lists = not schedule.has_closed_form(call.pattern)
        self.call, self.kv_heads, self.device = call, k.shape[2], k.device
        self.levels, sinks = 0, False
        if not self.lists:
            table, _, self.levels, sinks = schedule.rule_schedule(call, self.kv_heads, self.device)
            self.table = (table, table, table, 0)
        d0, d1 = split_head_dim(*self.chip)
        self.parts = {"D": q.shape[3], "D0": d0, "D1": d1}
        self.constants = {
            **self.parts,
            "TABLE": 0 if self.lists else schedule.TABLE_COLUMNS,
            "BLOCK": self.size,
            "LEVELS": self.levels,
            "SINKS": sinks,
            "LISTS": self.lists,
            "PACKED": cu_seqlens is not None,
            "LATE": cu_seqlens_k is not None,
        }

    def of_queries(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """What kernels get that walk keys: the table, then lists of key blocks and the stride of a head in them."""
        return self._table_or(schedule.key_lists)

    def of_keys(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The same of query blocks."""
        return self._table_or(schedule.query_lists)

    def _table_or(self, lists_of: Callable[..., schedule.BlockLists]) -> tuple[Tensor, Tensor, Tensor, int]:
        if not self.lists:
            return self.table
        first = 0 if self.cu_seqlens is not None else (self.kv_len - self.q_len) // self.size
        offsets, blocks = lists_of(self.call, self._listed_blocks, self.kv_heads, self.device, first)
        return offsets, offsets, blocks, offsets.shape[1]

    @cached_property
    def _listed_blocks(self) -> int:
        """Blocks of the lists. Packed documents may be shorter than all the tokens: where these exceed a mask,
        borders are read."""
        mask = self.call.pattern.mask
        if mask is None or self.cu_seqlens is None or self.num_blocks <= mask.shape[1]:
            return self.num_blocks
        lengths = self.cu_seqlens.diff()
        if self.cu_seqlens_k is not None:
            lengths = self.cu_seqlens_k.diff() * (lengths > 0)
        longest = -(-int(lengths.max()) // self.size)
        if longest > mask.shape[1]:
            raise ValueError(f"the block mask covers {mask.shape[1]} blocks but a document has {longest}")
        return mask.shape[1]

    def config(self, choose: Callable[[int, int, tuple[int, int]], TileConfig]) -> TileConfig:
        """Tiles of a kernel. With lists those of keys stay inside a block."""
        config = choose(*self.chip)
        return dataclasses.replace(config, block_n=min(config.block_n, self.size)) if self.lists else config

    def query_tiles(self, block_m: int, fill: Fill | None = None) -> tuple[int, int, Tensor | None, int]:
        """`(block_m, pack, table of tiles, num_tiles)` of kernels that walk queries."""
        pack = pack_heads(self.group, self.size, block_m)
        if self.lists and block_m // pack > self.size:  # a tile must stay inside one query block
            block_m = self.size * pack
        if self.cu_seqlens is not None:
            keys = None if self.cu_seqlens_k is None else (self.cu_seqlens_k, self.kv_len)
            return block_m, pack, *document_tiles(self.cu_seqlens, self.q_len, block_m // pack, fill=fill, keys=keys)
        # few queries (decoding) do not pay for a tall tile
        rows = max(16, 1 << (self.q_len * pack - 1).bit_length())
        block_m = min(block_m, max(rows, pack))
        tokens = block_m // pack
        return block_m, pack, None, -(-self.kv_len // tokens) - (self.kv_len - self.q_len) // tokens

    def key_tiles(self, block_n: int, extra: int, fill: Fill | None) -> tuple[Tensor | None, int]:
        """`(table of tiles, num_tiles)` of the kernel that walks keys."""
        if self.cu_seqlens is None:
            return None, -(-self.num_blocks * self.size // block_n) + extra
        borders, queries = self.cu_seqlens, None
        if self.cu_seqlens_k is not None:
            borders, queries = self.cu_seqlens_k, (self.cu_seqlens, self.q_len)
        return document_tiles(borders, self.kv_len, block_n, block=self.size, extra=extra, fill=fill, queries=queries)


def _batch(cu_seqlens: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors as a batch of one."""
    return tensors if cu_seqlens is None else tuple(x[None] for x in tensors)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """All but the last of each, which is 1."""
    return [stride for x in tensors for stride in x.stride()[:-1]]


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """q `[B, Sq, Hq, D]`, k/v `[B, Skv, Hkv, D]` -> out, lse `[B, Hq, Sq]`; packed `[Tq, Hq, D]`, `[Tk, Hkv, D]` -> lse
    `[Hq, Tq]`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32, device=q.device)
    if out.numel() == 0 or (cu_seqlens is not None and len(cu_seqlens) == 1):  # no document
        return out.zero_(), lse.fill_(float("-inf"))
    fill = None if cu_seqlens is None else unowned(out, lse=lse)
    q, k, v, out_rows, row_lse = _batch(cu_seqlens, *map(_unit_stride, (q, k, v)), out, lse)
    plan = _Plan(call, q, k, cu_seqlens, cu_seqlens_k)
    config = plan.config(forward_config)
    block_m, pack, documents, num_tiles = plan.query_tiles(config.block_m, fill)
    num_packs = q.shape[2] // pack
    forward.attention_forward[(num_tiles * num_packs * q.shape[0],)](
        q, k, v, out_rows, row_lse, *plan.of_queries(),
        q if documents is None else documents, plan.q_len, plan.kv_len, call.softmax_scale * forward.LOG2E.value,
        num_tiles, num_packs, plan.group, *_strides(q, k, v, out_rows, row_lse),
        BLOCK_M=block_m, BLOCK_N=config.block_n, PACK=pack, STAGES=config.num_stages,
        **plan.constants, num_warps=config.num_warps,
    )  # fmt: skip
    return out, lse


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from those of the output and (if used) of the log-sum-exp. Bitwise repeatable."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0 or (cu_seqlens is not None and len(cu_seqlens) == 1):
        return dq.zero_(), dk.zero_(), dv.zero_()
    given = (*map(_unit_stride, (q, k, v, out, dout)), lse, lse if dlse is None else _unit_stride(dlse))
    q, k, v, out, dout, lse, row_dlse, grad_q, grad_k, grad_v = _batch(cu_seqlens, *given, dq, dk, dv)
    batch, q_len, num_heads, _ = q.shape
    kv_heads = k.shape[2]
    plan = _Plan(call, q, k, cu_seqlens, cu_seqlens_k)

    delta = torch.empty_like(lse)
    backward.attention_delta[(-(-q_len // _DELTA_ROWS) * num_heads * batch,)](
        out, dout, row_dlse, delta, q_len, num_heads, *_strides(out, dout, delta, row_dlse),
        **plan.parts, BLOCK_M=_DELTA_ROWS, HAS_DLSE=dlse is not None,
    )  # fmt: skip

    config = plan.config(backward_kv_config)
    block_m, block_n = min(config.block_m, plan.size) if plan.lists else config.block_m, config.block_n
    extra = plan.levels + 1 if block_n > plan.size else 0
    fill, fill_q = None, None
    if cu_seqlens_k is not None:  # each with the borders of its own rows
        fill, fill_q = unowned(dk, dv), unowned(dq)
    elif cu_seqlens is not None:
        fill = unowned(dq, dk, dv)
    documents, num_tiles = plan.key_tiles(block_n, extra, fill)
    backward.attention_backward_kv[(kv_heads * num_tiles * batch,)](
        q, k, v, dout, lse, delta, grad_k, grad_v, *plan.of_keys(),
        q if documents is None else documents, q_len, plan.kv_len, call.softmax_scale, num_tiles, kv_heads, plan.group,
        *_strides(q, k, v, dout, lse, grad_k, grad_v),
        BLOCK_M=block_m, BLOCK_N=block_n, STAGES=config.num_stages, **plan.constants, num_warps=config.num_warps,
    )  # fmt: skip

    config = plan.config(backward_q_config)
    block_m, pack, tiles, num_tiles = plan.query_tiles(config.block_m, fill_q)
    num_packs = num_heads // pack
    backward.attention_backward_q[(num_tiles * num_packs * batch,)](
        q, k, v, dout, lse, delta, grad_q, *plan.of_queries(),
        q if tiles is None else tiles, q_len, plan.kv_len, call.softmax_scale, num_tiles, num_packs, plan.group,
        *_strides(q, k, v, dout, grad_q, lse),
        BLOCK_M=block_m, BLOCK_N=config.block_n, PACK=pack, STAGES=config.num_stages,
        **plan.constants, num_warps=config.num_warps,
    )  # fmt: skip
    return dq, dk, dv
