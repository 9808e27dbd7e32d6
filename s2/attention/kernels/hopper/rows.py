"""Tiles of query rows: three consumer warpgroups of 64 rows each, and the producer that feeds them. Shared by the
forward and the dQ kernel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ..triton.indexing import full_tile, full_tiles, key_plan, load_rule, masked_tile, masked_tiles, reach_of
from .common import SCALAR, advance, find_document, put

ROWS = gl.constexpr(64)  # query rows of a consumer warpgroup
KEYS = gl.constexpr(64)  # keys of a stage
CONSUMERS = gl.constexpr(3)
MOST_EDGES = gl.constexpr(32)  # masked key tiles of a tile of rows: at most 20, with blocks of 256
TILE_WORDS = gl.constexpr(16)  # tile, unmasked key tiles, masked ones, those seen by each consumer; then as `_locate`


@gluon.jit
def _locate(tile, heads, tiles_per_head, length, documents, cu_seqlens, num_documents, PACKED: gl.constexpr):
    """`(batch, head, first row, token where the document begins, its length, its first chunk)` of a tile. Rows count
    from the beginning of the document, which is the whole sequence where nothing is packed."""
    group = tile // tiles_per_head
    index = tiles_per_head - 1 - tile % tiles_per_head
    batch = group // heads
    head = group % heads
    begin, chunk = 0, 0
    if PACKED:
        document = find_document(documents, num_documents, index)
        begin = gl.load(cu_seqlens + document)
        length = gl.load(cu_seqlens + document + 1) - begin
        chunk = gl.load(documents + (num_documents + 1) + document)
        index -= gl.load(documents + document)
    return batch, head, index * (ROWS * CONSUMERS), begin, length, chunk


@gluon.jit
def _key_tile(n, edges, full, masked, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr):
    """Block and first key of the n-th key tile of a plan: `edges` masked ones, then the unmasked ones."""
    first, stride, index, _ = masked_tile(n, masked, LEVELS, SINKS)
    full_first, full_stride, full_index = full_tile(n - edges, full, LEVELS, SINKS)
    unmasked = n >= edges
    first = gl.where(unmasked, full_first, first)
    stride = gl.where(unmasked, full_stride, stride)
    index = gl.where(unmasked, full_index, index)
    per_block: gl.constexpr = BLOCK // KEYS
    block = first + (index // per_block) * stride
    return block, block * BLOCK + (index % per_block) * KEYS


@gluon.jit
def _seen(row, last_row, edges, full, masked, rule, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr):
    """Which of the masked key tiles the consumer whose rows start at `row` sees: a bit each, from a lane each. A
    consumer past the last row looks where that one does, so that everybody sees a tile."""
    lane = gl.arange(0, MOST_EDGES, SCALAR)
    block, key = _key_tile(lane, edges, full, masked, BLOCK, LEVELS, SINKS)
    until = block + reach_of(block, rule, LEVELS, SINKS)
    row = gl.minimum(row, last_row // ROWS * ROWS)
    seen = (lane < edges) & (key <= row + (ROWS - 1)) & (row // BLOCK < until)
    return gl.sum(gl.where(seen, 1 << lane, 0), 0)


@gluon.jit
def _load(
    n, edges, full, masked, seen, batch, head, row, begin, kv_head, round, stage, phase,
    q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf,
    q_full, q_empty, k_full, v_full, kv_empty, slot_buf, first,
    GRADIENT: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills a stage with the n-th key tile, and with the first the consumers' rows. Hands the stage back for consumers
    that do not see the tile; one that nobody sees (the end of a large block) is not loaded."""
    D: gl.constexpr = q_desc.block_type.shape[3]
    _, key = _key_tile(n, edges, full, masked, BLOCK, LEVELS, SINKS)
    mbarrier.wait(kv_empty.index(stage), phase ^ 1)
    if n < edges:
        put(slot_buf, stage, key)
    wanted = (n >= edges) | (((seen[0] | seen[1] | seen[2]) >> n) & 1 == 1)
    loaded = k_full.index(stage)
    mbarrier.expect(loaded, KEYS * D * 2, pred=wanted)
    tma.async_copy_global_to_shared(k_desc, [batch, kv_head, begin + key, 0], loaded, k_buf.index(stage), pred=wanted)
    if first:
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(c), (round & 1) ^ 1)
            mbarrier.expect(q_full.index(c), ROWS * D * (4 if GRADIENT else 2))
            rows = begin + row + c * ROWS
            tma.async_copy_global_to_shared(q_desc, [batch, head, rows, 0], q_full.index(c), q_buf.index(c))
            if GRADIENT:
                tma.async_copy_global_to_shared(do_desc, [batch, head, rows, 0], q_full.index(c), do_buf.index(c))
    loaded_v = v_full.index(stage)
    mbarrier.expect(loaded_v, KEYS * D * 2, pred=wanted)
    tma.async_copy_global_to_shared(v_desc, [batch, kv_head, begin + key, 0], loaded_v, v_buf.index(stage), pred=wanted)
    if n < edges:
        for c in gl.static_range(CONSUMERS):
            mbarrier.arrive(kv_empty.index(stage), count=1, pred=((seen[c] >> n) & 1) == 0)
        mbarrier.arrive(loaded, count=1, pred=wanted == 0)
        mbarrier.arrive(loaded_v, count=1, pred=wanted == 0)
    return advance(stage, phase, STAGES)


