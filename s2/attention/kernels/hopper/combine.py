"""Segments of divided key columns, where their partial sums of dK and dV are, and the kernels that combine them. Plain
Triton, called from Gluon too."""

import triton
import triton.language as tl

from ..index import load_rule
from .n_blocks import KEYS, document_tile, level_block, n_block_run
from .varlen import document_segments, wide_tiles

ROWS = tl.constexpr(16)  # of an n_block, that a program combines


@triton.jit
def segment_runs(
    index, level, num_blocks, high, segment, segment_rows, rule, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """`n_block_run` of a tile's n_blocks `index` in one segment (-1: in all rows, up to `high`), and whether the tile's
    rows reach into no other."""
    key, begin, end = n_block_run(index, level, num_blocks, 0, high, rule, BLOCK, LEVELS, SINKS)
    alone = True
    if segment >= 0:
        last_row = tl.max(tl.where(begin < end, end, 0), 0) - 1
        alone = tl.min(begin, 0) // segment_rows >= last_row // segment_rows
        low = segment * segment_rows
        until = (segment + 1) * segment_rows
        if BLOCK >= KEYS:
            begin = tl.maximum(begin, low)
            end = tl.minimum(end, until)
        else:  # there may be no run of any of the n_block's blocks in the segment
            until = tl.minimum(until, high)
            key, begin, end = n_block_run(index, level, num_blocks, low, until, rule, BLOCK, LEVELS, SINKS)
    exists = begin < end
    return tl.where(exists, key, high), tl.where(exists, begin, high), tl.where(exists, end, high), alone


@triton.jit
def first_partial(level, tiles, segments, WIDEST: tl.constexpr, N_BLOCKS: tl.constexpr = 2):
    """Number of a level's first n_block in the workspace, where those of the wider levels that are divided come before,
    N_BLOCKS per tile. Sinks are the widest level where there are any."""
    begin = 0
    for other in tl.static_range(1, WIDEST + 1):
        begin += tl.where((level < other) & (segments[other] > 1), N_BLOCKS * tiles[other], 0)
    return begin


@triton.jit
def _combine(
    partials, dk, dv, own, level, rule, begin_token, length, group, batch_tokens, kv_heads, segment_rows, slot, step,
    rows, D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
    N_BLOCKS: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """`rows` of the gradients of a level's n_block `own`, summed over its segments from the first to the last. The
    partial sum of segment 0 is at `slot`, those of the others `step` apart. `batch_tokens`: those before the sequence.
    With DIRECT a tile that lies in one segment has none."""
    num_blocks = (length + BLOCK - 1) // BLOCK
    high = (length + KEYS - 1) // KEYS * KEYS
    lane = tl.arange(0, N_BLOCKS)
    keys, begins, ends = n_block_run(
        own // N_BLOCKS * N_BLOCKS + lane, level, num_blocks, 0, high, rule, BLOCK, LEVELS, SINKS
    )
    bottom = tl.min(begins, 0)
    top = tl.max(tl.where(begins < ends, ends, 0), 0)
    key = tl.sum(tl.where(lane == own % N_BLOCKS, keys, 0), 0)
    begin = tl.sum(tl.where(lane == own % N_BLOCKS, begins, 0), 0)
    end = tl.sum(tl.where(lane == own % N_BLOCKS, ends, 0), 0)
    first = bottom // segment_rows
    last = (top - 1) // segment_rows
    if (begin < end) & ((first < last) | (not DIRECT)):
        column = tl.arange(0, D)
        offsets = rows[:, None] * D + column[None, :]
        sum_k = tl.zeros([ROWS, D], tl.float32)
        sum_v = tl.zeros([ROWS, D], tl.float32)
        for segment in range(first, last + 1):
            low = segment * segment_rows
            seen = tl.maximum(begin, low) < tl.minimum(end, low + segment_rows)
            if BLOCK < KEYS:  # the runs of its blocks may leave a segment out, which then has no partial sum
                _, own_begin, own_end = n_block_run(
                    own, level, num_blocks, low, tl.minimum(low + segment_rows, high), rule, BLOCK, LEVELS, SINKS
                )
                seen = own_begin < own_end
            source = partials + (slot + segment * step).to(tl.int64) * (2 * KEYS * D)
            sum_k += tl.load(source + offsets, mask=seen, other=0.0)
            sum_v += tl.load(source + KEYS * D + offsets, mask=seen, other=0.0)
        row = key + rows
        exists = row < length
        if BLOCK < KEYS:
            block, _, exists = level_block(
                own * (KEYS // BLOCK) + rows // BLOCK, level, num_blocks, rule, LEVELS, SINKS
            )
            row = block * BLOCK + rows % BLOCK
            exists = exists & (row < length)
        to = ((batch_tokens + begin_token + row).to(tl.int64) * kv_heads + group)[:, None] * D + column[None, :]
        tl.store(dk + to, sum_k.to(dk.dtype.element_ty), mask=exists[:, None])
        tl.store(dv + to, sum_v.to(dv.dtype.element_ty), mask=exists[:, None])


@triton.jit(do_not_specialize=[
    "length", "kv_heads", "segment_rows", "num_partials", "tiles0", "tiles1", "tiles2", "tiles3", "segments0",
    "segments1", "segments2", "segments3",
])  # fmt: skip
def attention_combine(
    partials, dk, dv, table, length, kv_heads, segment_rows, num_partials,
    tiles0, tiles1, tiles2, tiles3, segments0, segments1, segments2, segments3,
    TABLE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
    N_BLOCKS: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """dK and dV `[B, S, Hkv, D]` of the n_blocks of divided levels, from partial sums `[segments, B Hkv, num_partials,
    dK and dV, 64, D]`. Programs: ROWS rows of an n_block each, for one KV head after the other."""
    tiles = (tiles0, tiles1, tiles2, tiles3)
    segments = (segments0, segments1, segments2, segments3)
    WIDEST: tl.constexpr = LEVELS + 1 if SINKS else LEVELS
    per_group = num_partials * (KEYS // ROWS)
    group = tl.program_id(0) // per_group
    groups = tl.num_programs(0) // per_group
    step = tl.program_id(0) % per_group
    index = step // (KEYS // ROWS)
    level = -1
    for other in tl.static_range(WIDEST + 1):
        begin = first_partial(other, tiles, segments, WIDEST, N_BLOCKS)
        inside = (segments[other] > 1) & (index >= begin) & (index < begin + N_BLOCKS * tiles[other])
        level = tl.where(inside, other, level)
    rule = load_rule(table + (group % kv_heads) * TABLE, LEVELS, SINKS)
    own = index - first_partial(level, tiles, segments, WIDEST, N_BLOCKS)
    rows = step % (KEYS // ROWS) * ROWS + tl.arange(0, ROWS)
    batch_tokens = (group // kv_heads).to(tl.int64) * length
    _combine(
        partials, dk, dv, own, level, rule, 0, length, group % kv_heads, batch_tokens, kv_heads, segment_rows,
        group * num_partials + index, groups * num_partials, rows, D, BLOCK, LEVELS, SINKS, N_BLOCKS, DIRECT,
    )  # fmt: skip


@triton.jit(do_not_specialize=[
    "kv_heads", "most_tiles", "segment_rows", "num_partials", "sinks", "stride0", "stride1", "stride2",
])  # fmt: skip
def attention_combine_packed(
    partials, dk, dv, table, documents, kv_heads, most_tiles, segment_rows, num_partials,
    sinks, stride0, stride1, stride2,
    TABLE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The same `[T, Hkv, D]` of packed documents, from partial sums `[Hkv, num_partials, dK and dV, 64, D]`: N_BLOCKS
    for every divided item of the table. The programs of a KV head, as many for each, stride over the items' rows."""
    programs = tl.num_programs(0) // kv_heads
    group = tl.program_id(0) // programs
    rule = load_rule(table + group * TABLE, LEVELS, SINKS)
    steps_per_item: tl.constexpr = N_BLOCKS * (KEYS // ROWS)
    num_steps = tl.load(documents + 2) * steps_per_item
    step = tl.program_id(0) % programs
    while step < num_steps:
        item = step // steps_per_item
        entry = documents + 4 * (1 + most_tiles + item)
        nth = tl.load(entry)
        begin_token = tl.load(entry + 1)
        length = tl.load(entry + 2)
        num_blocks = (length + BLOCK - 1) // BLOCK
        segments, own_rows = document_segments(length, segment_rows)
        wide = wide_tiles(num_blocks, sinks, stride0, stride1, stride2, N_BLOCKS, BLOCK, LEVELS)
        if nth < wide:  # an item of the last segment, of which each tile has one
            level, tile = document_tile(nth, num_blocks, rule, BLOCK, LEVELS, SINKS)
            if level >= 0:
                n_block = step // (KEYS // ROWS) % N_BLOCKS
                slot = group * num_partials + N_BLOCKS * (item + (segments - 1) * wide) + n_block
                rows = step % (KEYS // ROWS) * ROWS + tl.arange(0, ROWS)
                _combine(
                    partials, dk, dv, N_BLOCKS * tile + n_block, level, rule, begin_token, length, group, 0, kv_heads,
                    own_rows, slot, -N_BLOCKS * wide, rows, D, BLOCK, LEVELS, SINKS, N_BLOCKS, True,
                )  # fmt: skip
        step += programs
