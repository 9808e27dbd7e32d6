"""n_blocks of 64 keys: where they lie, which queries see them, and which of them a work item has. Plain Triton, called
from Gluon too; `cu/n_blocks.cuh` says the same in C++."""

import triton
import triton.language as tl

from ..index import member, members_of, reach_of

KEYS = tl.constexpr(64)


@triton.jit
def level_block(nth, level, num_blocks, rule, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    """The `nth` key block of a level, the query block after the last one that sees it, and whether there is such a key
    block. Sinks are a level of their own, `LEVELS + 1`."""
    wider, block, count = 0, 0, 0
    for step in tl.static_range(LEVELS + 1):
        belong = members_of(LEVELS - step, num_blocks, rule)
        count = tl.where(level == LEVELS - step, belong - wider, count)
        block = tl.where(level == LEVELS - step, member(nth, LEVELS - step, rule, LEVELS), block)
        wider = belong
    if SINKS:
        count = tl.where(level > LEVELS, tl.minimum(rule[1], num_blocks), tl.where(block < rule[1], 0, count))
        block = tl.where(level > LEVELS, nth, block)
    return block, tl.minimum(block + reach_of(block, rule, LEVELS, SINKS), num_blocks), nth < count


@triton.jit
def n_block_run(
    index, level, num_blocks, low, high, rule, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr
):
    """First key of the `index`-th n_block of a level, and the run `[begin, end)` of query rows in `[low, high)` that
    sees it; all three are `high` where there is no such n_block or run. An n_block is a part of a block, or the next
    `KEYS // BLOCK` blocks of the level: then the run spans the runs of all, and the key is the first of the blocks
    that have one."""
    if BLOCK >= KEYS:
        per_block: tl.constexpr = BLOCK // KEYS
        block, until, exists = level_block(index // per_block, level, num_blocks, rule, LEVELS, SINKS)
        key = block * BLOCK + (index % per_block) * KEYS
        end = tl.minimum(until * BLOCK, high)
        begin = tl.maximum(key, low)
        exists = exists & (begin < end)
        return tl.where(exists, key, high), tl.where(exists, begin, high), tl.where(exists, end, high)
    else:
        key = index * 0 + high
        begin = key
        last = index * 0
        for j in tl.static_range(KEYS // BLOCK):
            block, until, exists = level_block(index * (KEYS // BLOCK) + j, level, num_blocks, rule, LEVELS, SINKS)
            own_begin = tl.maximum(block * BLOCK, low)
            own_end = tl.minimum(until * BLOCK, high)
            exists = exists & (own_begin < own_end)
            key = tl.where(exists, tl.minimum(key, block * BLOCK), key)
            begin = tl.where(exists, tl.minimum(begin, own_begin), begin)
            last = tl.where(exists, tl.maximum(last, own_end), last)
        return key, begin, tl.where(begin < last, last, high)


@triton.jit
def count_tiles(blocks, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr = 2):
    """Tiles of N_BLOCKS n_blocks in so many blocks of a level."""
    if BLOCK >= KEYS:
        return (blocks * (BLOCK // KEYS) + N_BLOCKS - 1) // N_BLOCKS
    else:
        return (blocks + N_BLOCKS * (KEYS // BLOCK) - 1) // (N_BLOCKS * (KEYS // BLOCK))


@triton.jit
def document_tile(tile, num_blocks, rule, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    """`(level, tile of the level)` of a document's `tile`-th pair of n_blocks, sinks first, then the widest level.
    Level < 0: there is no such tile."""
    wider, found, index = 0, -1, 0
    if SINKS:
        tiles = count_tiles(tl.minimum(rule[1], num_blocks), BLOCK)
        found = tl.where(tile < tiles, LEVELS + 1, -1)
        index = tl.where(tile < tiles, tile, 0)
        tile = tl.where(tile < tiles, tile, tile - tiles)
    for step in tl.static_range(LEVELS + 1):
        belong = members_of(LEVELS - step, num_blocks, rule)
        tiles = count_tiles(belong - wider, BLOCK)
        here = (found < 0) & (tile < tiles)
        found = tl.where(here, LEVELS - step, found)
        index = tl.where(here, tile, index)
        tile = tl.where(found < 0, tile - tiles, tile)
        wider = belong
    return found, index


@triton.jit
def locate_item(item, groups, wave, tiles, segments, batches, few, WIDEST: tl.constexpr):
    """`(level, segment, batch x KV head, first tile, tile after the last)` of a work item of an unpacked call. Items
    come in waves of `wave` heads, whose queries the L2 cache holds; in a wave the widest level first, in a level the
    last segment first. The items of a segment come head by head, but if there are no more than `few`, which all run at
    once, the longest of all heads come first."""
    items = 0
    for level in tl.static_range(WIDEST + 1):
        items += (tiles[level] + batches[level] - 1) // batches[level] * segments[level] * wave
    start = item // items * wave
    item = item % items
    found, segment, group, first, last = -1, 0, 0, 0, 0
    for step in tl.static_range(WIDEST + 1):
        most = tiles[WIDEST - step]
        batch = batches[WIDEST - step]
        per_head = (most + batch - 1) // batch
        parts = segments[WIDEST - step]
        per_segment = per_head * wave
        if (found < 0) & (item < per_segment * parts):
            rest = item % per_segment
            found = WIDEST - step
            segment = parts - 1 - item // per_segment
            group = start + tl.where(per_segment <= few, rest % wave, rest // per_head)
            first = tl.where(per_segment <= few, rest // wave, rest % per_head) * batch
            last = tl.where(group < groups, tl.minimum(first + batch, most), first)
        if found < 0:
            item -= per_segment * parts
    return found, segment, group, first, last
