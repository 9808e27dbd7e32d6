"""Index arithmetic of the Triton and Gluon kernels: which key blocks a tile of queries reads, which queries a tile of
keys is seen by, and the visibility of single elements. See `s2.attention.schedule`. In C++: `hopper/cu/plan.cuh`.

Block indices, positions and residues count from the start of the document. `UNBOUNDED` (1 << 30) marks absent levels.
"""

import triton
import triton.language as tl

UNBOUNDED = tl.constexpr(1 << 30)


@triton.jit
def members_below(bound, stride, residue):
    """Number of blocks `b` in `[0, bound)` with `b % stride == residue`."""
    return tl.maximum(bound - residue + stride - 1, 0) // stride


@triton.jit
def progression(low, high, stride, residue):
    """First member and number of members of `b % stride == residue` in `[low, high)`."""
    before = members_below(low, stride, residue)
    count = tl.maximum(members_below(high, stride, residue) - before, 0)
    return residue + before * stride, count


@triton.jit
def load_rule(table, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    """A head's row of the rule table as a tuple of scalars, in the table's order: local window, sinks, then stride,
    residue and end of the near and the far level."""
    sinks = 0
    near_stride, near_residue, near_end = 1, 0, 0
    far_stride, far_residue, far_end = 1, 0, 0
    local = tl.load(table)
    if SINKS:
        sinks = tl.load(table + 1)
    if LEVELS >= 1:
        near_stride = tl.load(table + 2)
        near_residue = tl.load(table + 3)
        near_end = tl.load(table + 4)
    if LEVELS >= 2:
        far_stride = tl.load(table + 5)
        far_residue = tl.load(table + 6)
        far_end = tl.load(table + 7)
    return local, sinks, near_stride, near_residue, near_end, far_stride, far_residue, far_end


@triton.jit
def reach_of(block, rule, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    """How many query blocks, from itself on, see key block `block` (scalar or vector)."""
    reach = block * 0 + rule[0]  # broadcast
    if LEVELS >= 1:
        reach = tl.where(block % rule[2] == rule[3], rule[4], reach)
    if LEVELS >= 2:
        reach = tl.where(block % rule[5] == rule[6], rule[7], reach)
    if SINKS:
        reach = tl.where(block < rule[1], UNBOUNDED, reach)
    return reach


@triton.jit
def gather_positions(first, stride, index, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Token positions of the `index`-th TILE of the progression `first, first + stride, ...` of blocks."""
    lanes = tl.arange(0, TILE)
    if TILE <= BLOCK:
        per_block: tl.constexpr = BLOCK // TILE
        start = (first + (index // per_block) * stride) * BLOCK + (index % per_block) * TILE
        return start + lanes
    else:
        flat = index * TILE + lanes
        return (first + (flat // BLOCK) * stride) * BLOCK + flat % BLOCK


# ------------------------------------------------------------------ tiles of queries -> key tiles


@triton.jit
def key_plan(
    first_row, last_row, rule, BLOCK: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr
):  # fmt: skip
    """Key tiles for query positions `first_row..last_row`: ranges without and with element masks.

    A range is `(tiles, first block, stride, blocks)`. Blocks that all rows see in full form the unmasked ranges (far
    level, near level, sinks, local window); blocks that only some rows see, the diagonal, and blocks left over when a
    tile holds several, the masked ones, the diagonal last. Every visible block is in exactly one range.
    """
    i0 = first_row // BLOCK
    i1 = last_row // BLOCK
    local, sinks = rule[0], rule[1]
    per_tile: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1

    window = tl.maximum(i0 - local + 1, 0)  # first block of the local window
    window_full = tl.minimum(tl.maximum(i1 - local + 1, 0), i0)
    local_rest = (i0 - window_full) % per_tile
    local_blocks = i0 - window_full - local_rest
    diagonal = i0 - local_rest
    full = (_full_range(window_full, 1, local_blocks, BLOCK, TILE),)
    masked = (
        _masked_range(window, 1, window_full - window, BLOCK, TILE),
        _masked_range(diagonal, 1, i1 - diagonal + 1, BLOCK, TILE),
    )
    if SINKS:
        sink_blocks = tl.minimum(sinks, window)
        sink_rest = sink_blocks % per_tile
        full = _before(_full_range(sink_rest, 1, sink_blocks - sink_rest, BLOCK, TILE), full)
        masked = _before(_masked_range(0, 1, sink_rest, BLOCK, TILE), masked)
    for level in tl.static_range(LEVELS):
        begin = local if level == 0 else rule[3 * level + 1]
        stride = rule[3 * level + 2]
        # members of the level, which covers block distances `[begin, end)`
        high = tl.maximum(i0 - begin + 1, 0)
        low = tl.maximum(i0 - rule[3 * level + 4] + 1, sinks)
        low_full = tl.minimum(tl.maximum(i1 - rule[3 * level + 4] + 1, low), tl.maximum(high, low))
        edge, edge_blocks = progression(low, low_full, stride, rule[3 * level + 3])
        first, blocks = progression(low_full, high, stride, rule[3 * level + 3])
        rest = blocks % per_tile  # the blocks that do not fill a tile join the masked ones, which end where these begin
        edge = tl.where(edge_blocks > 0, edge, first)
        full = _before(_full_range(first + rest * stride, stride, blocks - rest, BLOCK, TILE), full)
        masked = _before(_masked_range(edge, stride, edge_blocks + rest, BLOCK, TILE), masked)
    return full, masked


@triton.jit
def _before(first, ranges):
    return (first,) + ranges  # noqa: RUF005 (Triton does not know it)


@triton.jit
def _full_range(first, stride, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    if TILE <= BLOCK:
        return blocks * (BLOCK // TILE), first, stride, blocks
    else:
        return blocks // (TILE // BLOCK), first, stride, blocks


@triton.jit
def _masked_range(first, stride, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    return tl.cdiv(blocks * BLOCK, TILE), first, stride, blocks


@triton.jit
def count_tiles(ranges):
    tiles = 0
    for nth in tl.static_range(len(ranges)):
        tiles += ranges[nth][0]
    return tiles


@triton.jit
def nth_tile(n, ranges):
    """`(first block, stride, index, blocks in the range)` of the n-th tile of all ranges."""
    first, stride, index, blocks = ranges[0][1], ranges[0][2], n, ranges[0][3]
    begin = 0
    for nth in tl.static_range(1, len(ranges)):
        begin += ranges[nth - 1][0]
        inside = n >= begin
        first = tl.where(inside, ranges[nth][1], first)
        stride = tl.where(inside, ranges[nth][2], stride)
        index = tl.where(inside, n - begin, index)
        blocks = tl.where(inside, ranges[nth][3], blocks)
    return first, stride, index, blocks


# ------------------------------------------------------------------ tiles of keys -> query tiles


@triton.jit
def member(index, level: tl.constexpr, rule, LEVELS: tl.constexpr):
    """The `index`-th key block that belongs to `level` but to no wider level (level 0: to none)."""
    stride, residue = 1, 0
    if level >= 1:
        stride, residue = rule[3 * level - 1], rule[3 * level]
    if level == LEVELS:
        unit = index
    else:  # skip every `ratio`-th unit, which belongs to the next level
        ratio = rule[3 * level + 2] // stride
        skip = (rule[3 * level + 3] - residue) // stride
        past = tl.maximum(index - skip, 0)
        keep = tl.maximum(ratio - 1, 1)
        unit = tl.where(index < skip, index, skip + (past // keep) * ratio + 1 + past % keep)
    return residue + unit * stride


@triton.jit
def members_of(level: tl.constexpr, num_blocks, rule):
    """Number of key blocks that belong to `level` or a wider one (level 0: all)."""
    if level == 0:
        return num_blocks
    else:
        return members_below(num_blocks, rule[3 * level - 1], rule[3 * level])


@triton.jit
def key_tile(tile, num_blocks, rule, BLOCK: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr):
    """The `tile`-th tile of key blocks, widest level first so that the longest runs of queries start first.

    A tile never mixes levels. Returns `(level, first index, members of the level)`; level < 0 is a spare tile.
    """
    blocks: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    parts: tl.constexpr = BLOCK // TILE if TILE < BLOCK else 1
    found, begin, size = -1, 0, 0
    wider = 0
    for step in tl.static_range(LEVELS + 1):
        belong = members_of(LEVELS - step, num_blocks, rule)
        count = belong - wider
        tiles = tl.cdiv(count, blocks) * parts
        here = (found < 0) & (tile >= 0) & (tile < tiles)
        found = tl.where(here, LEVELS - step, found)
        begin = tl.where(here, tile, begin)
        size = tl.where(here, count, size)
        tile = tl.where(found < 0, tile - tiles, tile)
        wider = belong
    return found, begin, size
