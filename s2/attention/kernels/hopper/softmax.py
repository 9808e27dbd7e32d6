"""Online softmax of score tiles `[64, 64]` in base 2, for a warpgroup that holds them as results of its products.

A thread has 16 scores of each of two rows, and four threads of a warp have those rows whole. Each keeps its own part of
the rows' statistics, `[64, 4]` in the layout `PARTS`: maxima, the same in all four, and sums of its own columns, which
are added up at the end.

A maximum is replaced only by one that is more than `LAZY` larger: probabilities stay below `2^LAZY`, which float32 sums
and bfloat16 and float16 factors hold. Most steps keep all maxima. So every thread first looks for such a score among
its own, and only warps that have one compare theirs and multiply what was added up before. Gluon has no branch that
each warp takes for itself, hence the PTX.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .rows import KEYS, ROWS

LAZY = gl.constexpr(8.0)
PARTS = gl.constexpr(
    gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4])
)


@gluon.jit
def _own_max(x):
    """The largest of a thread's own elements of each of its rows, `[64, 64]` -> `[64, 4]`, in few dependent steps."""
    x = gl.max(gl.max(x.reshape([ROWS, KEYS // 16, 2, 4, 2]), 4), 2)
    return gl.convert_layout(gl.max(x, 1), PARTS, assert_trivial=True)


@gluon.jit
def _own_sum(x):
    """Their sums, likewise."""
    x = gl.sum(gl.sum(x.reshape([ROWS, KEYS // 16, 2, 4, 2]), 4), 2)
    return gl.convert_layout(gl.sum(x, 1), PARTS, assert_trivial=True)


@gluon.jit
def _spread(parts, like):
    """Parts `[64, 4]` beside the elements of a product `[64, columns]` that are a thread's."""
    columns: gl.constexpr = like.shape[1]
    wide = parts
    for _ in gl.static_range(4 if columns == 64 else 5):
        wide = gl.join(wide, wide)
    wide = wide.reshape([ROWS, 4, columns // 8, 2]).permute([0, 2, 1, 3]).reshape([ROWS, columns])
    return gl.convert_layout(wide, like.type.layout, assert_trivial=True)


@gluon.constexpr_function
def _raise_ptx(lazy):
    """New maxima and factors of a thread's two rows from its own maxima and the old ones. Only where a lane of the warp
    has one that is `lazy` larger, the four lanes of each row compare theirs."""
    find = " ".join(
        f"shfl.sync.bfly.b32 other, top{row}, {distance}, 0x1f, 0xffffffff; max.f32 top{row}, top{row}, other;"
        for distance in (1, 2)
        for row in (0, 1)
    )
    replace = " ".join(
        f"setp.gt.f32 own, top{row}, bar{row}; @own mov.f32 ${row}, top{row}; "
        f"sub.f32 other, ${6 + row}, ${row}; ex2.approx.ftz.f32 ${2 + row}, other;"
        for row in (0, 1)
    )
    return (
        "{ .reg .f32 top<2>, bar<2>, other; .reg .pred grown, own; "
        "mov.f32 top0, $4; mov.f32 top1, $5; mov.f32 $0, $6; mov.f32 $1, $7; mov.f32 $2, 1.0; mov.f32 $3, 1.0; "
        f"add.f32 bar0, $6, {lazy}; add.f32 bar1, $7, {lazy}; "
        "setp.gt.f32 grown, top0, bar0; setp.gt.or.f32 grown, top1, bar1, grown; "
        f"vote.sync.any.pred grown, grown, 0xffffffff; @!grown bra DONE; {find} {replace} DONE: }}"
    )


@gluon.constexpr_function
def _pack_ptx(element):
    return {"bf16": "cvt.rn.bf16x2.f32", "fp16": "cvt.rn.f16x2.f32"}[str(element)] + " $0, $2, $1;"


@gluon.jit
def _pack(probs, like):
    """In the type of `like`, in pairs as a product takes them; taken apart they would have to be put together again."""
    return gl.inline_asm_elementwise(
        _pack_ptx(like.dtype), "=r,f,f", [probs], dtype=like.dtype, is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def softmax_step(scores, row_max, row_sum, scale, like):
    """Probabilities of scores `[64, 64]`, in the type of `like`, then maxima and sums of their rows (`PARTS`) and the
    factors of what was added up before. `scale`: positive, with log2 e in it. Maxima are -inf before the first scores,
    of which every row must have one that is not (else it is NaN)."""
    row_max, factors = gl.inline_asm_elementwise(
        _raise_ptx(LAZY), "=&f,=&f,=&f,=&f,f,f,f,f", [_own_max(scores) * scale, row_max],
        dtype=(gl.float32, gl.float32), is_pure=True, pack=2,
    )  # fmt: skip
    probs = gl.exp2(scores * scale - _spread(row_max, scores))
    return _pack(probs, like), row_max, row_sum * factors + _own_sum(probs), factors


@gluon.constexpr_function
def _product_ptx(count):
    """PTX that multiplies `count` values by as many factors, if a lane of the warp has one that is not 1. Asked are the
    first and the third: elements of a thread come in pairs, in turn of the one and the other of its rows."""
    moves = " ".join(f"mov.f32 ${i}, ${count + i};" for i in range(count))
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return (
        f"{{ .reg .pred p; {moves} "
        f"setp.ne.f32 p, ${2 * count}, 0f3F800000; setp.ne.or.f32 p, ${2 * count + 2}, 0f3F800000, p; "
        f"vote.sync.any.pred p, p, 0xffffffff; @!p bra DONE; {products} DONE: }}"
    )


@gluon.constexpr_function
def _operands(count):
    return ",".join(["=&f"] * count + ["f"] * (2 * count))


@gluon.jit
def multiply_rows(acc, factors):
    """A product `[64, columns]` times the factors of its rows, skipped by warps all of whose factors are 1 (or NaN: the
    sum of such a row is NaN too)."""
    count: gl.constexpr = acc.shape[0] * acc.shape[1] // 128  # of a thread
    return gl.inline_asm_elementwise(
        _product_ptx(count), _operands(count), [acc, _spread(factors, acc)],
        dtype=gl.float32, is_pure=True, pack=count,
    )  # fmt: skip


@gluon.jit
def log2(x):
    """In one instruction instead of thirty; absolute error 2^-22 where `x` is between 0.5 and 2, relative elsewhere."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def inverse(x):
    """`1 / x`, to one unit in the last place."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
