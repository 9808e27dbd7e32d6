"""Forward kernel for Hopper (sm_90a), in Gluon: warp-specialised, persistent, fed by TMA.

One CTA holds a producer partition and three consumer warpgroups. Tiles of 3 x 64 query rows are drawn from an atomic
counter, heads in order and their longest rows first. The producer turns a tile into the list of key blocks that any of
its rows sees (`indexing.key_plan`, closed form), loads them into a ring of shared-memory stages, and tells each
consumer how many of the masked ones it sees; a consumer skips the others, so every 64-row group does exactly its own
work. The product of the next key tile is issued together with the one of the current value tile, and the output leaves
through TMA while the next tile starts.
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

from .common import advance, get
from .rows import CONSUMERS, KEYS, ROWS, locate, make_rings, produce_rows, sees

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _softmax(scores, row_max, row_sum, acc, scale_log2, acc_rows: gl.constexpr):
    """One step of the online softmax in base 2; `acc` is rescaled to the new maximum."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    probs = gl.exp2(scores * scale_log2 - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + gl.sum(probs, 1)
    return probs, new_max, row_sum, acc * gl.convert_layout(rescale, acc_rows)[:, None]


@gluon.jit
def _consume(
    C: gl.constexpr, o_desc, q_buf, k_buf, v_buf, o_buf, q_full, q_empty, k_full, v_full, kv_empty,
    tile_buf, slot_buf, tile_full, tile_empty,
    lse, scale_log2, length, heads, tiles_per_head,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    element: gl.constexpr = q_buf.dtype
    q = q_buf.index(C).reshape([ROWS, D])
    o = o_buf.index(C).reshape([ROWS, D])
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
        position = row + gl.arange(0, ROWS, s_rows)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
        row_sum = gl.full([ROWS], 0.0, gl.float32, s_rows)
        acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        scores = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
        mbarrier.wait(q_full.index(C), round & 1)

        # unmasked tiles: scores of the next one are computed beside the output of this one. Loops of one step stand
        # where an `if` would: a branch around a wgmma makes ptxas serialise them all
        some = gl.minimum(num_full, 1)
        for _ in range(some):
            mbarrier.wait(k_full.index(stage), phase)
            k = k_buf.index(stage).reshape([KEYS, D]).permute([1, 0])
            pending = warpgroup_mma(q, k, scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[pending])
        for _ in range(num_full - 1):
            probs, row_max, row_sum, acc = _softmax(scores, row_max, row_sum, acc, scale_log2, o_rows)
            p = gl.convert_layout(probs.to(element), p_layout)
            next_stage, next_phase = advance(stage, phase, STAGES)
            mbarrier.wait(v_full.index(stage), phase)
            pending_out = warpgroup_mma(p, v_buf.index(stage).reshape([KEYS, D]), acc, is_async=True)
            mbarrier.wait(k_full.index(next_stage), next_phase)
            k_next = k_buf.index(next_stage).reshape([KEYS, D]).permute([1, 0])
            blank = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
            pending_scores = warpgroup_mma(q, k_next, blank, use_acc=False, is_async=True)
            acc, scores = warpgroup_mma_wait(0, deps=[pending_out, pending_scores])
            mbarrier.arrive(kv_empty.index(stage), count=1)
            stage, phase = next_stage, next_phase
        for _ in range(some):
            probs, row_max, row_sum, acc = _softmax(scores, row_max, row_sum, acc, scale_log2, o_rows)
            p = gl.convert_layout(probs.to(element), p_layout)
            mbarrier.wait(v_full.index(stage), phase)
            pending = warpgroup_mma(p, v_buf.index(stage).reshape([KEYS, D]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[pending])
            mbarrier.arrive(kv_empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)

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
            k_edge = k_buf.index(stage).reshape([KEYS, D]).permute([1, 0])
            blank = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
            pending = warpgroup_mma(q, k_edge, blank, use_acc=False, is_async=True)
            edge = warpgroup_mma_wait(0, deps=[pending])
            if key + KEYS - 1 > row:
                keys = key + gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
                edge = gl.where(keys[None, :] <= position[:, None], edge, float("-inf"))
            probs, row_max, row_sum, acc = _softmax(edge, row_max, row_sum, acc, scale_log2, o_rows)
            p = gl.convert_layout(probs.to(element), p_layout)
            mbarrier.wait(v_full.index(stage), phase)
            pending = warpgroup_mma(p, v_buf.index(stage).reshape([KEYS, D]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[pending])
            mbarrier.arrive(kv_empty.index(stage), count=1)
            left -= 1
            stage, phase = advance(stage, phase, STAGES)
        mbarrier.arrive(q_empty.index(C), count=1)
        for _ in range(left):
            mbarrier.wait(k_full.index(stage), phase)  # a slot is handed back only once it is filled
            mbarrier.wait(v_full.index(stage), phase)
            mbarrier.arrive(kv_empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)

        statistics = lse + (batch * heads + head).to(gl.int64) * length
        gl.store(statistics + position, (row_max + gl.log2(row_sum)) * LN2, mask=position < length)
        acc = acc * gl.convert_layout(1.0 / row_sum, o_rows)[:, None]
        tma.store_wait(0)  # the previous tile's output has left the buffer
        o.store(acc.to(element))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [batch, head, row, 0], o_buf.index(C))
        round += 1
        mbarrier.wait(tile_full, round & 1)
        tile = get(tile_buf, 0)
        num_full = get(tile_buf, 1)
        left = get(tile_buf, 2)
        count = (get(tile_buf, 3) >> (8 * C)) & 255
        mbarrier.arrive(tile_empty, count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["length", "heads", "group", "tiles_per_head", "num_tiles"])
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, lse, table, counter,
    scale_log2, length, heads, group, tiles_per_head, num_tiles,
    TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    # descriptors over [B, H, S, D] with boxes [1, 1, 64, D]; lse [B, H, S]
    D: gl.constexpr = q_desc.block_type.shape[3]
    element: gl.constexpr = q_desc.dtype
    q_buf = gl.allocate_shared_memory(element, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    o_buf = gl.allocate_shared_memory(element, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], v_desc.layout)
    q_full, q_empty, k_full, v_full, kv_empty, tile_full, tile_empty, tile_buf, slot_buf = make_rings(STAGES)
    # argument tuples stand inline: constexprs inside a named tuple would become tensors
    gl.warp_specialize(
        [
            (produce_rows, (q_desc, q_desc, k_desc, v_desc, q_buf, q_buf, k_buf, v_buf,
                            q_full, q_empty, k_full, v_full, kv_empty, tile_buf, slot_buf, tile_full, tile_empty,
                            table, counter, length, heads, group, tiles_per_head, num_tiles,
                            False, TABLE, BLOCK, LEVELS, SINKS, STAGES)),
            (_consume, (0, o_desc, q_buf, k_buf, v_buf, o_buf, q_full, q_empty, k_full, v_full, kv_empty,
                        tile_buf, slot_buf, tile_full, tile_empty,
                        lse, scale_log2, length, heads, tiles_per_head, BLOCK, STAGES, D)),
            (_consume, (1, o_desc, q_buf, k_buf, v_buf, o_buf, q_full, q_empty, k_full, v_full, kv_empty,
                        tile_buf, slot_buf, tile_full, tile_empty,
                        lse, scale_log2, length, heads, tiles_per_head, BLOCK, STAGES, D)),
            (_consume, (2, o_desc, q_buf, k_buf, v_buf, o_buf, q_full, q_empty, k_full, v_full, kv_empty,
                        tile_buf, slot_buf, tile_full, tile_empty,
                        lse, scale_log2, length, heads, tiles_per_head, BLOCK, STAGES, D)),
        ],
        [4, 4, 4],
        [REGISTERS, REGISTERS, REGISTERS],
    )  # fmt: skip
