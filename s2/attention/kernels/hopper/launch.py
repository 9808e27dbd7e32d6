"""Host side of the Hopper kernels: what they take, and how a call reaches the device.

Everything about a call but its pointers is a `plans.Plan`, made once for a shape and kept: descriptors, grids, compiled
kernels. After that a call allocates its results, fills in the pointers and launches. The forward is CUDA C++ (`cuda`),
the backward Gluon, and CUDA C++ too where one pass over the visible pairs is faster than two (`one_pass`).
"""

from __future__ import annotations

import functools
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import schedule
from ...pattern import UNBOUNDED, Pattern, pattern_from_key
from ..triton.documents import unowned
from ..triton.forward import LOG2E
from . import cuda, plans, structs
from .columns import CHUNK, PAIR, mean_chunks
from .division import Division, PackedDivision
from .one_pass import OnePass
from .plans import Heads

_SMALLEST_BLOCK = 16
_CONSUMERS = {64: 4, 128: 3}  # boxes of rows that a thread block of the forward works on, by head dimension
_Q_CONSUMERS = 3  # the same in dQ
_STAGES = {64: 8, 128: 4}  # key and value tiles in flight
_Q_STAGES = {64: 6, 128: 4}  # the same beside the rows of dO
_KV_STAGES = {64: 6, 128: 3}  # query and dO tiles in flight
_ROW_REGISTERS = {3: 160, 4: 112}  # of a thread, by number of consumers; more would be dropped without a word
_KEY_REGISTERS = 240  # two warpgroups
_PRODUCER_REGISTERS = 32  # of a thread of the forward's other warpgroup
_MANY_CHUNKS = 23  # of keys, that a chunk of queries sees: from there on one pass over the pairs is faster than two
_MANY_SHARED = 17  # the same with four query heads to a KV head and more
_ONE_PASS_DIM = 128  # head dimension of `backward.cu`
_LAST_TILES = 5  # a processor at the end of the forward, of heads worked on together: the last tiles are short
_MANY_TILES = 32  # a processor: from there on heads are worked on one by one to the end
_NVRTC = 13  # the version that kernels are built and checked with; ptxas 12.8 has made wrong code (`common.opaque`)


def objection(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: bool) -> str:
    """What keeps the kernels from taking this call; empty if they take it. They want sm_90, NVRTC (warns once where it
    is missing), 16 bits, head dimension 64 or 128, a closed-form pattern, blocks of 64 and more, or of 32 and 16 with
    two and four query heads to a KV head (or multiples), as many queries as keys, and strides that TMA can read; no
    blocks of 256 with levels that end (`most_skipped`)."""
    if not on_hopper(q):
        return "it runs on devices of compute capability 9.0 (sm_90)"
    if not _can_compile():
        return "it needs NVRTC 13 (packages cuda-bindings and nvidia-cuda-nvrtc)"
    if torch.compiler.is_compiling():  # runs once a graph; a dict would be guarded entry by entry
        return _objection(q, k, v, pattern, packed)
    key = (q.shape, q.stride(), k.shape, k.stride(), v.stride(), q.dtype, pattern.key)
    known = _OBJECTIONS.get(key)
    if known is None:
        if len(_OBJECTIONS) >= plans.MAX_PLANS:
            _OBJECTIONS.clear()
        known = _OBJECTIONS[key] = _objection(q, k, v, pattern, packed)
    return known


def supports(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: bool) -> bool:
    """Whether there is no `objection`."""
    return not objection(q, k, v, pattern, packed)


def on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


@torch.compiler.assume_constant_result
def _can_compile() -> bool:
    return _finds_nvrtc()


@functools.cache
def _finds_nvrtc() -> bool:
    """Whether there is what `cuda` compiles with; warns if not."""
    package = "cuda-bindings"
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        package = "nvidia-cuda-nvrtc"
        code, major, minor = nvrtc.nvrtcVersion()
        if not code and major >= _NVRTC:
            return True
        reason = f"found is NVRTC {major}.{minor}"
    except Exception as error:  # its types differ between versions of cuda-bindings
        reason = str(error)
    warnings.warn(
        f"the Hopper kernels need the package {package} of version {_NVRTC}; Triton's, which are slower, run in their "
        f"place ({reason})",
        stacklevel=5,  # the call of s2_attention
    )
    return False


