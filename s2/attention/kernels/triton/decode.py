"""Decode kernel: the last few queries of each sequence against the keys that the regions of a KV head hold.

The rows of a program are all query heads of one KV head times the new tokens, so a key is read once. The key tiles of a
head are divided among programs (`decode_plan`), and what these found is merged by the last of them to arrive: a second
kernel would wait for the whole grid and cost every layer another launch. Which program merges is left to chance, but
not what is merged in which order: results repeat bit for bit.
"""

import triton
import triton.language as tl

from .decode_plan import HEADER, find_tile, load_ranges, load_words
from .forward import LN2
from .tiles import (
    add_product,
    consecutive_rows,
    gathered_rows,
    load_parts,
    product,
    rescaled,
    softmax_step,
    store_parts,
    zero_parts,
)


@triton.jit
def key_step(
    state, queries, k_rows, v_rows, exists, seen, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr, SPREAD: tl.constexpr = False,
):  # fmt: skip
    """Adds a tile of keys to the softmax of the rows. Both loads come first, so that a tile outside the pipelined loop
    waits once."""
    keys, values = load_parts(k_rows, exists, D, D0, D1, MASKED), load_parts(v_rows, exists, D, D0, D1, MASKED)
    scores = product(queries, keys)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    probs, rescale, row_max, row_sum = softmax_step(scores, state[1], state[2], scale_log2, MASKED, SPREAD)
    acc = add_product(rescaled(state[0], rescale[:, None]), probs.to(values[0].dtype), values)
    return acc, row_max, row_sum


