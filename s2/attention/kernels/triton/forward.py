"""Forward kernel: one program computes one tile of query rows against the key blocks its pattern keeps.

- Key tiles come from closed-form ranges (`indexing.key_plan`) or from block lists; tiles that every row sees in full
  run first and without a mask, then the few that need one.
- Merge-Q: a tile of BLOCK_M rows holds `PACK` query heads of one KV head times `BLOCK_M / PACK` tokens, so a small
  block still fills the matrix unit and K, V are read once for the packed heads.
- Softmax is online, in base 2.
"""

import triton
import triton.language as tl

from .documents import locate_tile
from .indexing import full_tile, full_tiles, gather_positions, key_plan, load_rule, masked_tile, masked_tiles
from .tiles import NEVER, consecutive_rows, dot, dot_add, gathered_rows, load_tile, store_tile, visible

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate_program(inner, middle):
    """Coordinates `(inner, middle, batch)` of a program in a grid of one dimension, which has room for any sizes: the
    other two of a device's end at 65,535."""
    program = tl.program_id(0)
    rest = program // inner
    return program % inner, rest % middle, (rest // middle).to(tl.int64)


@triton.jit
def locate_rows(program_head, tile, q_len, kv_len, BLOCK_M: tl.constexpr, PACK: tl.constexpr):
    """Rows of a query tile: positions `[BLOCK_M]` (in keys), rows of q, their limit check, and query heads."""
    row = tl.arange(0, BLOCK_M)
    tokens: tl.constexpr = BLOCK_M // PACK
    position = tile * tokens + row // PACK
    token = (position - (kv_len - q_len)).to(tl.int64)
    head = (program_head * PACK + row % PACK).to(tl.int64)
    valid = (token >= 0) & (token < q_len)
    return position, token, valid, head


@triton.jit(do_not_specialize=["q_len", "kv_len", "num_tiles", "num_packs", "list_stride"])
def attention_forward(
    q, k, v, out, lse,
    table, key_offsets, key_blocks, list_stride,
    documents, q_len, kv_len, scale_log2, num_tiles, num_packs, group,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    TABLE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr, STAGES: tl.constexpr,
    LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # q [B, Sq, Hq, D], k/v [B, Skv, Hkv, D] -> out [B, Sq, Hq, D], lse [B, Hq, Sq]; packed: B = 1, S = T, documents the
    # table of tiles
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
        tile = (kv_len - q_len) // tokens + num_tiles - 1 - nth  # the longest rows first
    kv_head = ((program_head * PACK) // group).to(tl.int64)

    position, token, valid, head = locate_rows(program_head, tile, q_len, kv_len, BLOCK_M, PACK)
    q_rows = q + batch * stride_qb + (begin + token) * stride_qt + head * stride_qh
    k += batch * stride_kb + begin * stride_kt + kv_head * stride_kh
    v += batch * stride_vb + begin * stride_vt + kv_head * stride_vh
    rule = load_rule(table + kv_head * TABLE, LEVELS, SINKS)

    q0 = load_tile(q_rows, valid, D, 0, D0, True)
    acc0 = tl.zeros([BLOCK_M, D0], dtype=tl.float32)
    if D1 > 0:
        q1 = load_tile(q_rows, valid, D, D0, D1, True)
        acc1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

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
        scores = dot(q0, k0.T)
        if D1 > 0:
            k1 = load_tile(k_rows, True, D, D0, D1, False)
            scores = dot_add(q1, k1.T, scores)
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        probs = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        row_max = new_max
        v0 = load_tile(v_rows, True, D, 0, D0, False)
        probs = probs.to(v0.dtype)
        acc0 = dot_add(probs, v0, acc0 * rescale[:, None])
        if D1 > 0:
            v1 = load_tile(v_rows, True, D, D0, D1, False)
            acc1 = dot_add(probs, v1, acc1 * rescale[:, None])

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
        scores = dot(q0, k0.T)
        if D1 > 0:
            k1 = load_tile(k_rows, exists, D, D0, D1, True)
            scores = dot_add(q1, k1.T, scores)
        seen = visible(position[:, None], key[None, :], rule, BLOCK, LEVELS, SINKS, LISTS)
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have seen nothing yet
        probs = tl.exp2(scores * scale_log2 - finite_max[:, None])
        rescale = tl.exp2(row_max - finite_max)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        row_max = new_max
        v0 = load_tile(v_rows, exists, D, 0, D0, True)
        probs = probs.to(v0.dtype)
        acc0 = dot_add(probs, v0, acc0 * rescale[:, None])
        if D1 > 0:
            v1 = load_tile(v_rows, exists, D, D0, D1, True)
            acc1 = dot_add(probs, v1, acc1 * rescale[:, None])

    empty = row_sum == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))
    out_rows = out + batch * stride_ob + (begin + token) * stride_ot + head * stride_oh
    store_tile(out_rows, valid, acc0 * inverse[:, None], D, 0, D0)
    if D1 > 0:
        store_tile(out_rows, valid, acc1 * inverse[:, None], D, D0, D1)
    log_sum = tl.where(empty, float("-inf"), (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * LN2)
    tl.store(lse + batch * stride_lb + head * stride_lh + begin + token, log_sum, mask=valid)
