"""Forward kernel: one program computes one tile of query rows against the key blocks its pattern keeps (`walk`).
Softmax is online, in base 2."""

import triton
import triton.language as tl

from ..index import load_rule
from .tiles import add_product, load_parts, product, rescaled, softmax_step, store_parts, visible, zero_parts
from .walk import locate_queries, locate_rows, walk_keys

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _key_step(
    state, rows, k_rows, v_rows, position, key, kv_len, scale_log2, rule,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the softmax of the rows: a step of `walk_keys`."""
    exists = key < kv_len if MASKED else True
    scores = product(rows[0], load_parts(k_rows, exists, D, D0, D1, MASKED))
    if MASKED:
        seen = visible(position[:, None], key[None, :], rule, BLOCK, LEVELS, SINKS, LISTS)
        scores = tl.where(seen, scores, float("-inf"))
    probs, rescale, row_max, row_sum = softmax_step(scores, state[1], state[2], scale_log2, MASKED)
    v = load_parts(v_rows, exists, D, D0, D1, MASKED)
    acc = add_product(rescaled(state[0], rescale[:, None]), probs.to(v[0].dtype), v)
    return acc, row_max, row_sum


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
    LATE: tl.constexpr,
):  # fmt: skip
    # q [B, Sq, Hq, D], k/v [B, Skv, Hkv, D] -> out [B, Sq, Hq, D], lse [B, Hq, Sq]; packed: B = 1, S = T, documents the
    # table of tiles, LATE: those of queries at the end of longer keys
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
    k += batch * stride_kb + kv_begin * stride_kt + kv_head * stride_kh
    v += batch * stride_vb + kv_begin * stride_vt + kv_head * stride_vh
    rule = load_rule(table + kv_head * TABLE, LEVELS, SINKS)

    queries = load_parts(q, valid, D, D0, D1, True)
    acc = zero_parts(BLOCK_M, D0, D1)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc, row_max, row_sum = walk_keys(
        _key_step, (acc, row_max, row_sum), (queries,), position, tile, q_len, kv_len, k, v, stride_kt, stride_vt,
        scale_log2, rule, key_offsets + kv_head * list_stride, key_blocks,
        tokens, D, D0, D1, BLOCK, BLOCK_N, STAGES, LEVELS, SINKS, LISTS,
    )  # fmt: skip

    empty = row_sum == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))
    out += batch * stride_ob + (begin + token) * stride_ot + head * stride_oh
    store_parts(out, valid, acc, inverse[:, None], D, D0, D1)
    log_sum = tl.where(empty, float("-inf"), (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) * LN2)
    tl.store(lse + batch * stride_lb + head * stride_lh + begin + token, log_sum, mask=valid)
