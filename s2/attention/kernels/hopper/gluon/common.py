"""What the Gluon kernel is built of: words and rings in shared memory, packed documents."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # an element a lane: of 32, every warp has them all
WORDS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

# under the names of Triton 3.9, or of those before it
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def get(words, index):
    """An integer of shared memory `[n, 1]`."""
    return gl.max(words.index(index).load(LANES), 0)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring and its phase."""
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def opaque(value):
    """Identity that hides where `value` comes from. ptxas 12.8 moves matrix descriptors that a loop shares with the
    code after it into the loop's preheader, which a loop of no steps skips: the code after it then reads registers that
    nothing wrote. Descriptors made from an opaque index are not shared."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_entry(entries, index):
    """The four words of an entry of the table of packed work (`varlen.attention_documents`)."""
    entry = entries + 4 * index
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def flat_rows(buffer):
    """A box `[1, heads, tokens, D]` in shared memory as `[heads tokens, D]`."""
    rows: gl.constexpr = buffer.shape[1] * buffer.shape[2]
    if buffer.shape[1] == 1:
        return buffer.reshape([rows, buffer.shape[3]])
    else:
        layout: gl.constexpr = gl.NVMMASharedLayout(
            swizzle_byte_width=buffer.layout.swizzle_byte_width,
            element_bitwidth=buffer.layout.element_bitwidth,
            rank=2,
        )
        return reinterpret(buffer, buffer.dtype, [rows, buffer.shape[3]], layout)


@gluon.jit
def clear_rows(flat, first: gl.constexpr, ROWS: gl.constexpr, count):
    """Zeroes ROWS rows of `[rows, D]` in shared memory, from `first` on, but for the first `count` of them. TMA has no
    documents, so it fills a box whose document ends in it with the next one's rows, and 0 times what stands there need
    not be 0. The caller puts it before what follows by a fence and a barrier."""
    STEP: gl.constexpr = 8  # few, since the producer has few registers
    columns: gl.constexpr = flat.shape[1] // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // columns, columns], [4, 1], [1, 0])
    for step in gl.static_range(ROWS // STEP):
        part = flat.slice(first + step * STEP, STEP)
        row = step * STEP + gl.arange(0, STEP, gl.SliceLayout(1, layout))
        part.store(gl.where((row < count)[:, None], part.load(layout), 0.0).to(flat.dtype))


@gluon.jit
def store_rows(x, buffer, desc, pointer, batch, head, begin, row, length, tokens, heads, PACKED: gl.constexpr):
    """Writes 64 rows `[64, D]` of registers, of one head or several, through shared memory to `[B, tokens, heads, D]`:
    by TMA, which stops at the end of the sequence, or row by row where a packed document ends among them. `row` counts
    from the document's beginning. The caller waits for the copy."""
    ROWS: gl.constexpr = x.shape[0]
    TOKENS: gl.constexpr = buffer.shape[2]
    D: gl.constexpr = x.shape[1]
    flat = flat_rows(buffer)
    flat.store(x)
    if PACKED:
        if row + TOKENS <= length:
            fence_async_shared()
            async_store(desc, [batch, head, begin + row, 0], buffer)
        else:
            columns: gl.constexpr = D // 8
            layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // columns, columns], [4, 1], [1, 0])
            lanes = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            token = row + lanes % TOKENS
            offset = ((batch * tokens + begin + token).to(gl.int64) * heads + head + lanes // TOKENS) * D
            column = gl.arange(0, D, gl.SliceLayout(0, layout))
            gl.store(pointer + offset[:, None] + column[None, :], flat.load(layout), mask=(token < length)[:, None])
            fence_async_shared()  # the buffer is filled by TMA next
    else:
        fence_async_shared()
        async_store(desc, [batch, head, begin + row, 0], buffer)


@gluon.jit
def store_blocks(
    k_buf, v_buf, dk_desc, dv_desc, dk, dv, info, word, batch, head, begin, length, tokens, kv_heads,
    BLOCK: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Writes the gradients of an n_block of small blocks, in shared memory `[1, 1, 64, D]`, to where their keys are: by
    TMA, or row by row where packed documents may end among them."""
    ROWS: gl.constexpr = k_buf.shape[2]
    if PACKED:
        D: gl.constexpr = k_buf.shape[3]
        columns: gl.constexpr = D // 8
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // columns, columns], [4, 1], [1, 0])
        lanes = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        token = lanes
        for j in gl.static_range(ROWS // BLOCK):
            first = gl.where(get(info, word + 2 * j + 1) > 0, get(info, word + 2 * j), length)  # no block: past the end
            token = gl.where(lanes // BLOCK == j, first + lanes % BLOCK, token)
        offset = ((batch * tokens + begin + token).to(gl.int64) * kv_heads + head) * D
        column = gl.arange(0, D, gl.SliceLayout(0, layout))
        stored = (token < length)[:, None]
        gl.store(dk + offset[:, None] + column[None, :], flat_rows(k_buf).load(layout), mask=stored)
        gl.store(dv + offset[:, None] + column[None, :], flat_rows(v_buf).load(layout), mask=stored)
        fence_async_shared()  # the buffers are filled by TMA next
    else:
        fence_async_shared()
        for j in gl.static_range(ROWS // BLOCK):
            first = get(info, word + 2 * j)
            if get(info, word + 2 * j + 1) > 0:
                at = [batch, head, first, 0]
                async_store(dk_desc, at, k_buf.slice(j * BLOCK, BLOCK, 2))
                async_store(dv_desc, at, v_buf.slice(j * BLOCK, BLOCK, 2))
