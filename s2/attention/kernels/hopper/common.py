"""What the Hopper kernels share: words and rings in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SCALAR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def put(words, index, value):
    """Writes an integer into shared memory `[n, 1]`; a barrier follows before others read it."""
    words.index(index).store(gl.full([1], value, gl.int32, SCALAR))


@gluon.jit
def get(words, index):
    return gl.max(words.index(index).load(SCALAR), 0)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring and its phase."""
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def opaque(value):
    """`value`, of which the compiler no longer knows where it comes from. ptxas 12.8 moves matrix descriptors that a
    loop shares with the code after it into the loop's preheader, which a loop of no steps skips: the code after it then
    reads registers that nothing wrote. Descriptors made from an opaque index are not shared."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)
