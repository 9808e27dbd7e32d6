"""Index arithmetic of the decode kernel: which key tiles of a head's regions the newest queries of a sequence read, and
which program reads which of them.

A region (`s2.attention.decode`) holds the blocks of one class in consecutive slots, the `member`-th block of the class
in slots `begin + member % capacity * BLOCK`. What the queries see of it is one run of members, so its tiles follow from
a few integers. `length` is a scalar, or in counts a vector of sequences.
"""

import triton
import triton.language as tl

from ..index import members_below

FIELDS = tl.constexpr(8)  # of a region in the table
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
def _plan(region, length, TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """What the last `TOKENS` queries of a sequence see of a region, as runs of members. `(first member, tiles)`: all of
    them see these in full. `(first member, tokens)` behind those need masks: the queries' own blocks, and blocks that
    do not fill a tile; so do `(first member, tokens)` at the far end, which only queries in the older block see."""
    _, capacity, stride, residue, first, last, near, far = region
    newest = (length + BLOCK - 1) // BLOCK - 1  # block of the last query, -1 of an empty sequence
    oldest = tl.maximum(length - TOKENS, 0) // BLOCK if TOKENS > 1 else newest
    low = members_below(tl.maximum(first, newest - far + 1), stride, residue)
    whole = members_below(tl.minimum(last, oldest - tl.maximum(near, 1) + 1), stride, residue)
    high = members_below(tl.minimum(last, newest - near + 1), stride, residue)
    high = tl.maximum(high, low)
    low = tl.maximum(low, high - capacity)  # never outside the region, whatever `length` is
    whole = tl.minimum(tl.maximum(whole, low), high)
    per_tile: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    full = (whole - low) // per_tile * per_tile
    rest = low + full
    missing = tl.maximum((residue + (high - 1) * stride + 1) * BLOCK - length, 0)  # tokens of the last block
    tokens = tl.maximum((high - rest) * BLOCK - missing, 0)
    edge, edge_tokens = low, low * 0
    if TOKENS > 1:
        edge = tl.maximum(members_below(tl.maximum(first, oldest - far + 1), stride, residue), high - capacity)
        end = tl.minimum(low, members_below(last, stride, residue))
        edge_tokens = tl.maximum(end - edge, 0) * BLOCK
    return low, full * BLOCK // TILE, rest, tokens, edge, edge_tokens


@triton.jit
def count_key_tiles(regions, length, TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Key tiles of a sequence in all regions of a head."""
    tiles = length * 0
    for nth in tl.static_range(len(regions)):
        _, full, _, tokens, _, edge_tokens = _plan(regions[nth], length, TOKENS, BLOCK, TILE)
        tiles += full + tl.cdiv(tokens, TILE) + tl.cdiv(edge_tokens, TILE)
    return tiles


@triton.jit
def decode_plan(regions, length, TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Ranges of key tiles without and with masks. A range is `(tiles, first slot, end of the region's slots, slots)`,
    one with masks goes on with `(first member, tokens, stride, residue, near, far)`."""
    full, masked = _ranges(regions[0], length, TOKENS, BLOCK, TILE)
    for nth in tl.static_range(1, len(regions)):
        more_full, more_masked = _ranges(regions[nth], length, TOKENS, BLOCK, TILE)
        full, masked = full + more_full, masked + more_masked
    return full, masked


@triton.jit
def _ranges(region, length, TOKENS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    low, tiles, rest, tokens, edge, edge_tokens = _plan(region, length, TOKENS, BLOCK, TILE)
    slot, end, slots = _slots(region, low, BLOCK)
    full, masked = (tiles, slot, end, slots), _masked_range(region, rest, tokens, BLOCK, TILE)
    if TOKENS > 1:
        return (full,), (masked, _masked_range(region, edge, edge_tokens, BLOCK, TILE))
    else:
        return (full,), (masked,)


@triton.jit
def _slots(region, member, BLOCK: tl.constexpr):
    begin, capacity = region[0], region[1]
    return begin + member % capacity * BLOCK, begin + capacity * BLOCK, capacity * BLOCK


@triton.jit
def _masked_range(region, member, tokens, BLOCK: tl.constexpr, TILE: tl.constexpr):
    slot, end, slots = _slots(region, member, BLOCK)
    tiles = tl.cdiv(tokens, TILE)
    return tiles, slot, end, slots, member, tokens, region[2], region[3], region[6], region[7]


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


@triton.jit
def slots_of(start, end, slots, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Slots of a tile of SIZE tokens that starts at `start`, which may be past the end of a ring by less than a turn. A
    tile inside one block gets its first slot only, one of several blocks a vector: it may wrap within."""
    if SIZE <= BLOCK:
        return tl.where(start >= end, start - slots, start)
    else:
        slot = start + tl.arange(0, SIZE)
        return tl.where(slot >= end, slot - slots, slot)


# ------------------------------------------------------------------ which program does what


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
