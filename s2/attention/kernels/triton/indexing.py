"""Index arithmetic shared by the forward and backward kernels: which key blocks a tile of queries reads, which
queries a tile of keys is seen by, and the visibility of single elements. See `s2.attention.schedule`.

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
def tiles_of(blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Number of whole TILE-token tiles in `blocks` blocks of BLOCK tokens."""
    if TILE <= BLOCK:
        return blocks * (BLOCK // TILE)
    else:
        return blocks // (TILE // BLOCK)


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
    first_row,
    last_row,
    rule,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Key tiles for query positions `first_row..last_row`: four ranges without and five with element masks.

    A range is `(tiles, first block, stride, blocks)`. Blocks that all rows see in full form the unmasked ranges (far
    level, near level, sinks, local window); blocks that only some rows see, the diagonal, and blocks left over when a
    tile holds several, the masked ones. Every visible block is in exactly one range.
    """
    i0 = first_row // BLOCK
    i1 = last_row // BLOCK
    local, sinks = rule[0], rule[1]
    per_tile: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1

    window = tl.maximum(i0 - local + 1, 0)  # first block of the local window
    window_full = tl.minimum(tl.maximum(i1 - local + 1, 0), i0)
    local_rest = (i0 - window_full) % per_tile
    local_blocks = i0 - window_full - local_rest
    edge_blocks = window_full - window
    diagonal_first = i0 - local_rest
    diagonal_blocks = i1 - diagonal_first + 1

    near_first, near_blocks, near_edge_first, near_edge_blocks, near_stride = 0, 0, 0, 0, 1
    far_first, far_blocks, far_edge_first, far_edge_blocks, far_stride = 0, 0, 0, 0, 1
    if LEVELS >= 1:
        near_stride = rule[2]
        near_first, near_blocks, near_edge_first, near_edge_blocks = _level_ranges(
            i0, i1, local, rule[4], near_stride, rule[3], sinks, per_tile
        )
        if LEVELS >= 2:
            far_stride = rule[5]
            far_first, far_blocks, far_edge_first, far_edge_blocks = _level_ranges(
                i0, i1, rule[4], rule[7], far_stride, rule[6], sinks, per_tile
            )
    sink_blocks = tl.minimum(sinks, window)
    sink_rest = sink_blocks % per_tile
    sink_blocks -= sink_rest

    full = (
        tiles_of(far_blocks, BLOCK, TILE), far_first, far_stride,
        tiles_of(near_blocks, BLOCK, TILE), near_first, near_stride,
        tiles_of(sink_blocks, BLOCK, TILE), sink_rest,
        tiles_of(local_blocks, BLOCK, TILE), window_full,
    )  # fmt: skip
    masked = (
        _masked_tiles(far_edge_blocks, BLOCK, TILE), far_edge_first, far_stride, far_edge_blocks,
        _masked_tiles(near_edge_blocks, BLOCK, TILE), near_edge_first, near_stride, near_edge_blocks,
        _masked_tiles(sink_rest, BLOCK, TILE), sink_rest,
        _masked_tiles(edge_blocks, BLOCK, TILE), window, edge_blocks,
        _masked_tiles(diagonal_blocks, BLOCK, TILE), diagonal_first, diagonal_blocks,
    )  # fmt: skip
    return full, masked


@triton.jit
def _level_ranges(i0, i1, begin, end, stride, residue, sinks, per_tile: tl.constexpr):
    """Unmasked and masked members of a level that covers block distances `[begin, end)`."""
    high = tl.maximum(i0 - begin + 1, 0)
    low = tl.maximum(i0 - end + 1, sinks)
    low_full = tl.minimum(tl.maximum(i1 - end + 1, low), tl.maximum(high, low))
    edge_first, edge_blocks = progression(low, low_full, stride, residue)
    first, blocks = progression(low_full, high, stride, residue)
    rest = blocks % per_tile  # the blocks that do not fill a tile join the masked ones, which end where these begin
    edge_first = tl.where(edge_blocks > 0, edge_first, first)
    return first + rest * stride, blocks - rest, edge_first, edge_blocks + rest


@triton.jit
def _masked_tiles(blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    return tl.cdiv(blocks * BLOCK, TILE)


@triton.jit
def full_tiles(full):
    return full[0] + full[3] + full[6] + full[8]


@triton.jit
def full_tile(n, full, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    """`(first block, stride, index)` of the n-th unmasked tile: far level, near level, sinks, then local window."""
    local_begin = full[0] + full[3] + full[6]
    first, stride, index = full[9], 1, n - local_begin
    if SINKS:
        inside = n < local_begin
        first = tl.where(inside, full[7], first)
        index = tl.where(inside, n - full[0] - full[3], index)
    if LEVELS >= 1:
        inside = n < full[0] + full[3]
        first = tl.where(inside, full[4], first)
        stride = tl.where(inside, full[5], stride)
        index = tl.where(inside, n - full[0], index)
    if LEVELS >= 2:
        inside = n < full[0]
        first = tl.where(inside, full[1], first)
        stride = tl.where(inside, full[2], stride)
        index = tl.where(inside, n, index)
    return first, stride, index


@triton.jit
def masked_tiles(masked):
    return masked[0] + masked[4] + masked[8] + masked[10] + masked[13]


@triton.jit
def masked_tile(n, masked, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    """`(first block, stride, index, blocks in the range)` of the n-th masked tile, the diagonal last."""
    far, near = masked[0], masked[0] + masked[4]
    edge_begin = near + masked[8]
    diagonal_begin = edge_begin + masked[10]
    first, stride, index, blocks = masked[14], 1, n - diagonal_begin, masked[15]
    inside = n < diagonal_begin
    first = tl.where(inside, masked[11], first)
    blocks = tl.where(inside, masked[12], blocks)
    index = tl.where(inside, n - edge_begin, index)
    if SINKS:
        inside = n < edge_begin
        first = tl.where(inside, 0, first)
        blocks = tl.where(inside, masked[9], blocks)
        index = tl.where(inside, n - near, index)
    if LEVELS >= 1:
        inside = n < near
        first = tl.where(inside, masked[5], first)
        stride = tl.where(inside, masked[6], stride)
        blocks = tl.where(inside, masked[7], blocks)
        index = tl.where(inside, n - far, index)
    if LEVELS >= 2:
        inside = n < far
        first = tl.where(inside, masked[1], first)
        stride = tl.where(inside, masked[2], stride)
        blocks = tl.where(inside, masked[3], blocks)
        index = tl.where(inside, n, index)
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
def key_tile(tile, num_blocks, rule, BLOCK: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr):
    """The `tile`-th tile of key blocks, widest level first so that the longest runs of queries start first.

    A tile never mixes levels. Returns `(level, first index, members of the level)`; level < 0 is a spare tile.
    """
    blocks: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    parts: tl.constexpr = BLOCK // TILE if TILE < BLOCK else 1
    found, begin, size = -1, 0, 0
    wider = 0
    for step in tl.static_range(LEVELS + 1):
        belong = num_blocks
        if step < LEVELS:
            belong = members_below(num_blocks, rule[3 * (LEVELS - step) - 1], rule[3 * (LEVELS - step)])
        count = belong - wider
        tiles = tl.cdiv(count, blocks) * parts
        here = (found < 0) & (tile >= 0) & (tile < tiles)
        found = tl.where(here, LEVELS - step, found)
        begin = tl.where(here, tile, begin)
        size = tl.where(here, count, size)
        tile = tl.where(found < 0, tile - tiles, tile)
        wider = belong
    return found, begin, size
