"""A further chunk of a prompt behind the keys that were kept of those before it, as one sequence (`Frame`).

Once a chunk begins in block b, a head's keys are of two kinds: those near enough for its window or for a level that
ends, of which its queries see some or all, and those of its last level and its sinks from before, which all of its
queries see. The latter stand first, without what lies between them, and count as sinks. The others follow in their
places: the sequence leaves out a number of blocks that all strides divide, so that the pattern's own rules, with more
sinks, say what is seen, and the kernels for rules in closed form compute it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .grammar import UNBOUNDED
from .pattern import HeadRule, Pattern
from .regions import HeadGroup, Region


@dataclass(frozen=True)
class Frame:
    """What stands before a chunk.

    Attributes:
        pattern: by which the chunk's queries see the sequence; of all KV heads of the layer.
        blocks: of each head of the group the key blocks that stand there, one after the other; -1 where there is none,
            which no query sees.
        slots: where the group keeps them, in blocks of slots; any block for -1.
    """

    pattern: Pattern
    blocks: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[int, ...], ...]


def frame_of(pattern: Pattern, num_kv_heads: int, rotation: int, group: HeadGroup, length: int) -> Frame:
    """The frame of heads that have kept `length` tokens, at least 1, of a sequence.

    Args:
        pattern, num_kv_heads, rotation: the layer's.
        group: some of its KV heads, laid out by `regions.lay_out`, not in order.
    """
    size = pattern.block_size
    rules = pattern.rules(num_kv_heads, layer=rotation)
    newest = (length - 1) // size
    left_out, first = _left_out(rules[group.begin], length // size)
    heads = list(pattern.heads or (pattern,) * num_kv_heads)
    rows: list[list[int]] = []
    for head in range(group.begin, group.end):
        seen = _seen_by_all(rules[head], first) if left_out else list(range(first))
        holes = first - left_out - len(seen)
        rows.append([*seen, *[-1] * holes, *range(first, newest + 1)])
        if left_out:
            heads[head] = Pattern(size, heads[head].local, heads[head].ranges, len(seen))
    places = [
        [_place(block, regions, newest, size) for block in row]
        for row, regions in zip(rows, group.regions, strict=True)
    ]
    blocks = tuple(
        tuple(b if at >= 0 else -1 for b, at in zip(*pair, strict=True)) for pair in zip(rows, places, strict=True)
    )
    same = len(set(heads)) == 1
    slots = tuple(tuple(max(at, 0) for at in row) for row in places)
    return Frame(heads[0] if same else Pattern.per_head(heads), blocks, slots)


def _place(block: int, regions: Sequence[Region], newest: int, block_size: int) -> int:
    """The block of slots that has a block after `newest` has been begun; -1 where none has. Of the regions that hold it
    the one that is seen furthest: where tokens have been taken back, rings may have lost more than `newest` tells, but
    then nothing that some query sees by them."""
    holding = [region for region in regions if block >= 0 and region.holds(block)]
    region = max(holding, key=lambda region: region.far, default=None)
    lost = region.overwritten(newest) if region else None
    if region is None or (lost is not None and block <= lost):
        return -1
    return region.begin // block_size + region.place(block)


def _left_out(rule: HeadRule, block: int) -> tuple[int, int]:
    """How many blocks are left out before a chunk that begins in `block`, and the first block that is in its place. The
    same for all heads whose rules differ in their residues alone, though one may have a block less to put first than
    another: then the last place before `first` is empty, and its block would not be of that head's class."""
    reach = max([rule.local, *(level.end for level in rule.levels if level.end < UNBOUNDED)])
    latest = block - reach + 1  # what stands before it is seen by all or by none
    period = math.lcm(*(level.stride for level in rule.levels))
    stride = rule.levels[-1].stride if rule.levels and rule.levels[-1].end >= UNBOUNDED else 0
    if latest <= rule.sinks:
        return 0, max(block, 0)

    def first(left_out: int) -> int:
        if not stride:
            return rule.sinks + left_out
        # x blocks of the class stand before block x + left_out, but for sinks: x = ceil((x + left_out) / stride)
        skipped = left_out // stride
        return rule.sinks + left_out + skipped + -(-skipped // (stride - 1))

    share = (stride - 1) / stride if stride else 1.0
    times = int((latest - rule.sinks) * share / period) + 1
    while first(times * period) > latest:
        times -= 1
    return times * period, first(times * period)


def _seen_by_all(rule: HeadRule, before: int) -> list[int]:
    """Blocks before `before` that all queries from a reach behind it on see."""
    found = list(range(rule.sinks))
    if rule.levels and rule.levels[-1].end >= UNBOUNDED:
        last = rule.levels[-1]
        begin = rule.sinks + (last.residue - rule.sinks) % last.stride
        found += range(begin, before, last.stride)
    return found
