"""Attention to keys in pages, and writing new ones: any number of the newest queries of each sequence, whose keys stand
in pages that a table names, a block of the pattern in each.

A tile is `TOKENS` queries of one sequence times `PACK` query heads of one KV head. Its key tiles are those of
`index.key_plan`, so that of the table and of the pages only what some row sees is read. KV heads may have pages and
tables of their own: `offsets` says by how many UNITs of elements those of each are behind those of the first. Few tiles
with many keys are divided among programs, merged as in `decode`.
"""

import triton
import triton.language as tl

from ..index import count_tiles, gather_positions, key_plan, load_rule, nth_tile
from .decode import key_step, merge
from .forward import LN2
from .tiles import NEVER, consecutive_rows, load_parts, store_parts, visible, zero_parts
from .walk import locate_program

SLACK = tl.constexpr(2)  # tiles of a sequence more than its queries fill: both ends of them may be cut


@triton.jit
def locate_tile(tile, cu_seqlens, seq_lens, num_sequences, TOKENS: tl.constexpr, WHOLE: tl.constexpr):
    """`(sequence, row of its first query, queries, keys, first query of the tile)`. WHOLE: a tile is a sequence. Else
    the first query may be negative, since tiles begin at positions that are multiples of TOKENS, and tiles behind the
    last query have nothing to do."""
    if WHOLE:
        row = tl.load(cu_seqlens + tile)
        q_len, kv_len = tl.load(cu_seqlens + tile + 1) - row, tl.load(seq_lens + tile)
        return tile, row.to(tl.int64), q_len, kv_len, 0
    else:
        begin = tl.load(cu_seqlens)
        low, high = tile * 0, num_sequences
        while high - low > 1:
            middle = (low + high) // 2
            behind = (tl.load(cu_seqlens + middle) - begin) // TOKENS + SLACK * middle > tile
            low, high = tl.where(behind, low, middle), tl.where(behind, middle, high)
        row = tl.load(cu_seqlens + low)
        q_len, kv_len = tl.load(cu_seqlens + low + 1) - row, tl.load(seq_lens + low)
        nth = tile - (row - begin) // TOKENS - SLACK * low
        return low, row.to(tl.int64), q_len, kv_len, nth * TOKENS - tl.maximum(kv_len - q_len, 0) % TOKENS


@triton.jit
def _places(base, offsets, head, COLUMN: tl.constexpr, UNIT: tl.constexpr):
    """`base`, of the first KV head, moved to `head`. The pointer is known to be as aligned as UNITs are."""
    return base + tl.load(offsets + head * 3 + COLUMN) * UNIT