@gluon.jit
def produce_rows(
    q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, k_full, v_full, kv_empty,
    tile_buf, slot_buf, tile_full, tile_empty,
    table, documents, cu_seqlens, counter, length, heads, group, tiles_per_head, num_tiles, num_documents,
    GRADIENT: gl.constexpr, TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr,
    STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The producer of kernels that walk query rows: tiles from the counter, their rows (of dO too with `GRADIENT`) and
    the key tiles that they see, masked ones first."""
    stage, phase, round = 0, 0, 0
    tile = gl.atomic_add(counter, 1)
    if PACKED:
        tiles_per_head = gl.load(documents + num_documents)
        num_tiles = tiles_per_head * heads
    batch, head, row, begin, own_length, chunk = _locate(
        tile, heads, tiles_per_head, length, documents, cu_seqlens, num_documents, PACKED
    )
    rule = load_rule(table + (head // group) * TABLE, LEVELS, SINKS)
    while tile < num_tiles:
        last_row = gl.minimum(row + ROWS * CONSUMERS, own_length) - 1
        full, masked = key_plan(row, last_row, rule, BLOCK, KEYS, LEVELS, SINKS)
        num_full = full_tiles(full)
        edges = masked_tiles(masked)
        seen0 = _seen(row, last_row, edges, full, masked, rule, BLOCK, LEVELS, SINKS)
        seen1 = _seen(row + ROWS, last_row, edges, full, masked, rule, BLOCK, LEVELS, SINKS)
        seen2 = _seen(row + 2 * ROWS, last_row, edges, full, masked, rule, BLOCK, LEVELS, SINKS)
        mbarrier.wait(tile_empty, (round & 1) ^ 1)
        put(tile_buf, 0, tile)
        put(tile_buf, 1, num_full)
        put(tile_buf, 2, edges)
        put(tile_buf, 3, seen0)
        put(tile_buf, 4, seen1)
        put(tile_buf, 5, seen2)
        put(tile_buf, 6, batch)
        put(tile_buf, 7, head)
        put(tile_buf, 8, row)
        put(tile_buf, 9, begin)
        put(tile_buf, 10, own_length)
        put(tile_buf, 11, chunk)
        mbarrier.arrive(tile_full, count=1)
        total = edges + num_full
        early = gl.maximum(total - STAGES, 1)
        for n in range(early):
            stage, phase = _load(
                n, edges, full, masked, (seen0, seen1, seen2), batch, head, row, begin, head // group, round,
                stage, phase, q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf,
                q_full, q_empty, k_full, v_full, kv_empty, slot_buf, n == 0,
                GRADIENT, BLOCK, LEVELS, SINKS, STAGES,
            )  # fmt: skip
        # the next tile is drawn while the consumers work on the stages in flight
        tile = gl.atomic_add(counter, 1)
        next_batch, next_head, next_row, next_begin, next_length, next_chunk = _locate(
            tile, heads, tiles_per_head, length, documents, cu_seqlens, num_documents, PACKED
        )
        next_rule = load_rule(table + (next_head // group) * TABLE, LEVELS, SINKS)
        for n in range(early, total):
            stage, phase = _load(
                n, edges, full, masked, (seen0, seen1, seen2), batch, head, row, begin, head // group, round,
                stage, phase, q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf,
                q_full, q_empty, k_full, v_full, kv_empty, slot_buf, False,
                GRADIENT, BLOCK, LEVELS, SINKS, STAGES,
            )  # fmt: skip
        batch, head, row, rule = next_batch, next_head, next_row, next_rule
        begin, own_length, chunk = next_begin, next_length, next_chunk
        round += 1
    if tile == num_tiles + gl.num_programs(0) - 1:  # the last draw of all: the counter is zero for the next launch
        gl.atomic_xchg(counter, 0)
    mbarrier.wait(tile_empty, (round & 1) ^ 1)
    put(tile_buf, 0, -1)
    mbarrier.arrive(tile_full, count=1)


@gluon.jit
def store_rows(x, buffer, desc, pointer, batch, head, begin, row, length, tokens, heads, PACKED: gl.constexpr):
    """Writes 64 rows `[64, D]` of registers through shared memory to `[B, tokens, heads, D]`: by TMA, which stops at
    the end of the sequence, or row by row where a packed document ends among them. The caller waits for the copy."""
    D: gl.constexpr = x.shape[1]
    flat = buffer.reshape([ROWS, D])
    flat.store(x)
    if PACKED:
        if row + ROWS <= length:
            fence_async_shared()
            tma.async_copy_shared_to_global(desc, [batch, head, begin + row, 0], buffer)
        else:
            columns: gl.constexpr = D // 8
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // columns, columns], [4, 1], [1, 0])
            lanes = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            offset = ((batch * tokens + begin + lanes).to(gl.int64) * heads + head) * D
            column = gl.arange(0, D, gl.SliceLayout(0, layout))
            gl.store(pointer + offset[:, None] + column[None, :], flat.load(layout), mask=(lanes < length)[:, None])
    else:
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, [batch, head, begin + row, 0], buffer)
