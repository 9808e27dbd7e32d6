"""How the Hopper kernels divide the backward: every visible pair of chunks lies in exactly one work item's run, packed
or not (in Triton's interpreter, and `n_blocks.cuh` compiled for the host)."""

import itertools
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from s2.attention import Pattern
from s2.attention.kernels.hopper.combine import ROWS, attention_combine, attention_combine_packed, segment_runs
from s2.attention.kernels.hopper.n_blocks import document_tile, level_block, locate_item, n_block_run
from s2.attention.kernels.hopper.problem import TILE
from s2.attention.kernels.hopper.scheduler import divide_columns, divide_packed
from s2.attention.kernels.hopper.varlen import PackedColumns, attention_documents, document_item
from s2.attention.kernels.index import load_rule
from s2.attention.schedule import TABLE_COLUMNS, rule_schedule
from tests.attention.checks import call_with
from tests.attention.hopper.host import COMPILER, CPU, compile_for_host, unit_mask, unit_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="index arithmetic, checked in Triton's interpreter: on machines without a GPU"
)

NOTHING = torch.zeros(1)


def gated(count: int, cases: list) -> list:
    """The first cases, and the others at night."""
    return [*cases[:count], *(pytest.param(*case, marks=pytest.mark.nightly) for case in cases[count:])]


UNFILLED = (NOTHING,) * 4 + (0,) * 4  # no results with rows of no document


