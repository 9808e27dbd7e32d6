"""How the decode kernel divides its work: which tiles need masks and which programs read them (in the interpreter on a
CPU), and how many programs there are."""

import pytest
import torch
import triton
import triton.language as tl

from s2.attention import Pattern
from s2.attention.kernels.index import count_tiles
from s2.attention.kernels.triton.config import decode_config, decode_splits
from s2.attention.kernels.triton.decode_plan import count_key_tiles, decode_plan, load_regions, locate_share
from tests.attention.decode_cases import table_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = (9, 0), 132


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# ---------------------------------------------------------------- tiles


@triton.jit
def _tiles(out, table, lengths, TOKENS: tl.constexpr, REGIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0)
    regions = load_regions(table, REGIONS)
    length = tl.load(lengths + program)
    ranges = decode_plan(regions, length, TOKENS, BLOCK, TILE)
    tl.store(out + 3 * program, count_tiles(ranges))
    tl.store(out + 3 * program + 1, count_key_tiles(regions, length, TOKENS, BLOCK, TILE))
    tokens = 0
    for nth in tl.static_range(len(ranges)):
        tokens += ranges[nth][5]
    tl.store(out + 3 * program + 2, tokens)


def tiles(spec, block, lengths, tokens=1, tile=64):
    """Of each length `(tiles, tokens in them)`, and the tokens that some of the queries see."""
    rule = Pattern.parse(spec, block).rules(1)[0]
    num_blocks = max(lengths) // block + 1
    table, _ = table_of([rule], num_blocks, block)
    out = int32([[0, 0, 0]] * len(lengths))
    _tiles[(len(lengths),)](out, table.to(DEVICE), int32(lengths), tokens, table.shape[1], block, tile)
    assert bool((out[:, 0] == out[:, 1]).all())
    seen = []
    for length in lengths:
        rows = rule.mask(num_blocks)[max(length - tokens, 0) // block : (length - 1) // block + 1].any(0)
        seen.append(int(rows.repeat_interleave(block)[:length].sum()))
    return [(count, read, want) for (count, _, read), want in zip(out.tolist(), seen, strict=True)]


@pytest.mark.parametrize("spec", ["dense", "W3", "L2V5+sink1", "L2V3<9V6"])
@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("tokens", [1, 8])
def test_no_key_is_read_that_nobody_sees(spec, block, tokens):
    lengths = [1, block - 1, block, block + 1, block + 7, 11 * block + 70, 20 * block]
    for _, read, seen in tiles(spec, block, lengths, tokens):
        assert seen <= read, "slots that are not yet written are not read"
        assert read == seen or (tokens > 1 and read == seen + block), "a block that two levels show to two queries"


@pytest.mark.parametrize("spec", ["dense", "L2V5+sink1"])
@pytest.mark.parametrize("block", [16, 64])
def test_tiles_are_full_but_for_the_last_of_a_region(spec, block):
    lengths = [block * n + 5 for n in (0, 1, 4, 5, 7, 12, 24, 39)]
    for count, read, _ in tiles(spec, block, lengths):
        assert -(-read // 64) <= count <= -(-read // 64) + 2


# ---------------------------------------------------------------- programs


@triton.jit
def _shares(
    out, table, lengths, batch_size, splits,
    REGIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, BATCH: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    nth = tl.program_id(0)
    regions = load_regions(table, REGIONS)
    batch, part, parts = locate_share(nth, regions, lengths, batch_size, splits, 1, BLOCK, TILE, BATCH, LEAST)
    tl.store(out + 3 * nth, batch)
    tl.store(out + 3 * nth + 1, part)
    tl.store(out + 3 * nth + 2, parts)


def parts_of(lengths, splits, least=4):
    """Parts of each sequence of a dense head with blocks of 64; every one belongs to one program."""
    table, _ = table_of(list(Pattern.parse("dense").rules(1)), max(lengths) // 64 + 1, 64)
    out = int32([[0, 0, 0]] * (len(lengths) * splits))
    width = triton.next_power_of_2(len(lengths))
    _shares[(len(out),)](out, table.to(DEVICE), int32(lengths), len(lengths), splits, 1, 64, 64, width, least)
    shares = [tuple(share) for share in out.tolist() if share[0] < len(lengths)]
    parts = {batch: count for batch, _, count in shares}
    assert shares == [(batch, part, parts[batch]) for batch in range(len(lengths)) for part in range(parts[batch])]
    return list(parts.values())


@pytest.mark.parametrize(
    ("lengths", "splits", "parts"),
    [
        ([64 * 100], 6, [6]),
        ([64 * 100], 60, [25]),  # at least four tiles each
        ([0], 3, [1]),
        ([64 * 100] * 3, 2, [2, 2, 2]),
        ([64 * 100, 0, 64, 0], 3, [9, 1, 1, 1]),
        ([64 * 40, 64 * 40, 64 * 20], 3, [3, 3, 2]),
    ],
)
def test_programs_go_to_sequences_by_their_length(lengths, splits, parts):
    assert parts_of(lengths, splits) == parts


def test_the_largest_share_of_any_batch_is_close_to_an_even_one(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.rand(7, generator=generator) ** 4 * 40_000).int().tolist()
    parts = parts_of(lengths, 3)
    sizes = [-(-length // 64) for length in lengths]
    largest = max(-(-size // count) for size, count in zip(sizes, parts, strict=True))
    assert sum(parts) <= 21
    assert largest <= max(4, 1.5 * sum(sizes) / 21 + 1)


@pytest.mark.parametrize(
    ("heads", "batch", "slots", "splits"),
    [
        (8, 1, 131072, 33),  # two programs a multiprocessor
        (8, 1, 640, 2),  # ten tiles: at least four each
        (8, 1, 64, 1),
        (32, 1, 131072, 8),
        (8, 16, 131072, 2),
        (8, 32, 32768, 8),  # two waves would end unevenly
        (32, 16, 131072, 8),
        (32, 32, 8192, 2),  # one would fill the GPU, but sequences may differ in length
        (32, 64, 131072, 3),
        (32, 256, 8192, 1),
    ],
)
def test_splits_fill_the_gpu(heads, batch, slots, splits):
    assert decode_splits(heads, batch, slots, 4 * 128 * 4, decode_config(128, 2, H200[0]), H200[1]) == splits


def test_tall_rows_are_merged_from_fewer_parts():
    config = decode_config(128, 2, H200[0])
    assert decode_splits(8, 1, 131072, 32 * 128 * 4, config, H200[1]) == 17, "one program a multiprocessor"
