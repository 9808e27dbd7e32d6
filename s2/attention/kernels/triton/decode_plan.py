"""The plan of a decode step: which key tiles of a head's regions the newest queries of a sequence read, and which
program of the decode kernel reads which of them.

It follows from lengths and tables, which layers of one kind share, by divisions and searches that take longer than
reading a few keys. So a kernel of its own (`plan_decode`) works it out, once a step for all these layers, and each
program of the decode kernel reads what it has to do, its share, int32:

    batch, length     the sequence, and its tokens
    part, parts       which part of its tiles, of how many; all zeros: nothing to do
    begin, end        of these tiles
    ranges            `decode_plan`'s

A region (`s2.attention.decode`) holds the blocks of one class in consecutive slots, the `member`-th block of the class
in slots `begin + member % capacity * BLOCK`. What the queries see of it is one run of members, so its tiles follow from
a few integers. `length` is a scalar, or in counts a vector of sequences.
"""

import triton
import triton.language as tl

from ..index import count_tiles, members_below

FIELDS = tl.constexpr(8)  # of a region in the table
HEADER = tl.constexpr(6)  # words of a share before its ranges
RANGE = tl.constexpr(10)  # of a range
CANDIDATES = tl.constexpr(16)  # shares that are tried
MANY = tl.constexpr(1 << 30)


@triton.jit
def load_regions(table, REGIONS: tl.constexpr):
    """A head's regions, each the tuple of its fields in the table's order. Unused rows are all zero."""
    regions = (_load_region(table),)
    for nth in tl.static_range(1, REGIONS):
        regions = regions + (_load_region(table + nth * FIELDS),)  # type: ignore[assignment]  # noqa: RUF005
    return regions


@triton.jit
def _load_region(row):
    begin, capacity, stride, residue = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    first, last, near, far = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    return begin, tl.maximum(capacity, 1), tl.maximum(stride, 1), residue, first, last, near, far