@triton.jit
def runs(table, out, level, num_blocks, low, high, N: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr,
         LEVELS: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    lane = tl.arange(0, N)
    rule = load_rule(table, LEVELS, SINKS)
    key, begin, end = n_block_run(lane, level, num_blocks, low, high, rule, BLOCK, LEVELS, SINKS)
    tl.store(out + lane, key)
    tl.store(out + N + lane, begin)
    tl.store(out + 2 * N + lane, end)


@triton.jit
def tiles(table, out, num_blocks, N: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    lane = tl.arange(0, N)
    rule = load_rule(table, LEVELS, SINKS)
    level, index = document_tile(lane, num_blocks, rule, BLOCK, LEVELS, SINKS)
    tl.store(out + lane, level)
    tl.store(out + N + lane, index)


@triton.jit
def blocks(table, out, level, num_blocks, N: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    lane = tl.arange(0, N)
    block, until, exists = level_block(lane, level, num_blocks, load_rule(table, LEVELS, SINKS), LEVELS, SINKS)
    tl.store(out + lane, tl.where(exists, block, -1))
    tl.store(out + N + lane, until)


def blocks_of(schedule, head: int, level: int, length: int, block: int, chunks: int) -> list[list[tuple[int, int]]]:
    """Of the first chunks of several blocks of a level: their blocks, and the query block after the last one that sees
    each."""
    per_n_block, num_blocks = TILE // block, -(-length // block)
    size = triton.next_power_of_2(chunks * per_n_block)
    out = torch.full((2, size), -1, dtype=torch.int32)
    blocks[(1,)](schedule.table[head], out, level, num_blocks, N=size, LEVELS=schedule.num_levels,
                 SINKS=schedule.has_sinks)  # fmt: skip
    found = out.T.tolist()
    return [[(b, u) for b, u in found[n * per_n_block : (n + 1) * per_n_block] if b >= 0] for n in range(chunks)]


def add_runs(found, runs, schedule, head: int, level: int, length: int, block: int, low: int, high: int, first=0):
    """Counts in `found` `[key unit, query unit]` what the chunks of a level, from chunk `first` on, work on; of chunks
    of several blocks each block's part of the run."""
    unit = unit_of(block)
    if block >= TILE:
        for key, begin, end in runs:
            if begin < end:
                found[key // unit, begin // unit : end // unit] += 1
        return
    all_members = blocks_of(schedule, head, level, length, block, first + len(runs))
    for (key, begin, end), members in zip(runs, all_members[first:], strict=True):
        seen = [(member, max(member * block, low), min(u * block, high)) for member, u in members]
        seen = [(member, b, e) for member, b, e in seen if b < e]
        assert (begin < end) == bool(seen)
        if seen:
            assert (begin, end) == (min(b for _, b, _ in seen), max(e for _, _, e in seen)) and key <= begin
            for member, b, e in seen:
                found[member, b // unit : e // unit] += 1


def call_runs(schedule, head: int, level: int, length: int, block: int, low: int, high: int) -> list[list[int]]:
    size = triton.next_power_of_2(2 * -(-length // TILE) + 2)
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
    Pattern.parse("L1V15", 16),
    Pattern.parse("L8V16", 32),
    Pattern.parse("L2V5+sink3", 16),
    Pattern.from_ranges(2, [(3, 7), (9, 20)], sinks=1, block_size=16),
    Pattern.per_head([Pattern.parse(s) for s in ("dense", "W2", "L1V4", "L2V3+sink1")]),
]


@triton.jit
def tile_runs(table, out, tile, level, num_blocks, high, segment, segment_rows, N_BLOCKS: tl.constexpr,
              BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    lane = tl.arange(0, N_BLOCKS)
    _, begin, end, alone = segment_runs(tile * N_BLOCKS + lane, level, num_blocks, high, segment, segment_rows,
                                        load_rule(table, LEVELS, SINKS), BLOCK, LEVELS, SINKS)  # fmt: skip
    tl.store(out + lane, begin)
    tl.store(out + N_BLOCKS + lane, end)
    tl.store(out + 2 * N_BLOCKS, tl.where(alone, 1, 0))


def call_tile(schedule, head, level, tile, length, block, segment, segment_rows, a_tile):
    """Runs of the chunks of a tile in a segment, without their keys, and whether the tile has no other one."""
    out = torch.full((2 * a_tile + 1,), -1, dtype=torch.int32)
    unit = unit_of(block)
    tile_runs[(1,)](schedule.table[head], out, tile, level, -(-length // block), -(-length // unit) * unit, segment,
                    segment_rows, N_BLOCKS=a_tile, BLOCK=block, LEVELS=schedule.num_levels,
                    SINKS=schedule.has_sinks)  # fmt: skip
    *numbers, alone = out.tolist()
    return list(zip(numbers[:a_tile], numbers[a_tile:], strict=True)), bool(alone)


@pytest.mark.parametrize(
    ("pattern", "a_tile"),
    gated(1, [
        (Pattern.parse("L2V5+sink1", 128), 2),
        (Pattern.from_ranges(2, [(3, 7), (9, 20)], sinks=1, block_size=32), 2),
        (Pattern.parse("L1V3"), 4),
        (Pattern.from_ranges(2, [(2, 5), (4, None)], sinks=1), 2),
    ]),
    ids=str,
)  # fmt: skip
def test_segments_of_a_tile_are_its_rows(pattern, a_tile):
    """Each row in one of them."""
    heads, block, length = 4, pattern.block_size, 1000
    schedule = rule_schedule(call_with(pattern, heads), heads, CPU)
    segment_rows, rows = 4 * TILE, -(-length // TILE) * TILE
    for level in range(schedule.num_levels + 1 + schedule.has_sinks):
        whole = call_runs(schedule, 1, level, length, block, 0, rows)
        for tile in range(0, len(whole) // a_tile, 3):
            runs = [(min(b, length), min(e, length)) for _, b, e in whole[tile * a_tile : (tile + 1) * a_tile]]
            found = [set() for _ in range(a_tile)]
            spans = []
            for segment in range(-(-rows // segment_rows)):
                own, alone = call_tile(schedule, 1, level, tile, length, block, segment, segment_rows, a_tile)
                worked = [range(b, min(e, length)) for b, e in own if b < e]
                if not worked:
                    continue
                spans.append((min(r.start for r in worked), max(r.stop for r in worked)))
                for chunk, (b, e) in enumerate(own):
                    assert found[chunk].isdisjoint(range(b, min(e, length)))
                    found[chunk].update(range(b, min(e, length)))
            assert found == [set(range(b, e)) for b, e in runs]
            if spans:
                assert alone == (len(spans) == 1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("group", "a_tile"), [(1, 2), (4, 4)])
def test_division_covers_every_head_within_its_room(pattern, group, a_tile):
    heads, block, head_dim = 4, pattern.block_size, 128
    schedule = rule_schedule(call_with(pattern, heads), heads, CPU)
    for length in (1, 700, 4096, 32768, 131072):
        columns = divide_columns(schedule.rows, schedule.num_levels, length, block, heads, group, 132, a_tile)
        chunks = -(-length // TILE)
        per_head = a_tile * sum(columns.tiles)
        assert chunks <= per_head * heads  # mixed heads: the most of any head in every level
        assert columns.segment_rows % TILE == 0
        most = max(columns.segments)
        assert most == 1 or (most - 1) * columns.segment_rows < chunks * TILE <= most * columns.segment_rows
        parts = most * heads * columns.num_partials * 2 * TILE * head_dim * 4
        queries = heads * group * length * head_dim * 2
        assert parts <= max(1.25 * queries, 70e6)
        assert 1 <= columns.wave <= heads
    table = schedule.rows
    short = divide_columns(table, schedule.num_levels, 300, block, heads, group, 132, a_tile)
    assert max(short.segments) == 1, "a short sequence gains nothing from being divided"


def test_sinks_are_divided_like_the_other_long_columns():
    """Else one item has all queries of a group of heads: 16k steps at 128k with 32 query and 4 KV heads."""
    schedule = rule_schedule(call_with(Pattern.parse("L1V15+sink1"), 4), 4, CPU)
    columns = divide_columns(schedule.rows, schedule.num_levels, 131072, 64, 4, 8, 132, 2)
    assert columns.tiles[2] == 1 and columns.segments[2] == columns.segments[1] > 10
    assert columns.segments[0] == 1, "the local window stays whole"


@pytest.mark.parametrize(
    ("pattern", "a_tile", "direct"),
    gated(1, [
        (Pattern.parse("L2V5+sink1", 128), 2, True),
        (Pattern.from_ranges(2, [(20, 4)], block_size=16), 4, False),
        (Pattern.parse("L1V7"), 4, False),
        (Pattern.parse("L1V7"), 2, True),
        (Pattern.from_ranges(2, [(2, 5), (4, None)], sinks=1), 2, True),
        (Pattern.per_head([Pattern.parse("dense"), Pattern.parse("L1V4")]), 4, False),
        (Pattern.from_ranges(2, [(12, 4)], block_size=32), 2, True),
    ]),
    ids=str,
)  # fmt: skip
def test_parts_of_divided_columns_are_added_up_where_their_keys_are(pattern, a_tile, direct):
    """Parts of segments in which a chunk is not seen, between two of its blocks for example, are never written."""
    dim, block = 16, pattern.block_size
    heads, batch, length, segment_tiles = (2, 2, 500, 3) if block >= TILE else (1, 1, 400, 2)
    schedule = rule_schedule(call_with(pattern, heads), heads, CPU)
    whole = divide_columns(schedule.rows, schedule.num_levels, length, block, heads * batch, 1, 132, a_tile)
    rows, segment_rows = -(-length // TILE) * TILE, segment_tiles * TILE
    levels = range(schedule.num_levels + schedule.has_sinks, -1, -1)
    segments = [-(-rows // segment_rows) if level in levels else 1 for level in range(4)]
    columns = replace(whole, segments=tuple(segments), segment_rows=segment_rows)
    parts = torch.full((max(segments), batch * heads, columns.num_partials, 2, TILE, dim), torch.nan)
    wanted, unseen = torch.zeros(2, batch, rows + TILE, heads, dim), 0
    for head in range(heads):
        first = 0  # part of the level: the widest levels come first
        for level in levels:
            count = a_tile * columns.tiles[level]
            whole_runs = call_runs(schedule, head, level, length, block, 0, rows)
            per_segment = [
                call_runs(schedule, head, level, length, block, low, min(low + segment_rows, rows))
                for low in range(0, rows, segment_rows)
            ]
            members = [] if block >= TILE else blocks_of(schedule, head, level, length, block, count)
            for own in range(count):
                tile = [
                    run for run in whole_runs[own // a_tile * a_tile : (own // a_tile + 1) * a_tile] if run[1] < run[2]
                ]
                if not tile:
                    continue
                low, high = min(b for _, b, _ in tile) // segment_rows, (max(e for *_, e in tile) - 1) // segment_rows
                for segment in range(low, high + 1):
                    key, begin, end = per_segment[segment][own]
                    unseen += begin >= end
                    if begin >= end or (direct and low == high):
                        continue
                    own_part = torch.randn(batch, 2, TILE, dim)
                    parts[segment, head::heads, first + own] = own_part
                    places = [(key, slice(0, TILE))]
                    if block < TILE:
                        places = [
                            (b * block, slice(n * block, (n + 1) * block)) for n, (b, _) in enumerate(members[own])
                        ]
                    for at, part_rows in places:
                        added = own_part[:, :, part_rows].transpose(0, 1)
                        wanted[:, :, at : at + added.shape[2], head] += added
            first += count
    assert wanted.any() and (unseen > 0 or block >= TILE)
    dk, dv = (torch.zeros(batch, length, heads, dim) for _ in range(2))
    attention_combine[(columns.num_partials * (TILE // ROWS.value) * batch * heads,)](
        parts, dk, dv, schedule.table, length, heads, segment_rows, columns.num_partials, *columns.tiles, *segments,
        TABLE=TABLE_COLUMNS, D=dim, BLOCK=block, LEVELS=schedule.num_levels, SINKS=schedule.has_sinks, N_BLOCKS=a_tile,
        DIRECT=direct,
    )  # fmt: skip
    torch.testing.assert_close(torch.stack([dk, dv]), wanted[:, :, :length])


@pytest.mark.parametrize(
    ("spec", "block", "consumers", "share"),
    gated(2, [
        ("L2V5+sink1", 32, 4, 2), ("L1V15", 64, 3, 1), ("W3", 128, 3, 1), ("L2V5+sink1", 16, 3, 1),
        ("dense", 64, 4, 2),
    ]),
)  # fmt: skip
def test_documents_and_their_tiles(spec, block, consumers, share):
    pattern, heads = Pattern.parse(spec, block), 4
    schedule = rule_schedule(call_with(pattern, heads), heads, CPU)
    lengths = [0, 0, 1, 130, 0, 270, 64, 517, 0, *[65] * 4]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    count = len(lengths)
    unit = unit_of(block)
    most_tiles = sum(lengths) * share // (consumers * unit) + count * (2 + share // consumers)
    sinks = max(row[1] for row in schedule.rows)
    documents = torch.full((1 + most_tiles + sum(lengths) // 64 + 4 * count, 4), -1, dtype=torch.int32)
    attention_documents[(count + 1,)](
        cu_seqlens, documents, *UNFILLED, count, sum(lengths), most_tiles, 0, sinks, 0, 0, 0,
        M_BLOCKS=consumers, PACK_GQA=share, N_BLOCKS=2, BLOCK=block, LEVELS=schedule.num_levels, WIDTH=4,
    )  # fmt: skip
    num_tiles, num_pairs, num_divided = documents[0, :3].tolist()
    assert num_divided == 0, "nothing is divided"
    chunks = torch.tensor([0, *[-(-n // unit) for n in lengths]]).cumsum(0).tolist()
    wanted = [
        [box, begin, length, chunk]
        for length, begin, chunk in zip(lengths, cu_seqlens.tolist(), chunks, strict=False)
        for box in range(0, -(-length // unit) * share, consumers)
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
    if share > 1:
        return  # what the pairs are does not depend on it
    rooms = set(zip(lengths, pairs, strict=True))
    assert len(rooms) == len(set(lengths)), "documents of one length have as many pairs"
    for length, room in rooms - {(0, 0)}:
        wanted = unit_mask(pattern, length, heads)
        rows, size = -(-length // TILE) * TILE, triton.next_power_of_2(max(room, 2))
        for head in (0, heads - 1):
            out = torch.full((2, size), -1, dtype=torch.int32)
            tiles[(1,)](schedule.table[head], out, -(-length // block), N=size, BLOCK=block,
                        LEVELS=schedule.num_levels, SINKS=schedule.has_sinks)  # fmt: skip
            assert (out[0, room:] == -1).all(), "a tile beyond the document's room"
            found = torch.zeros_like(wanted[head], dtype=torch.int32)
            for level, index in out[:, :room].T.tolist():
                if level >= 0:
                    own = call_runs(schedule, head, level, length, block, 0, rows)[2 * index : 2 * index + 2]
                    add_runs(found, own, schedule, head, level, length, block, 0, rows, first=2 * index)
            assert torch.equal(found, wanted[head].int())


@triton.jit
def document_work(documents, out, most_tiles, segment_rows, sinks, stride0, stride1, stride2, table,
                  BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """What the producer of dK and dV makes of an item of the table: level, tile, 1 if it has no parts, then of both
    chunks key, begin and end of the run."""
    item = tl.program_id(0)
    entry = documents + 4 * (1 + most_tiles + item)
    length = tl.load(entry + 2)
    tile, segment, rows = document_item(tl.load(entry), item < tl.load(documents + 2), length, segment_rows, sinks,
                                        stride0, stride1, stride2, 2, BLOCK, LEVELS)  # fmt: skip
    rule, num_blocks = load_rule(table, LEVELS, SINKS), (length + BLOCK - 1) // BLOCK
    level, index = document_tile(tile, num_blocks, rule, BLOCK, LEVELS, SINKS)
    unit = tl.minimum(BLOCK, 64)
    lane = tl.arange(0, 2)
    key, begin, end, alone = segment_runs(2 * index + lane, level, num_blocks, (length + unit - 1) // unit * unit,
                                          segment, rows, rule, BLOCK, LEVELS, SINKS)  # fmt: skip
    to = out + 9 * item
    tl.store(to, level)
    tl.store(to + 1, index)
    tl.store(to + 2, tl.where(alone, 1, 0))
    tl.store(to + 3 + 3 * lane, key)
    tl.store(to + 4 + 3 * lane, begin)
    tl.store(to + 5 + 3 * lane, end)


def packed_columns(schedule, narrowest: int, segment_rows: int) -> PackedColumns:
    """Where the levels from `narrowest` on are divided."""
    strides = [1, *(min(row[3 * n - 1] for row in schedule.rows) for n in range(1, schedule.num_levels + 1)), 0, 0][:3]
    return PackedColumns(segment_rows, tuple(stride if n >= narrowest else 0 for n, stride in enumerate(strides)), 0)


@pytest.mark.parametrize(
    ("pattern", "narrowest"),
    gated(1, [
        (Pattern.from_ranges(2, [(2, 5), (4, None)], sinks=1), 2),
        (Pattern.parse("L2V5+sink3", 16), 1),
        (Pattern.parse("dense"), 0),
        (Pattern.parse("L1V3"), 1),
        (Pattern.parse("L2V3+sink1", 128), 1),
        (Pattern.parse("L1V3", 32), 0),
        (Pattern.per_head([Pattern.parse(s) for s in ("dense", "L2V3+sink1")]), 1),
    ]),
    ids=str,
)  # fmt: skip
def test_divided_documents_are_worked_on_once_and_added_up(pattern, narrowest):
    heads, dim, block = 2, 16, pattern.block_size
    schedule = rule_schedule(call_with(pattern, heads), heads, CPU)
    rng = random.Random(seed := block + narrowest)
    lengths = [rng.randint(400, 650), 0, 1, rng.randint(257, 320), rng.randint(100, 256)]
    rng.shuffle(lengths)
    borders, tokens = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths)
    columns = packed_columns(schedule, narrowest, 2 * TILE)
    sinks, unit = max(row[1] for row in schedule.rows), unit_of(block)
    most_tiles = tokens // (3 * unit) + 2 * len(lengths)
    table = torch.full((1 + most_tiles + 500, 4), -1, dtype=torch.int32)
    sizes = (columns.segment_rows, sinks, *columns.strides)
    kind = {"BLOCK": block, "LEVELS": schedule.num_levels}
    attention_documents[(len(lengths) + 1,)](
        borders,
        table,
        *UNFILLED,
        len(lengths),
        tokens,
        most_tiles,
        *sizes,
        M_BLOCKS=3,
        PACK_GQA=1,
        N_BLOCKS=2,
        WIDTH=16,
        **kind,
    )
    _, num_items, num_divided = table[0, :3].tolist()
    assert num_divided > 0 or not any(columns.strides), f"{seed=}, {lengths}"
    entries = table[1 + most_tiles :][:num_items].tolist()
    parts = torch.randn(heads, 2 * num_divided, 2, TILE, dim)
    summed = torch.zeros(2, tokens + TILE, heads, dim)
    masks = {length: unit_mask(pattern, length, heads) for length in lengths if length}
    for head in range(heads):
        out = torch.full((num_items, 9), -1, dtype=torch.int32)
        document_work[(num_items,)](table, out, most_tiles, *sizes, schedule.table[head], SINKS=schedule.has_sinks,
                                    **kind)  # fmt: skip
        found = {begin: torch.zeros_like(masks[length][head], dtype=torch.int32)
                 for begin, length in zip(borders.tolist(), lengths, strict=False) if length}  # fmt: skip
        for item, ((_, begin, length, _), (level, tile, alone, *numbers)) in enumerate(
            zip(entries, out.tolist(), strict=True)
        ):
            own = [(key, b, e) for key, b, e in (numbers[:3], numbers[3:]) if b < e]
            if level < 0 or not own:
                continue
            low, high = min(b for _, b, _ in own), max(e for _, _, e in own)
            own = [(key, b, e) if b < e else (0, 0, 0) for key, b, e in (numbers[:3], numbers[3:])]
            add_runs(found[begin], own, schedule, head, level, length, block, low, high, first=2 * tile)
            for chunk, (key, b, e) in enumerate(own):
                if b < e and not alone:
                    assert item < num_divided
                    if block >= TILE:
                        gradients = parts[head, 2 * item + chunk]
                        summed[:, begin + key : begin + min(key + TILE, length), head] += gradients[:, : length - key]
        for (begin, work), length in zip(found.items(), [n for n in lengths if n], strict=True):
            assert torch.equal(work, masks[length][head].int()), f"{seed=}, {lengths}, {head=}, {begin=}"
    if block >= TILE:  # small blocks' keys lie apart, and are checked on the GPU
        dk, dv = (torch.zeros(tokens, heads, dim) for _ in range(2))
        attention_combine_packed[(3 * heads,)](
            parts, dk, dv, schedule.table, table, heads, most_tiles, columns.segment_rows, 2 * num_divided, sinks,
            *columns.strides, TABLE=TABLE_COLUMNS, D=dim, SINKS=schedule.has_sinks, N_BLOCKS=2, **kind,
        )  # fmt: skip
        gradients = torch.stack([dk, dv])
        torch.testing.assert_close(gradients, summed[:, :tokens])


@pytest.mark.parametrize(
    "pattern",
    [
        PATTERNS[2],
        *(pytest.param(pattern, marks=pytest.mark.nightly) for pattern in (PATTERNS[3], PATTERNS[6], *PATTERNS[9:])),
    ],
    ids=str,
)
def test_segments_of_packed_documents_have_room(pattern):
    """Whatever the lengths are."""
    group, heads, block = 4, 4, pattern.block_size
    schedule = rule_schedule(call_with(pattern, heads), heads, CPU)
    sinks = max(row[1] for row in schedule.rows)
    rng, divided = random.Random(block), False
    for tokens in (1000, 40000):
        columns = divide_packed(schedule.rows, schedule.num_levels, tokens, block, heads, group, 132)
        for most in (tokens, tokens // 3 + 1, max(2 * columns.segment_rows, 300) + 1):
            lengths = [most] * (tokens // most) + [tokens % most]
            rng.shuffle(lengths)
            borders = torch.tensor([0, *lengths]).cumsum(0).int()
            most_tiles = sum(lengths) // unit_of(block) + 2 * len(lengths)
            table = torch.zeros((1 + most_tiles + 40000 + 8 * len(lengths), 4), dtype=torch.int32)
            attention_documents[(len(lengths) + 1,)](
                borders, table, *UNFILLED, len(lengths), tokens, most_tiles, columns.segment_rows, sinks,
                *columns.strides, M_BLOCKS=3, PACK_GQA=1, N_BLOCKS=2, BLOCK=block, LEVELS=schedule.num_levels,
                WIDTH=8192,
            )  # fmt: skip
            assert table[0, 2] <= columns.most_segments
            divided |= bool(table[0, 2])
    assert divided or pattern not in PATTERNS[2:4], "or nothing was shown"


# ---------------------------------------------------------------- work items


@triton.jit
def items(
    out, groups, wave, few, tiles0, tiles1, tiles2, segments0, segments1, segments2, batch0, batch1, batch2,
    WIDEST: tl.constexpr,
):  # fmt: skip
    tiles, segments, batches = (tiles0, tiles1, tiles2), (segments0, segments1, segments2), (batch0, batch1, batch2)
    item = tl.program_id(0)
    level, segment, group, first, last = locate_item(item, groups, wave, tiles, segments, batches, few, WIDEST)
    tl.store(out + 5 * item, level)
    tl.store(out + 5 * item + 1, segment)
    tl.store(out + 5 * item + 2, group)
    tl.store(out + 5 * item + 3, first)
    tl.store(out + 5 * item + 4, last)


@pytest.mark.parametrize(("groups", "wave", "few"), [(5, 2, 8), (5, 5, 0), (1, 1, 1000)])
def test_items_are_every_tile_of_every_segment_once(groups, wave, few):
    tiles, segments, batches = (7, 3, 0), (1, 3, 1), (4, 1, 1)
    per_head = [-(-n // batch) for n, batch in zip(tiles, batches, strict=True)]
    count = sum(n * parts for n, parts in zip(per_head, segments, strict=True)) * wave * -(-groups // wave)
    out = torch.full((count, 5), -1, dtype=torch.int32)
    items[(count,)](out, groups, wave, few, *tiles, *segments, *batches, WIDEST=2)
    found = [(level, segment, group, tile) for level, segment, group, *ends in out.tolist() for tile in range(*ends)]
    assert sorted(found) == [
        (level, segment, group, tile)
        for level in range(3) for segment in range(segments[level]) for group in range(groups)
        for tile in range(tiles[level])
    ]  # fmt: skip
    order = [(group // wave, -level, -segment) for level, segment, group, _ in found]
    assert order == sorted(order)
    for (turn, level, _), run in itertools.groupby(found, key=lambda item: (item[2] // wave, *item[:2])):
        own = [(group, tile // batches[level], tile) for _, _, group, tile in run]
        if per_head[level] * wave <= few:
            assert own == sorted(own, key=lambda item: (item[1], item[0]))
        else:
            assert own == sorted(own)
        assert len(own) == min(wave, groups - turn * wave) * tiles[level]


# ---------------------------------------------------------------- work items in C++

ITEMS = Path(__file__).with_name("items.cpp")


def count_runs(lines: list[str], found: torch.Tensor, block: int, parts: dict | None) -> None:
    """Counts in `found` `[head, key unit, query unit]` what the items that `items.cpp` prints work on."""
    unit = unit_of(block)
    for line in lines:
        head, segment, part, key, begin, end, *members = map(int, line.split())
        assert begin < end
        if block >= TILE:
            found[head, key // unit, begin // unit : end // unit] += 1
        for first, until in zip(members[::2], members[1::2], strict=True):
            low, high = max(first, begin), min(until, end)  # of a small block's part of the run
            if low < high:
                found[head, first // unit, low // unit : high // unit] += 1
        if segment >= 0 and parts is not None:
            assert (head, segment, part) not in parts
            parts[head, segment, part] = line


@pytest.mark.skipif(COMPILER is None, reason="a C++ compiler is needed")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("length", [1, 2100])
def test_items_in_cpp_are_the_pattern(pattern, length, tmp_path):
    heads, block = 4, pattern.block_size
    schedule = rule_schedule(call_with(pattern, heads), heads, CPU)
    constants = {"BLOCK": block, "LEVELS": schedule.num_levels, "SINKS": int(schedule.has_sinks), "CONSUMERS": 2}
    program = compile_for_host(ITEMS, tmp_path, constants)
    rules = " ".join(str(x) for row in schedule.rows for x in row)
    wanted = unit_mask(pattern, length, heads).int()

    def run(words: str) -> list[str]:
        result = subprocess.run([str(program)], input=f"{words} {rules}", capture_output=True, text=True, check=True)
        return result.stdout.splitlines()

    whole = divide_columns(schedule.rows, schedule.num_levels, length, block, heads, 1, 132, 4)
    rows = -(-length // TILE) * TILE
    divided = replace(whole, segments=tuple(-(-rows // 320) for _ in range(4)), segment_rows=320, wave=3)
    for columns in (whole, divided):
        turns = -(-heads // columns.wave)
        division = (*columns.tiles, *columns.segments, *columns.batches, columns.segment_rows, columns.wave)
        lines = run(f"0 {length} {heads} {columns.num_items * columns.wave * turns} {' '.join(map(str, division))}")
        found, parts = torch.zeros_like(wanted), {}
        count_runs(lines, found, block, parts)
        assert torch.equal(found, wanted)
        assert all(0 <= part < columns.num_partials for _, _, part in parts)
        assert bool(parts) == (columns.num_partials > 0)
    found = torch.zeros_like(wanted)  # as a packed document
    sinks = max(row[1] for row in schedule.rows)
    num_blocks = -(-length // block)

    def items_of(blocks: int) -> int:
        return -(-blocks * max(block // TILE, 1) // (4 * max(TILE // block, 1)))

    room = items_of(num_blocks) + schedule.num_levels + items_of(min(sinks, num_blocks))
    count_runs(run(f"1 {length} {heads} {room} {' '.join(['0'] * 14)}"), found, block, None)
    assert torch.equal(found, wanted)
