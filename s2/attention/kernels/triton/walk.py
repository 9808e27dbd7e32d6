"""What the kernels share that walk from a tile of queries over the keys which it sees: where the tile lies, and its key
tiles, from closed-form ranges (`index.key_plan`) or from block lists. Tiles that every row sees in full run first and
without a mask, then the few that need one.

Merge-Q: a tile of BLOCK_M rows holds `PACK` query heads of one KV head times `BLOCK_M / PACK` tokens, so a small block
still fills the matrix unit and K, V are read once for the packed heads.
"""

import triton
import triton.language as tl

from ..index import count_tiles, gather_positions, key_plan, nth_tile
from .documents import locate_tile
from .tiles import NEVER, consecutive_rows, gathered_rows


@triton.jit
def locate_program(inner, middle):
    """Coordinates `(inner, middle, batch)` of a program in a grid of one dimension, which has room for any sizes: the
    other two of a device's end at 65,535."""
    program = tl.program_id(0)
    rest = program // inner
    return program % inner, rest % middle, (rest // middle).to(tl.int64)


@triton.jit
def locate_queries(
    documents, q_len, kv_len, num_tiles, num_packs, TOKENS: tl.constexpr, PACKED: tl.constexpr, LATE: tl.constexpr
):  # fmt: skip
    """Of a program: first query and first key of its document, queries and keys there (0: nothing to do), tile, head of
    its packs, and batch. The longest rows come first."""
    nth, program_head, batch = locate_program(num_tiles, num_packs)
    if PACKED:
        q_begin, q_len, tile, kv_begin, kv_len = locate_tile(documents, num_tiles - 1 - nth, LATE)
        return q_begin.to(tl.int64), kv_begin.to(tl.int64), q_len, kv_len, tile, program_head, batch
    else:
        return 0, 0, q_len, kv_len, (kv_len - q_len) // TOKENS + num_tiles - 1 - nth, program_head, batch


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


@triton.jit
def _full_keys(n, full, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, LISTS: tl.constexpr):
    """Position of the first key of the n-th unmasked tile, or those of all if it holds several blocks."""
    per_block: tl.constexpr = BLOCK // BLOCK_N
    if LISTS:
        return tl.load(full + n // per_block) * BLOCK + (n % per_block) * BLOCK_N
    else:
        first, stride, index, _ = nth_tile(n, full)
        if BLOCK_N <= BLOCK:
            return (first + (index // per_block) * stride) * BLOCK + (index % per_block) * BLOCK_N
        else:
            return gather_positions(first, stride, index, BLOCK, BLOCK_N)


@triton.jit
def _full_rows(base, key, row_stride, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers to the rows at `_full_keys`."""
    if BLOCK_N <= BLOCK:
        return consecutive_rows(base, key, row_stride, BLOCK_N)
    else:
        return gathered_rows(base, key, row_stride)


@triton.jit
def _masked_keys(n, masked, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, LISTS: tl.constexpr):
    """Positions of the keys of the n-th masked tile."""
    if LISTS:
        return masked * BLOCK + n * BLOCK_N + tl.arange(0, BLOCK_N)
    else:
        first, stride, index, blocks = nth_tile(n, masked)
        key = gather_positions(first, stride, index, BLOCK, BLOCK_N)
        if BLOCK_N > BLOCK:
            key = tl.where(index * BLOCK_N + tl.arange(0, BLOCK_N) < blocks * BLOCK, key, NEVER)
        return key


@triton.jit
def walk_keys(
    STEP: tl.constexpr, state, rows, position, tile, q_len, kv_len, k, v, stride_kt, stride_vt, scale_log2, rule,
    key_offsets, key_blocks,
    TOKENS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """`state` after a `STEP` with every key tile that the rows of a query tile see; `k`, `v`: of the document's first
    token. What STEP gets of the rows is `rows`. `key_offsets`: of the head."""
    if LISTS:
        query_block = tile * TOKENS // BLOCK
        begin = tl.load(key_offsets + query_block)
        end = tl.load(key_offsets + query_block + 1)
        per_block: tl.constexpr = BLOCK // BLOCK_N
        has_diagonal = 0
        if end > begin:
            has_diagonal = (tl.load(key_blocks + end - 1) == query_block).to(tl.int32)
        num_full, num_masked = (end - begin - has_diagonal) * per_block, has_diagonal * per_block
        full, masked = key_blocks + begin, query_block
    else:
        first_row = tl.maximum(tile * TOKENS, kv_len - q_len)
        last_row = tl.minimum(tile * TOKENS + TOKENS, kv_len) - 1
        full, masked = key_plan(first_row, last_row, rule, BLOCK, BLOCK_N, LEVELS, SINKS)
        num_full, num_masked = count_tiles(full), count_tiles(masked)
    for n in tl.range(0, num_full, num_stages=STAGES):
        key = _full_keys(n, full, BLOCK, BLOCK_N, LISTS)
        k_rows, v_rows = _full_rows(k, key, stride_kt, BLOCK, BLOCK_N), _full_rows(v, key, stride_vt, BLOCK, BLOCK_N)
        state = STEP(
            state, rows, k_rows, v_rows, position, key, kv_len, scale_log2, rule,
            D, D0, D1, BLOCK, LEVELS, SINKS, LISTS, False,
        )  # fmt: skip
    for n in tl.range(0, num_masked, num_stages=1):
        key = _masked_keys(n, masked, BLOCK, BLOCK_N, LISTS)
        k_rows, v_rows = gathered_rows(k, key, stride_kt), gathered_rows(v, key, stride_vt)
        state = STEP(
            state, rows, k_rows, v_rows, position, key, kv_len, scale_log2, rule,
            D, D0, D1, BLOCK, LEVELS, SINKS, LISTS, True,
        )  # fmt: skip
    return state