@triton.jit
def _run(region, length, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """What the last `TOKENS` queries of a sequence see of a region, a run of members: the first one, and the tokens."""
    _, capacity, stride, residue, first, last, near, far = region
    newest = (length + BLOCK - 1) // BLOCK - 1  # block of the last query, -1 of an empty sequence
    oldest = tl.maximum(length - TOKENS, 0) // BLOCK if TOKENS > 1 else newest
    low = members_below(tl.maximum(first, oldest - far + 1), stride, residue)
    high = members_below(tl.minimum(last, newest - near + 1), stride, residue)
    low = tl.maximum(low, high - capacity)  # never outside the region, whatever `length` is
    missing = tl.maximum((residue + (high - 1) * stride + 1) * BLOCK - length, 0)  # tokens of the last block
    return low, tl.maximum((high - low) * BLOCK - missing, 0)


@triton.jit
def count_key_tiles(regions, length, TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Key tiles of a sequence in all regions of a head."""
    tiles = length * 0
    for nth in tl.static_range(len(regions)):
        tiles += tl.cdiv(_run(regions[nth], length, TOKENS, BLOCK)[1], TILE)
    return tiles


@triton.jit
def decode_plan(regions, length, TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """A range of key tiles for each region: `(tiles, first slot, end of the region's slots, slots, first member,
    tokens, stride, residue, near, far)`."""
    ranges = (_range(regions[0], length, TOKENS, BLOCK, TILE),)
    for nth in tl.static_range(1, len(regions)):
        ranges = ranges + (_range(regions[nth], length, TOKENS, BLOCK, TILE),)  # type: ignore[assignment]  # noqa: RUF005
    return ranges


@triton.jit
def _range(region, length, TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    begin, capacity, stride, residue, _, _, near, far = region
    member, tokens = _run(region, length, TOKENS, BLOCK)
    slot, slots = begin + member % capacity * BLOCK, capacity * BLOCK
    return tl.cdiv(tokens, TILE), slot, begin + slots, slots, member, tokens, stride, residue, near, far


@triton.jit
def find_tile(n, ranges):
    """`(index, range)` of the n-th tile of all ranges."""
    index, found = n, ranges[0]
    begin = 0
    for nth in tl.static_range(1, len(ranges)):
        begin += ranges[nth - 1][0]
        inside = n >= begin
        index = tl.where(inside, n - begin, index)
        found = _choose(inside, ranges[nth], found)
    return index, found


@triton.jit
def _choose(condition, these, others):
    chosen = (tl.where(condition, these[0], others[0]),)
    for nth in tl.static_range(1, len(these)):
        chosen = chosen + (tl.where(condition, these[nth], others[nth]),)  # type: ignore[assignment]  # noqa: RUF005
    return chosen


# ------------------------------------------------------------------ which program does what


def share_words(regions: int) -> int:
    """Words of a program's share."""
    return HEADER.value + regions * RANGE.value


@triton.jit(do_not_specialize=["batch_size", "splits"])
def plan_decode(
    shares, table, lengths, batch_size, splits,
    TOKENS: tl.constexpr, REGIONS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, BATCH: tl.constexpr,
    LEAST: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    # table [Hkv, REGIONS, 8], lengths [B] -> shares [programs of a head, Hkv, WORDS]
    nth, head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    regions = load_regions(table + head * (REGIONS * FIELDS), REGIONS)
    batch, part, parts = locate_share(nth, regions, lengths, batch_size, splits, TOKENS, BLOCK, TILE, BATCH, LEAST)
    share = shares + (nth * kv_heads + head).to(tl.int64) * WORDS
    if batch >= batch_size:
        for word in tl.static_range(WORDS):
            tl.store(share + word, 0)
        return
    length = tl.load(lengths + batch)
    ranges = decode_plan(regions, length, TOKENS, BLOCK, TILE)
    num_tiles = count_tiles(ranges)
    _store_words(share, (batch, length, part, parts, part * num_tiles // parts, (part + 1) * num_tiles // parts))
    for region in tl.static_range(len(ranges)):
        _store_words(share + HEADER + region * RANGE, ranges[region])


@triton.jit
def _store_words(pointer, words):
    for nth in tl.static_range(len(words)):
        tl.store(pointer + nth, words[nth])


@triton.jit
def load_words(pointer, NUM: tl.constexpr):
    """The words that stand there, a tuple."""
    words = (tl.load(pointer),)
    for nth in tl.static_range(1, NUM):
        words = words + (tl.load(pointer + nth),)  # type: ignore[assignment]  # noqa: RUF005
    return words


@triton.jit
def load_ranges(share, REGIONS: tl.constexpr):
    """The ranges of a share."""
    ranges = (load_words(share + HEADER, RANGE),)
    for nth in tl.static_range(1, REGIONS):
        ranges = ranges + (load_words(share + HEADER + nth * RANGE, RANGE),)  # type: ignore[assignment]  # noqa: RUF005
    return ranges


@triton.jit
def locate_share(
    nth, regions, lengths, batch_size, splits,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, BATCH: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Sequence of the `nth` program of a head, which part of it, and in how many parts it is divided; a sequence past
    the last: nothing to do. No part but a sequence's only one is smaller than about LEAST tiles.

    A head has `splits` programs for each of `batch_size` sequences. BATCH 0: each sequence is one part. 1: there is one
    sequence. Else a power of two, at least `batch_size`: programs go to the sequences by their tiles, so that the
    longest of a mixed batch does not hold up the others."""
    if BATCH == 0:
        return nth, 0, 1
    elif BATCH == 1:
        tiles = count_key_tiles(regions, tl.load(lengths), TOKENS, BLOCK, TILE)
        parts = tl.maximum(tl.minimum(tl.cdiv(tiles, LEAST), splits), 1)
        return (nth >= parts).to(tl.int32), nth, parts
    else:
        sequence = tl.arange(0, BATCH)
        exists = sequence < batch_size
        tiles = count_key_tiles(regions, tl.load(lengths + sequence, mask=exists, other=0), TOKENS, BLOCK, TILE)
        # the smallest share with which the programs suffice: between an even one and one that leaves each sequence a
        # program for its remainder
        programs = batch_size * splits
        total = tl.sum(tiles, 0)
        even = tl.cdiv(total, programs)
        spread = tl.cdiv(total, programs - batch_size) - even
        share = tl.maximum(even + tl.cdiv(spread * tl.arange(0, CANDIDATES), CANDIDATES - 1), LEAST)
        needed = tl.sum(_parts(tiles[None, :], share[:, None], exists[None, :]), 1)
        share = tl.min(tl.where(needed <= programs, share, MANY), 0)
        parts = _parts(tiles, share, exists)
        batch = tl.sum((tl.cumsum(parts, 0) <= nth).to(tl.int32), 0)
        before = tl.sum(tl.where(sequence < batch, parts, 0), 0)
        return batch, nth - before, tl.sum(tl.where(sequence == batch, parts, 0), 0)


@triton.jit
def _parts(tiles, share, exists):
    return tl.where(exists, tl.maximum(tl.cdiv(tiles, share), 1), 0)
