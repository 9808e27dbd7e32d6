"""dQ on Hopper (sm_90a), in Gluon: the forward's tiles of 3 x 64 query rows, walking the same key tiles.

    P = exp2(scale_log2 * Q K^T - lse2)    dS = P * (dO V^T - delta)    dQ = scale * dS K

with `lse2 = lse / ln 2` and `delta = rowsum(dO * O) - dlse`, which it computes and leaves for the dK and dV kernel. dQ
leaves through the shared memory of its own Q rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..triton.forward import LOG2E
from .common import advance, get
from .rows import CONSUMERS, KEYS, ROWS, locate, make_rings, produce_rows, sees


@gluon.jit
def _key_step(
    q, do, k_buf, v_buf, k_full, v_full, kv_empty, stage, phase, dq, lse, delta, row, key, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Adds one key tile to dQ `[64, D]`; with `EDGE` keys after a row's own are masked."""
    s_layout: gl.constexpr = lse.type.layout.parent
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    k = k_buf.index(stage).reshape([KEYS, D])
    v = v_buf.index(stage).reshape([KEYS, D])
    blank = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    mbarrier.wait(k_full.index(stage), phase)
    pending_s = warpgroup_mma(q, k.permute([1, 0]), blank, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    pending_dp = warpgroup_mma(do, v.permute([1, 0]), blank, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[pending_s])
    probs = gl.exp2(scores * scale_log2 - lse[:, None])
    if EDGE:  # noqa: SIM102 (one is known when compiling)
        if key + KEYS - 1 > row:
            rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
            keys = key + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
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
    do, do_full, phase, out, lse, dlse, stats, batch, head, row, length, heads,
    D: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """`lse2` and `delta` of 64 rows, stored for the other kernel; rows past the end get inf and 0, and add nothing.
    Waits for the rows of dO."""
    columns: gl.constexpr = D // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // columns, columns], [4, 1], [1, 0])
    lanes = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    token = row + lanes
    exists = token < length
    offset = ((batch * length + token).to(gl.int64) * heads + head) * D
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    o = gl.load(out + offset[:, None] + column[None, :], mask=exists[:, None], other=0.0)
    position = (batch * heads + head).to(gl.int64) * length + token
    lse2 = gl.load(lse + position, mask=exists, other=float("inf")) * LOG2E
    mbarrier.wait(do_full, phase)
    delta = gl.sum(o.to(gl.float32) * do.load(layout).to(gl.float32), 1)
    if HAS_DLSE:
        delta -= gl.load(dlse + position, mask=exists, other=0.0)
    chunk = (batch * heads + head).to(gl.int64) * ((length + ROWS - 1) // ROWS) + row // ROWS
    to = stats + chunk * (2 * ROWS) + lanes
    stored = (lanes >= 0) & (row < length)
    gl.store(to, lse2, mask=stored)
    gl.store(to + ROWS, delta, mask=stored)
    return lse2, delta


@gluon.jit
def _consume(
    C: gl.constexpr, dq_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, k_full, v_full, kv_empty,
    tile_buf, slot_buf, tile_full, tile_empty,
    out, lse, dlse, stats, scale, scale_log2, length, heads, tiles_per_head,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = q_buf.index(C).reshape([ROWS, D])
    do = do_buf.index(C).reshape([ROWS, D])
    stage, phase, round = 0, 0, 0
    mbarrier.wait(tile_full, 0)
    tile = get(tile_buf, 0)
    num_full = get(tile_buf, 1)
    left = get(tile_buf, 2)
    count = (get(tile_buf, 3) >> (8 * C)) & 255
    mbarrier.arrive(tile_empty, count=1)
    while tile >= 0:
        batch, head, row = locate(tile, heads, tiles_per_head)
        row += C * ROWS
        lse2, delta = _statistics(
            do, q_full.index(C), round & 1, out, lse, dlse, stats, batch, head, row, length, heads, D, HAS_DLSE
        )
        row_lse = gl.convert_layout(lse2, s_rows)
        row_delta = gl.convert_layout(delta, s_rows)
        dq = gl.zeros([ROWS, D], gl.float32, dq_layout)
        for _ in range(num_full):
            dq, stage, phase = _key_step(
                q, do, k_buf, v_buf, k_full, v_full, kv_empty, stage, phase, dq, row_lse, row_delta, row, 0,
                scale_log2, D, STAGES, False,
            )  # fmt: skip
        # tiles at the edges: those this consumer does not see are handed back, the diagonal is masked
        for _ in range(count):
            mbarrier.wait(k_full.index(stage), phase)
            key = get(slot_buf, 2 * stage)
            seen = sees(row, key, get(slot_buf, 2 * stage + 1), BLOCK)
            while not seen:
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.arrive(kv_empty.index(stage), count=1)
                left -= 1
                stage, phase = advance(stage, phase, STAGES)
                mbarrier.wait(k_full.index(stage), phase)
                key = get(slot_buf, 2 * stage)
                seen = sees(row, key, get(slot_buf, 2 * stage + 1), BLOCK)
            dq, stage, phase = _key_step(
                q, do, k_buf, v_buf, k_full, v_full, kv_empty, stage, phase, dq, row_lse, row_delta, row, key,
                scale_log2, D, STAGES, True,
            )  # fmt: skip
            left -= 1
        for _ in range(left):
            mbarrier.wait(k_full.index(stage), phase)  # a slot is handed back only once it is filled
            mbarrier.wait(v_full.index(stage), phase)
            mbarrier.arrive(kv_empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
        q.store((dq * scale).to(q_buf.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [batch, head, row, 0], q_buf.index(C))
        round += 1
        mbarrier.wait(tile_full, round & 1)
        tile = get(tile_buf, 0)
        num_full = get(tile_buf, 1)
        left = get(tile_buf, 2)
        count = (get(tile_buf, 3) >> (8 * C)) & 255
        mbarrier.arrive(tile_empty, count=1)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(C), count=1)


@gluon.jit(do_not_specialize=["length", "heads", "group", "tiles_per_head", "num_tiles"])
def attention_backward_q(
    q_desc, do_desc, k_desc, v_desc, dq_desc, out, lse, dlse, stats, table, counter,
    scale, scale_log2, length, heads, group, tiles_per_head, num_tiles,
    TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    # descriptors over [B, H, S, D] with boxes [1, 1, 64, D]; out [B, S, H, D], lse and dlse
    # [B, H, S] contiguous; stats [B H chunks, 128] float32: lse2 and delta of 64 rows
    D: gl.constexpr = q_desc.block_type.shape[3]
    element: gl.constexpr = q_desc.dtype
    q_buf = gl.allocate_shared_memory(element, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    do_buf = gl.allocate_shared_memory(element, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], v_desc.layout)
    q_full, q_empty, k_full, v_full, kv_empty, tile_full, tile_empty, tile_buf, slot_buf = make_rings(STAGES)
    # argument tuples stand inline: constexprs inside a named tuple would become tensors
    gl.warp_specialize(
        [
            (produce_rows, (q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf,
                            q_full, q_empty, k_full, v_full, kv_empty, tile_buf, slot_buf, tile_full, tile_empty,
                            table, counter, length, heads, group, tiles_per_head, num_tiles,
                            True, TABLE, BLOCK, LEVELS, SINKS, STAGES)),
            (_consume, (0, dq_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, k_full, v_full, kv_empty,
                        tile_buf, slot_buf, tile_full, tile_empty,
                        out, lse, dlse, stats, scale, scale_log2, length, heads, tiles_per_head,
                        BLOCK, STAGES, D, HAS_DLSE)),
            (_consume, (1, dq_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, k_full, v_full, kv_empty,
                        tile_buf, slot_buf, tile_full, tile_empty,
                        out, lse, dlse, stats, scale, scale_log2, length, heads, tiles_per_head,
                        BLOCK, STAGES, D, HAS_DLSE)),
            (_consume, (2, dq_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, k_full, v_full, kv_empty,
                        tile_buf, slot_buf, tile_full, tile_empty,
                        out, lse, dlse, stats, scale, scale_log2, length, heads, tiles_per_head,
                        BLOCK, STAGES, D, HAS_DLSE)),
        ],
        [4, 4, 4],
        [REGISTERS, REGISTERS, REGISTERS],
    )  # fmt: skip