@triton.jit
def _walk_share(
    queries, position, begin, end, ranges, k, v, stride_kt, stride_vt, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of values, maxima and sums of probabilities of the rows over tiles `begin` to `end` of the ranges. All tiles
    are masked: few need it, but a loop of their own would begin when the others' ends, and wait for memory again."""
    SPREAD: tl.constexpr = ROWS <= 32  # sums of more rows would not fit the registers
    state = (
        zero_parts(ROWS, D0, D1),
        tl.full([ROWS], float("-inf"), dtype=tl.float32),
        tl.zeros([ROWS, TILE] if SPREAD else [ROWS], dtype=tl.float32),
    )
    for n in tl.range(begin, end, num_stages=STAGES):
        index, found = find_tile(n, ranges)
        _, start, region_end, slots, member, tokens, stride, residue, near, far = found
        first = index * TILE
        offset = first + tl.arange(0, TILE)
        exists = offset < tokens
        place = offset if TILE > BLOCK else first  # of a tile within a block the first slot is enough
        slot, block = start + place, residue + (member + place // BLOCK) * stride
        slot = tl.where(slot >= region_end, slot - slots, slot)
        if TILE > BLOCK:
            k_rows, v_rows = gathered_rows(k, slot, stride_kt), gathered_rows(v, slot, stride_vt)
        else:
            k_rows, v_rows = consecutive_rows(k, slot, stride_kt, TILE), consecutive_rows(v, slot, stride_vt, TILE)
        distance = position[:, None] // BLOCK - (block[None, :] if TILE > BLOCK else block)
        key = block * BLOCK + offset % BLOCK
        seen = exists[None, :] & (distance >= near) & (distance < far) & (key[None, :] <= position[:, None])
        state = key_step(state, queries, k_rows, v_rows, exists, seen, scale_log2, D, D0, D1, True, SPREAD)
    return state[0], state[1], tl.sum(state[2], 1) if SPREAD else state[2]


@triton.jit
def merge(
    partials, logs, first, step, parts, valid,
    D: tl.constexpr, WIDTH: tl.constexpr, STORED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Outputs `[STORED, WIDTH]` and logarithms (base 2) of `[STORED]` rows from those of `parts` programs, of which
    every `step`-th from `first` is one; CHUNK of them at a time, always in the same order."""
    row, column = tl.arange(0, STORED), tl.arange(0, WIDTH)
    total, top = tl.zeros([STORED], dtype=tl.float32), tl.full([STORED], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([STORED, WIDTH], dtype=tl.float32)
    for begin in tl.range(0, parts, CHUNK):
        part = begin + tl.arange(0, CHUNK)
        there = (part < parts)[:, None] & valid[None, :]
        at = (first + part * step).to(tl.int64)[:, None] * STORED + row[None, :]
        # .cg: what other processors wrote is in L2
        log = tl.load(logs + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        whole = there[:, :, None] & (column < D)[None, None, :]
        values = tl.load(
            partials + at[:, :, None] * D + column[None, None, :], mask=whole, other=0.0, cache_modifier=".cg"
        )
        new_top = tl.maximum(top, tl.max(log, 0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, rescale = tl.exp2(log - finite_top[None, :]), tl.exp2(top - finite_top)
        total = total * rescale + tl.sum(weight, 0)
        sums = sums * rescale[:, None] + tl.sum(values * weight[:, :, None], 0)
        top = new_top
    some = tl.where(total == 0.0, 1.0, total)
    return sums / some[:, None], tl.where(total == 0.0, float("-inf"), top + tl.log2(some))


@triton.jit
def attention_decode(
    q, k, v, out, lse, shares, partials, logs, arrivals, scale_log2,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, REGIONS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    STORED: tl.constexpr, ROW_TILES: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, SEQUENCES: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    # q [B, S, Hq, D], k/v [B, Hkv, C, D], shares [programs of a head, Hkv, WORDS] -> out [B, S, Hq, D], lse [B, S, Hq];
    # of each program partials [STORED, D] and logs [STORED]; arrivals [B, Hkv, ROW_TILES], zero before and after
    nth, head, row_tile = tl.program_id(0), tl.program_id(1) // ROW_TILES, tl.program_id(1) % ROW_TILES
    kv_heads = tl.num_programs(1) // ROW_TILES
    program = nth * tl.num_programs(1) + tl.program_id(1)
    share = shares + (nth * kv_heads + head).to(tl.int64) * WORDS
    header = load_words(share, HEADER)
    ranges = load_ranges(share, REGIONS)
    length, part, parts = header[1], header[2], header[3]
    batch = header[0]
    if SEQUENCES < 2:  # each program has its own, or all have one: the queries need not wait for the share
        batch = nth if SEQUENCES == 0 else nth * 0

    row = row_tile * ROWS + tl.arange(0, ROWS)
    token, group_head = row // GROUP, row % GROUP
    valid = token < TOKENS
    wide_batch, wide_head = batch.to(tl.int64), head.to(tl.int64)
    q += wide_batch * stride_qb + wide_head * GROUP * stride_qh
    queries = load_parts(q + token * stride_qt + group_head * stride_qh, valid, D, D0, D1, True)
    acc, row_max, row_sum = _walk_share(
        queries, length - TOKENS + token, header[4], header[5], ranges,
        k + wide_batch * stride_kb + wide_head * stride_kh, v + wide_batch * stride_vb + wide_head * stride_vh,
        stride_kt, stride_vt, scale_log2, D, D0, D1, BLOCK, TILE, ROWS, STAGES,
    )  # fmt: skip

    some = tl.where(row_sum == 0.0, 1.0, row_sum)
    log = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(some))
    # the rows of a head's tokens in out and lse
    first_row = wide_batch * TOKENS * kv_heads * GROUP + wide_head * GROUP
    target = first_row + token * (kv_heads * GROUP) + group_head
    if parts == 1:
        store_parts(out + target * D, valid, acc, (1.0 / some)[:, None], D, D0, D1)
        tl.store(lse + target, log * LN2, mask=valid)
    elif parts > 1:
        own = program.to(tl.int64) * STORED + tl.arange(0, ROWS)
        store_parts(partials + own * D, valid, acc, (1.0 / some)[:, None], D, D0, D1)
        tl.store(logs + own, log, mask=valid)
        tl.debug_barrier()  # the arrival, of one thread, tells of what all have written
        counter = arrivals + (batch * kv_heads + head) * ROW_TILES + row_tile
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
            stored = row_tile * ROWS + tl.arange(0, STORED)
            merged_rows = first_row + stored // GROUP * (kv_heads * GROUP) + stored % GROUP
            step, column = kv_heads * ROW_TILES, tl.arange(0, WIDTH)
            exists = stored < TOKENS * GROUP
            merged, merged_log = merge(
                partials, logs, program - part * step, step, parts, exists, D, WIDTH, STORED, CHUNK
            )
            tl.store(lse + merged_rows, merged_log * LN2, mask=exists)
            pointers = out + merged_rows[:, None] * D + column[None, :]
            tl.store(pointers, merged.to(out.dtype.element_ty), mask=exists[:, None] & (column < D)[None, :])
            tl.store(counter, 0)  # for the next launch
