"""Loading, multiplying and masking tiles: the parts that the forward and both backward kernels are made of.

Split-D: a head dimension D is processed in one or two parts of D0 and D1 columns (`config.split_head_dim`), so that
little or no matrix work is spent on padding; `D1 == 0` compiles to one part. Columns past D are read as zero.
"""

import triton
import triton.language as tl

from .indexing import reach_of

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
def store_tile(rows, valid, value, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
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
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def visible(query, key, rule, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr, LISTS: tl.constexpr):
    """Bool mask by element for positions `query` and `key` (broadcast against each other)."""
    causal = key <= query
    if LISTS:  # the list names blocks that are kept whole
        return causal
    else:
        block = key // BLOCK
        return causal & (query // BLOCK - block < reach_of(block, rule, LEVELS, SINKS))
