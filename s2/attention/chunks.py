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

import numpy as np

from .grammar import UNBOUNDED
from .pattern import HeadRule, Pattern
from .regions import HeadGroup, Region


@dataclass(frozen=True)
class Frame:
    """What stands before a chunk.

    Attributes:
        pattern: by which the chunk's queries see the sequence: of each head of the group, at its place in the layer.
        blocks: int64 `[H, n]`, of each head of the group the key blocks that stand there, one after the other; -1 where
            there is none, which no query sees.
        slots: int64 `[H, n]`, where the group keeps them, in blocks of slots; any block for -1.
    """

    pattern: Pattern
    blocks: np.ndarray
    slots: np.ndarray


def frame_of(pattern: Pattern, num_kv_heads: int, rotation: int, group: HeadGroup, length: int) -> Frame:
    """The frame of heads that have kept `length` tokens, at least 1, of a sequence.

    Args:
        pattern, num_kv_heads, rotation: the layer's.
        group: some of its KV heads, laid out by `regions.lay_out`, not in order.
    """
    size = pattern.block_size
    rules = pattern.rules(num_kv_heads, layer=rotation)[group.begin : group.end]
    newest = (length - 1) // size
    left_out, first = _left_out(rules[0], length // size)
    blocks = np.full((len(rules), newest + 1 - left_out), -1)
    blocks[:, first - left_out :] = np.arange(first, newest + 1)
    own = (pattern.heads or (pattern,) * num_kv_heads)[group.begin : group.end]
    heads = []
    for row, rule, head in zip(blocks, rules, own, strict=True):
        seen = _seen_by_all(rule, first) if left_out else np.arange(first)
        row[: len(seen)] = seen
        heads.append(Pattern(size, head.local, head.ranges, len(seen)) if left_out else head)
    places = np.stack([_places(*each, newest, size) for each in zip(blocks, group.regions, strict=True)])
    if len(set(heads)) > 1:  # the rules of other heads do not matter
        heads = [heads[0]] * group.begin + heads + [heads[0]] * (num_kv_heads - group.end)
        return Frame(Pattern.per_head(heads), np.where(places >= 0, blocks, -1), places.clip(min=0))
    return Frame(heads[0], np.where(places >= 0, blocks, -1), places.clip(min=0))


def _places(blocks: np.ndarray, regions: Sequence[Region], newest: int, block_size: int) -> np.ndarray:
    """The blocks of slots that have these blocks after `newest` has been begun; -1 where none has. Of the regions that
    hold one it is the one that is seen furthest: where tokens have been taken back, rings may have lost more than
    `newest` tells, but then nothing that some query sees by them."""
    places = np.full_like(blocks, -1)
    for region in sorted(regions, key=lambda region: region.far):
        lost = region.overwritten(newest)
        place = region.begin // block_size + (blocks - region.residue) // region.stride % region.capacity
        place = np.where(blocks > (-1 if lost is None else lost), place, -1)
        holds = (blocks % region.stride == region.residue) & (region.first <= blocks) & (blocks < region.last)
        places = np.where(holds & (blocks >= 0), place, places)
    return places


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


def _seen_by_all(rule: HeadRule, before: int) -> np.ndarray:
    """Blocks before `before` that all queries from a reach behind it on see."""
    found = [np.arange(rule.sinks)]
    if rule.levels and rule.levels[-1].end >= UNBOUNDED:
        last = rule.levels[-1]
        found.append(np.arange(rule.sinks + (last.residue - rule.sinks) % last.stride, before, last.stride))
    return np.concatenate(found)
