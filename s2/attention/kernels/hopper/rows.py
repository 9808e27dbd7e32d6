"""Tiles of query rows: three consumer warpgroups of 64 rows each, and the producer that feeds them. Shared by the
forward and the dQ kernel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ..triton.indexing import full_tile, full_tiles, key_plan, load_rule, masked_tile, masked_tiles, reach_of
from .common import SCALAR, advance, put

ROWS = gl.constexpr(64)  # query rows of a consumer warpgroup
KEYS = gl.constexpr(64)  # keys of a stage
CONSUMERS = gl.constexpr(3)
MOST_MASKED = gl.constexpr(32)  # key tiles at the edges of a tile of rows: at most 20, with blocks of 256


@gluon.jit
def locate(tile, heads, tiles_per_head):
    """`(batch, head, first row)` of a tile."""
    group = tile // tiles_per_head
    row = (tiles_per_head - 1 - tile % tiles_per_head) * (ROWS * CONSUMERS)
    return group // heads, group % heads, row


@gluon.jit
def key_tile(n, num_full, full, masked, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr):
    """Block and first key of the n-th key tile of a plan, unmasked ones first."""
    first, stride, index = full_tile(n, full, LEVELS, SINKS)
    masked_first, masked_stride, masked_index, _ = masked_tile(n - num_full, masked, LEVELS, SINKS)
    unmasked = n < num_full
    first = gl.where(unmasked, first, masked_first)
    stride = gl.where(unmasked, stride, masked_stride)
    index = gl.where(unmasked, index, masked_index)
    per_block: gl.constexpr = BLOCK // KEYS
    block = first + (index // per_block) * stride
    return block, block * BLOCK + (index % per_block) * KEYS


@gluon.jit
def sees(row, key, until, BLOCK: gl.constexpr):
    """Whether the consumer whose rows start at `row` sees the key tile at `key`, visible to blocks below `until`."""
    return (key <= row + (ROWS - 1)) & (row // BLOCK < until)


@gluon.jit
def _seen(num_full, total, row, full, masked, rule, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr):
    """How many of the masked key tiles each consumer sees: a byte each, counted by a lane for each tile."""
    n = num_full + gl.arange(0, MOST_MASKED, SCALAR)
    block, key = key_tile(n, num_full, full, masked, BLOCK, LEVELS, SINKS)
    until = block + reach_of(block, rule, LEVELS, SINKS)
    seen = n * 0
    for c in gl.static_range(CONSUMERS):
        seen += gl.where((n < total) & sees(row + c * ROWS, key, until, BLOCK), 1 << (8 * c), 0)
    return gl.sum(seen, 0)


@gluon.jit
def _load(
    n, num_full, full, masked, rule, batch, head, row, kv_head, round, stage, phase,
    q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf,
    q_full, q_empty, k_full, v_full, kv_empty, slot_buf, first,
    GRADIENT: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills a stage with the n-th key tile, and with the first the consumers' rows."""
    D: gl.constexpr = q_desc.block_type.shape[3]
    block, key = key_tile(n, num_full, full, masked, BLOCK, LEVELS, SINKS)
    mbarrier.wait(kv_empty.index(stage), phase ^ 1)
    if n >= num_full:
        put(slot_buf, 2 * stage, key)
        put(slot_buf, 2 * stage + 1, block + reach_of(block, rule, LEVELS, SINKS))
    mbarrier.expect(k_full.index(stage), KEYS * D * 2)
    tma.async_copy_global_to_shared(k_desc, [batch, kv_head, key, 0], k_full.index(stage), k_buf.index(stage))
    if first:
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(c), (round & 1) ^ 1)
            mbarrier.expect(q_full.index(c), ROWS * D * (4 if GRADIENT else 2))
            rows = row + c * ROWS
            tma.async_copy_global_to_shared(q_desc, [batch, head, rows, 0], q_full.index(c), q_buf.index(c))
            if GRADIENT:
                tma.async_copy_global_to_shared(do_desc, [batch, head, rows, 0], q_full.index(c), do_buf.index(c))
    mbarrier.expect(v_full.index(stage), KEYS * D * 2)
    tma.async_copy_global_to_shared(v_desc, [batch, kv_head, key, 0], v_full.index(stage), v_buf.index(stage))
    return advance(stage, phase, STAGES)


