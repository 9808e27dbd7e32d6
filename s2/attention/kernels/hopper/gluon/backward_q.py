"""dQ on Hopper (sm_90a), in Gluon: tiles of 3 x 64 query rows (`rows`).

    P = exp2(scale_log2 * Q K^T - lse2)    dS = P * (dO V^T - delta)    dQ = scale * dS K

with `lse2 = lse / ln 2` and `delta = rowsum(dO * O) - dlse`, which it computes and leaves for the dK and dV kernel. dQ
leaves through the shared memory of its own Q rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ...triton.forward import LOG2E
from .common import WORDS, advance, count_bits, flat_rows, get, store_rows
from .rows import (
    CONSUMERS,
    HIDDEN,
    KEYS,
    LIST,
    ROWS,
    TILE_WORDS,
    TILES,
    edge_keys,
    make_rings,
    produce_rows,
    read_tile,
    seen_tiles,
    skip_keys,
    tile_of,
)


@gluon.jit
def _key_step(
    q, do, k_buf, v_buf, kv_full, kv_empty, stage, phase, dq, lse, delta, key_list, slot, tile, bits, row, scale_log2,
    D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Adds one key tile to dQ `[64, D]`; with `EDGE` keys that rows do not see are masked."""
    s_layout: gl.constexpr = lse.type.layout.parent
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    k = k_buf.index(stage).reshape([KEYS, D])
    v = v_buf.index(stage).reshape([KEYS, D])
    blank = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    mbarrier.wait(kv_full.index(stage), phase)
    pending_s = warpgroup_mma(q, k.permute([1, 0]), blank, use_acc=False, is_async=True)
    pending_dp = warpgroup_mma(do, v.permute([1, 0]), blank, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[pending_s])
    probs = gl.exp2(scores * scale_log2 - lse[:, None])
    if EDGE:
        key = get(key_list, slot * LIST + tile) if BLOCK >= KEYS else HIDDEN
        if key + KEYS - 1 > row:
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout)) % min(BLOCK, ROWS)
            keys = edge_keys(key_list, slot, tile, bits, gl.SliceLayout(0, s_layout), BLOCK)
            probs = gl.where(keys[None, :] <= rows[:, None], probs, 0.0)
    dprobs = warpgroup_mma_wait(0, deps=[pending_dp])
    ds = gl.convert_layout((probs * (dprobs - delta[:, None])).to(k_buf.dtype), p_layout)
    pending_dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[pending_dq])
    mbarrier.arrive(kv_empty.index(stage), count=1)
    stage, phase = advance(stage, phase, STAGES)
    return dq, stage, phase


