"""Segments of divided columns, where the parts of their gradients stand, and the passes that add them up. Plain Triton,
called from Gluon too."""

import triton
import triton.language as tl

from ..index import load_rule
from .n_blocks import CHUNK, chunk_block, chunk_run, chunk_tile
from .varlen import document_segments, wide_tiles

SUMMED = tl.constexpr(16)  # rows of a chunk that a program adds up


@triton.jit
def segment_runs(
    index, level, num_blocks, high, segment, segment_rows, rule, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """As `chunk_run` says it of a tile's chunks `index`, in one segment (-1: in all rows, up to `high`), and whether
    the tile's rows reach into no other."""
    key, begin, end = chunk_run(index, level, num_blocks, 0, high, rule, BLOCK, LEVELS, SINKS)
    alone = True
    if segment >= 0:
        last_row = tl.max(tl.where(begin < end, end, 0), 0) - 1
        alone = tl.min(begin, 0) // segment_rows >= last_row // segment_rows
        low = segment * segment_rows
        until = (segment + 1) * segment_rows
        if BLOCK >= CHUNK:
            begin = tl.maximum(begin, low)
            end = tl.minimum(end, until)
        else:  # the runs of a chunk's blocks may leave the segment out
            until = tl.minimum(until, high)
            key, begin, end = chunk_run(index, level, num_blocks, low, until, rule, BLOCK, LEVELS, SINKS)
    exists = begin < end
    return tl.where(exists, key, high), tl.where(exists, begin, high), tl.where(exists, end, high), alone


@triton.jit
def part_begin(level, tiles, segments, WIDEST: tl.constexpr, CHUNKS: tl.constexpr = 2):
    """First part of a level: those of wider levels that are divided into segments come before, CHUNKS a tile. Sinks
    are the widest level where there are any."""
    begin = 0
    for other in tl.static_range(1, WIDEST + 1):
        begin += tl.where((level < other) & (segments[other] > 1), CHUNKS * tiles[other], 0)
    return begin


@triton.jit
def _add_up(
    part, dk, dv, own, level, rule, begin_token, length, group, batch_tokens, kv_heads, segment_rows, slot, step, rows,
    D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr, CHUNKS: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """`rows` of the gradients of a level's chunk `own`: the sums of its segments, first to last. The part of segment 0
    would stand at `slot`, those of the others `step` apart. `batch_tokens`: those before the sequence. With DIRECT a
    tile of one segment has no parts."""
    num_blocks = (length + BLOCK - 1) // BLOCK
    high = (length + CHUNK - 1) // CHUNK * CHUNK
    lane = tl.arange(0, CHUNKS)
    keys, begins, ends = chunk_run(
        own // CHUNKS * CHUNKS + lane, level, num_blocks, 0, high, rule, BLOCK, LEVELS, SINKS
    )
    bottom = tl.min(begins, 0)
    top = tl.max(tl.where(begins < ends, ends, 0), 0)
    key = tl.sum(tl.where(lane == own % CHUNKS, keys, 0), 0)
    begin = tl.sum(tl.where(lane == own % CHUNKS, begins, 0), 0)
    end = tl.sum(tl.where(lane == own % CHUNKS, ends, 0), 0)
    first = bottom // segment_rows
    last = (top - 1) // segment_rows
    if (begin < end) & ((first < last) | (not DIRECT)):
        column = tl.arange(0, D)
        offsets = rows[:, None] * D + column[None, :]
        sum_k = tl.zeros([SUMMED, D], tl.float32)
        sum_v = tl.zeros([SUMMED, D], tl.float32)
        for segment in range(first, last + 1):
            low = segment * segment_rows
            seen = tl.maximum(begin, low) < tl.minimum(end, low + segment_rows)
            if BLOCK < CHUNK:  # the runs of its blocks may leave a segment out, which then has no part
                _, own_begin, own_end = chunk_run(
                    own, level, num_blocks, low, tl.minimum(low + segment_rows, high), rule, BLOCK, LEVELS, SINKS
                )
                seen = own_begin < own_end
            source = part + (slot + segment * step).to(tl.int64) * (2 * CHUNK * D)
            sum_k += tl.load(source + offsets, mask=seen, other=0.0)
            sum_v += tl.load(source + CHUNK * D + offsets, mask=seen, other=0.0)
        row = key + rows
        exists = row < length
        if BLOCK < CHUNK:
            block, _, exists = chunk_block(
                own * (CHUNK // BLOCK) + rows // BLOCK, level, num_blocks, rule, LEVELS, SINKS
            )
            row = block * BLOCK + rows % BLOCK
            exists = exists & (row < length)
        to = ((batch_tokens + begin_token + row).to(tl.int64) * kv_heads + group)[:, None] * D + column[None, :]
        tl.store(dk + to, sum_k.to(dk.dtype.element_ty), mask=exists[:, None])
        tl.store(dv + to, sum_v.to(dv.dtype.element_ty), mask=exists[:, None])


@triton.jit(
    do_not_specialize=[
        "length",
        "kv_heads",
        "segment_rows",
        "num_parts",
        "tiles0",
        "tiles1",
        "tiles2",
        "tiles3",
        "segments0",
        "segments1",
        "segments2",
        "segments3",
    ]
)
def attention_sum_parts(
    part, dk, dv, table, length, kv_heads, segment_rows, num_parts,
    tiles0, tiles1, tiles2, tiles3, segments0, segments1, segments2, segments3,
    TABLE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
    CHUNKS: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """dK and dV `[B, S, Hkv, D]` of the chunks of divided levels, from parts `[segments, B Hkv, num_parts, dK and dV,
    64, D]`. Programs: chunks in steps of SUMMED rows, for one KV head after the other."""
    tiles = (tiles0, tiles1, tiles2, tiles3)
    segments = (segments0, segments1, segments2, segments3)
    WIDEST: tl.constexpr = LEVELS + 1 if SINKS else LEVELS
    per_group = num_parts * (CHUNK // SUMMED)
    group = tl.program_id(0) // per_group
    groups = tl.num_programs(0) // per_group
    step = tl.program_id(0) % per_group
    index = step // (CHUNK // SUMMED)
    level = -1
    for other in tl.static_range(WIDEST + 1):
        begin = part_begin(other, tiles, segments, WIDEST, CHUNKS)
        inside = (segments[other] > 1) & (index >= begin) & (index < begin + CHUNKS * tiles[other])
        level = tl.where(inside, other, level)
    rule = load_rule(table + (group % kv_heads) * TABLE, LEVELS, SINKS)
    own = index - part_begin(level, tiles, segments, WIDEST, CHUNKS)
    rows = step % (CHUNK // SUMMED) * SUMMED + tl.arange(0, SUMMED)
    batch_tokens = (group // kv_heads).to(tl.int64) * length
    _add_up(
        part, dk, dv, own, level, rule, 0, length, group % kv_heads, batch_tokens, kv_heads, segment_rows,
        group * num_parts + index, groups * num_parts, rows, D, BLOCK, LEVELS, SINKS, CHUNKS, DIRECT,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "kv_heads",
        "most_tiles",
        "segment_rows",
        "num_parts",
        "sinks",
        "stride0",
        "stride1",
        "stride2",
    ]
)
def attention_sum_document_parts(
    part, dk, dv, table, documents, kv_heads, most_tiles, segment_rows, num_parts, sinks, stride0, stride1, stride2,
    TABLE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The same `[T, Hkv, D]` of packed documents, from parts `[Hkv, num_parts, dK and dV, 64, D]`: CHUNKS for every
    divided item of the table. As many programs for each KV head go through these items in steps of SUMMED rows."""
    programs = tl.num_programs(0) // kv_heads
    group = tl.program_id(0) // programs
    rule = load_rule(table + group * TABLE, LEVELS, SINKS)
    an_item: tl.constexpr = CHUNKS * (CHUNK // SUMMED)
    num_steps = tl.load(documents + 2) * an_item
    step = tl.program_id(0) % programs
    while step < num_steps:
        item = step // an_item
        entry = documents + 4 * (1 + most_tiles + item)
        nth = tl.load(entry)
        begin_token = tl.load(entry + 1)
        length = tl.load(entry + 2)
        num_blocks = (length + BLOCK - 1) // BLOCK
        segments, own_rows = document_segments(length, segment_rows)
        wide = wide_tiles(num_blocks, sinks, stride0, stride1, stride2, CHUNKS, BLOCK, LEVELS)
        if nth < wide:  # an item of the last segment, of which each tile has one
            level, tile = chunk_tile(nth, num_blocks, rule, BLOCK, LEVELS, SINKS)
            if level >= 0:
                chunk = step // (CHUNK // SUMMED) % CHUNKS
                slot = group * num_parts + CHUNKS * (item + (segments - 1) * wide) + chunk
                rows = step % (CHUNK // SUMMED) * SUMMED + tl.arange(0, SUMMED)
                _add_up(
                    part, dk, dv, CHUNKS * tile + chunk, level, rule, begin_token, length, group, 0, kv_heads, own_rows,
                    slot, -CHUNKS * wide, rows, D, BLOCK, LEVELS, SINKS, CHUNKS, True,
                )  # fmt: skip
        step += programs