def _objection(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, packed: bool) -> str:
    # texts are constant, since torch.compile goes through here
    if q.dtype not in (torch.float16, torch.bfloat16):
        return "it takes float16 and bfloat16"
    if q.shape[-1] not in _STAGES:
        return "it takes head dimensions 64 and 128"
    if q.numel() == 0:
        return "there are no queries"
    if not packed and q.shape[1] != k.shape[1]:
        return "it takes as many queries as keys"
    if (
        pattern.block_size < _SMALLEST_BLOCK
        or q.shape[-2] // k.shape[-2] % plans.heads_a_box(pattern.block_size)
    ):  # fmt: skip
        return "blocks of 32 and 16 need a multiple of 2 and 4 query heads to a KV head"
    if not _has_closed_form(pattern.key):
        return "the pattern has no closed form (a mask, more than two strides, or one that does not divide the next)"
    if not keeps_moving(pattern.key, q.shape[-1]):
        return "blocks of 256 cannot have levels that end"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _has_readable_strides(x):
            return _UNREADABLE[name]
    return ""


_OBJECTIONS: dict[tuple, str] = {}
_UNREADABLE = {
    name: f"the strides of {name} (expanded or padded?) are not what TMA reads, 1 for the last dimension and positive "
    f"multiples of 8 elements for the others; {name}.contiguous() has such strides"
    for name in "qkv"
}
AVOIDABLE = frozenset(_UNREADABLE.values())  # objections to how the caller's tensors happen to lie in memory


@torch.compiler.assume_constant_result
def warn_once(objection: str) -> None:
    if objection not in _said:
        _said.add(objection)
        warnings.warn(
            f"Triton's kernels, which are slower, run in place of the Hopper kernels: {objection}", stacklevel=3
        )


_said: set[str] = set()


@torch.compiler.assume_constant_result
def _has_closed_form(key: str) -> bool:
    return schedule.has_closed_form(pattern_from_key(key))


@torch.compiler.assume_constant_result
def keeps_moving(key: str, head_dim: int) -> bool:
    """Whether the forward's rings cannot come to a halt. A consumer keeps the values of the last key tile that it saw
    until it has walked its way through the ring of keys to the next one. Meanwhile the others get as far as values that
    are in its way, and keys a ring further: the next one must be within two rings."""
    pattern = pattern_from_key(key)
    return most_skipped(pattern, _CONSUMERS[head_dim]) + 1 < 2 * _STAGES[head_dim]


