"""Host side of the Triton kernels: shapes, schedules and grids. No autograd here (see `s2.attention.op`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import schedule
from ...call import Call
from . import backward, forward
from .config import backward_kv_config, backward_q_config, forward_config, pack_heads, split_head_dim
from .documents import Fill, document_tiles, unowned


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Schedule:
    """The pattern's side of a launch: table or lists, and the constants that go with them."""

    def __init__(self, call: Call, k: Tensor, cu_seqlens: Tensor | None) -> None:
        size = call.pattern.block_size
        self.lists = not schedule.has_closed_form(call.pattern)
        self.num_blocks = -(-k.shape[1] // size)
        if self.lists:
            num_blocks = _listed_blocks(call, self.num_blocks, cu_seqlens)
            lists = schedule.list_schedule(call, num_blocks, k.shape[2], k.device)
            self.key_lists = (lists.key_offsets, lists.key_blocks)
            self.query_lists = (lists.query_offsets, lists.query_blocks)
            self.list_stride = lists.key_offsets.shape[1]
            self.table, self.levels, self.sinks = lists.key_offsets, 0, False
        else:
            rules = schedule.rule_schedule(call, k.shape[2], k.device)
            self.table, self.levels, self.sinks = rules.table, rules.num_levels, rules.has_sinks
            self.key_lists = self.query_lists = (rules.table, rules.table)
            self.list_stride = 0
        self.constants = {
            "TABLE": 0 if self.lists else schedule.TABLE_COLUMNS,
            "BLOCK": size,
            "LEVELS": self.levels,
            "SINKS": self.sinks,
            "LISTS": self.lists,
            "PACKED": cu_seqlens is not None,
        }


def _listed_blocks(call: Call, num_blocks: int, cu_seqlens: Tensor | None) -> int:
    """Blocks of the lists. Packed documents may be shorter than all the tokens: where these exceed a mask,
    `cu_seqlens` is read."""
    mask, size = call.pattern.mask, call.pattern.block_size
    if mask is None or cu_seqlens is None or num_blocks <= mask.shape[1]:
        return num_blocks
    longest = -(-int(cu_seqlens.diff().max()) // size)
    if longest > mask.shape[1]:
        raise ValueError(f"the block mask covers {mask.shape[1]} blocks but a document has {longest}")
    return mask.shape[1]


def _query_tiles(
    call: Call, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, block_m: int, lists: bool, fill: Fill | None = None
) -> tuple[int, int, Tensor, int]:
    """`(block_m, pack, table of tiles, num_tiles)` of kernels that walk queries."""
    size, group = call.pattern.block_size, q.shape[2] // k.shape[2]
    pack = pack_heads(group, size, block_m)
    if lists and block_m // pack > size:  # a tile must stay inside one query block
        block_m = size * pack
    if cu_seqlens is not None:
        return block_m, pack, *document_tiles(cu_seqlens, q.shape[1], block_m // pack, fill=fill)
    # few queries (decoding) do not pay for a tall tile
    rows = max(16, 1 << (q.shape[1] * pack - 1).bit_length())
    block_m = min(block_m, max(rows, pack))
    tokens = block_m // pack
    offset = k.shape[1] - q.shape[1]
    return block_m, pack, q, -(-k.shape[1] // tokens) - offset // tokens


def _batch(cu_seqlens: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors as a batch of one."""
    return tensors if cu_seqlens is None else tuple(x[None] for x in tensors)


def run_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """q `[B, Sq, Hq, D]`, k/v `[B, Skv, Hkv, D]` -> out, lse `[B, Hq, Sq]`; packed `[T, H, D]` -> lse `[Hq, T]`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32, device=q.device)
    if out.numel() == 0 or (cu_seqlens is not None and len(cu_seqlens) == 1):  # no document
        return out.zero_(), lse.fill_(float("-inf"))
    fill = None if cu_seqlens is None else unowned(out, lse=lse)
    q, k, v, out_rows, row_lse = _batch(cu_seqlens, *map(_unit_stride, (q, k, v)), out, lse)
    batch, q_len, num_heads, head_dim = q.shape
    capability = _capability(q.device)
    d0, d1 = split_head_dim(head_dim, q.element_size(), capability)
    config = forward_config(head_dim, q.element_size(), capability)
    plan = _Schedule(call, k, cu_seqlens)
    block_m, pack, documents, num_tiles = _query_tiles(call, q, k, cu_seqlens, config.block_m, plan.lists, fill)
    block_n = min(config.block_n, call.pattern.block_size) if plan.lists else config.block_n
    num_packs = num_heads // pack
    forward.attention_forward[(num_tiles * num_packs * batch,)](
        q, k, v, out_rows, row_lse,
        plan.table, *plan.key_lists, plan.list_stride,
        documents, q_len, k.shape[1], call.softmax_scale * forward.LOG2E.value, num_tiles, num_packs,
        num_heads // k.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out_rows.stride()[:3],
        *row_lse.stride()[:2],
        D=head_dim, D0=d0, D1=d1, BLOCK_M=block_m, BLOCK_N=block_n, PACK=pack, STAGES=config.num_stages,
        **plan.constants, num_warps=config.num_warps,
    )  # fmt: skip
    return out, lse


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    cu_seqlens: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output and (if used) of the log-sum-exp. Bitwise repeatable."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0 or (cu_seqlens is not None and len(cu_seqlens) == 1):
        return dq.zero_(), dk.zero_(), dv.zero_()
    gradient_lse = lse if dlse is None else _unit_stride(dlse)
    read = (*map(_unit_stride, (q, k, v, out, dout)), lse, gradient_lse)
    q, k, v, out, dout, lse, gradient_lse, grad_q, grad_k, grad_v = _batch(cu_seqlens, *read, dq, dk, dv)
    batch, q_len, num_heads, head_dim = q.shape
    kv_heads, group = k.shape[2], num_heads // k.shape[2]
    capability = _capability(q.device)
    d0, d1 = split_head_dim(head_dim, q.element_size(), capability)
    q_config = backward_q_config(head_dim, q.element_size(), capability)
    kv_config = backward_kv_config(head_dim, q.element_size(), capability)
    plan = _Schedule(call, k, cu_seqlens)
    size = call.pattern.block_size

    delta = torch.empty_like(lse)
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
    if cu_seqlens is not None:
        fill = unowned(dq, dk, dv)
        documents, num_tiles = document_tiles(cu_seqlens, q_len, block_n, block=size, extra=extra, fill=fill)
    backward.attention_backward_kv[(kv_heads * num_tiles * batch,)](
        q, k, v, dout, lse, delta, grad_k, grad_v,
        plan.table, *plan.query_lists, plan.list_stride,
        documents, q_len, k.shape[1], call.softmax_scale, num_tiles, kv_heads, group,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *lse.stride()[:2],
        *grad_k.stride()[:3], *grad_v.stride()[:3],
        D=head_dim, D0=d0, D1=d1, BLOCK_M=block_m, BLOCK_N=block_n, STAGES=kv_config.num_stages,
        **plan.constants, num_warps=kv_config.num_warps,
    )  # fmt: skip

    block_m, pack, documents, num_tiles = _query_tiles(call, q, k, cu_seqlens, q_config.block_m, plan.lists)
    block_n = min(q_config.block_n, size) if plan.lists else q_config.block_n
    num_packs = num_heads // pack
    backward.attention_backward_q[(num_tiles * num_packs * batch,)](
        q, k, v, dout, lse, delta, grad_q,
        plan.table, *plan.key_lists, plan.list_stride,
        documents, q_len, k.shape[1], call.softmax_scale, num_tiles, num_packs, group,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *grad_q.stride()[:3],
        *lse.stride()[:2],
        D=head_dim, D0=d0, D1=d1, BLOCK_M=block_m, BLOCK_N=block_n, PACK=pack, STAGES=q_config.num_stages,
        **plan.constants, num_warps=q_config.num_warps,
    )  # fmt: skip
    return dq, dk, dv
