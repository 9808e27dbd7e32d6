"""A further chunk of a prompt behind the keys that were kept of those before it, as one sequence (`Frame`).

Of the blocks before a chunk, those about as far away as its window or a level ends are seen by some of its queries, and
those between two such ends by all or by none. What all see stands first, one block after the other, and counts as
sinks. The others follow in their places, but for blocks that are taken out between two ends, by which the levels beyond
end nearer. All strides divide the numbers of blocks that are taken out, and of those left out before the first place.
So the pattern's own rules, with more sinks and nearer ends, say what is seen, and the kernels for rules in closed form
compute it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .grammar import UNBOUNDED
from .pattern import HeadRule, Level, Pattern
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


def frame_of(
    pattern: Pattern, num_kv_heads: int, rotation: int, group: HeadGroup, length: int, num_tokens: int
) -> Frame:
    """The frame of heads that have kept `length` tokens, at least 1, of a sequence, for up to `num_tokens` more.

    Args:
        pattern, num_kv_heads, rotation: the layer's.
        group: some of its KV heads, laid out by `regions.lay_out`, not in order.
    """
    size, newest = pattern.block_size, (length - 1) // pattern.block_size
    rules = pattern.rules(num_kv_heads, layer=rotation)[group.begin : group.end]
    taken, stop, left_out = _cut(rules, length // size, -(-(length + num_tokens) // size))
    place = np.arange(left_out, newest + 1 - sum(map(len, taken)))  # which block stands there
    for out in reversed(taken):
        place[place >= out.start] += len(out)
    blocks, heads, ranges = np.tile(place, (len(rules), 1)), [], _nearer_ends(rules[0], taken)
    for row, rule in zip(blocks, rules, strict=True):
        first = _standing_first(rule, taken, stop, left_out)
        row[: len(first)] = first[: len(row)]
        heads.append(Pattern(size, rule.local, ranges, len(first)))
    places = np.stack([places_of(*each, newest, size) for each in zip(blocks, group.regions, strict=True)])
    blocks, places = np.where(places >= 0, blocks, -1), places.clip(min=0)
    if len(set(heads)) == 1:
        return Frame(heads[0], blocks, places)
    # the rules of other heads do not matter
    heads = [heads[0]] * group.begin + heads + [heads[0]] * (num_kv_heads - group.end)
    return Frame(Pattern.per_head(heads), blocks, places)


def places_of(blocks: np.ndarray, regions: Sequence[Region], newest: int, block_size: int) -> np.ndarray:
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


def _cut(rules: Sequence[HeadRule], begin: int, end: int) -> tuple[list[range], int, int]:
    """What does not stand in its place, before queries in the blocks `begin` to `end - 1`, of heads whose rules differ
    in their residues alone.

    Returns:
        The blocks that are taken out of the levels that end within the context, near to far: of each between the end of
        the one before and its own, where all queries see its class.
        The block that all before are seen by all or by none.
        How many blocks are left out before the first in its place. Where it is negative, places are left empty unless
        what was taken out fills them.
    """
    sinks, levels = rules[0].sinks, rules[0].levels
    period = math.lcm(*(level.stride for level in levels))
    near, taken = rules[0].local, []
    for level in levels:
        if end - level.end <= sinks:
            break
        between = begin - near - (end - level.end)  # one is left, since levels must end behind each other
        taken.append(range(begin - near + 1 - max(between, 0) // period * period, begin - near + 1))
        near = level.end
    stop = max(begin - near + 1, sinks)
    free = min(stop - len(_seen_before(rule, len(taken), stop)) for rule in rules)
    left_out = (free - _moved(levels, taken)) // period * period
    is_seen = len(taken) < len(levels) or begin - near + 1 < sinks  # what would stand at an empty place, by some query
    if left_out < -_moved(levels, taken) and is_seen:
        units = [period * level.stride for level in levels[: len(taken)]]
        taken = [range(out.stop - len(out) // unit * unit, out.stop) for out, unit in zip(taken, units, strict=True)]
        left_out = -_moved(levels, taken)
    return taken, stop, left_out


def _moved(levels: Sequence[Level], taken: Sequence[range]) -> int:
    """How many of the blocks that are taken out stand first."""
    return sum(len(out) // level.stride for level, out in zip(levels, taken, strict=False))


def _nearer_ends(rule: HeadRule, taken: Sequence[range]) -> tuple[tuple[int, int], ...]:
    """Strides and ends of levels once these blocks have been taken out."""
    ranges, out, rest = [], 0, iter(taken)
    for level in rule.levels:
        out += len(next(rest, ()))
        ranges.append((level.stride, level.end if level.end >= UNBOUNDED else level.end - out))
    return tuple(ranges)


def _standing_first(rule: HeadRule, taken: Sequence[range], stop: int, left_out: int) -> np.ndarray:
    """The blocks of a head that stand first, as many as leave the next block in its place."""
    moved = [_class(level, out.start, out.stop) for level, out in zip(rule.levels, taken, strict=False)]
    seen = _seen_before(rule, len(taken), stop)
    ahead = left_out + sum(map(len, moved))  # blocks before the first in its place that do not stand first
    count = max(rule.sinks, int(np.searchsorted(seen - np.arange(len(seen)), ahead)))
    return np.concatenate([seen[:count], *reversed(moved)])


def _seen_before(rule: HeadRule, nth: int, stop: int) -> np.ndarray:
    """The sinks, and the blocks before `stop` that are seen in the nth level."""
    seen = [_class(level, rule.sinks, stop) for level in rule.levels[nth : nth + 1]]
    return np.concatenate([np.arange(rule.sinks), *seen])


def _class(level: Level, start: int, stop: int) -> np.ndarray:
    """The blocks from `start` to `stop - 1` of a level's class."""
    return np.arange(start + (level.residue - start) % level.stride, stop, level.stride)
