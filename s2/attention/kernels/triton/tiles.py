"""Loading, multiplying and masking tiles: the parts that the forward and both backward kernels are made of.

Split-D: a head dimension D is processed in one or two parts of D0 and D1 columns (`config.split_head_dim`), so that
little or no matrix work is spent on padding; `D1 == 0` compiles to one part. Columns past D are read as zero.
"""

import triton
import triton.language as tl

from ..index import reach_of

NEVER = tl.constexpr(1 << 30)  # a position past every query


@triton.jit
def load_tile(rows, valid, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr):
    """Columns `[FROM, FROM + WIDTH)` of the rows that the pointers `rows` `[R]` point to; zero where not `valid`."""
    columns = FROM + tl.arange(0, WIDTH)
    pointers = rows[:, None] + columns[None, :]
    if FROM + WIDTH > D:
        if CHECK:
            return tl.load(pointers, mask=valid[:, None] & (columns < D)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        if CHECK:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def load_parts(rows, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, CHECK: tl.constexpr):
    """All columns, in parts."""
    if D1 > 0:
        return load_tile(rows, valid, D, 0, D0, CHECK), load_tile(rows, valid, D, D0, D1, CHECK)
    else:
        return (load_tile(rows, valid, D, 0, D0, CHECK),)


@triton.jit
def zero_parts(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    if D1 > 0:
        return tl.zeros([ROWS, D0], dtype=tl.float32), tl.zeros([ROWS, D1], dtype=tl.float32)
    else:
        return (tl.zeros([ROWS, D0], dtype=tl.float32),)


@triton.jit
def store_parts(rows, valid, parts, factor, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Writes `parts * factor`."""
    _store_tile(rows, valid, parts[0] * factor, D, 0, D0)
    if D1 > 0:
        _store_tile(rows, valid, parts[1] * factor, D, D0, D1)


@triton.jit
def _store_tile(rows, valid, value, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    columns = FROM + tl.arange(0, WIDTH)
    mask = valid[:, None] & (columns < D)[None, :]
    tl.store(rows[:, None] + columns[None, :], value.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def gathered_rows(base, positions, row_stride):
    """Pointers to any rows of a matrix."""
    return base + positions.to(tl.int64) * row_stride


@triton.jit
def consecutive_rows(base, start, row_stride, ROWS: tl.constexpr):
    """Pointers to rows `start, start + 1, ...`: one wide scalar offset, narrow offsets within the tile."""
    return base + tl.cast(start, tl.int64) * row_stride + tl.arange(0, ROWS) * row_stride


@triton.jit
def product(a, b):
    """`a @ b.T` of matrices in parts."""
    total = tl.dot(a[0], b[0].T, input_precision="ieee")
    if len(a) > 1:
        total = tl.dot(a[1], b[1].T, total, input_precision="ieee")
    return total


@triton.jit
def add_product(total, a, b):
    """`total + a @ b`, of which `total` and `b` are in parts."""
    first = tl.dot(a, b[0], total[0], input_precision="ieee")
    if len(b) > 1:
        return first, tl.dot(a, b[1], total[1], input_precision="ieee")
    else:
        return (first,)


@triton.jit
def rescaled(parts, factor):
    if len(parts) > 1:
        return parts[0] * factor, parts[1] * factor
    else:
        return (parts[0] * factor,)


@triton.jit
def softmax_step(scores, row_max, row_sum, scale_log2, MASKED: tl.constexpr, SPREAD: tl.constexpr = False):
    """Online softmax in base 2 over another tile of scores: its probabilities, the factor of what was summed before,
    and maxima and sums of the rows. `MASKED`: scores may be -inf. `SPREAD`: sums are of each column of the tiles, of
    which the caller makes those of the rows when all is done; in between no warp waits for another's."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    finite_max = new_max
    if MASKED:
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have seen nothing yet
    probs = tl.exp2(scores * scale_log2 - finite_max[:, None])
    rescale = tl.exp2(row_max - finite_max)
    if SPREAD:
        return probs, rescale, new_max, row_sum * rescale[:, None] + probs
    else:
        return probs, rescale, new_max, row_sum * rescale + tl.sum(probs, 1)


@triton.jit
def visible(query, key, rule, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr):
    """Bool mask by element for positions `query` and `key` (broadcast against each other)."""
    causal = key <= query
    if LISTS:  # the list names blocks that are kept whole
        return causal
    else:
        block = key // BLOCK
        return causal & (query // BLOCK - block < reach_of(block, rule, LEVELS, SINKS))
