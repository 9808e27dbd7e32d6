"""Puts new keys and values into the slots of their regions (`s2.attention.decode` says what a region is).

Of a call's new tokens a region takes in those of its newest blocks, as many as it has room for and as so many tokens
can lie in. A program writes one of these blocks, or a tile of it, so no two write into one slot, and what it costs goes
by the tokens that are kept. The grid depends on shapes alone; how many tokens there are is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ...regions import HeadGroup
from ..index import members_below
from .decode_plan import FIELDS, load_regions

_TILE_BYTES = 16 << 10  # keys that a program has on their way
_WARP_BYTES = 512  # that the threads of a warp load at once


@triton.jit
def _locate(nth, regions, span, length, BLOCK: tl.constexpr):
    """`(key block, first slot)` of the `nth` block of a head's regions, newest first, of those that tokens in `span`
    neighbouring blocks reach. Block -1: there is none."""
    block, slot = nth * 0 - 1, nth * 0
    for index in tl.static_range(len(regions)):
        begin, capacity, stride, residue, first, last, _, _ = regions[index]
        member = members_below(tl.minimum(last, (length + BLOCK - 1) // BLOCK), stride, residue) - 1 - nth
        count = tl.minimum(capacity, tl.cdiv(span, stride))
        found = residue + member * stride
        here = (nth >= 0) & (nth < count) & (member >= 0) & (found >= first)
        block = tl.where(here, found, block)
        slot = tl.where(here, begin + member % capacity * BLOCK, slot)
        nth -= count
    return block, slot


@triton.jit(
    do_not_specialize=["kv_heads", "tiles", "pieces", "span"], do_not_specialize_on_alignment=["before", "after"]
)
def write_slots(
    new_k, new_v, k, v, table, before, after, kv_heads, tiles, pieces, span,
    stride_nkb, stride_nkt, stride_nkh, stride_nvb, stride_nvt, stride_nvh,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    REGIONS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # new_k/new_v [B, S, Hkv, D], before/after [B], table [Hkv, REGIONS, 8] -> k/v [B, Hkv, C, D]
    program = tl.program_id(0)
    tile, head, batch = program % tiles, program // tiles % kv_heads, program // tiles // kv_heads
    begin, end = tl.load(before + batch), tl.load(after + batch)
    regions = load_regions(table + head * (REGIONS * FIELDS), REGIONS)
    block, slot = _locate(tile // pieces, regions, span, end, BLOCK)
    first = tl.maximum(begin, block * BLOCK) + tile % pieces * TILE
    end = tl.minimum(end, (block + 1) * BLOCK)  # nothing where there is no block
    if first < end:
        token, column = first + tl.arange(0, TILE), tl.arange(0, WIDTH)
        mask = (token < end)[:, None] & (column < D)[None, :]
        source, target = (token - begin).to(tl.int64), (slot + token % BLOCK).to(tl.int64)
        wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
        from_k = new_k + wide_batch * stride_nkb + wide_head * stride_nkh + source * stride_nkt
        from_v = new_v + wide_batch * stride_nvb + wide_head * stride_nvh + source * stride_nvt
        to_k = k + wide_batch * stride_kb + wide_head * stride_kh + target * stride_kt
        to_v = v + wide_batch * stride_vb + wide_head * stride_vh + target * stride_vt
        keys = tl.load(from_k[:, None] + column[None, :], mask=mask)
        values = tl.load(from_v[:, None] + column[None, :], mask=mask)
        tl.store(to_k[:, None] + column[None, :], keys, mask=mask)
        tl.store(to_v[:, None] + column[None, :], values, mask=mask)


@dataclass(frozen=True)
class Grid:
    """Of calls with so many tokens a sequence: they lie in `span` neighbouring blocks at most, and what one of these
    gets is written in `pieces`."""

    span: int
    pieces: int
    constants: dict[str, int]
    num_warps: int

    @classmethod
    def of(cls, tokens: int, head_dim: int, itemsize: int, block: int) -> Grid:
        width = triton.next_power_of_2(head_dim)
        tile = min(block, triton.next_power_of_2(tokens), max(1, _TILE_BYTES // (width * itemsize)))
        constants = {"D": head_dim, "WIDTH": width, "BLOCK": block, "TILE": tile}
        num_warps = max(1, min(4, tile * width * itemsize // _WARP_BYTES))
        return cls((tokens + block - 2) // block + 1, -(-min(tokens, block) // tile), constants, num_warps)


def run_write_slots(
    k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, group: HeadGroup, table: Tensor, before: Tensor, after: Tensor,
    block: int,
) -> None:  # fmt: skip
    """Keep of new keys and values what later queries see.

    Args:
        k, v: `[B, H, C, D]`, the slots of a group's heads, whose last dimension is dense.
        new_k, new_v: `[B, S, H, D]`. Those behind a sequence's own are padding, which goes nowhere.
        group, table: where the heads keep their keys, and its `HeadGroup.table` on the device.
        before, after: int32 `[B]`, tokens of each sequence without and with the new ones, of which there are S at most.
        block: tokens in a block.
    """
    if new_k.numel() == 0:
        return
    batch, tokens, kv_heads, head_dim = new_k.shape
    new_k, new_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (new_k, new_v))
    grid = Grid.of(tokens, head_dim, k.element_size(), block)
    tiles = group.most_blocks_of(grid.span) * grid.pieces
    write_slots[(batch * kv_heads * tiles,)](
        new_k, new_v, k, v, table, before, after, kv_heads, tiles, grid.pieces, grid.span,
        *new_k.stride()[:3], *new_v.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        REGIONS=table.shape[1], **grid.constants, num_warps=grid.num_warps,
    )  # fmt: skip