@triton.jit
def _full_rows(base, first, stride, index, table, stride_page, stride_token, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Pointers to the keys of an unmasked tile."""
    if TILE <= BLOCK:
        per_block: tl.constexpr = BLOCK // TILE
        page = tl.load(table + first + index // per_block * stride).to(tl.int64)
        return consecutive_rows(base + page * stride_page, index % per_block * TILE, stride_token, TILE)
    else:
        key = gather_positions(first, stride, index, BLOCK, TILE)
        page = tl.load(table + key // BLOCK).to(tl.int64)
        return base + page * stride_page + key % BLOCK * stride_token


@triton.jit
def _masked_keys(first, stride, index, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    key = gather_positions(first, stride, index, BLOCK, TILE)
    if TILE > BLOCK:
        key = tl.where(index * TILE + tl.arange(0, TILE) < blocks * BLOCK, key, NEVER)
    return key


@triton.jit
def _walk_pages(
    queries, position, begin, end, full, masked, kv_len, k, v, table, stride_kp, stride_kt, stride_vp, stride_vt,
    scale_log2, rule,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Sums of values, maxima and sums of probabilities of the rows over key tiles `begin` to `end` of a plan."""
    state = (
        zero_parts(BLOCK_M, D0, D1),
        tl.full([BLOCK_M], float("-inf"), dtype=tl.float32),
        tl.zeros([BLOCK_M], dtype=tl.float32),
    )
    num_full = count_tiles(full)
    for n in tl.range(begin, tl.minimum(end, num_full), num_stages=STAGES):
        first, stride, index, _ = nth_tile(n, full)
        k_rows = _full_rows(k, first, stride, index, table, stride_kp, stride_kt, BLOCK, BLOCK_N)
        v_rows = _full_rows(v, first, stride, index, table, stride_vp, stride_vt, BLOCK, BLOCK_N)
        state = key_step(state, queries, k_rows, v_rows, True, True, scale_log2, D, D0, D1, False)
    for n in tl.range(tl.maximum(begin - num_full, 0), end - num_full, num_stages=1):
        first, stride, index, blocks = nth_tile(n, masked)
        key = _masked_keys(first, stride, index, blocks, BLOCK, BLOCK_N)
        exists = key < kv_len
        page = tl.load(table + key // BLOCK, mask=exists, other=0).to(tl.int64)
        k_rows = k + page * stride_kp + key % BLOCK * stride_kt
        v_rows = v + page * stride_vp + key % BLOCK * stride_vt
        seen = visible(position[:, None], key[None, :], rule, BLOCK, LEVELS, SINKS, False)
        state = key_step(state, queries, k_rows, v_rows, exists, seen, scale_log2, D, D0, D1, True)
    return state


# parts of a batch begin anywhere, and tables are of any width: none of it is to need a kernel of its own
_UNALIGNED = ["tables", "seq_lens", "cu_seqlens"]


@triton.jit(
    do_not_specialize=["num_sequences", "num_tiles", "num_packs", "splits", "stride_table"],
    do_not_specialize_on_alignment=_UNALIGNED,
)
def attention_paged(
    q, k, v, out, lse, tables, offsets, rules, seq_lens, cu_seqlens, partials, logs, arrivals,
    num_sequences, num_tiles, num_packs, splits, scale_log2,
    stride_qt, stride_qh, stride_kp, stride_kt, stride_vp, stride_vt, stride_table, stride_ot, stride_oh, stride_lt,
    TABLE: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, TOKENS: tl.constexpr, WHOLE: tl.constexpr,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STORED: tl.constexpr, SPLIT: tl.constexpr, LEAST: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    # q [T, Hq, D], k/v [pages, BLOCK, D] and tables [B, n] of a KV head, offsets [Hkv, 3], rules [Hkv, TABLE], seq_lens
    # [B], cu_seqlens [B + 1] -> out [T, Hq, D], lse [T, Hq]; of each program partials [STORED, D] and logs [STORED];
    # arrivals [num_tiles, num_packs], zero before and after
    program_head, nth, part = locate_program(num_packs, num_tiles)
    tile = num_tiles - 1 - nth  # the longest rows come first
    sequence, row_of_first, q_len, kv_len, first_token = locate_tile(
        tile, cu_seqlens, seq_lens, num_sequences, TOKENS, WHOLE
    )
    if first_token >= q_len:
        return
    kv_head = program_head * PACK // GROUP
    rule = load_rule(rules + kv_head * TABLE, LEVELS, SINKS)
    first_row = tl.maximum(kv_len - q_len + tl.maximum(first_token, 0), 0)
    last_row = tl.minimum(kv_len - q_len + first_token + TOKENS, kv_len) - 1
    full, masked = key_plan(first_row, tl.maximum(last_row, first_row), rule, BLOCK, BLOCK_N, LEVELS, SINKS)
    count = tl.where(last_row < first_row, 0, count_tiles(full) + count_tiles(masked))
    parts, begin, end = 1, 0, count
    if SPLIT:
        parts = tl.maximum(tl.minimum(tl.cdiv(count, LEAST), splits), 1)
        begin, end = (part * count // parts).to(tl.int32), ((part + 1) * count // parts).to(tl.int32)
        if part >= parts:
            return

    row = tl.arange(0, BLOCK_M)
    token = first_token + row // PACK
    valid = (row // PACK < TOKENS) & (token >= 0) & (token < q_len)
    head = program_head * PACK + row % PACK
    target = row_of_first + token
    queries = load_parts(q + target * stride_qt + head.to(tl.int64) * stride_qh, valid, D, D0, D1, True)
    acc, row_max, row_sum = _walk_pages(
        queries, kv_len - q_len + token, begin, end, full, masked, kv_len,
        _places(k, offsets, kv_head, 0, UNIT), _places(v, offsets, kv_head, 1, UNIT),
        _places(tables, offsets, kv_head, 2, 1) + sequence.to(tl.int64) * stride_table,
        stride_kp, stride_kt, stride_vp, stride_vt, scale_log2, rule,
        D, D0, D1, BLOCK, BLOCK_M, BLOCK_N, STAGES, LEVELS, SINKS,
    )  # fmt: skip

    some = tl.where(row_sum == 0.0, 1.0, row_sum)
    log = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(some))
    if parts == 1:
        out_rows = out + target * stride_ot + head.to(tl.int64) * stride_oh
        store_parts(out_rows, valid, acc, (1.0 / some)[:, None], D, D0, D1)
        tl.store(lse + target * stride_lt + head, log * LN2, mask=valid)
    elif SPLIT:  # always; where it is False, what follows is not compiled
        unit = nth.to(tl.int64) * num_packs + program_head
        handed = row < STORED
        own = (unit * splits + part) * STORED + row
        store_parts(partials + own * D, handed, acc, (1.0 / some)[:, None], D, D0, D1)
        tl.store(logs + own, log, mask=handed)
        tl.debug_barrier()  # the arrival, of one thread, tells of what all have written
        if tl.atomic_add(arrivals + unit, 1, sem="acq_rel", scope="gpu") == parts - 1:
            stored, column = tl.arange(0, STORED), tl.arange(0, WIDTH)
            merged_token, merged_head = first_token + stored // PACK, program_head * PACK + stored % PACK
            exists = (stored // PACK < TOKENS) & (merged_token >= 0) & (merged_token < q_len)
            merged, merged_log = merge(partials, logs, unit * splits, 1, parts, exists, D, WIDTH, STORED, CHUNK)
            merged_row = row_of_first + merged_token
            tl.store(lse + merged_row * stride_lt + merged_head, merged_log * LN2, mask=exists)
            pointers = out + (merged_row * stride_ot + merged_head.to(tl.int64) * stride_oh)[:, None] + column[None, :]
            tl.store(pointers, merged.to(out.dtype.element_ty), mask=exists[:, None] & (column < D)[None, :])
            tl.store(arrivals + unit, 0)  # for the next launch


@triton.jit(do_not_specialize=["num_sequences", "kv_heads", "stride_table"], do_not_specialize_on_alignment=_UNALIGNED)
def write_pages(
    new_k, new_v, k, v, tables, offsets, seq_lens, cu_seqlens, num_sequences, kv_heads,
    stride_nkt, stride_nkh, stride_nvt, stride_nvh, stride_kp, stride_kt, stride_vp, stride_vt, stride_table,
    UNIT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Puts the newest keys and values of each sequence, `[T, Hkv, D]`, where the tables say."""
    kv_head, tile, _ = locate_program(kv_heads, tl.num_programs(0))
    sequence, row_of_first, q_len, kv_len, first_token = locate_tile(
        tile, cu_seqlens, seq_lens, num_sequences, TOKENS, False
    )
    token = first_token + tl.arange(0, TOKENS)
    position = kv_len - q_len + token
    valid = (token >= 0) & (token < q_len) & (position >= 0)
    table = _places(tables, offsets, kv_head, 2, 1) + sequence.to(tl.int64) * stride_table
    page = tl.load(table + position // BLOCK, mask=valid, other=0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = valid[:, None] & (column < D)[None, :]
    source, slot = row_of_first + token, position % BLOCK
    k_rows = _places(k, offsets, kv_head, 0, UNIT) + page * stride_kp + slot * stride_kt
    v_rows = _places(v, offsets, kv_head, 1, UNIT) + page * stride_vp + slot * stride_vt
    keys = tl.load((new_k + source * stride_nkt + kv_head * stride_nkh)[:, None] + column[None, :], mask=mask)
    values = tl.load((new_v + source * stride_nvt + kv_head * stride_nvh)[:, None] + column[None, :], mask=mask)
    tl.store(k_rows[:, None] + column[None, :], keys, mask=mask)
    tl.store(v_rows[:, None] + column[None, :], values, mask=mask)
