"""Host of the backward in two passes over the visible pairs: dQ with the statistics of rows (`gluon/backward_q.py`),
then dK and dV (`gluon/backward_kv.py`). Deterministic."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..triton.documents import Fill
from ..triton.forward import LOG2E
from .problem import MAX_KEPT, TILE, BackwardTensors, Problem, counter_of, stream_of
from .scheduler import PAIR, PackedScheduler, Scheduler
from .triton_launcher import Launch
from .varlen import Documents

Q_STAGES = {64: 6, 128: 4}  # key and value tiles in flight, beside the rows of q and dO
Q_REGISTERS = 160  # of a thread of the three consumers; setmaxnreg of more is dropped without a word
KV_STAGES = {64: 6, 128: 3}  # query and dO tiles in flight
KV_REGISTERS = 240  # of a thread of the two consumers


@dataclass(frozen=True)
class Boxes:
    """Makes TMA descriptors of tensors of one shape and stride."""

    shape: list[int]
    strides: list[int]
    box: list[int]
    swizzle: int

    @classmethod
    def of_rows(cls, x: Tensor, problem: Problem, contiguous: bool = False) -> Boxes:
        """`[B, S, H, D]` as `[B, H, S, D]` in m_blocks. Of x, or of contiguous tensors of its shape."""
        return cls._of_tokens(x, problem.heads_per_tile, problem.tokens_per_tile, contiguous)

    @classmethod
    def of_keys(cls, x: Tensor, problem: Problem, contiguous: bool = False) -> Boxes:
        """The same in key tiles of one head, or in blocks if they are smaller."""
        return cls._of_tokens(x, 1, problem.tokens_per_tile, contiguous)

    @classmethod
    def _of_tokens(cls, x: Tensor, heads: int, tokens: int, contiguous: bool) -> Boxes:
        batch, length, num_heads, dim = x.shape
        strides = (length * num_heads * dim, num_heads * dim, dim) if contiguous else x.stride()
        shape, box = [batch, num_heads, length, dim], [1, heads, tokens, dim]
        return cls(shape, [strides[0], strides[2], strides[1], 1], box, 128)

    @classmethod
    def of_statistics(cls, rows: int) -> Boxes:
        """`[m_blocks, 128]`, in boxes of one row."""
        return cls([rows, 2 * TILE], [2 * TILE, 1], [1, 2 * TILE], 0)

    def __call__(self, x: Tensor) -> Any:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = _layout(self.swizzle, 8 * x.element_size(), len(self.shape))
        return TensorDescriptor(x, self.shape, self.strides, self.box, layout)


@functools.cache
def _layout(swizzle: int, element_bits: int, rank: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=element_bits, rank=rank)


def _read(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Boxes]:
    """Descriptors of what both kernels read."""
    return {
        "q_desc": Boxes.of_rows(q, problem),
        "do_desc": Boxes.of_rows(q, problem, contiguous=True),
        "k_desc": Boxes.of_keys(k, problem),
        "v_desc": Boxes.of_keys(v, problem),
    }


class QueryGradients:
    """dQ, and the statistics of rows that the other kernel reads: lse / ln 2 and delta."""

    consumers = 3  # warpgroups, of an m_block each

    def __init__(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
        from .gluon import backward_q

        tiles_per_head = -(-problem.length // (self.consumers * problem.tokens_per_tile))  # of a set of heads
        num_tiles = tiles_per_head * (problem.num_heads // problem.heads_per_tile) * problem.batch
        grid = problem.num_sms if problem.packed else min(num_tiles, problem.num_sms)
        read = _read(problem, q, k, v)
        constants = {
            **problem.constants, "STAGES": Q_STAGES[problem.head_dim], "REGISTERS": Q_REGISTERS,
            "PACKED": problem.packed,
        }  # fmt: skip
        self.table = problem.rules.table
        self.kernels = {
            has_dlse: Launch(
                backward_q.attention_backward_q,
                (grid, 1, 1),
                {**constants, "HAS_DLSE": has_dlse},
                (problem.dtype, problem.head_dim, problem.device),
                read | {"dq_desc": read["do_desc"]},
            )
            for has_dlse in (False, True)
        }
        self.scalars = (
            problem.scale, problem.scale * LOG2E.value, problem.length, problem.num_heads, problem.group,
            tiles_per_head, num_tiles,
        )  # fmt: skip

    def __call__(self, stream: int, x: BackwardTensors, stats: Tensor, documents: Documents, counter: Tensor) -> None:
        dlse = x.lse if x.dlse is None else x.dlse
        self.kernels[x.dlse is not None](
            stream, x.q, x.dout, x.k, x.v, x.dq, x.dq, x.out, x.lse, dlse, stats, self.table, documents.table, counter,
            *self.scalars, documents.m_blocks,
        )  # fmt: skip


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
        self.make = functools.partial(
            Launch,
            backward_kv.attention_backward_kv,
            (num_sms if problem.packed else min(items, num_sms), 1, 1),
            constants,
            (problem.dtype, problem.head_dim, problem.device),
        )
        keys = Boxes.of_keys(k, problem, contiguous=True)
        self.descriptors = _read(problem, q, k, v) | {"dk_desc": keys, "dv_desc": keys}
        self.scalars = (
            problem.scale, problem.scale * LOG2E.value, problem.length, problem.kv_heads, problem.group,
            problem.batch * problem.kv_heads, scheduler.columns.wave, items,
        )  # fmt: skip
        self.scheduled = scheduler.kernel_scalars
        self.kernels: dict[int, Launch] = {}  # by rows of statistics

    def kernel(self, rows: int) -> Launch:
        """For so many rows of statistics, which depend on the number of packed documents."""
        kernel = self.kernels.get(rows)
        if kernel is None:
            if len(self.kernels) >= MAX_KEPT:
                self.kernels.clear()
            kernel = self.kernels[rows] = self.make(self.descriptors | {"stats_desc": Boxes.of_statistics(rows)})
        return kernel

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
        stream = stream_of(problem.device)
        counter = counter_of(problem.device, stream)
        documents = Documents.of(
            stream, problem, self.q.consumers, cu_seqlens, fill, columns=scheduler.documents
        )  # fmt: skip
        m_blocks = problem.batch * problem.num_heads // problem.heads_per_tile * documents.m_blocks
        stats = x.lse.new_empty((m_blocks, 2 * TILE))
        self.q(stream, x, stats, documents, counter)
        partials = scheduler.workspace(stats)
        self.kv(stream, x, stats, documents, counter, partials)
        scheduler.combine(stream, partials, x.dk, x.dv, documents)
