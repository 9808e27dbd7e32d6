"""Host of the backward in two passes over the visible pairs: dQ with the statistics of rows (`cu/backward_q.cu`), then
dK and dV (`gluon/backward_kv.py`). Deterministic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..triton.documents import Fill
from ..triton.forward import LOG2E
from . import driver, params
from .problem import MAX_KEPT, TILE, BackwardTensors, Problem, counter_of
from .rows import RowKernel, row_kernel
from .scheduler import PAIR, PackedScheduler, Scheduler
from .triton_launcher import Launch
from .varlen import Documents

Q_CONSUMERS = 3  # warpgroups of dQ, of an m_block each
Q_STAGES = {64: 8, 128: 4}  # key and value tiles in flight, beside the rows of q and dO
Q_ROW_SLOTS = {64: 2, 128: 1}  # tiles whose rows are in shared memory
KV_STAGES = {64: 6, 128: 3}  # query and dO tiles in flight
KV_REGISTERS = 240  # of a thread of the two consumers


@functools.cache
def _layout(swizzle: int, element_bits: int, rank: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=element_bits, rank=rank)


def _describe(shape: list[int], strides: list[int], box: list[int], swizzle: int, x: Tensor) -> Any:
    """The TMA descriptor of a tensor as Gluon takes it."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, shape, strides, box, _layout(swizzle, 8 * x.element_size(), len(shape)))


def describe_tiles(x: Tensor, problem: Problem, heads: int, contiguous: bool = False) -> Callable[[Tensor], Any]:
    """Makes descriptors `[B, H, S, D]` of tensors like x `[B, S, H, D]`, or like it but contiguous, in boxes of a
    tile's tokens of some heads."""
    batch, length, num_heads, dim = x.shape
    strides = (length * num_heads * dim, num_heads * dim, dim) if contiguous else x.stride()
    shape, box = [batch, num_heads, length, dim], [1, heads, problem.tokens_per_tile, dim]
    return functools.partial(_describe, shape, [strides[0], strides[2], strides[1], 1], box, 128)


def describe_statistics(m_blocks: int) -> Callable[[Tensor], Any]:
    """The same of `[m_blocks, 128]`, in boxes of one row."""
    return functools.partial(_describe, [m_blocks, 2 * TILE], [2 * TILE, 1], [1, 2 * TILE], 0)


def query_kernel(problem: Problem) -> driver.Kernel:
    head_dim = problem.head_dim
    return row_kernel("backward_q", problem, Q_CONSUMERS, Q_STAGES[head_dim], Q_ROW_SLOTS[head_dim], row_parts=2)


class QueryGradients(RowKernel):
    """dQ, and the statistics of rows that the other kernel reads: lse / ln 2 and delta."""

    def __init__(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().__init__(query_kernel(problem), params.BackwardQ, "dout", problem, q, k, v)
        self.params.scale = problem.scale

    def __call__(self, stream: int, x: BackwardTensors, stats: Tensor, documents: Documents, counter: Tensor) -> None:
        with self.lock:
            self.move(x.q, x.k, x.v, x.dout, documents, counter)
            own = self.params
            own.dq, own.out, own.lse = x.dq.data_ptr(), x.out.data_ptr(), x.lse.data_ptr()
            own.dlse = None if x.dlse is None else x.dlse.data_ptr()
            own.stats, own.m_blocks = stats.data_ptr(), documents.m_blocks
            self.kernel.launch(self.grid, own, stream)


class KeyGradients:
    """dK and dV, and partial sums of those that are divided into segments."""

    def __init__(
        self, problem: Problem, q: Tensor, k: Tensor, v: Tensor, scheduler: Scheduler | PackedScheduler
    ) -> None:
        from .gluon import backward_kv

        items, num_sms = scheduler.items, problem.num_sms
        constants = {
            **problem.constants, "STAGES": KV_STAGES[problem.head_dim], "REGISTERS": KV_REGISTERS,
            "PACKED": problem.packed, "GROUPED": problem.group > 1,
        }  # fmt: skip
        self.table = problem.rules.table
        grid = (num_sms if problem.packed else min(items, num_sms), 1, 1)
        kind = (problem.dtype, problem.head_dim, problem.device)
        heads, written = problem.heads_per_tile, describe_tiles(k, problem, 1, contiguous=True)
        descriptors = {
            "q_desc": describe_tiles(q, problem, heads),
            "do_desc": describe_tiles(q, problem, heads, contiguous=True),
            "k_desc": describe_tiles(k, problem, 1),
            "v_desc": describe_tiles(v, problem, 1),
            "dk_desc": written,
            "dv_desc": written,
        }
        self.scalars = (
            problem.scale, problem.scale * LOG2E.value, problem.length, problem.kv_heads, problem.group,
            problem.batch * problem.kv_heads, scheduler.columns.wave, items,
        )  # fmt: skip
        self.scheduled = scheduler.kernel_scalars

        @functools.lru_cache(MAX_KEPT)
        def kernel(rows: int) -> Launch:
            statistics = {"stats_desc": describe_statistics(rows)}
            return Launch(backward_kv.attention_backward_kv, grid, constants, kind, descriptors | statistics)

        self.kernel = kernel  # for so many rows of statistics, which depend on the number of packed documents

    def __call__(
        self, stream: int, x: BackwardTensors, stats: Tensor, documents: Documents, counter: Tensor, partials: Tensor
    ) -> None:
        self.kernel(stats.shape[0])(
            stream, x.q, x.dout, stats, x.k, x.v, x.dk, x.dv, x.dk, x.dv, partials, self.table, documents.table,
            counter, *self.scalars, documents.m_blocks, documents.most_tiles, *self.scheduled,
        )  # fmt: skip


class TwoPass:
    """The kernels for one shape of call."""

    def __init__(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.problem = problem
        self.scheduler = (
            PackedScheduler(problem, problem.num_sms)
            if problem.packed
            else Scheduler(problem, problem.num_sms, PAIR, direct=True)
        )
        self.q = QueryGradients(problem, q, k, v)
        self.kv = KeyGradients(problem, q, k, v, self.scheduler)

    def __call__(self, x: BackwardTensors, cu_seqlens: Tensor | None, fill: Fill | None) -> None:
        """Packed documents come with the gradients to `fill` where no document is."""
        problem, scheduler = self.problem, self.scheduler
        stream = driver.current_stream(problem.device.index)
        counter = counter_of(problem.device, stream)
        documents = Documents.of(
            stream, problem, Q_CONSUMERS, cu_seqlens, fill, self.q.pack_gqa, columns=scheduler.documents
        )
        m_blocks = problem.batch * problem.num_heads // problem.heads_per_tile * documents.m_blocks
        stats = x.lse.new_empty((m_blocks, 2 * TILE))
        self.q(stream, x, stats, documents, counter)
        partials = scheduler.workspace(stats)
        self.kv(stream, x, stats, documents, counter, partials)
        scheduler.combine(stream, partials, x.dk, x.dv, documents)
