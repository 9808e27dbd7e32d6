"""Host side of the Hopper kernels: what they support, their descriptors and grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import schedule
from ...pattern import Pattern

_BOX_ROWS = 64
_TILE_ROWS = 192
_STAGES = {64: 8, 128: 4}  # key and value tiles in flight, by head dimension
_REGISTERS = 160  # of a consumer thread; more would be dropped without a word


def supports_forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: bool) -> bool:
    """Whether the forward kernel takes this call: sm_90, 16 bits, head dimension 64 or 128, blocks of 64 and more, a
    closed-form pattern, whole sequences (not packed, as many queries as keys), and strides that TMA can read."""
    if packed or not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return False
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] not in _STAGES or q.numel() == 0:
        return False
    if q.shape[1] != k.shape[1] or pattern.block_size < _BOX_ROWS or not schedule.has_closed_form(pattern):
        return False
    return all(_readable(x) for x in (q, k, v))


def _readable(x: Tensor) -> bool:
    """TMA reads 16-byte aligned rows with unit stride."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
    return aligned and x.stride(3) == 1


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, heads: tuple[int, int, int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """q `[B, S, Hq, D]`, k/v `[B, S, Hkv, D]`, heads = (layer, head_offset, total KV heads) -> out and lse."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import forward

    batch, length, num_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)

    def describe(x: Tensor) -> TensorDescriptor:
        """[B, H, S, D], in boxes of 64 rows of one head."""
        shape = [x.shape[0], x.shape[2], x.shape[1], x.shape[3]]
        strides = [x.stride(0), x.stride(2), x.stride(1), 1]
        return TensorDescriptor(x, shape, strides, [1, 1, _BOX_ROWS, head_dim], layout)

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, length, dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    rules = schedule.rule_schedule(pattern.key, kv_heads, *heads, q.device)
    tiles_per_head = -(-length // _TILE_ROWS)
    num_tiles = tiles_per_head * num_heads * batch
    programs = min(num_tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    forward.attention_forward[(programs,)](
        describe(q), describe(k), describe(v), describe(out), lse, rules.table, counter,
        softmax_scale * 1.4426950408889634, length, num_heads, num_heads // kv_heads, tiles_per_head, num_tiles,
        TABLE=schedule.TABLE_COLUMNS, BLOCK=pattern.block_size, LEVELS=rules.num_levels, SINKS=rules.has_sinks,
        STAGES=_STAGES[head_dim], REGISTERS=_REGISTERS, num_warps=4,
    )  # fmt: skip
    return out, lse
