"""Backward kernels. `delta = rowsum(dO * O) - dlse` comes first; then two kernels that need no atomics, so gradients
are the same bits every time:

- `attention_backward_q`: query tiles walk the same key tiles as the forward and accumulate dQ.
- `attention_backward_kv`: key tiles walk the run of queries that sees them and accumulate dK, dV. A tile holds blocks
  of one stride level (several columns of one residue, or neighbours of the local window), so small blocks fill it too.

With P = exp(scale * Q K^T - lse):  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale * dS K,  dK = scale * dS^T Q.
"""

import triton
import triton.language as tl

from ..index import key_tile, load_rule, member, reach_of
from .documents import locate_tile
from .forward import LOG2E
from .tiles import (
    NEVER,
    add_product,
    consecutive_rows,
    gathered_rows,
    load_parts,
    product,
    store_parts,
    visible,
    zero_parts,
)  # fmt: skip
from .walk import locate_program, locate_queries, locate_rows, walk_keys


@triton.jit
def attention_delta(
    out, dout, dlse, delta, length, num_heads,
    stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, stride_lb, stride_lh, stride_gb, stride_gh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    nth, head, batch = locate_program(tl.cdiv(length, BLOCK_M), num_heads)
    row = nth.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = head.to(tl.int64)
    valid = row < length
    o = load_parts(out + batch * stride_ob + head * stride_oh + row * stride_ot, valid, D, D0, D1, True)
    do = load_parts(dout + batch * stride_db + head * stride_dh + row * stride_dt, valid, D, D0, D1, True)
    total = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    if HAS_DLSE:
        total -= tl.load(dlse + batch * stride_gb + head * stride_gh + row, mask=valid, other=0.0)
    tl.store(delta + batch * stride_lb + head * stride_lh + row, total, mask=valid)


@triton.jit
def _load_statistics(lse, delta, at, valid):
    """Log-sum-exp in base 2, inf for rows without keys: there P is 0; and delta."""
    row_lse = tl.load(lse + at, mask=valid, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    return row_lse, tl.load(delta + at, mask=valid, other=0.0)


@triton.jit
def _key_step(
    dq, rows, k_rows, v_rows, position, key, kv_len, scale_log2, rule,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dQ with a tile of keys added: a step of `walk_keys`."""
    q, dout, row_lse, row_delta = rows
    exists = key < kv_len if MASKED else True
    k = load_parts(k_rows, exists, D, D0, D1, MASKED)
    v = load_parts(v_rows, exists, D, D0, D1, MASKED)
    scores = product(q, k)
    dprobs = product(dout, v)
    probs = tl.exp2(scores * scale_log2 - row_lse[:, None])
    if MASKED:
        seen = visible(position[:, None], key[None, :], rule, BLOCK, LEVELS, SINKS, LISTS)
        probs = tl.where(seen, probs, 0.0)
    dscores = (probs * (dprobs - row_delta[:, None])).to(k[0].dtype)
    return add_product(dq, dscores, k)


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
    LATE: tl.constexpr,
):  # fmt: skip
    tokens: tl.constexpr = BLOCK_M // PACK
    begin, kv_begin, q_len, kv_len, tile, program_head, batch = locate_queries(
        documents, q_len, kv_len, num_tiles, num_packs, tokens, PACKED, LATE
    )
    if PACKED:  # noqa: SIM102 (known when the kernel is compiled)
        if q_len <= 0:
            return
    kv_head = ((program_head * PACK) // group).to(tl.int64)

    position, token, valid, head = locate_rows(program_head, tile, q_len, kv_len, BLOCK_M, PACK)
    q += batch * stride_qb + (begin + token) * stride_qt + head * stride_qh
    dout += batch * stride_ob + (begin + token) * stride_ot + head * stride_oh
    k += batch * stride_kb + kv_begin * stride_kt + kv_head * stride_kh
    v += batch * stride_vb + kv_begin * stride_vt + kv_head * stride_vh
    rule = load_rule(table + kv_head * TABLE, LEVELS, SINKS)
    scale_log2 = scale * LOG2E

    row_lse, row_delta = _load_statistics(lse, delta, batch * stride_lb + head * stride_lh + begin + token, valid)
    queries = load_parts(q, valid, D, D0, D1, True)
    gradients = load_parts(dout, valid, D, D0, D1, True)
    acc = zero_parts(BLOCK_M, D0, D1)
    acc = walk_keys(
        _key_step, acc, (queries, gradients, row_lse, row_delta), position, tile, q_len, kv_len, k, v, stride_kt,
        stride_vt, scale_log2, rule, key_offsets + kv_head * list_stride, key_blocks,
        tokens, D, D0, D1, BLOCK, BLOCK_N, STAGES, LEVELS, SINKS, LISTS,
    )  # fmt: skip

    dq += batch * stride_gb + (begin + token) * stride_gt + head * stride_gh
    store_parts(dq, valid, acc, scale, D, D0, D1)


@triton.jit
def _query_step(
    dk, dv, k, v, q, dout, lse, delta,
    key, start, offset, q_len, scale_log2, stride_qt, stride_ot, rule,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dK and dV with the query rows `start, start + 1, ...` (at positions + `offset`) added; rows outside `[0, q_len)`
    add nothing. Works on S^T = K Q^T, so that P^T and dS^T are the left operands of both products untransposed."""
    lanes = tl.arange(0, BLOCK_M)
    token = start + lanes
    valid = (token >= 0) & (token < q_len)
    queries = load_parts(consecutive_rows(q, start, stride_qt, BLOCK_M), valid, D, D0, D1, True)
    gradients = load_parts(consecutive_rows(dout, start, stride_ot, BLOCK_M), valid, D, D0, D1, True)
    row_lse, row_delta = _load_statistics(lse, delta, start + lanes, valid)
    probs = tl.exp2(product(k, queries) * scale_log2 - row_lse[None, :])
    if MASKED:
        seen = visible((token + offset)[None, :], key[:, None], rule, BLOCK, LEVELS, SINKS, LISTS)
        probs = tl.where(seen, probs, 0.0)
    dv = add_product(dv, probs.to(gradients[0].dtype), gradients)
    dscores = (probs * (product(v, gradients) - row_delta[None, :])).to(queries[0].dtype)
    return add_product(dk, dscores, queries), dv


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
    LATE: tl.constexpr,
):  # fmt: skip
    # heads vary fastest: all heads start with their longest columns
    kv_head, tile, batch = locate_program(kv_heads, num_tiles)
    kv_head = kv_head.to(tl.int64)
    if PACKED:
        begin, q_len, tile, kv_begin, kv_len = locate_tile(documents, tile, LATE)
        if kv_len <= 0:
            return
        begin, kv_begin = begin.to(tl.int64), kv_begin.to(tl.int64)
    else:
        begin, kv_begin = 0, 0
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

    k += batch * stride_kb + kv_begin * stride_kt + kv_head * stride_kh
    v += batch * stride_vb + kv_begin * stride_vt + kv_head * stride_vh
    q += batch * stride_qb + begin * stride_qt + kv_head * group * stride_qh
    dout += batch * stride_ob + begin * stride_ot + kv_head * group * stride_oh
    statistics = batch * stride_lb + kv_head * group * stride_lh + begin
    lse += statistics
    delta += statistics

    exists = key < kv_len
    keys = load_parts(gathered_rows(k, key, stride_kt), exists, D, D0, D1, True)
    values = load_parts(gathered_rows(v, key, stride_vt), exists, D, D0, D1, True)
    dk_acc = zero_parts(BLOCK_N, D0, D1)
    dv_acc = zero_parts(BLOCK_N, D0, D1)
    scale_log2 = scale * LOG2E

    if LISTS:
        per_block: tl.constexpr = BLOCK // BLOCK_M
        # lists reach as far as documents that have queries
        listed = tl.where(q_len > 0, key_block, 0) if LATE else key_block
        list_begin = tl.load(query_offsets + kv_head * list_stride + listed)
        list_end = tl.load(query_offsets + kv_head * list_stride + listed + 1)
        if LATE:
            list_end = tl.where(q_len > 0, list_end, list_begin)
        num_masked = (list_end - list_begin) * per_block
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
        num_masked = head_tiles + tl.cdiv(tl.maximum(run_end - tail_begin, 0), BLOCK_M)

        for n in tl.range(0, full_steps * group, num_stages=STAGES):
            head = (n % group).to(tl.int64)
            start = full_begin + (n // group) * BLOCK_M
            dk_acc, dv_acc = _query_step(
                dk_acc, dv_acc, keys, values,
                q + head * stride_qh, dout + head * stride_oh, lse + head * stride_lh, delta + head * stride_lh,
                key, start, offset, q_len, scale_log2, stride_qt, stride_ot, rule,
                D, D0, D1, BLOCK, BLOCK_M, LEVELS, SINKS, LISTS, False,
            )  # fmt: skip
    for n in tl.range(0, num_masked * group, num_stages=1):
        head = (n % group).to(tl.int64)
        step = n // group
        if LISTS:
            query_block = tl.load(query_blocks + list_begin + step // per_block)
            start = query_block * BLOCK + (step % per_block) * BLOCK_M - offset
        else:
            start = tl.where(step < head_tiles, run_begin, tail_begin - head_tiles * BLOCK_M) + step * BLOCK_M
        dk_acc, dv_acc = _query_step(
            dk_acc, dv_acc, keys, values,
            q + head * stride_qh, dout + head * stride_oh, lse + head * stride_lh, delta + head * stride_lh,
            key, start, offset, q_len, scale_log2, stride_qt, stride_ot, rule,
            D, D0, D1, BLOCK, BLOCK_M, LEVELS, SINKS, LISTS, True,
        )  # fmt: skip

    dk += batch * stride_gkb + kv_begin * stride_gkt + kv_head * stride_gkh
    dv += batch * stride_gvb + kv_begin * stride_gvt + kv_head * stride_gvh
    store_parts(gathered_rows(dk, key, stride_gkt), exists, dk_acc, scale, D, D0, D1)
    store_parts(gathered_rows(dv, key, stride_gvt), exists, dv_acc, 1.0, D, D0, D1)
