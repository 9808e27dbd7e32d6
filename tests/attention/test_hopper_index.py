"""How the Hopper backward divides its work, in Triton's interpreter: every visible pair of chunks lies in exactly one
work item's run, packed or not."""

import pytest
import torch
import triton
import triton.language as tl

from s2.attention import Pattern
from s2.attention.kernels.hopper.chunks import attention_documents, chunk_run, chunk_tile
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


@triton.jit
def tiles(table, out, num_blocks, N: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    lane = tl.arange(0, N)
    rule = load_rule(table, LEVELS, SINKS)
    level, index = chunk_tile(lane, num_blocks, rule, BLOCK, LEVELS, SINKS)
    tl.store(out + lane, level)
    tl.store(out + N + lane, index)


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
            for level in range(schedule.num_levels + 1 + schedule.has_sinks):
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
        columns = divide_columns(schedule.rows, schedule.num_levels, length, block, heads, group, 132)
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
    table = schedule.rows
    short = divide_columns(table, schedule.num_levels, 300, block, heads, group, 132)
    assert max(short.segments) == 1, "a short sequence gains nothing from being divided"


def test_sinks_are_divided_like_the_other_long_columns():
    """Else one item has all queries of a group of heads: 16k steps at 128k with 32 query and 4 KV heads."""
    schedule = rule_schedule(Pattern.parse("L1V15+sink1").key, 4, 0, 0, 4, CPU)
    columns = divide_columns(schedule.rows, schedule.num_levels, 131072, 64, 4, 8, 132)
    assert columns.tiles[2] == 1 and columns.segments[2] == columns.segments[1] > 10
    assert columns.segments[0] == 1, "the local window stays whole"


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("spec", ["L1V15", "L2V5+sink1", "W3", "dense"])
def test_documents_and_their_tiles(spec, block):
    pattern, heads = Pattern.parse(spec, block), 4
    schedule = rule_schedule(pattern.key, heads, 0, 0, heads, CPU)
    lengths = [0, 0, 1, 130, 0, 270, 64, 517, 0, *[65] * 20]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    count = len(lengths)
    most_tiles = sum(lengths) // 192 + count
    sinks = max(row[1] for row in schedule.rows)
    documents = torch.full((1 + most_tiles + sum(lengths) // 64 + 4 * count, 4), -1, dtype=torch.int32)
    attention_documents[(count,)](
        cu_seqlens, documents, count, most_tiles, sinks, TILE=192, BLOCK=block, LEVELS=schedule.num_levels, WIDTH=8
    )
    num_tiles, num_pairs = documents[0, :2].tolist()
    chunks = torch.tensor([0, *[-(-n // CHUNK) for n in lengths]]).cumsum(0).tolist()
    wanted = [
        [row, begin, length, chunk]
        for length, begin, chunk in zip(lengths, cu_seqlens.tolist(), chunks, strict=False)
        for row in range(0, length, 192)
    ]
    assert documents[1 : 1 + num_tiles].tolist() == wanted
    assert (documents[1 + num_tiles : 1 + most_tiles] == -1).all()
    entries = documents[1 + most_tiles :][:num_pairs].tolist()
    assert (documents[1 + most_tiles + num_pairs :] == -1).all()
    pairs = []
    for length, begin, chunk in zip(lengths, cu_seqlens.tolist(), chunks, strict=False):
        own = [entry for entry in entries if entry[1:] == [begin, length, chunk]] if length else []
        assert [entry[0] for entry in own] == list(range(len(own)))
        pairs.append(len(own))
    assert sum(pairs) == num_pairs
    for length, room in zip(lengths, pairs, strict=True):
        if length == 0:
            continue
        wanted = chunk_mask(pattern, length, heads)
        rows, size = -(-length // CHUNK) * CHUNK, triton.next_power_of_2(max(room, 2))
        for head in range(heads):
            out = torch.full((2, size), -1, dtype=torch.int32)
            tiles[(1,)](schedule.table[head], out, -(-length // block), N=size, BLOCK=block,
                        LEVELS=schedule.num_levels, SINKS=schedule.has_sinks)  # fmt: skip
            assert (out[0, room:] == -1).all(), "a tile beyond the document's room"
            found = torch.zeros_like(wanted[head], dtype=torch.int32)
            for level, index in out[:, :room].T.tolist():
                if level >= 0:
                    chunk_runs = call_runs(schedule, head, level, length, block, 0, rows)
                    for key, begin, end in chunk_runs[2 * index : 2 * index + 2]:
                        if begin < end:
                            found[key // CHUNK, begin // CHUNK : end // CHUNK] += 1
            assert torch.equal(found, wanted[head].int())
