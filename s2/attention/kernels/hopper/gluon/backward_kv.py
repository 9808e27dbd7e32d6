"""dK and dV on Hopper (sm_90a), in Gluon: warp-specialised, persistent, fed by TMA.

A CTA holds a producer partition and two consumer warpgroups of 64 keys each: two n_blocks of one stride level (columns
of one residue, or neighbours of the local window). A work item is such a pair and a segment of the queries that see
them, walked from its last rows to its first: items of one head start on the same rows, which the L2 cache then holds.
The consumers work on S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are left operands in registers:

    P = exp2(scale_log2 * S - lse2)    dV += P^T dO    dS = P * (dP - delta)    dK += dS^T Q

The keys of the next item are loaded while this one is worked on. Levels with few long columns are divided into
segments, whose partial sums leave in float32 (see `scheduler` and `combine`).
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

# isort: off
from ...index import load_rule
from ..combine import first_partial, segment_runs
from ..n_blocks import document_tile, level_block, locate_item
from ..varlen import document_item
from .common import (
    LANES, WORDS, advance, async_load, clear_rows, flat_rows, get, load_entry, opaque, reinterpret, store_blocks,
    store_rows,
)  # fmt: skip
# isort: on

ROWS = gl.constexpr(64)  # queries of a step
KEYS = gl.constexpr(64)  # keys of a consumer
CONSUMERS = gl.constexpr(2)
SLOTS = gl.constexpr(2)  # items whose keys and values are held
ITEM_WORDS = gl.constexpr(32)  # see `_produce`
WIDE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _pick(pair, lane, which: gl.constexpr):
    return gl.sum(gl.where(lane == which, pair, 0), 0)


@gluon.jit
def _produce(
    q_desc, do_desc, stats_desc, k_desc, v_desc,
    q_buf, do_buf, stats_buf, kv_buf, step_full, step_empty, kv_full, kv_empty, item_buf, item_full, item_empty,
    table, documents, counter, length, kv_heads, group, segment_rows, groups, wave, num_items, m_blocks, most_tiles,
    tiles, segments, batches, sinks, strides,
    TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Draws items and loads what they need. Queries and dO after the end of a packed document are zeroed once the next
    step is on its way: they add nothing then, whatever the next document holds. The words of an item:

         0     KV head of the batch, -1 after the last item
         1     segment of the partial sums, -1: none, all queries are here
         2, 3  where the document begins, its length
         4..   for either consumer: first key (-1: no n_block), number in the workspace, steps before it, unmasked
               steps, masked steps (small blocks, whose steps all count as unmasked: the row after the last), and after
        16..   of small blocks, for either consumer: each block's first key, the query after the last (0: no block)
    """
    D: gl.constexpr = q_desc.block_type.shape[3]
    TOKENS: gl.constexpr = min(BLOCK, ROWS)  # of a step, whose 64 rows are those of one head or several
    HEADS: gl.constexpr = ROWS // TOKENS
    WIDEST: gl.constexpr = LEVELS + 1 if SINKS else LEVELS  # sinks are a level of their own
    stage, phase, cut, cut_phases, slot, round = 0, 0, -1, 0, 0, 0
    begin_token, first_m_block, num_divided = 0, 0, 0
    if PACKED:
        num_items = gl.load(documents + 1) * groups
        num_divided = gl.load(documents + 2)
    lane = gl.arange(0, ITEM_WORDS, LANES)
    item = gl.atomic_add(counter, 1, sem="relaxed")
    while item < num_items:
        own_rows = segment_rows
        if PACKED:  # heads vary fastest
            batch_head = item % groups
            entry = item // groups
            number, begin_token, length, first_m_block = load_entry(documents + 4 * (1 + most_tiles), entry)
        else:
            level, segment, batch_head, first_tile, last_tile = locate_item(
                item, groups, wave, tiles, segments, batches, 2 * gl.num_programs(0), WIDEST
            )
        batch = batch_head // kv_heads
        kv_head = batch_head % kv_heads
        rule = load_rule(table + kv_head * TABLE, LEVELS, SINKS)  # of a head past the last: never used
        num_blocks = (length + BLOCK - 1) // BLOCK
        high = (length + TOKENS - 1) // TOKENS * TOKENS
        if PACKED:
            pair, segment, own_rows = document_item(
                number, entry < num_divided, length, segment_rows, sinks, strides[0], strides[1], strides[2], CONSUMERS,
                BLOCK, LEVELS,
            )  # fmt: skip
            level, first_tile = document_tile(pair, num_blocks, rule, BLOCK, LEVELS, SINKS)
            last_tile = gl.where(level < 0, first_tile, first_tile + 1)
            part = CONSUMERS * (entry - first_tile)
        else:
            split = segments[0]
            for other in gl.static_range(1, WIDEST + 1):
                split = gl.where(level == other, segments[other], split)
            segment = gl.where(split > 1, segment, -1)
            part = first_partial(level, tiles, segments, WIDEST)
        item = gl.atomic_add(counter, 1, sem="relaxed")
        for tile in range(first_tile, last_tile):
            index = tile * CONSUMERS + lane % CONSUMERS
            key, begin, end, alone = segment_runs(
                index, level, num_blocks, high, segment, own_rows, rule, BLOCK, LEVELS, SINKS
            )
            part_segment = gl.where(alone, -1, 0 if PACKED else segment)
            exists = begin < end
            top = gl.max(gl.where(exists, end, 0), 0)
            bottom = gl.min(begin, 0)
            rows = gl.maximum(top - bottom, 0) // TOKENS
            sets = group // HEADS  # of heads that a step takes together
            if rows > 0:
                before = gl.where(exists, top - end, rows * TOKENS) // TOKENS
                inside = gl.where(exists, (end - begin) // TOKENS, 0)
                after = rows - before - inside
                diagonal = inside * 0
                if BLOCK >= KEYS:
                    diagonal = (exists & (begin == key)).to(gl.int32)
                    inside -= diagonal
                mbarrier.wait(item_empty.index(slot), (round & 1) ^ 1)
                words = gl.where(lane == 0, batch_head, part_segment)
                words = gl.where(lane == 2, begin_token, words)
                words = gl.where(lane == 3, length, words)
                words = gl.where(lane // CONSUMERS == 2, gl.where(exists, key, -1), words)
                words = gl.where(lane // CONSUMERS == 3, part + index, words)
                words = gl.where(lane // CONSUMERS == 4, before * sets, words)
                words = gl.where(lane // CONSUMERS == 5, inside * sets, words)
                words = gl.where(lane // CONSUMERS == 6, diagonal * sets if BLOCK >= KEYS else end, words)
                words = gl.where(lane // CONSUMERS == 7, after * sets, words)
                block = lane * 0
                if BLOCK < KEYS:
                    nth = (tile * CONSUMERS + (lane // 8) % CONSUMERS) * HEADS + (lane // 2) % 4
                    block, until, found = level_block(nth, level, num_blocks, rule, LEVELS, SINKS)
                    found = found & ((lane // 2) % 4 < HEADS)
                    block = gl.where(found, block, 0)
                    words = gl.where(lane < 16, words, block * BLOCK)
                    words = gl.where((lane < 16) | (lane % 2 == 0), words, gl.where(found, until * BLOCK, 0))
                item_buf.index(slot).store(words)
                mbarrier.arrive(item_full.index(slot), count=1)
                mbarrier.wait(kv_empty.index(slot), (round & 1) ^ 1)
                loaded = kv_full.index(slot)
                mbarrier.expect(loaded, 2 * CONSUMERS * KEYS * D * 2)
                for c in gl.static_range(CONSUMERS):
                    k = kv_buf.index(2 * (slot * CONSUMERS + c))
                    v = kv_buf.index(2 * (slot * CONSUMERS + c) + 1)
                    if BLOCK >= KEYS:
                        first = begin_token + _pick(key, lane, c)
                        async_load(k_desc, [batch, kv_head, first, 0], loaded, k)
                        async_load(v_desc, [batch, kv_head, first, 0], loaded, v)
                    else:
                        for j in gl.static_range(HEADS):  # as many blocks
                            first = begin_token + _pick(block, lane, 16 + 8 * c + 2 * j) * BLOCK
                            to = k.slice(j * BLOCK, BLOCK, 2)
                            async_load(k_desc, [batch, kv_head, first, 0], loaded, to)
                            to = v.slice(j * BLOCK, BLOCK, 2)
                            async_load(v_desc, [batch, kv_head, first, 0], loaded, to)
                for n in range(rows):
                    row = top - (n + 1) * TOKENS
                    for g in range(sets):
                        head = kv_head * group + g * HEADS
                        m_block = (batch * kv_heads * group + head) // HEADS * m_blocks + first_m_block + row // TOKENS
                        token = begin_token + row
                        is_cut = PACKED & (row + TOKENS > length)
                        ready = step_full.index(gl.where(is_cut, STAGES + stage, stage))
                        mbarrier.wait(step_empty.index(stage), phase ^ 1)
                        mbarrier.expect(ready, 2 * ROWS * D * 2 + 2 * ROWS * 4)
                        async_load(q_desc, [batch, head, token, 0], ready, q_buf.index(stage))
                        async_load(stats_desc, [m_block, 0], ready, stats_buf.index(stage))
                        async_load(do_desc, [batch, head, token, 0], ready, do_buf.index(stage))
                        if PACKED:
                            cut_phases = _cut_rows(
                                length - top + TOKENS, cut, cut_phases, q_buf, do_buf, step_full, STAGES
                            )  # fmt: skip
                            cut = gl.where(is_cut, stage, -1)
                        stage, phase = advance(stage, phase, STAGES)
                if PACKED:  # before anything is waited for that needs it
                    cut_phases = _cut_rows(length - top + TOKENS, cut, cut_phases, q_buf, do_buf, step_full, STAGES)
                    cut = -1
                round += slot
                slot = slot ^ 1
    if item == num_items + gl.num_programs(0) - 1:  # the last draw of all: the counter is zero for the next launch
        gl.atomic_xchg(counter, 0, sem="relaxed")
    mbarrier.wait(item_empty.index(slot), (round & 1) ^ 1)
    item_buf.index(slot).store(lane * 0 - 1)
    mbarrier.arrive(item_full.index(slot), count=1)


@gluon.jit
def _cut_rows(count, stage, phases, q_buf, do_buf, step_full, STAGES: gl.constexpr):
    """Zeroes queries and dO of a stage (-1: none) but for the first `count` of each head, and hands it over. Only the
    last rows of a document are cut, which come first in an item. A bit of `phases` for each stage; returns them."""
    TOKENS: gl.constexpr = q_buf.shape[3]
    if stage >= 0:
        mbarrier.wait(step_full.index(STAGES + stage), (phases >> stage) & 1)
        for j in gl.static_range(ROWS // TOKENS):
            clear_rows(flat_rows(q_buf.index(stage)), j * TOKENS, TOKENS, count)
            clear_rows(flat_rows(do_buf.index(stage)), j * TOKENS, TOKENS, count)
        fence_async_shared()
        mbarrier.arrive(step_full.index(stage), count=1)
        phases = phases ^ (1 << stage)
    return phases


@gluon.jit
def _step(
    k, v, q_buf, do_buf, stats_buf, step_full, step_empty, stage, phase, scores, dk, dv, scale_log2, diagonal,
    keys, ends, row, BLOCK: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, NEXT: gl.constexpr,
):  # fmt: skip
    """Adds one step of 64 queries, whose scores are there, to dK and dV (both `[64, D]` float32), and with `NEXT`
    computes the scores of the next one. With `MASKED` a step on the diagonal, where a query sees keys up to its own, is
    one with `diagonal` set. Of smaller blocks every step is masked: the key at `keys` is seen from there to `ends`, the
    queries are at `row` and after."""
    s_layout: gl.constexpr = scores.type.layout
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    element: gl.constexpr = q_buf.dtype
    q = flat_rows(q_buf.index(opaque(stage)))
    do = flat_rows(do_buf.index(opaque(stage)))
    stats = reinterpret(stats_buf.index(stage), gl.float32, [2, ROWS], WIDE)
    blank = gl.zeros([KEYS, ROWS], gl.float32, s_layout)
    pending_dp = warpgroup_mma(v, do.permute([1, 0]), blank, use_acc=False, is_async=True)
    lse = stats.slice(0, 1).load(s_layout)
    probs = gl.exp2(scores * scale_log2 - lse)
    if BLOCK < KEYS:
        query = row + gl.arange(0, ROWS, columns) % BLOCK
        probs = gl.where((keys[:, None] <= query[None, :]) & (query[None, :] < ends[:, None]), probs, 0.0)
    elif MASKED:
        key = gl.arange(0, KEYS, gl.SliceLayout(1, s_layout))
        query = gl.arange(0, ROWS, columns)
        probs = gl.where((key[:, None] <= query[None, :]) | (diagonal == 0), probs, 0.0)
    p = gl.convert_layout(probs.to(element), p_layout)
    pending_dv = warpgroup_mma(p, do, dv, is_async=True)
    delta = stats.slice(1, 1).load(s_layout)
    dprobs = warpgroup_mma_wait(1, deps=[pending_dp])
    ds = gl.convert_layout((probs * (dprobs - delta)).to(element), p_layout)
    pending_dk = warpgroup_mma(ds, q, dk, is_async=True)
    next_stage, next_phase = advance(stage, phase, STAGES)
    if NEXT:
        mbarrier.wait(step_full.index(next_stage), next_phase)
        q_next = flat_rows(q_buf.index(next_stage))
        blank_next = gl.zeros([KEYS, ROWS], gl.float32, s_layout)
        pending_s = warpgroup_mma(k, q_next.permute([1, 0]), blank_next, use_acc=False, is_async=True)
        dv, dk, scores = warpgroup_mma_wait(0, deps=[pending_dv, pending_dk, pending_s])
    else:
        dv, dk = warpgroup_mma_wait(0, deps=[pending_dv, pending_dk])
    mbarrier.arrive(step_empty.index(stage), count=1)
    return scores, dk, dv, next_stage, next_phase


@gluon.jit
def _skip(steps, step_full, step_empty, stage, phase, STAGES: gl.constexpr):
    for _ in range(steps):
        mbarrier.wait(step_full.index(stage), phase)  # a stage is handed back only once it is filled
        mbarrier.arrive(step_empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _consume(
    C: gl.constexpr, dk_desc, dv_desc, dk_pointer, dv_pointer, partials,
    q_buf, do_buf, stats_buf, kv_buf, step_full, step_empty, kv_full, kv_empty, item_buf, item_full, item_empty,
    scale, scale_log2, tokens, kv_heads, group, groups, num_partials,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, GROUPED: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q_buf.shape[4]
    TOKENS: gl.constexpr = min(BLOCK, ROWS)
    HEADS: gl.constexpr = ROWS // TOKENS
    sets = group // HEADS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    element: gl.constexpr = q_buf.dtype
    info = reinterpret(item_buf, gl.int32, [SLOTS * ITEM_WORDS, 1], WORDS)
    stage, phase, slot, round = 0, 0, 0, 0
    mbarrier.wait(item_full.index(0), 0)
    batch_head = get(info, 0)
    while batch_head >= 0:
        word = slot * ITEM_WORDS
        segment = get(info, word + 1)
        begin = get(info, word + 2)
        length = get(info, word + 3)
        key = get(info, word + 4 + C)
        part = get(info, word + 6 + C)
        before = get(info, word + 8 + C)
        inside = get(info, word + 10 + C)
        diagonal = get(info, word + 12 + C)
        after = get(info, word + 14 + C)
        key_lanes = gl.arange(0, KEYS, gl.SliceLayout(1, s_layout))
        keys = key_lanes
        ends = key_lanes
        row, turn = 0, 0
        if BLOCK < KEYS:
            for j in gl.static_range(HEADS):
                own = key_lanes // BLOCK == j
                keys = gl.where(own, get(info, word + 16 + 8 * C + 2 * j) + key_lanes % BLOCK, keys)
                ends = gl.where(own, get(info, word + 17 + 8 * C + 2 * j), ends)
            row = diagonal - TOKENS
            diagonal = 0
        else:
            mbarrier.arrive(item_empty.index(slot), count=1)
        dk = gl.zeros([KEYS, D], gl.float32, d_layout)
        dv = gl.zeros([KEYS, D], gl.float32, d_layout)
        scores = gl.zeros([KEYS, ROWS], gl.float32, s_layout)
        k4 = kv_buf.index(2 * (slot * CONSUMERS + C))
        v4 = kv_buf.index(2 * (slot * CONSUMERS + C) + 1)
        k = k4.reshape([KEYS, D])
        v = v4.reshape([KEYS, D])
        mbarrier.wait(kv_full.index(slot), round & 1)
        # the previous item's gradients have left its slot, which may be filled again
        tma.store_wait(0)
        mbarrier.arrive(kv_empty.index(slot ^ 1), count=1, pred=(round > 0) | (slot > 0))
        stage, phase = _skip(before, step_full, step_empty, stage, phase, STAGES)
        # loops of one step stand where an `if` would: a branch around a wgmma makes ptxas serialise them all
        some = gl.minimum(inside + diagonal, 1)
        for _ in range(some):
            mbarrier.wait(step_full.index(stage), phase)
            q = flat_rows(q_buf.index(opaque(stage))).permute([1, 0])
            k_first = kv_buf.index(2 * (opaque(slot) * CONSUMERS + C)).reshape([KEYS, D])
            pending = warpgroup_mma(k_first, q, scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[pending])
        for n in range(inside + diagonal - 1):
            scores, dk, dv, stage, phase = _step(
                k, v, q_buf, do_buf, stats_buf, step_full, step_empty, stage, phase, scores, dk, dv,
                scale_log2, (n >= inside).to(gl.int32), keys, ends, row, BLOCK, STAGES, GROUPED, True,
            )  # fmt: skip
            if BLOCK < KEYS:  # after all heads of a query block the one before it
                turn += 1
                row = gl.where(turn == sets, row - TOKENS, row)
                turn = gl.where(turn == sets, 0, turn)
        again = opaque(slot)
        k_last = kv_buf.index(2 * (again * CONSUMERS + C)).reshape([KEYS, D])
        v_last = kv_buf.index(2 * (again * CONSUMERS + C) + 1).reshape([KEYS, D])
        for _ in range(some):
            scores, dk, dv, stage, phase = _step(
                k_last, v_last, q_buf, do_buf, stats_buf, step_full, step_empty, stage, phase, scores, dk, dv,
                scale_log2, diagonal, keys, ends, row, BLOCK, STAGES, True, False,
            )  # fmt: skip
        stage, phase = _skip(after, step_full, step_empty, stage, phase, STAGES)
        dk = dk * scale
        if key >= 0:
            if segment >= 0:
                rows = gl.arange(0, KEYS, gl.SliceLayout(1, d_layout))
                columns = gl.arange(0, D, gl.SliceLayout(0, d_layout))
                first = ((segment * groups + batch_head) * num_partials + part).to(gl.int64) * (2 * KEYS * D)
                offsets = rows[:, None] * D + columns[None, :]
                gl.store(partials + first + offsets, dk)
                gl.store(partials + first + KEYS * D + offsets, dv)
            else:
                batch = batch_head // kv_heads
                head = batch_head % kv_heads
                if BLOCK < KEYS:
                    k.store(dk.to(element))
                    v.store(dv.to(element))
                    store_blocks(k4, v4, dk_desc, dv_desc, dk_pointer, dv_pointer, info, word + 16 + 8 * C, batch,
                                  head, begin, length, tokens, kv_heads, BLOCK, PACKED)  # fmt: skip
                else:
                    store_rows(dk.to(element), k4, dk_desc, dk_pointer, batch, head, begin, key, length, tokens,
                               kv_heads, PACKED)  # fmt: skip
                    store_rows(dv.to(element), v4, dv_desc, dv_pointer, batch, head, begin, key, length, tokens,
                               kv_heads, PACKED)  # fmt: skip
        if BLOCK < KEYS:
            mbarrier.arrive(item_empty.index(slot), count=1)
        round += slot
        slot = slot ^ 1
        mbarrier.wait(item_full.index(slot), round & 1)
        batch_head = get(info, slot * ITEM_WORDS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "length", "kv_heads", "group", "groups", "wave", "num_items", "m_blocks", "most_tiles",
    "segment_rows", "num_partials",
    "tiles0", "tiles1", "tiles2", "tiles3", "segments0", "segments1", "segments2", "segments3",
    "batch0", "batch1", "batch2", "batch3", "sinks", "stride0", "stride1", "stride2",
])  # fmt: skip
def attention_backward_kv(
    q_desc, do_desc, stats_desc, k_desc, v_desc, dk_desc, dv_desc, dk, dv, partials, table, documents, counter,
    scale, scale_log2, length, kv_heads, group, groups, wave, num_items, m_blocks, most_tiles, segment_rows,
    num_partials, tiles0, tiles1, tiles2, tiles3, segments0, segments1, segments2, segments3,
    batch0, batch1, batch2, batch3, sinks, stride0, stride1, stride2,
    TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, PACKED: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    # descriptors over [B, H, S, D] with boxes [1, 1, 64, D]; stats [B Hq m_blocks, 128]: lse2 and delta of 64 rows;
    # dk and dv [B, S, Hkv, D] contiguous; partials [segments, B Hkv, num_partials, dK and dV, 64, D] float32, of packed
    # documents [Hkv, num_partials, ...]; groups = B Hkv; tiles, segments and tiles per item of each level; sinks and
    # strides as in `varlen.wide_tiles`; packed: B = 1, S = all tokens
    D: gl.constexpr = q_desc.block_type.shape[3]
    element: gl.constexpr = q_desc.dtype
    q_box: gl.constexpr = q_desc.block_type.shape
    q_buf = gl.allocate_shared_memory(element, [STAGES, 1, q_box[1], q_box[2], D], q_desc.layout)
    do_buf = gl.allocate_shared_memory(element, [STAGES, 1, q_box[1], q_box[2], D], q_desc.layout)
    kv_buf = gl.allocate_shared_memory(element, [SLOTS * CONSUMERS * 2, 1, 1, KEYS, D], k_desc.layout)
    stats_buf = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * ROWS], stats_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    step_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], barrier)  # the second half: still to be cut
    step_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    kv_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    kv_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    item_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    item_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    item_buf = gl.allocate_shared_memory(gl.int32, [SLOTS, ITEM_WORDS], WORDS)
    for i in gl.static_range(STAGES):
        mbarrier.init(step_full.index(i), count=1)
        mbarrier.init(step_full.index(STAGES + i), count=1)
        mbarrier.init(step_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(SLOTS):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=CONSUMERS)
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    # argument tuples stand inline: constexprs inside a named tuple would become tensors
    gl.warp_specialize(
        [
            (_produce, (q_desc, do_desc, stats_desc, k_desc, v_desc,
                        q_buf, do_buf, stats_buf, kv_buf, step_full, step_empty, kv_full, kv_empty,
                        item_buf, item_full, item_empty,
                        table, documents, counter, length, kv_heads, group, segment_rows, groups, wave, num_items,
                        m_blocks, most_tiles,
                        (tiles0, tiles1, tiles2, tiles3), (segments0, segments1, segments2, segments3),
                        (batch0, batch1, batch2, batch3), sinks, (stride0, stride1, stride2),
                        TABLE, BLOCK, LEVELS, SINKS, STAGES, PACKED)),
            (_consume, (0, dk_desc, dv_desc, dk, dv, partials,
                        q_buf, do_buf, stats_buf, kv_buf, step_full, step_empty, kv_full, kv_empty,
                        item_buf, item_full, item_empty,
                        scale, scale_log2, length, kv_heads, group, groups, num_partials,
                        BLOCK, STAGES, GROUPED, PACKED)),
            (_consume, (1, dk_desc, dv_desc, dk, dv, partials,
                        q_buf, do_buf, stats_buf, kv_buf, step_full, step_empty, kv_full, kv_empty,
                        item_buf, item_full, item_empty,
                        scale, scale_log2, length, kv_heads, group, groups, num_partials,
                        BLOCK, STAGES, GROUPED, PACKED)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip
