"""Parts of the gradients of divided columns: where they stand, and the pass that adds them up."""

import triton
import triton.language as tl

from ..triton.indexing import load_rule
from .chunks import CHUNK, chunk_block, chunk_run

SUMMED = tl.constexpr(16)  # rows of a chunk that a program adds up


@triton.jit
def part_begin(level, tiles, segments, WIDEST: tl.constexpr, CHUNKS: tl.constexpr = 2):
    """First part of a level: those of wider levels that are divided into segments come before, CHUNKS a tile. Sinks
    are the widest level where there are any."""
    begin = 0
    for other in tl.static_range(1, WIDEST + 1):
        begin += tl.where((level < other) & (segments[other] > 1), CHUNKS * tiles[other], 0)
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
        "tiles3",
        "segments0",
        "segments1",
        "segments2",
        "segments3",
    ]
)
def attention_sum_parts(
    part, dk, dv, table, length, kv_heads, segment_rows, parts,
    tiles0, tiles1, tiles2, tiles3, segments0, segments1, segments2, segments3,
    TABLE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """dK and dV `[B, S, Hkv, D]` of the chunks of divided levels: the sums of their segments, first to last. Programs:
    chunks in steps of SUMMED rows, and KV heads."""
    tiles = (tiles0, tiles1, tiles2, tiles3)
    segments = (segments0, segments1, segments2, segments3)
    WIDEST: tl.constexpr = LEVELS + 1 if SINKS else LEVELS
    index = tl.program_id(0) // (CHUNK // SUMMED)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    level = -1
    for other in tl.static_range(WIDEST + 1):
        begin = part_begin(other, tiles, segments, WIDEST, CHUNKS)
        inside = (segments[other] > 1) & (index >= begin) & (index < begin + CHUNKS * tiles[other])
        level = tl.where(inside, other, level)
    rule = load_rule(table + (group % kv_heads) * TABLE, LEVELS, SINKS)
    num_blocks = (length + BLOCK - 1) // BLOCK
    high = (length + CHUNK - 1) // CHUNK * CHUNK
    own = index - part_begin(level, tiles, segments, WIDEST, CHUNKS)
    key, begin, end = chunk_run(own, level, num_blocks, 0, high, rule, BLOCK, LEVELS, SINKS)
    if begin < end:
        rows = tl.program_id(0) % (CHUNK // SUMMED) * SUMMED + tl.arange(0, SUMMED)
        column = tl.arange(0, D)
        offsets = rows[:, None] * D + column[None, :]
        sum_k = tl.zeros([SUMMED, D], tl.float32)
        sum_v = tl.zeros([SUMMED, D], tl.float32)
        for segment in range(begin // segment_rows, (end - 1) // segment_rows + 1):
            seen = begin < end
            if BLOCK < CHUNK:  # the runs of its blocks may leave a segment out
                low = segment * segment_rows
                _, own_begin, own_end = chunk_run(
                    own, level, num_blocks, low, tl.minimum(low + segment_rows, high), rule, BLOCK, LEVELS, SINKS
                )
                seen = own_begin < own_end
            source = part + ((segment * groups + group) * parts + index).to(tl.int64) * (2 * CHUNK * D)
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
        batch = (group // kv_heads).to(tl.int64)
        to = ((batch * length + row) * kv_heads + group % kv_heads)[:, None] * D + column[None, :]
        tl.store(dk + to, sum_k.to(dk.dtype.element_ty), mask=exists[:, None])
        tl.store(dv + to, sum_v.to(dv.dtype.element_ty), mask=exists[:, None])
