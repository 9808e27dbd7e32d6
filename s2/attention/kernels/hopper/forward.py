"""Forward kernel for Hopper (sm_90a), in Gluon: warp-specialised, persistent, fed by TMA.

One CTA holds a producer partition and three consumer warpgroups of 64 query rows each (`rows`); every consumer does
exactly the work of its own rows. The product of the next key tile is issued together with the one of the current value
tile. The output leaves by TMA through the shared memory of its own query rows, while those of the next tile are there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .common import WORDS, advance, count_bits, flat_rows, get, opaque, store_rows
from .rows import (
    CONSUMERS,
    KEYS,
    LIST,
    ROWS,
    TILE_WORDS,
    TILES,
    edge_keys,
    make_rings,
    produce_rows,
    seen_tiles,
    skip_keys,
    tile_of,
)

LN2 = gl.constexpr(0.6931471805599453)
ROW_SLOTS = gl.constexpr(2)  # of a consumer: this tile's rows and the next one's, later their output
LAZY = gl.constexpr(8.0)  # see `_softmax`


@gluon.constexpr_function
def _multiplication(count):
    """PTX that multiplies `count` values by as many factors, if a lane of the warp has one that is not 1. Asked are the
    first and the third: elements of a thread come in pairs, in turn of the one and the other of its rows."""
    moves = " ".join(f"mov.f32 ${i}, ${count + i};" for i in range(count))
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return (
        f"{{ .reg .pred p, q; {moves} "
        f"setp.ne.f32 p, ${2 * count}, 0f3F800000; setp.ne.or.f32 p, ${2 * count + 2}, 0f3F800000, p; "
        f"vote.sync.any.pred q, p, 0xffffffff; @!q bra DONE; {products} DONE: }}"
    )


@gluon.constexpr_function
def _operands(count):
    return ",".join(["=&f"] * count + ["f"] * (2 * count))


@gluon.jit
def _multiply_rows(acc, factors):
    """`acc * factors[:, None]`, skipped by warps all of whose factors are 1."""
    _, spread = gl.broadcast(acc, factors[:, None])
    count: gl.constexpr = acc.shape[0] * acc.shape[1] // 128  # of a thread
    return gl.inline_asm_elementwise(
        _multiplication(count), _operands(count), [acc, spread], dtype=gl.float32, is_pure=True, pack=count
    )


@gluon.jit
def _softmax(scores, row_max, row_sum, acc, scale_log2):
    """One step of the online softmax in base 2. A maximum is replaced only by one that is LAZY larger: probabilities
    stay below 2^LAZY, which float32 sums and bfloat16 and float16 factors hold, and warps none of whose rows got a new
    maximum do not multiply their part of the output."""
    o_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    found = gl.max(scores, 1) * scale_log2
    new_max = gl.where(found > row_max + LAZY, found, row_max)
    probs = gl.exp2(scores * scale_log2 - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + gl.sum(probs, 1)
    return probs, new_max, row_sum, _multiply_rows(acc, gl.convert_layout(rescale, o_rows))


@gluon.jit
def _scores(q, k_buf, kv_full, stage, phase, s_layout: gl.constexpr, D: gl.constexpr):
    """Scores of a key tile."""
    mbarrier.wait(kv_full.index(stage), phase)
    k = k_buf.index(opaque(stage)).reshape([KEYS, D]).permute([1, 0])
    blank = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    pending = warpgroup_mma(q, k, blank, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=[pending])


@gluon.jit
def _finish(scores, v_buf, kv_empty, stage, row_max, row_sum, acc, scale_log2, D: gl.constexpr):
    """Adds a key tile whose scores are there to the output."""
    o_layout: gl.constexpr = acc.type.layout
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    probs, row_max, row_sum, acc = _softmax(scores, row_max, row_sum, acc, scale_log2)
    p = gl.convert_layout(probs.to(v_buf.dtype), p_layout)
    pending = warpgroup_mma(p, v_buf.index(opaque(stage)).reshape([KEYS, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[pending])
    mbarrier.arrive(kv_empty.index(stage), count=1)
    return row_max, row_sum, acc


@gluon.jit
def _step(
    q, k_buf, v_buf, kv_full, kv_empty, stage, next_stage, next_phase,
    scores, row_max, row_sum, acc, scale_log2, D: gl.constexpr,
):  # fmt: skip
    """Adds a key tile whose scores are there to the output, and computes the scores of the next one beside it."""
    s_layout: gl.constexpr = scores.type.layout
    o_layout: gl.constexpr = acc.type.layout
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    probs, row_max, row_sum, acc = _softmax(scores, row_max, row_sum, acc, scale_log2)
    p = gl.convert_layout(probs.to(v_buf.dtype), p_layout)
    pending_out = warpgroup_mma(p, v_buf.index(stage).reshape([KEYS, D]), acc, is_async=True)
    mbarrier.wait(kv_full.index(next_stage), next_phase)
    k_next = k_buf.index(next_stage).reshape([KEYS, D]).permute([1, 0])
    blank = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    pending_scores = warpgroup_mma(q, k_next, blank, use_acc=False, is_async=True)
    acc, scores = warpgroup_mma_wait(0, deps=[pending_out, pending_scores])
    mbarrier.arrive(kv_empty.index(stage), count=1)
    return scores, row_max, row_sum, acc


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
        word = slot * TILE_WORDS
        edges = get(words, word + 1)
        num_full = get(words, word + 2)
        bits = get(words, word + 3 + C)
        batch = get(words, word + 6)
        head = get(words, word + 7)
        row = get(words, word + 8) + C * TOKENS
        begin = get(words, word + 9)
        length = get(words, word + 10)
        lanes = gl.arange(0, ROWS, s_rows)
        position = row + lanes % TOKENS
        row_max = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
        row_sum = gl.full([ROWS], 0.0, gl.float32, s_rows)
        acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        q = flat_rows(q_buf.index(own))

        # masked key tiles that these rows see
        seen = seen_tiles(bits, BLOCK)
        at = tile_of(seen, BLOCK)
        seen = seen & (seen - 1)
        stage, phase = skip_keys(at, kv_full, kv_empty, stage, phase, STAGES)
        mbarrier.wait(q_full.index(own), round // ROW_SLOTS & 1)
        scores = _scores(q, k_buf, kv_full, stage, phase, s_layout, D)
        if ROW_SLOTS == 2:  # the previous tile's output has left the other buffer
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(C * ROW_SLOTS + 1 - slot), count=1, pred=round > 0)
        scores = _mask(scores, key_list, slot, at, bits, row, position, BLOCK)
        for _ in range(count_bits(seen)):
            then = tile_of(seen, BLOCK)
            seen = seen & (seen - 1)
            if HOLD:
                next_stage, next_phase = advance(stage, phase, STAGES)
                next_stage, next_phase = skip_keys(then - at - 1, kv_full, kv_empty, next_stage, next_phase, STAGES)
                scores, row_max, row_sum, acc = _step(
                    q, k_buf, v_buf, kv_full, kv_empty, stage, next_stage, next_phase,
                    scores, row_max, row_sum, acc, scale_log2, D,
                )  # fmt: skip
                stage, phase = next_stage, next_phase
            else:
                row_max, row_sum, acc = _finish(scores, v_buf, kv_empty, stage, row_max, row_sum, acc, scale_log2, D)
                stage, phase = advance(stage, phase, STAGES)
                stage, phase = skip_keys(then - at - 1, kv_full, kv_empty, stage, phase, STAGES)
                scores = _scores(q, k_buf, kv_full, stage, phase, s_layout, D)
            scores = _mask(scores, key_list, slot, then, bits, row, position, BLOCK)
            at = then
        mbarrier.arrive(tile_empty.index(slot), count=1)

        # the others. Loops of one step stand for `if`: a branch around a wgmma makes ptxas serialise them all
        next_stage, next_phase = advance(stage, phase, STAGES)
        if HOLD:
            next_stage, next_phase = skip_keys(edges - at - 1, kv_full, kv_empty, next_stage, next_phase, STAGES)
            for _ in range(num_full):
                scores, row_max, row_sum, acc = _step(
                    q, k_buf, v_buf, kv_full, kv_empty, stage, next_stage, next_phase,
                    scores, row_max, row_sum, acc, scale_log2, D,
                )  # fmt: skip
                stage, phase = next_stage, next_phase
                next_stage, next_phase = advance(stage, phase, STAGES)
            row_max, row_sum, acc = _finish(scores, v_buf, kv_empty, stage, row_max, row_sum, acc, scale_log2, D)
        else:
            row_max, row_sum, acc = _finish(scores, v_buf, kv_empty, stage, row_max, row_sum, acc, scale_log2, D)
            next_stage, next_phase = skip_keys(edges - at - 1, kv_full, kv_empty, next_stage, next_phase, STAGES)
            some = gl.minimum(num_full, 1)
            for _ in range(some):
                scores = _scores(q, k_buf, kv_full, next_stage, next_phase, s_layout, D)
            for _ in range(num_full - 1):
                stage, phase = next_stage, next_phase
                next_stage, next_phase = advance(stage, phase, STAGES)
                scores, row_max, row_sum, acc = _step(
                    q, k_buf, v_buf, kv_full, kv_empty, stage, next_stage, next_phase,
                    scores, row_max, row_sum, acc, scale_log2, D,
                )  # fmt: skip
            for _ in range(some):
                row_max, row_sum, acc = _finish(
                    scores, v_buf, kv_empty, next_stage, row_max, row_sum, acc, scale_log2, D
                )
                next_stage, next_phase = advance(next_stage, next_phase, STAGES)
        stage, phase = next_stage, next_phase

        statistics = lse + (batch * heads + head + lanes // TOKENS).to(gl.int64) * tokens + begin
        gl.store(statistics + position, (row_max + gl.log2(row_sum)) * LN2, mask=position < length)
        acc = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, o_layout))[:, None]
        store_rows(acc.to(q_buf.dtype), q_buf.index(own), o_desc, out, batch, head, begin, row, length,
                   tokens, heads, PACKED)  # fmt: skip
        round += 1
        mbarrier.wait(tile_full.index(round % TILES), round // TILES & 1)
        if ROW_SLOTS == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(own), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["length", "heads", "group", "tiles_per_head", "num_tiles"])
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, out, lse, table, documents, counter,
    scale_log2, length, heads, group, tiles_per_head, num_tiles,
    TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    # descriptors over [B, H, S, D] with boxes [1, heads, tokens, D] of 64 rows, k and v [1, 1, tokens, D] of as many
    # tokens; out [B, S, H, D]; lse [B, H, S]; packed: B = 1, S = all tokens, documents (`chunks.attention_documents`)
    D: gl.constexpr = q_desc.block_type.shape[3]
    element: gl.constexpr = q_desc.dtype
    q_box: gl.constexpr = q_desc.block_type.shape
    q_buf = gl.allocate_shared_memory(element, [CONSUMERS * ROW_SLOTS, 1, q_box[1], q_box[2], D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(element, [STAGES, 1, 1, KEYS, D], v_desc.layout)
    q_full, q_empty, kv_full, kv_empty, tile_full, tile_empty, tile_buf, list_buf = make_rings(
        ROW_SLOTS, STAGES
    )  # fmt: skip
    # argument tuples stand inline: constexprs inside a named tuple would become tensors
    gl.warp_specialize(
        [
            (produce_rows, (q_desc, q_desc, k_desc, v_desc, q_buf, q_buf, k_buf, v_buf,
                            q_full, q_empty, kv_full, kv_empty, tile_buf, list_buf, tile_full, tile_empty,
                            table, documents, counter, length, heads, group, tiles_per_head, num_tiles,
                            False, TABLE, BLOCK, LEVELS, SINKS, ROW_SLOTS, STAGES, PACKED)),
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