@gluon.jit
def make_rings(STAGES: gl.constexpr):
    """Barriers of the consumers' rows, of the key and value stages and of the tile at work, with its words (tile,
    unmasked and masked key tiles, those seen by each consumer) and those of each stage (first key, visible to blocks
    below)."""
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    words: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    tile_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    tile_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    tile_buf = gl.allocate_shared_memory(gl.int32, [4, 1], words)
    slot_buf = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], words)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=CONSUMERS)
    mbarrier.init(tile_full, count=1)
    mbarrier.init(tile_empty, count=CONSUMERS)
    fence_async_shared()
    return q_full, q_empty, k_full, v_full, kv_empty, tile_full, tile_empty, tile_buf, slot_buf


@gluon.jit
def produce_rows(
    q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, k_full, v_full, kv_empty,
    tile_buf, slot_buf, tile_full, tile_empty,
    table, counter, length, heads, group, tiles_per_head, num_tiles,
    GRADIENT: gl.constexpr, TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The producer of kernels that walk query rows: tiles from the counter, their rows (of dO too with `GRADIENT`) and
    the key tiles that they see, unmasked ones first."""
    stage, phase, round = 0, 0, 0
    tile = gl.atomic_add(counter, 1)
    batch, head, row = locate(tile, heads, tiles_per_head)
    rule = load_rule(table + (head // group) * TABLE, LEVELS, SINKS)
    while tile < num_tiles:
        last_row = gl.minimum(row + ROWS * CONSUMERS, length) - 1
        full, masked = key_plan(row, last_row, rule, BLOCK, KEYS, LEVELS, SINKS)
        num_full = full_tiles(full)
        total = num_full + masked_tiles(masked)
        seen = _seen(num_full, total, row, full, masked, rule, BLOCK, LEVELS, SINKS)
        mbarrier.wait(tile_empty, (round & 1) ^ 1)
        put(tile_buf, 0, tile)
        put(tile_buf, 1, num_full)
        put(tile_buf, 2, total - num_full)
        put(tile_buf, 3, seen)
        mbarrier.arrive(tile_full, count=1)
        early = gl.maximum(total - STAGES, 1)
        for n in range(early):
            stage, phase = _load(
                n, num_full, full, masked, rule, batch, head, row, head // group, round, stage, phase,
                q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf,
                q_full, q_empty, k_full, v_full, kv_empty, slot_buf, n == 0,
                GRADIENT, BLOCK, LEVELS, SINKS, STAGES,
            )  # fmt: skip
        # the next tile is drawn while the consumers work on the stages in flight
        tile = gl.atomic_add(counter, 1)
        next_batch, next_head, next_row = locate(tile, heads, tiles_per_head)
        next_rule = load_rule(table + (next_head // group) * TABLE, LEVELS, SINKS)
        for n in range(early, total):
            stage, phase = _load(
                n, num_full, full, masked, rule, batch, head, row, head // group, round, stage, phase,
                q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf,
                q_full, q_empty, k_full, v_full, kv_empty, slot_buf, False,
                GRADIENT, BLOCK, LEVELS, SINKS, STAGES,
            )  # fmt: skip
        batch, head, row, rule = next_batch, next_head, next_row, next_rule
        round += 1
    if tile == num_tiles + gl.num_programs(0) - 1:  # the last draw of all: the counter is zero for the next launch
        gl.atomic_xchg(counter, 0)
    mbarrier.wait(tile_empty, (round & 1) ^ 1)
    put(tile_buf, 0, -1)
    mbarrier.arrive(tile_full, count=1)