@gluon.jit
def _statistics(
    do, do_full, phase, out, lse, dlse, stats, batch, head, begin, row, length, chunk, tokens, heads, chunks,
    TOKENS: gl.constexpr, D: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """`lse2` and `delta` of 64 rows, stored for the other kernel; rows past the end get inf and 0, and add nothing.
    Waits for the rows of dO."""
    columns: gl.constexpr = D // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // columns, columns], [4, 1], [1, 0])
    lanes = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    token = row + lanes % TOKENS
    own_head = head + lanes // TOKENS
    exists = token < length
    offset = ((batch * tokens + begin + token).to(gl.int64) * heads + own_head) * D
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    o = gl.load(out + offset[:, None] + column[None, :], mask=exists[:, None], other=0.0)
    position = (batch * heads + own_head).to(gl.int64) * tokens + begin + token
    lse2 = gl.load(lse + position, mask=exists, other=float("inf")) * LOG2E
    mbarrier.wait(do_full, phase)
    delta = gl.sum(o.to(gl.float32) * do.load(layout).to(gl.float32), 1)
    if HAS_DLSE:
        delta -= gl.load(dlse + position, mask=exists, other=0.0)
    sets = (batch * heads + head) // (ROWS // TOKENS)
    to = stats + (sets.to(gl.int64) * chunks + chunk + row // TOKENS) * (2 * ROWS) + lanes
    stored = (lanes >= 0) & (row < length)
    gl.store(to, lse2, mask=stored)
    gl.store(to + ROWS, gl.where(exists, delta, 0.0), mask=stored)
    return lse2, gl.where(exists, delta, 0.0)


@gluon.jit
def _consume(
    C: gl.constexpr, dq_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
    tile_buf, list_buf, tile_full, tile_empty,
    dq_pointer, out, lse, dlse, stats, scale, scale_log2, tokens, heads, chunks,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, HAS_DLSE: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q_buf.shape[4]
    TOKENS: gl.constexpr = min(BLOCK, ROWS)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    words = tile_buf._reinterpret(gl.int32, [TILES * TILE_WORDS, 1], WORDS)
    key_list = list_buf._reinterpret(gl.int32, [(TILES + 1) * LIST, 1], WORDS)
    q = flat_rows(q_buf.index(C))
    do = flat_rows(do_buf.index(C))
    stage, phase, round = 0, 0, 0
    mbarrier.wait(tile_full.index(0), 0)
    while get(words, round % TILES * TILE_WORDS) >= 0:
        slot = round % TILES
        edges, num_full, bits, batch, head, row, begin, length, chunk = read_tile(words, slot, C, TOKENS)
        lse2, delta = _statistics(
            do, q_full.index(C), round & 1, out, lse, dlse, stats, batch, head, begin, row, length, chunk,
            tokens, heads, chunks, TOKENS, D, HAS_DLSE,
        )  # fmt: skip
        row_lse = gl.convert_layout(lse2, s_rows)
        row_delta = gl.convert_layout(delta, s_rows)
        dq = gl.zeros([ROWS, D], gl.float32, dq_layout)
        # the masked key tiles that these rows see, then the others
        seen = seen_tiles(bits, BLOCK)
        at = -1
        for _ in range(count_bits(seen)):
            then = tile_of(seen, BLOCK)
            seen = seen & (seen - 1)
            stage, phase = skip_keys(then - at - 1, kv_full, kv_empty, stage, phase, STAGES)
            dq, stage, phase = _key_step(
                q, do, k_buf, v_buf, kv_full, kv_empty, stage, phase, dq, row_lse, row_delta,
                key_list, slot, then, bits, row, scale_log2, D, BLOCK, STAGES, True,
            )  # fmt: skip
            at = then
        mbarrier.arrive(tile_empty.index(slot), count=1)
        stage, phase = skip_keys(edges - at - 1, kv_full, kv_empty, stage, phase, STAGES)
        for _ in range(num_full):
            dq, stage, phase = _key_step(
                q, do, k_buf, v_buf, kv_full, kv_empty, stage, phase, dq, row_lse, row_delta,
                key_list, slot, 0, bits, row, scale_log2, D, BLOCK, STAGES, False,
            )  # fmt: skip
        store_rows((dq * scale).to(q_buf.dtype), q_buf.index(C), dq_desc, dq_pointer, batch, head, begin, row, length,
                   tokens, heads, PACKED)  # fmt: skip
        round += 1
        mbarrier.wait(tile_full.index(round % TILES), round // TILES & 1)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(C), count=1)


@gluon.jit(do_not_specialize=["length", "heads", "group", "tiles_per_head", "num_tiles", "chunks"])
def attention_backward_q(
    q_desc, do_desc, k_desc, v_desc, dq_desc, dq, out, lse, dlse, stats, table, documents, counter,
    scale, scale_log2, length, heads, group, tiles_per_head, num_tiles, chunks,
    TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PACKED: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    # descriptors over [B, H, S, D] with boxes [1, heads, tokens, D] of 64 rows, k and v [1, 1, tokens, D] of as many
    # tokens; dq and out [B, S, H, D], lse and dlse [B, H, S] contiguous; stats [chunks, 128] float32: lse2 and delta of
    # the 64 rows of a box, over B, sets of heads, boxes; packed: B = 1, S = all tokens, documents
    # (`varlen.attention_documents`)
    D: gl.constexpr = q_desc.block_type.shape[3]
    element: gl.constexpr = q_desc.dtype
    q_box: gl.constexpr = q_desc.block_type.shape
    q_buf = gl.allocate_shared_memory(element, [CONSUMERS, 1, q_box[1], q_box[2], D], q_desc.layout)
    do_buf = gl.allocate_shared_memory(element, [CONSUMERS, 1, q_box[1], q_box[2], D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], v_desc.layout)
    q_full, q_empty, kv_full, kv_empty, tile_full, tile_empty, tile_buf, list_buf = make_rings(STAGES)
    # argument tuples stand inline: constexprs inside a named tuple would become tensors
    gl.warp_specialize(
        [
            (produce_rows, (q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf,
                            q_full, q_empty, kv_full, kv_empty, tile_buf, list_buf, tile_full, tile_empty,
                            table, documents, counter, length, heads, group, tiles_per_head, num_tiles,
                            TABLE, BLOCK, LEVELS, SINKS, STAGES, PACKED)),
            (_consume, (0, dq_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                        tile_buf, list_buf, tile_full, tile_empty,
                        dq, out, lse, dlse, stats, scale, scale_log2, length, heads, chunks,
                        BLOCK, STAGES, HAS_DLSE, PACKED)),
            (_consume, (1, dq_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                        tile_buf, list_buf, tile_full, tile_empty,
                        dq, out, lse, dlse, stats, scale, scale_log2, length, heads, chunks,
                        BLOCK, STAGES, HAS_DLSE, PACKED)),
            (_consume, (2, dq_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                        tile_buf, list_buf, tile_full, tile_empty,
                        dq, out, lse, dlse, stats, scale, scale_log2, length, heads, chunks,
                        BLOCK, STAGES, HAS_DLSE, PACKED)),
        ],
        [4, 4, 4],
        [REGISTERS, REGISTERS, REGISTERS],
    )  # fmt: skip
