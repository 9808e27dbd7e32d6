"""Forward kernel for Hopper (sm_90a), in Gluon: warp-specialised, persistent, fed by TMA.

One CTA holds a producer partition and three consumer warpgroups (four with head dimension 64) of 64 query rows each
(`rows`); every consumer does exactly the work of its own rows. The product of the next key tile is issued together with
the one of the current value tile. The output leaves by TMA through the shared memory of its own query rows, while those
of the next tile are there.

Every consumer is a copy of the code, and copies share the instruction cache: short rows wait for instructions, so what
makes this kernel longer makes it slower.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .common import WORDS, advance, count_bits, flat_rows, get, opaque, store_rows
from .rows import (
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
from .softmax import PARTS, inverse, log2, multiply_rows, softmax_step

LN2 = gl.constexpr(0.6931471805599453)
ROW_SLOTS = gl.constexpr(2)  # of a consumer: this tile's rows and the next one's, later their output


@gluon.jit
def _scores(q, k_buf, kv_full, stage, phase, s_layout: gl.constexpr, D: gl.constexpr):
    """Scores of a key tile."""
    mbarrier.wait(kv_full.index(stage), phase)
    k = k_buf.index(opaque(stage)).reshape([KEYS, D]).permute([1, 0])
    blank = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    pending = warpgroup_mma(q, k, blank, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[pending])


@gluon.jit
def _finish(probs, v_buf, kv_empty, stage, acc, D: gl.constexpr):
    """Adds a key tile to the output and hands its stage back."""
    v = v_buf.index(opaque(stage)).reshape([KEYS, D])
    p = gl.convert_layout(probs, gl.DotOperandLayout(0, acc.type.layout, 2))
    pending = warpgroup_mma(p, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[pending])
    mbarrier.arrive(kv_empty.index(stage), count=1)
    return acc


@gluon.jit
def _step(
    q, k_buf, v_buf, kv_full, kv_empty, stage, next_stage, next_phase, probs, row_max, row_sum, acc, scale_log2,
    key_list, slot, tile, bits, row, position,
    s_layout: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, EDGE: gl.constexpr,
):  # fmt: skip
    """Adds a key tile whose probabilities are there to the output, beside the scores of the next one, which then become
    probabilities."""
    p = gl.convert_layout(probs, gl.DotOperandLayout(0, acc.type.layout, 2))
    v = v_buf.index(stage).reshape([KEYS, D])
    pending_out = warpgroup_mma(p, v, acc, is_async=True)
    mbarrier.wait(kv_full.index(next_stage), next_phase)
    k_next = k_buf.index(next_stage).reshape([KEYS, D]).permute([1, 0])
    blank = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    pending_scores = warpgroup_mma(q, k_next, blank, use_acc=False, is_async=True)
    acc, scores = warpgroup_mma_wait(0, deps=[pending_out, pending_scores])
    mbarrier.arrive(kv_empty.index(stage), count=1)
    if EDGE:
        scores = _mask(scores, key_list, slot, tile, bits, row, position, BLOCK)
    probs, row_max, row_sum, factors = softmax_step(scores, row_max, row_sum, scale_log2, v_buf)
    return probs, row_max, row_sum, multiply_rows(acc, factors)


@gluon.jit
def _mask(scores, key_list, slot, tile, bits, row, position, BLOCK: gl.constexpr):
    """Hides the keys of a tile at the edge that rows do not see."""
    layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    if BLOCK < KEYS:
        keys = edge_keys(key_list, slot, tile, bits, layout, BLOCK)
        scores = gl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
    else:
        if get(key_list, slot * LIST + tile) + KEYS - 1 > row:
            keys = edge_keys(key_list, slot, tile, bits, layout, BLOCK)
            scores = gl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
    return scores


@gluon.jit
def _consume(
    C: gl.constexpr, o_desc, q_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
    tile_buf, list_buf, tile_full, tile_empty, out, lse, scale_log2, tokens, heads,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q_buf.shape[4]
    TOKENS: gl.constexpr = min(BLOCK, ROWS)
    HOLD: gl.constexpr = BLOCK <= KEYS  # a tile, while the next one is waited for; see `rows`
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    words = tile_buf._reinterpret(gl.int32, [TILES * TILE_WORDS, 1], WORDS)
    key_list = list_buf._reinterpret(gl.int32, [(TILES + 1) * LIST, 1], WORDS)
    stage, phase, round = 0, 0, 0
    mbarrier.wait(tile_full.index(0), 0)
    while get(words, round % TILES * TILE_WORDS) >= 0:
        slot = round % TILES
        own = C * ROW_SLOTS + round % ROW_SLOTS
        edges, num_full, bits, batch, head, row, begin, length, _ = read_tile(words, slot, C, TOKENS)
        lanes = gl.arange(0, ROWS, s_rows)
        position = row + lanes % TOKENS
        row_max = gl.full([ROWS, 4], float("-inf"), gl.float32, PARTS)
        row_sum = gl.full([ROWS, 4], 0.0, gl.float32, PARTS)
        acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        q = flat_rows(q_buf.index(own))

        # masked key tiles that these rows see
        seen = seen_tiles(bits, BLOCK)
        at = tile_of(seen, BLOCK)
        seen = seen & (seen - 1)
        stage, phase = skip_keys(at, kv_full, kv_empty, stage, phase, STAGES)
        mbarrier.wait(q_full.index(own), round // ROW_SLOTS & 1)
        scores = _scores(q, k_buf, kv_full, stage, phase, s_layout, D)
        scores = _mask(scores, key_list, slot, at, bits, row, position, BLOCK)
        probs, row_max, row_sum, _ = softmax_step(scores, row_max, row_sum, scale_log2, v_buf)
        for _ in range(count_bits(seen)):
            then = tile_of(seen, BLOCK)
            seen = seen & (seen - 1)
            if HOLD:
                next_stage, next_phase = advance(stage, phase, STAGES)
                next_stage, next_phase = skip_keys(then - at - 1, kv_full, kv_empty, next_stage, next_phase, STAGES)
                probs, row_max, row_sum, acc = _step(
                    q, k_buf, v_buf, kv_full, kv_empty, stage, next_stage, next_phase,
                    probs, row_max, row_sum, acc, scale_log2, key_list, slot, then, bits, row, position,
                    s_layout, D, BLOCK, True,
                )  # fmt: skip
                stage, phase = next_stage, next_phase
            else:
                acc = _finish(probs, v_buf, kv_empty, stage, acc, D)
                stage, phase = advance(stage, phase, STAGES)
                stage, phase = skip_keys(then - at - 1, kv_full, kv_empty, stage, phase, STAGES)
                scores = _scores(q, k_buf, kv_full, stage, phase, s_layout, D)
                scores = _mask(scores, key_list, slot, then, bits, row, position, BLOCK)
                probs, row_max, row_sum, factors = softmax_step(scores, row_max, row_sum, scale_log2, v_buf)
                acc = multiply_rows(acc, factors)
            at = then
        tma.store_wait(0)  # the previous tile's output has left the other buffer
        mbarrier.arrive(q_empty.index(C * ROW_SLOTS + 1 - slot), count=1, pred=round > 0)
        mbarrier.arrive(tile_empty.index(slot), count=1)

        # the others. Loops of one step stand for `if`: a branch around a wgmma makes ptxas serialise them all
        next_stage, next_phase = advance(stage, phase, STAGES)
        if HOLD:
            next_stage, next_phase = skip_keys(edges - at - 1, kv_full, kv_empty, next_stage, next_phase, STAGES)
            for _ in range(num_full):
                probs, row_max, row_sum, acc = _step(
                    q, k_buf, v_buf, kv_full, kv_empty, stage, next_stage, next_phase,
                    probs, row_max, row_sum, acc, scale_log2, key_list, slot, 0, bits, row, position,
                    s_layout, D, BLOCK, False,
                )  # fmt: skip
                stage, phase = next_stage, next_phase
                next_stage, next_phase = advance(stage, phase, STAGES)
            acc = _finish(probs, v_buf, kv_empty, stage, acc, D)
        else:
            acc = _finish(probs, v_buf, kv_empty, stage, acc, D)
            next_stage, next_phase = skip_keys(edges - at - 1, kv_full, kv_empty, next_stage, next_phase, STAGES)
            some = gl.minimum(num_full, 1)
            for _ in range(some):
                scores = _scores(q, k_buf, kv_full, next_stage, next_phase, s_layout, D)
                probs, row_max, row_sum, factors = softmax_step(scores, row_max, row_sum, scale_log2, v_buf)
                acc = multiply_rows(acc, factors)
            for _ in range(num_full - 1):
                stage, phase = next_stage, next_phase
                next_stage, next_phase = advance(stage, phase, STAGES)
                probs, row_max, row_sum, acc = _step(
                    q, k_buf, v_buf, kv_full, kv_empty, stage, next_stage, next_phase,
                    probs, row_max, row_sum, acc, scale_log2, key_list, slot, 0, bits, row, position,
                    s_layout, D, BLOCK, False,
                )  # fmt: skip
            for _ in range(some):
                acc = _finish(probs, v_buf, kv_empty, next_stage, acc, D)
                next_stage, next_phase = advance(next_stage, next_phase, STAGES)
        stage, phase = next_stage, next_phase

        total = gl.convert_layout(gl.sum(row_sum, 1), s_rows)
        maximum = gl.convert_layout(gl.max(row_max, 1), s_rows)
        acc = acc * gl.convert_layout(inverse(total), gl.SliceLayout(1, o_layout))[:, None]
        store_rows(acc.to(q_buf.dtype), q_buf.index(own), o_desc, out, batch, head, begin, row, length,
                   tokens, heads, PACKED)  # fmt: skip
        # after the copy, whose fence waits for stores before it
        statistics = lse + (batch * heads + head + lanes // TOKENS).to(gl.int64) * tokens + begin
        gl.store(statistics + position, (maximum + log2(total)) * LN2, mask=position < length)
        round += 1
        mbarrier.wait(tile_full.index(round % TILES), round // TILES & 1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["length", "heads", "group", "tiles_per_head", "num_tiles"])
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, out, lse, table, documents, counter,
    scale_log2, length, heads, group, tiles_per_head, num_tiles,
    TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    # descriptors over [B, H, S, D] with boxes [1, heads, tokens, D] of 64 rows, k and v [1, 1, tokens, D] of as many
    # tokens; out [B, S, H, D]; lse [B, H, S]; packed: B = 1, S = all tokens, documents (`chunks.attention_documents`)
    gl.static_assert((CONSUMERS == 3) | (CONSUMERS == 4), "one partition each stands below")
    D: gl.constexpr = q_desc.block_type.shape[3]
    element: gl.constexpr = q_desc.dtype
    q_box: gl.constexpr = q_desc.block_type.shape
    q_buf = gl.allocate_shared_memory(element, [CONSUMERS * ROW_SLOTS, 1, q_box[1], q_box[2], D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], v_desc.layout)
    q_full, q_empty, kv_full, kv_empty, tile_full, tile_empty, tile_buf, list_buf = make_rings(
        CONSUMERS, ROW_SLOTS, STAGES
    )  # fmt: skip
    # argument tuples stand inline: constexprs inside a named tuple would become tensors
    if CONSUMERS == 4:
        gl.warp_specialize(
            [
                (produce_rows, (q_desc, q_desc, k_desc, v_desc, q_buf, q_buf, k_buf, v_buf,
                                q_full, q_empty, kv_full, kv_empty, tile_buf, list_buf, tile_full, tile_empty,
                                table, documents, counter, length, heads, group, tiles_per_head, num_tiles,
                                False, TABLE, BLOCK, LEVELS, SINKS, CONSUMERS, ROW_SLOTS, STAGES, PACKED)),
                (_consume, (0, o_desc, q_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                            tile_buf, list_buf, tile_full, tile_empty, out, lse, scale_log2, length, heads,
                            BLOCK, STAGES, PACKED)),
                (_consume, (1, o_desc, q_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                            tile_buf, list_buf, tile_full, tile_empty, out, lse, scale_log2, length, heads,
                            BLOCK, STAGES, PACKED)),
                (_consume, (2, o_desc, q_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                            tile_buf, list_buf, tile_full, tile_empty, out, lse, scale_log2, length, heads,
                            BLOCK, STAGES, PACKED)),
                (_consume, (3, o_desc, q_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                            tile_buf, list_buf, tile_full, tile_empty, out, lse, scale_log2, length, heads,
                            BLOCK, STAGES, PACKED)),
            ],
            [4, 4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS, REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (produce_rows, (q_desc, q_desc, k_desc, v_desc, q_buf, q_buf, k_buf, v_buf,
                                q_full, q_empty, kv_full, kv_empty, tile_buf, list_buf, tile_full, tile_empty,
                                table, documents, counter, length, heads, group, tiles_per_head, num_tiles,
                                False, TABLE, BLOCK, LEVELS, SINKS, CONSUMERS, ROW_SLOTS, STAGES, PACKED)),
                (_consume, (0, o_desc, q_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                            tile_buf, list_buf, tile_full, tile_empty, out, lse, scale_log2, length, heads,
                            BLOCK, STAGES, PACKED)),
                (_consume, (1, o_desc, q_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                            tile_buf, list_buf, tile_full, tile_empty, out, lse, scale_log2, length, heads,
                            BLOCK, STAGES, PACKED)),
                (_consume, (2, o_desc, q_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
                            tile_buf, list_buf, tile_full, tile_empty, out, lse, scale_log2, length, heads,
                            BLOCK, STAGES, PACKED)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )  # fmt: skip