def most_skipped(pattern: Pattern, consumers: int) -> int:
    """A bound of how many positions of the forward's rings lie between two key tiles that a consumer sees: at the end
    of a tile the edges of the others, at the beginning of the next what only the first rows see, where a level or the
    window ends within the rows, and the keys of these rows before its own."""
    block = pattern.block_size
    tokens = min(block, CHUNK)
    more_blocks = -(-(block - tokens + consumers * tokens) // block) - 1  # of the rows, after the first one's
    ends = max(
        sum(-(-more_blocks // stride) for stride, end in rule.ranges if end < UNBOUNDED)
        for rule in pattern.heads or (pattern,)
    )
    return consumers - 1 + (ends + more_blocks) * max(block // CHUNK, 1)


def _has_readable_strides(x: Tensor) -> bool:
    """TMA reads rows with unit stride that start at multiples of 16 bytes."""
    return x.stride(-1) == 1 and all(stride % 8 == 0 and stride > 0 for stride in x.stride()[:-1])


# ---------------------------------------------------------------- launching


@dataclass(frozen=True)
class _Boxes:
    """Makes TMA descriptors of tensors of one shape and stride."""

    shape: list[int]
    strides: list[int]
    box: list[int]
    swizzle: int

    @classmethod
    def of_rows(cls, x: Tensor, block: int, contiguous: bool = False) -> _Boxes:
        """`[B, S, H, D]` as `[B, H, S, D]`, in boxes of 64 rows: `block` (at most 64) tokens of as many heads as are
        needed. Of x, or of tensors of its shape that are contiguous."""
        return cls._of_tokens(x, CHUNK // block, block, contiguous)

    @classmethod
    def of_keys(cls, x: Tensor, block: int, contiguous: bool = False) -> _Boxes:
        """The same in boxes of `block` tokens of one head."""
        return cls._of_tokens(x, 1, block, contiguous)

    @classmethod
    def _of_tokens(cls, x: Tensor, some_heads: int, tokens: int, contiguous: bool) -> _Boxes:
        batch, length, heads, dim = x.shape
        strides = (length * heads * dim, heads * dim, dim) if contiguous else x.stride()
        shape, box = [batch, heads, length, dim], [1, some_heads, tokens, dim]
        return cls(shape, [strides[0], strides[2], strides[1], 1], box, 128)

    @classmethod
    def of_statistics(cls, rows: int) -> _Boxes:
        """`[B H chunks, 128]`, in boxes of one row."""
        return cls([rows, 2 * CHUNK], [2 * CHUNK, 1], [1, 2 * CHUNK], 0)

    def __call__(self, x: Tensor) -> Any:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = _layout(self.swizzle, 8 * x.element_size(), len(self.shape))
        return TensorDescriptor(x, self.shape, self.strides, self.box, layout)


@functools.cache
def _layout(swizzle: int, element_bits: int, rank: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=element_bits, rank=rank)


def _row_tiles(q: Tensor, block: int, consumers: int, packed: bool) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Tiles of `consumers` boxes of query rows, of one head (or set of heads) and in all, and the grid for them."""
    batch, length, num_heads, _ = q.shape
    tiles_per_head = -(-length // (consumers * min(block, CHUNK)))
    num_tiles = tiles_per_head * (num_heads // plans.heads_a_box(block)) * batch
    processors = plans.processors_of(q.device)
    return (tiles_per_head, num_tiles), (processors if packed else min(num_tiles, processors), 1, 1)


# ---------------------------------------------------------------- forward


def _forward_kernel(
    dtype: torch.dtype, head_dim: int, block: int, levels: int, sinks: bool, packed: bool
) -> cuda.Kernel:
    consumers, stages = _CONSUMERS[head_dim], _STAGES[head_dim]
    constants = {
        **plans.macros_of(dtype, head_dim, block, levels, sinks, packed),
        "CONSUMERS": consumers,
        "STAGES": stages,
        "CONSUMER_REGISTERS": _ROW_REGISTERS[consumers],
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
    }
    shared_bytes = structs.shared_bytes(head_dim, consumers, stages)
    source = Path(__file__).with_name("forward.cu")
    return cuda.Kernel(source, "attention_forward", constants, (consumers + 1) * 128, shared_bytes)


class Forward:
    """The forward's side of a plan: its kernel, and its parameters, whose pointers a call replaces."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: plans.Plan, packed: bool) -> None:
        batch, length, num_heads, head_dim = q.shape
        block = plan.constants["BLOCK"]
        self.consumers = consumers = _CONSUMERS[head_dim]
        kv_heads, group = k.shape[2], num_heads // k.shape[2]
        self.share = group // plans.heads_a_box(block)  # boxes of the same rows, side by side: they share key tiles
        self.heads, self.processors = batch * kv_heads, plans.processors_of(q.device)
        self.kernel = _forward_kernel(q.dtype, head_dim, block, plan.rules.num_levels, plan.rules.has_sinks, packed)
        tiles_per_head = -(-(-(-length // min(block, CHUNK)) * self.share) // consumers)  # of a KV head
        num_tiles = tiles_per_head * self.heads
        self.grid = self.processors if packed else min(num_tiles, self.processors)
        self.lock = threading.Lock()  # one call at a time changes the parameters
        params = self.params = cuda.allocate(structs.Forward)
        params.scale_log2 = plan.scale * LOG2E.value
        problem = self.problem = params.problem
        problem.table = plan.rules.table.data_ptr()
        problem.length, problem.kv_heads, problem.group = length, kv_heads, group
        problem.tiles_per_head, problem.num_tiles = tiles_per_head, num_tiles
        problem.together = self.together(tiles_per_head)
        self.maps = plans.Maps(params, q, k, v, "out", block)

    def together(self, tiles_per_head: int) -> int:
        """KV heads at the end that are worked on together."""
        if tiles_per_head * self.heads >= _MANY_TILES * self.processors:
            return 1
        return min(self.heads, -(-_LAST_TILES * self.processors // tiles_per_head))

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        documents: plans.Documents | None,
        counter: Tensor,
        stream: int,
    ) -> None:
        with self.lock:
            self.maps.move(q, k, v, out)
            if documents is not None:
                self.problem.documents = documents.table.data_ptr()
                self.problem.together = self.together(documents.most_tiles)
            self.problem.counter = counter.data_ptr()
            self.params.out_rows, self.params.lse = out.data_ptr(), lse.data_ptr()
            self.kernel.launch(self.grid, self.params, stream)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    pattern: Pattern,
    heads: Heads,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """q `[B, S, Hq, D]`, k/v `[B, S, Hkv, D]` -> out and lse `[B, Hq, S]`; packed `[T, H, D]` with int32 `cu_seqlens`
    -> lse `[Hq, T]`."""
    if cu_seqlens is not None and cu_seqlens.shape[0] == 1:  # no document
        return q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    q, k, v = plans.at_16(q), plans.at_16(k), plans.at_16(v)
    out = plans.empty_like(q)
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    plan = plans.plan_of(q, k, v, pattern, heads, softmax_scale, packed)
    forward = plan.forward
    if forward is None:
        forward = plan.forward = Forward(q, k, v, plan, packed)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    stream = plans.stream_of(q.device)
    documents = None
    if packed:
        fill = unowned(out, lse=lse[0])
        documents = plans.Documents.of(stream, q, plan, forward.consumers, cu_seqlens, fill, forward.share)
    forward(q, k, v, out, lse, documents, plans.counter_of(q.device, stream), stream)
    return out, lse[0] if packed else lse


# ---------------------------------------------------------------- backward


class TwoPasses:
    """The backward's side of a plan: dQ with the statistics, dK and dV, the sum of their parts."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: plans.Plan, packed: bool) -> None:
        from . import backward_kv, backward_q

        batch, length, num_heads, head_dim = q.shape
        kv_heads, group = k.shape[2], num_heads // k.shape[2]
        groups, processors = batch * kv_heads, plans.processors_of(q.device)
        constants, kind = plan.constants, (q.dtype, head_dim, q.device)
        tokens = min(constants["BLOCK"], CHUNK)
        read = {
            "q_desc": _Boxes.of_rows(q, tokens),
            "do_desc": _Boxes.of_rows(q, tokens, contiguous=True),
            "k_desc": _Boxes.of_keys(k, tokens),
            "v_desc": _Boxes.of_keys(v, tokens),
        }
        keys = _Boxes.of_keys(k, tokens, contiguous=True)
        self.division = (
            PackedDivision(q, k, plan, processors) if packed else Division(q, k, plan, processors, PAIR, direct=True)
        )
        wave, items = self.division.columns.wave, self.division.items
        num_tiles, q_grid = _row_tiles(q, constants["BLOCK"], _Q_CONSUMERS, packed)
        scales = (plan.scale, plan.scale * LOG2E.value)
        self.q_scalars = (*scales, length, num_heads, group, *num_tiles)
        self.q = {
            has_dlse: plans.Launch(
                backward_q.attention_backward_q,
                q_grid,
                {**constants, "STAGES": _Q_STAGES[head_dim], "REGISTERS": _ROW_REGISTERS[_Q_CONSUMERS],
                 "PACKED": packed, "HAS_DLSE": has_dlse},
                kind,
                read | {"dq_desc": read["do_desc"]},
            )
            for has_dlse in (False, True)
        }  # fmt: skip
        self.kv_scalars = (*scales, length, kv_heads, group, groups, wave, items)
        self.kv_division = self.division.kernel_scalars
        self.kv_of_rows: dict[int, plans.Launch] = {}  # by rows of statistics
        self.make_kv = functools.partial(
            plans.Launch,
            backward_kv.attention_backward_kv,
            (processors if packed else min(items, processors), 1, 1),
            {**constants, "STAGES": _KV_STAGES[head_dim], "REGISTERS": _KEY_REGISTERS, "PACKED": packed,
             "GROUPED": group > 1},
            kind,
        )  # fmt: skip
        self.kv_descriptors = read | {"dk_desc": keys, "dv_desc": keys}

    def kv(self, rows: int) -> plans.Launch:
        """dK and dV with so many rows of statistics, which depend on the number of packed documents."""
        launch = self.kv_of_rows.get(rows)
        if launch is None:
            if len(self.kv_of_rows) >= plans.MAX_PLANS:
                self.kv_of_rows.clear()
            descriptors = self.kv_descriptors | {"stats_desc": _Boxes.of_statistics(rows)}
            launch = self.kv_of_rows[rows] = self.make_kv(descriptors)
        return launch


def _takes_one_pass(plan: plans.Plan, length: int, cu_seqlens: Tensor | None) -> bool:
    """Whether the backward goes over the visible pairs once: where queries see many keys, and if
    `torch.use_deterministic_algorithms` has not been called. Of packed documents the mean length counts, since borders
    are on the device: a long one among many short ones is taken for short."""
    if plan.head_dim != _ONE_PASS_DIM or torch.are_deterministic_algorithms_enabled():
        return False
    if cu_seqlens is not None:
        length = max(length // max(cu_seqlens.shape[0] - 1, 1), 1)
    is_long = plan.is_long.get(length)
    if is_long is None:
        if len(plan.is_long) >= plans.MAX_PLANS:
            plan.is_long.clear()
        chunks = mean_chunks(plan.rules.rows, plan.constants["LEVELS"], length, plan.constants["BLOCK"])
        is_long = plan.is_long[length] = chunks >= (_MANY_SHARED if plan.group >= 4 else _MANY_CHUNKS)
    return is_long


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    cu_seqlens: Tensor | None,
    pattern: Pattern,
    heads: Heads,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output and (if used) of the log-sum-exp. Bitwise repeatable unless
    `_takes_one_pass`: then dQ is not. ValueError: lse is not float32, as the forward's is."""
    if lse.dtype != torch.float32:
        raise ValueError(f"lse must be float32, got {lse.dtype}")
    if cu_seqlens is not None and cu_seqlens.shape[0] == 1:  # no document
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    q, k, v = plans.at_16(q), plans.at_16(k), plans.at_16(v)
    device = q.device
    dq, dk, dv = plans.empty_like(q), plans.empty_like(k), plans.empty_like(v)
    out, lse, dout = plans.aligned(out), plans.aligned(lse), plans.aligned(dout)
    dlse = None if dlse is None else plans.aligned(dlse)
    packed = cu_seqlens is not None
    fill = unowned(dq, dk, dv) if packed else None
    tensors = (q, k, v, dout, dq, dk, dv)
    q, k, v, grad_out, grad_q, grad_k, grad_v = (x[None] for x in tensors) if packed else tensors
    plan = plans.plan_of(q, k, v, pattern, heads, softmax_scale, packed)
    if _takes_one_pass(plan, q.shape[1], cu_seqlens):
        if plan.one_pass is None:
            plan.one_pass = OnePass(q, k, v, plan, packed)
        plan.one_pass(q, k, v, out, lse, grad_out, dlse, dq, dk, dv, cu_seqlens, fill)
        return dq, dk, dv
    if plan.backward is None:
        plan.backward = TwoPasses(q, k, v, plan, packed)
    backward, stream = plan.backward, plans.stream_of(device)
    counter = plans.counter_of(device, stream)
    documents = plans.Documents.of(stream, q, plan, _Q_CONSUMERS, cu_seqlens, fill, columns=backward.division.documents)
    rows = q.shape[0] * q.shape[2] // plans.heads_a_box(pattern.block_size) * documents.boxes
    stats = lse.new_empty((rows, 2 * CHUNK))
    backward.q[dlse is not None](
        stream, q, grad_out, k, v, grad_q, dq, out, lse, lse if dlse is None else dlse, stats, plan.rules.table,
        documents.table, counter, *backward.q_scalars, documents.boxes,
    )  # fmt: skip
    parts = backward.division.room(stats)
    backward.kv(rows)(
        stream, q, grad_out, stats, k, v, grad_k, grad_v, dk, dv, parts, plan.rules.table, documents.table, counter,
        *backward.kv_scalars, documents.boxes, documents.most_tiles, *backward.kv_division,
    )  # fmt: skip
    backward.division.add_up(stream, parts, dk, dv, documents)
    return dq, dk, dv
