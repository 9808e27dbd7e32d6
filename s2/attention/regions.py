"""What a KV cache has to keep of each head, and where it stands: the keys that some later query sees.

A head's rule falls into a few `Region`s, each a class of key blocks (every `stride`-th) that queries see at some
distances: sinks, the local window, and one for each level. Between them the regions give each query the keys that its
rule gives it, each once (`regions_of`). Classes that are seen up to a distance are rings, which overwrite what nobody
sees any more; the others grow with the sequence (`lay_out`). The same integers tell the decode step what it sees, so
that it needs no mask of queries and keys.

Shapes: B sequences, H KV heads, R regions, C slots (tokens a head has room for), n = C / block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .grammar import UNBOUNDED
from .pattern import HeadRule, Pattern

SPARE = 1  # blocks a ring has beyond what is seen: the new tokens of a decode step may begin one


class Region(NamedTuple):
    """A run of slots; the fields are the columns of a table, int32, in this order.

    Attributes:
        begin: first slot, a multiple of the block size.
        capacity: blocks it has room for. Block j stands in the `(j - residue) // stride % capacity`-th.
        stride, residue: it holds blocks j with `j % stride == residue`
        first, last: and `first <= j < last`.
        near, far: a query in block i sees those with `near <= i - j < far`.
    """

    begin: int
    capacity: int
    stride: int
    residue: int
    first: int
    last: int
    near: int
    far: int

    def holds(self, block: int) -> bool:
        return block % self.stride == self.residue and self.first <= block < self.last

    def blocks(self, begin: int, end: int) -> range:
        """Those that it holds, of `begin` to `end - 1`."""
        begin = max(self.first, begin)
        return range(begin + (self.residue - begin) % self.stride, min(self.last, end), self.stride)

    def place(self, block: int) -> int:
        """The slot of the first token of a block that it holds, in blocks from `begin`."""
        return (block - self.residue) // self.stride % self.capacity

    def overwritten(self, newest: int) -> int | None:
        """The last block that is lost once `newest` has been begun; None if none is."""
        index = (min(newest, self.last - 1) - self.residue) // self.stride - self.capacity
        block = self.residue + self.stride * index
        return block if block >= self.first else None


def regions_of(rule: HeadRule) -> tuple[Region, ...]:
    """The classes of key blocks that a rule is made of, without room (begin and capacity 0)."""
    if rule.is_dense:
        return (Region(0, 0, 1, 0, 0, UNBOUNDED, 0, UNBOUNDED),)
    regions = [Region(0, 0, 1, 0, 0, rule.sinks, 0, UNBOUNDED)] if rule.sinks else []
    regions.append(Region(0, 0, 1, 0, rule.sinks, UNBOUNDED, 0, rule.local))
    near = rule.local
    for level in rule.levels:
        regions.append(Region(0, 0, level.stride, level.residue, rule.sinks, UNBOUNDED, near, level.end))
        near = level.end
    return tuple(regions)


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Neighbouring KV heads whose rules differ in their residues alone, so that their keys have one shape.

    Attributes:
        begin, end: its heads are `begin` to `end - 1`.
        regions: of each of its heads, equally many.
        num_blocks: blocks that each head has room for.
        is_whole: it holds every key in order, although its pattern sees fewer: regions do not say what is seen.
    """

    begin: int
    end: int
    regions: tuple[tuple[Region, ...], ...]
    num_blocks: int
    is_whole: bool = False

    @property
    def is_in_order(self) -> bool:
        """Whether token t stands in slot t."""
        return len(self.regions[0]) == 1 and self.regions[0][0][2:] == (1, 0, 0, UNBOUNDED, 0, UNBOUNDED)

    @property
    def table(self) -> Tensor:
        """Int32 `[H, R, 8]` on the host."""
        return torch.tensor(self.regions, dtype=torch.int32, device="cpu")

    def most_blocks_of(self, span: int) -> int:
        """Blocks that each head keeps at most of `span` neighbouring ones."""
        return sum(min(region.capacity, -(-span // region.stride)) for region in self.regions[0])

    def oldest_block(self, newest: int) -> int:
        """The first block in which a query finds all that it sees, once `newest` has been begun."""
        lost = ((region, region.overwritten(newest)) for regions in self.regions for region in regions)
        return max((block + region.far for region, block in lost if block is not None), default=0)

    def rings(self, newest: int, block_size: int) -> list[slice]:
        """The slots of regions in which blocks are lost once `newest` has been begun."""
        return [
            slice(column[0].begin, column[0].begin + column[0].capacity * block_size)
            for column in zip(*self.regions, strict=True)  # of all heads, at the same slots
            if any(region.overwritten(newest) is not None for region in column)
        ]


def lay_out(
    pattern: Pattern, num_kv_heads: int, rotation: int, num_blocks: int, spare: int = SPARE
) -> tuple[HeadGroup, ...]:
    """Where a layer's KV heads keep their keys, for sequences of up to `num_blocks` blocks.

    Strides need not nest: each level keeps its own blocks from the beginning on. Masks and rules of query heads, of
    which several share a KV head, are no regions: then everything is kept (`HeadGroup.is_whole`).

    Args:
        pattern, rotation: the layer's.
        spare: blocks that rings keep beyond what is seen, at least 1. So many blocks can be taken back.
    """
    if pattern.mask is not None or len(pattern.heads) not in (0, num_kv_heads):
        return (whole_group(pattern, num_kv_heads, num_blocks),)
    rules = pattern.rules(num_kv_heads, layer=rotation)
    groups = []
    for _, heads in groupby(range(num_kv_heads), lambda head: _shape(rules[head])):
        members = list(heads)
        regions, size = _place([regions_of(rules[head]) for head in members], num_blocks, spare, pattern.block_size)
        groups.append(HeadGroup(members[0], members[-1] + 1, regions, size))
    return tuple(groups)


def whole_group(pattern: Pattern, num_kv_heads: int, num_blocks: int) -> HeadGroup:
    """All KV heads of a layer, keeping every key."""
    (region,) = regions_of(HeadRule(UNBOUNDED))
    regions = ((region._replace(capacity=num_blocks),),) * num_kv_heads
    return HeadGroup(0, num_kv_heads, regions, num_blocks, is_whole=not pattern.is_dense)


def _shape(rule: HeadRule) -> tuple:
    return rule.local, tuple((level.stride, level.end) for level in rule.levels), rule.sinks


def _place(
    heads: Sequence[tuple[Region, ...]], num_blocks: int, spare: int, block_size: int
) -> tuple[tuple[tuple[Region, ...], ...], int]:
    """The regions of each head with room, at the same slots for all, and the blocks that they take together."""
    placed: list[list[Region]] = [[] for _ in heads]
    begin = 0
    for column in zip(*heads, strict=True):
        if column[0].near:  # what no query can see any more is not kept
            column = tuple(region._replace(last=min(region.last, num_blocks - region.near)) for region in column)
        capacity = max(_capacity(region, num_blocks, spare) for region in column)
        if capacity:
            for row, region in zip(placed, column, strict=True):
                row.append(region._replace(begin=begin * block_size, capacity=capacity))
        begin += capacity
    return tuple(map(tuple, placed)), begin


def _capacity(region: Region, num_blocks: int, spare: int) -> int:
    members = len(region.blocks(0, num_blocks))
    return members if region.far >= UNBOUNDED else min(members, -(-(region.far + spare) // region.stride))


def held_blocks(table: Tensor, lengths: Tensor, num_blocks: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What stands in each block of slots.

    Args:
        table: int32 `[H, R, 8]`, regions (unused rows: first = last = 0).
        lengths: int32 `[B]`, tokens of each sequence.
        num_blocks: n, blocks of slots of a head.

    Returns:
        The key block, int32 `[B, H, n]` (`UNBOUNDED`, which no query sees, where there is none), and its region's near
        and far, `[H, n]`.
    """
    begin, capacity, stride, residue, first, last, near, far = table[:, :, None].unbind(-1)  # [H, R, 1]
    capacity, stride = capacity.clamp(min=1), stride.clamp(min=1)
    index = torch.arange(num_blocks, dtype=torch.int32, device=table.device) - begin // block_size  # [H, R, n]
    is_here = (index >= 0) & (index < capacity) & (first < last)
    newest = ((lengths - 1) // block_size)[:, None, None, None]
    newest = (torch.minimum(newest, last - 1) - residue) // stride  # [B, H, R, 1], of its class
    block = residue + stride * (newest - (newest - index) % capacity)
    block = torch.where(is_here & (block >= first), block, UNBOUNDED).amin(dim=2)
    return block, (near * is_here).sum(1, dtype=torch.int32), (far * is_here).sum(1, dtype=torch.int32)


def slots_of(table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Where tokens are written: int64 `[B, H, R, S]`, of tokens at `positions`, int64 `[B, S]`. Regions that do not
    hold a token give the slot of one that does."""
    begin, capacity, stride, residue, first, last, _, _ = table[:, :, None].long().unbind(-1)  # [H, R, 1]
    block = (positions // block_size)[:, None, None]  # [B, 1, 1, S]
    holds = (block % stride == residue) & (first <= block) & (block < last)
    slot = begin + (block - residue) // stride % capacity * block_size + (positions % block_size)[:, None, None]
    return torch.where(holds, slot, torch.where(holds, slot, -1).amax(dim=2, keepdim=True))
