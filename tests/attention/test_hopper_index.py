"""How the Hopper backward divides its work, in Triton's interpreter: every visible pair of chunks lies in exactly one
work item's run."""

import pytest
import torch
import triton
import triton.language as tl

from s2.attention import Pattern
from s2.attention.kernels.hopper.chunks import chunk_run
from s2.attention.kernels.hopper.launch import CHUNK, divide_columns
from s2.attention.kernels.triton.indexing import load_rule
from s2.attention.schedule import TABLE_COLUMNS, rule_schedule

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="index arithmetic, checked in Triton's interpreter: on machines without a GPU"
)


@triton.jit
def runs(table, out, level, num_blocks, low, high, N: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr,
         LEVELS: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    lane = tl.arange(0, N)
    rule = load_rule(table, LEVELS, SINKS)
    key, begin, end = chunk_run(lane, level, num_blocks, low, high, rule, BLOCK, LEVELS, SINKS)
    tl.store(out + lane, key)
    tl.store(out + N + lane, begin)
    tl.store(out + 2 * N + lane, end)


def chunk_mask(pattern: Pattern, length: int, heads: int) -> torch.Tensor:
    """bool `[H, key chunk, query chunk]`: which chunks of 64 keys which chunks of 64 queries see."""
    per_block, chunks = pattern.block_size // CHUNK, -(-length // CHUNK)
    mask = pattern.block_mask(-(-length // pattern.block_size), heads)
    mask = mask.repeat_interleave(per_block, 1).repeat_interleave(per_block, 2)[:, :chunks, :chunks]
    return (mask & torch.ones(chunks, chunks, dtype=torch.bool).tril()).transpose(1, 2)


def call_runs(schedule, head: int, level: int, length: int, block: int, low: int, high: int) -> list[list[int]]:
    size = triton.next_power_of_2(2 * -(-length // CHUNK) + 2)
    out = torch.full((3, size), -1, dtype=torch.int32)
    num_blocks = -(-length // block)
    runs[(1,)](schedule.table[head], out, level, num_blocks, low, high, N=size, TABLE=TABLE_COLUMNS, BLOCK=block,
               LEVELS=schedule.num_levels, SINKS=schedule.has_sinks)  # fmt: skip
    return out.T.tolist()


PATTERNS = [
    Pattern.parse("dense"),
    Pattern.parse("W3", 128),
    Pattern.parse("L1V15"),
    Pattern.parse("L8V16", 64),
    Pattern.parse("L2V5+sink1", 128),
    Pattern.parse("L1V3+sink2", 256),
    Pattern.from_ranges(2, [(2, 5), (4, None)], sinks=1),
    Pattern.per_head([Pattern.parse(s) for s in ("dense", "W2", "L1V4", "L2V3+sink1")]),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("length", [1, 64, 700, 2100])
def test_runs_of_all_levels_and_segments_are_the_pattern(pattern, length):
    heads, block = 4, pattern.block_size
    schedule = rule_schedule(pattern.key, heads, 0, 0, heads, CPU)
    wanted = chunk_mask(pattern, length, heads)
    rows = -(-length // CHUNK) * CHUNK
    for segment_rows in (rows, 5 * CHUNK):
        found = torch.zeros_like(wanted, dtype=torch.int32)
        for head in range(heads):
            for level in range(schedule.num_levels + 1):
                for low in range(0, rows, segment_rows):
                    high = min(low + segment_rows, rows)
                    for key, begin, end in call_runs(schedule, head, level, length, block, low, high):
                        if begin < end:
                            found[head, key // CHUNK, begin // CHUNK : end // CHUNK] += 1
        assert torch.equal(found, wanted.int())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_division_covers_every_head_within_its_room(pattern, group):
    heads, block, head_dim = 4, pattern.block_size, 128
    schedule = rule_schedule(pattern.key, heads, 0, 0, heads, CPU)
    for length in (1, 700, 4096, 32768, 131072):
        columns = divide_columns(schedule.table.tolist(), schedule.num_levels, length, block, heads, group, 132)
        chunks = -(-length // CHUNK)
        per_head = 2 * sum(columns.tiles)
        assert chunks <= per_head * heads  # mixed heads: the most of any head in every level
        assert columns.segment_rows % CHUNK == 0
        most = max(columns.segments)
        assert most == 1 or (most - 1) * columns.segment_rows < chunks * CHUNK <= most * columns.segment_rows
        parts = most * heads * columns.num_parts * 2 * CHUNK * head_dim * 4
        queries = heads * group * length * head_dim * 2
        assert parts <= max(1.25 * queries, 70e6)
        assert 1 <= columns.wave <= heads
    table = schedule.table.tolist()
    short = divide_columns(table, schedule.num_levels, 300, block, heads, group, 132)
    assert max(short.segments) == 1, "a short sequence gains nothing from being divided"
