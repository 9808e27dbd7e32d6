"""Backward kernels. `delta = rowsum(dO * O) - dlse` comes first; then two kernels that need no atomics, so gradients
are the same bits every time:

- `attention_backward_q`: query tiles walk the same key tiles as the forward and accumulate dQ.
- `attention_backward_kv`: key tiles walk the run of queries that sees them and accumulate dK, dV. A tile holds blocks
  of one stride level (several columns of one residue, or neighbours of the local window), so small blocks fill it too.

With P = exp(scale * Q K^T - lse):  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale * dS K,  dK = scale * dS^T Q.
"""

import triton
import triton.language as tl

from .documents import locate_tile
from .forward import LOG2E, locate_program, locate_rows
from .indexing import (
    full_tile,
    full_tiles,
    gather_positions,
    key_plan,
    key_tile,
    load_rule,
    masked_tile,
    masked_tiles,
    member,
    reach_of,
)
from .tiles import NEVER, consecutive_rows, dot, dot_add, gathered_rows, load_tile, store_tile, visible


@triton.jit
def attention_delta(
    out, dout, dlse, delta, length, num_heads,
    stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, stride_lb, stride_lh, stride_gb, stride_gh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    nth, head, batch = locate_program(tl.cdiv(length, BLOCK_M), num_heads)
    row = nth.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = head.to(tl.int64)
    out += batch * stride_ob + head * stride_oh
    dout += batch * stride_db + head * stride_dh
    valid = row < length
    o_rows = out + row * stride_ot
    do_rows = dout + row * stride_dt
    o0 = load_tile(o_rows, valid, D, 0, D0, True).to(tl.float32)
    total = tl.sum(o0 * load_tile(do_rows, valid, D, 0, D0, True).to(tl.float32), 1)
    if D1 > 0:
        o1 = load_tile(o_rows, valid, D, D0, D1, True).to(tl.float32)
        total += tl.sum(o1 * load_tile(do_rows, valid, D, D0, D1, True).to(tl.float32), 1)
    if HAS_DLSE:
        total -= tl.load(dlse + batch * stride_gb + head * stride_gh + row, mask=valid, other=0.0)
    tl.store(delta + batch * stride_lb + head * stride_lh + row, total, mask=valid)


@triton.jit(do_not_specialize=["q_len", "kv_len", "num_tiles", "num_packs", "list_stride"])
def attention_backward_q(
    q, k, v, dout, lse, delta, dq,
    table, key_offsets, key_blocks, list_stride,
    documents, q_len, kv_len, scale, num_tiles, num_packs, group,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_gb, stride_gt, stride_gh, stride_lb, stride_lh,
    TABLE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr, STAGES: tl.constexpr,
    LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tokens: tl.constexpr = BLOCK_M // PACK
    nth, program_head, batch = locate_program(num_tiles, num_packs)
    if PACKED:
        begin, q_len, tile = locate_tile(documents, num_tiles - 1 - nth)
        kv_len = q_len
        if q_len <= 0:
            return
        begin = begin.to(tl.int64)
    else:
        begin = 0
        tile = (kv_len - q_len) // tokens + num_tiles - 1 - nth
    kv_head = ((program_head * PACK) // group).to(tl.int64)

    position, token, valid, head = locate_rows(program_head, tile, q_len, kv_len, BLOCK_M, PACK)
    q_rows = q + batch * stride_qb + (begin + token) * stride_qt + head * stride_qh
    do_rows = dout + batch * stride_ob + (begin + token) * stride_ot + head * stride_oh
    k += batch * stride_kb + begin * stride_kt + kv_head * stride_kh
    v += batch * stride_vb + begin * stride_vt + kv_head * stride_vh
    rule = load_rule(table + kv_head * TABLE, LEVELS, SINKS)
    scale_log2 = scale * LOG2E

    statistics = batch * stride_lb + head * stride_lh + begin + token
    row_lse = tl.load(lse + statistics, mask=valid, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)  # rows without keys: P = 0
    row_delta = tl.load(delta + statistics, mask=valid, other=0.0)
    q0 = load_tile(q_rows, valid, D, 0, D0, True)
    do0 = load_tile(do_rows, valid, D, 0, D0, True)
    dq0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    if D1 > 0:
        q1 = load_tile(q_rows, valid, D, D0, D1, True)
        do1 = load_tile(do_rows, valid, D, D0, D1, True)
        dq1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)

    if LISTS:
        query_block = tile * tokens // BLOCK
        list_begin = tl.load(key_offsets + kv_head * list_stride + query_block)
        list_end = tl.load(key_offsets + kv_head * list_stride + query_block + 1)
        per_block: tl.constexpr = BLOCK // BLOCK_N
        has_diagonal = 0
        if list_end > list_begin:
            has_diagonal = (tl.load(key_blocks + list_end - 1) == query_block).to(tl.int32)
        num_full = (list_end - list_begin - has_diagonal) * per_block
        num_masked = has_diagonal * per_block
    else:
        first_row = tl.maximum(tile * tokens, kv_len - q_len)
        last_row = tl.minimum(tile * tokens + tokens, kv_len) - 1
        full, masked = key_plan(first_row, last_row, rule, BLOCK, BLOCK_N, LEVELS, SINKS)
        num_full = full_tiles(full)
        num_masked = masked_tiles(masked)

    for n in tl.range(0, num_full, num_stages=STAGES):
        if LISTS:
            key_block = tl.load(key_blocks + list_begin + n // per_block)
            start = key_block * BLOCK + (n % per_block) * BLOCK_N
        else:
            first, stride, index = full_tile(n, full, LEVELS, SINKS)
            if BLOCK_N <= BLOCK:
                sub: tl.constexpr = BLOCK // BLOCK_N
                start = (first + (index // sub) * stride) * BLOCK + (index % sub) * BLOCK_N
        if BLOCK_N <= BLOCK:
            k_rows = consecutive_rows(k, start, stride_kt, BLOCK_N)
            v_rows = consecutive_rows(v, start, stride_vt, BLOCK_N)
        else:
            key = gather_positions(first, stride, index, BLOCK, BLOCK_N)
            k_rows = gathered_rows(k, key, stride_kt)
            v_rows = gathered_rows(v, key, stride_vt)
        k0 = load_tile(k_rows, True, D, 0, D0, False)
        v0 = load_tile(v_rows, True, D, 0, D0, False)
        scores = dot(q0, k0.T)
        dprobs = dot(do0, v0.T)
        if D1 > 0:
            k1 = load_tile(k_rows, True, D, D0, D1, False)
            v1 = load_tile(v_rows, True, D, D0, D1, False)
            scores = dot_add(q1, k1.T, scores)
            dprobs = dot_add(do1, v1.T, dprobs)
        probs = tl.exp2(scores * scale_log2 - row_lse[:, None])
        dscores = (probs * (dprobs - row_delta[:, None])).to(k0.dtype)
        dq0 = dot_add(dscores, k0, dq0)
        if D1 > 0:
            dq1 = dot_add(dscores, k1, dq1)

    for n in tl.range(0, num_masked, num_stages=1):
        if LISTS:
            key = query_block * BLOCK + n * BLOCK_N + tl.arange(0, BLOCK_N)
        else:
            first, stride, index, blocks = masked_tile(n, masked, LEVELS, SINKS)
            key = gather_positions(first, stride, index, BLOCK, BLOCK_N)
            if BLOCK_N > BLOCK:
                key = tl.where(index * BLOCK_N + tl.arange(0, BLOCK_N) < blocks * BLOCK, key, NEVER)
        exists = key < kv_len
        k_rows = gathered_rows(k, key, stride_kt)
        v_rows = gathered_rows(v, key, stride_vt)
        k0 = load_tile(k_rows, exists, D, 0, D0, True)
        v0 = load_tile(v_rows, exists, D, 0, D0, True)
        scores = dot(q0, k0.T)
        dprobs = dot(do0, v0.T)
        if D1 > 0:
            k1 = load_tile(k_rows, exists, D, D0, D1, True)
            v1 = load_tile(v_rows, exists, D, D0, D1, True)
            scores = dot_add(q1, k1.T, scores)
            dprobs = dot_add(do1, v1.T, dprobs)
        seen = visible(position[:, None], key[None, :], rule, BLOCK, LEVELS, SINKS, LISTS)
        probs = tl.where(seen, tl.exp2(scores * scale_log2 - row_lse[:, None]), 0.0)
        dscores = (probs * (dprobs - row_delta[:, None])).to(k0.dtype)
        dq0 = dot_add(dscores, k0, dq0)
        if D1 > 0:
            dq1 = dot_add(dscores, k1, dq1)

    dq_rows = dq + batch * stride_gb + (begin + token) * stride_gt + head * stride_gh
    store_tile(dq_rows, valid, dq0 * scale, D, 0, D0)
    if D1 > 0:
        store_tile(dq_rows, valid, dq1 * scale, D, D0, D1)


@triton.jit
def _query_step(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, lse, delta,
    key, start, offset, q_len, scale_log2, stride_qt, stride_ot, rule,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the query rows `start, start + 1, ...` (at positions + `offset`) to dK, dV; rows outside `[0, q_len)` add
    nothing. Works on S^T = K Q^T, so that P^T and dS^T are the left operands of both products untransposed."""
    lanes = tl.arange(0, BLOCK_M)
    token = start + lanes
    valid = (token >= 0) & (token < q_len)
    q_rows = consecutive_rows(q, start, stride_qt, BLOCK_M)
    do_rows = consecutive_rows(dout, start, stride_ot, BLOCK_M)
    q0 = load_tile(q_rows, valid, D, 0, D0, True)
    do0 = load_tile(do_rows, valid, D, 0, D0, True)
    row_lse = tl.load(lse + start + lanes, mask=valid, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    row_delta = tl.load(delta + start + lanes, mask=valid, other=0.0)
    scores = dot(k0, q0.T)
    if D1 > 0:
        q1 = load_tile(q_rows, valid, D, D0, D1, True)
        scores = dot_add(k1, q1.T, scores)
    probs = tl.exp2(scores * scale_log2 - row_lse[None, :])
    if MASKED:
        seen = visible((token + offset)[None, :], key[:, None], rule, BLOCK, LEVELS, SINKS, LISTS)
        probs = tl.where(seen, probs, 0.0)
    low = probs.to(do0.dtype)
    dv0 = dot_add(low, do0, dv0)
    dprobs = dot(v0, do0.T)
    if D1 > 0:
        do1 = load_tile(do_rows, valid, D, D0, D1, True)
        dv1 = dot_add(low, do1, dv1)
        dprobs = dot_add(v1, do1.T, dprobs)
    dscores = (probs * (dprobs - row_delta[None, :])).to(q0.dtype)
    dk0 = dot_add(dscores, q0, dk0)
    if D1 > 0:
        dk1 = dot_add(dscores, q1, dk1)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["q_len", "kv_len", "num_tiles", "kv_heads", "list_stride"])
def attention_backward_kv(
    q, k, v, dout, lse, delta, dk, dv,
    table, query_offsets, query_blocks, list_stride,
    documents, q_len, kv_len, scale, num_tiles, kv_heads, group,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    stride_gkb, stride_gkt, stride_gkh, stride_gvb, stride_gvt, stride_gvh,
    TABLE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # heads vary fastest: all heads start with their longest columns
    kv_head, tile, batch = locate_program(kv_heads, num_tiles)
    kv_head = kv_head.to(tl.int64)
    if PACKED:
        begin, q_len, tile = locate_tile(documents, tile)
        kv_len = q_len
        if q_len <= 0:
            return
        begin = begin.to(tl.int64)
    else:
        begin = 0
    rule = load_rule(table + kv_head * TABLE, LEVELS, SINKS)
    offset = kv_len - q_len  # position of the first query
    num_blocks = tl.cdiv(kv_len, BLOCK)

    if LISTS:
        parts: tl.constexpr = BLOCK // BLOCK_N
        key_block = tile // parts
        if key_block >= num_blocks:
            return
        key = key_block * BLOCK + (tile % parts) * BLOCK_N + tl.arange(0, BLOCK_N)
    else:
        level, index, count = key_tile(tile, num_blocks, rule, BLOCK, BLOCK_N, LEVELS)
        if level < 0:
            return
        if BLOCK_N <= BLOCK:
            split: tl.constexpr = BLOCK // BLOCK_N
            first_index = index // split
            last_index = first_index
            lane_index = first_index + tl.zeros([BLOCK_N], dtype=tl.int32)
            within = (index % split) * BLOCK_N + tl.arange(0, BLOCK_N)
        else:
            blocks: tl.constexpr = BLOCK_N // BLOCK
            first_index = index * blocks
            last_index = tl.minimum(first_index + blocks, count) - 1
            lane_index = first_index + tl.arange(0, BLOCK_N) // BLOCK
            within = tl.arange(0, BLOCK_N) % BLOCK
        first_block, last_block = 0, 0
        lane_block = tl.zeros([BLOCK_N], dtype=tl.int32)
        for candidate in tl.static_range(LEVELS + 1):
            if level == candidate:
                first_block = member(first_index, candidate, rule, LEVELS)
                last_block = member(last_index, candidate, rule, LEVELS)
                lane_block = member(lane_index, candidate, rule, LEVELS)
        key = tl.where(lane_index <= last_index, lane_block * BLOCK + within, NEVER)

    k += batch * stride_kb + begin * stride_kt + kv_head * stride_kh
    v += batch * stride_vb + begin * stride_vt + kv_head * stride_vh
    q += batch * stride_qb + begin * stride_qt + kv_head * group * stride_qh
    dout += batch * stride_ob + begin * stride_ot + kv_head * group * stride_oh
    statistics = batch * stride_lb + kv_head * group * stride_lh + begin
    lse += statistics
    delta += statistics

    exists = key < kv_len
    k_rows = gathered_rows(k, key, stride_kt)
    v_rows = gathered_rows(v, key, stride_vt)
    k0 = load_tile(k_rows, exists, D, 0, D0, True)
    v0 = load_tile(v_rows, exists, D, 0, D0, True)
    dk0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], dtype=tl.float32)
    if D1 > 0:
        k1 = load_tile(k_rows, exists, D, D0, D1, True)
        v1 = load_tile(v_rows, exists, D, D0, D1, True)
        dk1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], dtype=tl.float32)
    else:  # placeholders that compile to nothing
        k1, v1, dk1, dv1 = 0, 0, 0, 0
    scale_log2 = scale * LOG2E

    if LISTS:
        per_block: tl.constexpr = BLOCK // BLOCK_M
        list_begin = tl.load(query_offsets + kv_head * list_stride + key_block)
        list_end = tl.load(query_offsets + kv_head * list_stride + key_block + 1)
        for n in tl.range(0, (list_end - list_begin) * per_block * group, num_stages=1):
            head = (n % group).to(tl.int64)
            step = n // group
            query_block = tl.load(query_blocks + list_begin + step // per_block)
            start = query_block * BLOCK + (step % per_block) * BLOCK_M - offset
            dk0, dk1, dv0, dv1 = _query_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1,
                q + head * stride_qh, dout + head * stride_oh, lse + head * stride_lh, delta + head * stride_lh,
                key, start, offset, q_len, scale_log2, stride_qt, stride_ot, rule,
                D, D0, D1, BLOCK, BLOCK_M, LEVELS, SINKS, LISTS, True,
            )  # fmt: skip
    else:
        # visible to some row of the tile: [run_begin, run_end); to all: [full_begin, full_end), in query tokens
        reach = reach_of(last_block, rule, LEVELS, False)
        run_end = tl.minimum(last_block + reach, num_blocks)
        if SINKS:  # a tile that starts with a sink is visible, in part, to the end
            run_end = tl.where(first_block < rule[1], num_blocks, run_end)
        run_end = tl.minimum(run_end * BLOCK, kv_len) - offset
        run_begin = tl.maximum(first_block * BLOCK - offset, 0)
        full_end = tl.minimum(tl.minimum(first_block + reach, num_blocks) * BLOCK, kv_len) - offset
        full_end = tl.where(full_end >= q_len, q_len, full_end)
        head_end = tl.maximum(tl.minimum((last_block + 1) * BLOCK - offset, run_end), run_begin)
        head_tiles = tl.cdiv(head_end - run_begin, BLOCK_M)
        full_begin = run_begin + head_tiles * BLOCK_M
        full_steps = tl.maximum(full_end - full_begin, 0) // BLOCK_M
        # a run that reaches the end of the sequence needs no mask in its last, ragged tile
        ragged = (full_end == q_len) & (full_begin + full_steps * BLOCK_M < q_len)
        full_steps += ragged.to(tl.int32)
        tail_begin = full_begin + full_steps * BLOCK_M
        tail_tiles = tl.cdiv(tl.maximum(run_end - tail_begin, 0), BLOCK_M)

        for n in tl.range(0, full_steps * group, num_stages=STAGES):
            head = (n % group).to(tl.int64)
            start = full_begin + (n // group) * BLOCK_M
            dk0, dk1, dv0, dv1 = _query_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1,
                q + head * stride_qh, dout + head * stride_oh, lse + head * stride_lh, delta + head * stride_lh,
                key, start, offset, q_len, scale_log2, stride_qt, stride_ot, rule,
                D, D0, D1, BLOCK, BLOCK_M, LEVELS, SINKS, LISTS, False,
            )  # fmt: skip
        for n in tl.range(0, (head_tiles + tail_tiles) * group, num_stages=1):
            head = (n % group).to(tl.int64)
            step = n // group
            start = tl.where(step < head_tiles, run_begin, tail_begin - head_tiles * BLOCK_M) + step * BLOCK_M
            dk0, dk1, dv0, dv1 = _query_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1,
                q + head * stride_qh, dout + head * stride_oh, lse + head * stride_lh, delta + head * stride_lh,
                key, start, offset, q_len, scale_log2, stride_qt, stride_ot, rule,
                D, D0, D1, BLOCK, BLOCK_M, LEVELS, SINKS, LISTS, True,
            )  # fmt: skip

    dk_rows = gathered_rows(dk + batch * stride_gkb + begin * stride_gkt + kv_head * stride_gkh, key, stride_gkt)
    dv_rows = gathered_rows(dv + batch * stride_gvb + begin * stride_gvt + kv_head * stride_gvh, key, stride_gvt)
    store_tile(dk_rows, exists, dk0 * scale, D, 0, D0)
    store_tile(dv_rows, exists, dv0, D, 0, D0)
    if D1 > 0:
        store_tile(dk_rows, exists, dk1 * scale, D, D0, D1)
        store_tile(dv_rows, exists, dv1, D, D0, D1)
