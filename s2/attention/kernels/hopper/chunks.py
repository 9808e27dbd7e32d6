"""Chunks of 64 keys: where they lie and which queries see them, and the pass that adds up the parts of divided columns.
Plain Triton, called from Gluon too."""

import triton
import triton.language as tl

from ..triton.indexing import load_rule, member, members_below, reach_of

CHUNK = tl.constexpr(64)


@triton.jit
def chunk_run(
    index, level, num_blocks, low, high, rule, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr
):
    """First key of the `index`-th chunk of a level, and the run `[begin, end)` of query rows in `[low, high)` that sees
    it; all three are `high` where there is no such chunk or run."""
    per_block: tl.constexpr = BLOCK // CHUNK
    nth = index // per_block
    wider, block, count = 0, 0, 0
    for step in tl.static_range(LEVELS + 1):
        belong = num_blocks
        if step < LEVELS:
            belong = members_below(num_blocks, rule[3 * (LEVELS - step) - 1], rule[3 * (LEVELS - step)])
        count = tl.where(level == LEVELS - step, belong - wider, count)
        block = tl.where(level == LEVELS - step, member(nth, LEVELS - step, rule, LEVELS), block)
        wider = belong
    key = block * BLOCK + (index % per_block) * CHUNK
    end = tl.minimum(tl.minimum(block + reach_of(block, rule, LEVELS, SINKS), num_blocks) * BLOCK, high)
    begin = tl.maximum(key, low)
    exists = (nth < count) & (begin < end)
    return tl.where(exists, key, high), tl.where(exists, begin, high), tl.where(exists, end, high)


@triton.jit
def part_begin(level, tiles, segments, LEVELS: tl.constexpr):
    """First part of a level: those of wider levels that are divided into segments come before, two chunks a tile."""
    begin = 0
    for other in tl.static_range(1, LEVELS + 1):
        begin += tl.where((level < other) & (segments[other] > 1), 2 * tiles[other], 0)
    return begin


@triton.jit(
    do_not_specialize=[
        "length",
        "kv_heads",
        "segment_rows",
        "parts",
        "tiles0",
        "tiles1",
        "tiles2",
        "segments0",
        "segments1",
        "segments2",
    ]
)
def attention_sum_parts(
    part, dk, dv, table, length, kv_heads, segment_rows, parts,
    tiles0, tiles1, tiles2, segments0, segments1, segments2,
    TABLE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """dK and dV `[B, S, Hkv, D]` of the chunks of divided levels: the sums of their segments, first to last."""
    tiles = (tiles0, tiles1, tiles2)
    segments = (segments0, segments1, segments2)
    index = tl.program_id(0)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    level = -1
    for step in tl.static_range(LEVELS + 1):
        begin = part_begin(LEVELS - step, tiles, segments, LEVELS)
        inside = (segments[LEVELS - step] > 1) & (index >= begin) & (index < begin + 2 * tiles[LEVELS - step])
        level = tl.where(inside, LEVELS - step, level)
    rule = load_rule(table + (group % kv_heads) * TABLE, LEVELS, SINKS)
    num_blocks = (length + BLOCK - 1) // BLOCK
    high = (length + CHUNK - 1) // CHUNK * CHUNK
    own = index - part_begin(level, tiles, segments, LEVELS)
    key, begin, end = chunk_run(own, level, num_blocks, 0, high, rule, BLOCK, LEVELS, SINKS)
    if begin < end:
        rows = tl.arange(0, CHUNK)
        column = tl.arange(0, D)
        offsets = rows[:, None] * D + column[None, :]
        sum_k = tl.zeros([CHUNK, D], tl.float32)
        sum_v = tl.zeros([CHUNK, D], tl.float32)
        for segment in range(begin // segment_rows, (end - 1) // segment_rows + 1):
            source = part + ((segment * groups + group) * parts + index).to(tl.int64) * (2 * CHUNK * D)
            sum_k += tl.load(source + offsets)
            sum_v += tl.load(source + CHUNK * D + offsets)
        row = key + rows
        batch = (group // kv_heads).to(tl.int64)
        to = ((batch * length + row) * kv_heads + group % kv_heads)[:, None] * D + column[None, :]
        tl.store(dk + to, sum_k.to(dk.dtype.element_ty), mask=(row < length)[:, None])
        tl.store(dv + to, sum_v.to(dv.dtype.element_ty), mask=(row < length)[:, None])
