"""Host of the backward in one pass over the visible pairs (`cu/backward.cu`), and of the passes over rows before and
after it (`cu/prepost.cu`)."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from ..triton.documents import Fill
from ..triton.forward import LOG2E
from . import driver, params
from .problem import MAX_KEPT, TILE, BackwardTensors, Maps, Problem, counter_of
from .scheduler import Scheduler, mean_n_blocks
from .varlen import Documents

HEAD_DIM = 128  # of `cu/backward.cu`
N_BLOCKS = 4  # of a work item, two of either thread block of a cluster (cu/n_blocks.cuh)
_CONSUMERS = 2
_CLUSTER = 2
_CONSUMER_REGISTERS = 240  # of a thread
_PRODUCER_REGISTERS = 24  # with two consumers' all that a thread block has
_M_BLOCKS = 3  # m_blocks that a thread block of the passes over packed documents takes
_PREPOST_THREADS = 256
_MANY_N_BLOCKS = 23  # that an m_block sees: from there on one pass over the pairs is faster than two
_MANY_SHARED = 17  # the same with four query heads to a KV head and more


@functools.lru_cache(MAX_KEPT)
def _sees_many(problem: Problem, length: int) -> bool:
    mean = mean_n_blocks(problem.rules.rows, problem.rules.num_levels, length, problem.block_size)
    return mean >= (_MANY_SHARED if problem.group >= 4 else _MANY_N_BLOCKS)


def is_taken(problem: Problem, cu_seqlens: Tensor | None) -> bool:
    """Whether the backward goes over the visible pairs once: where queries see many keys, and if
    `torch.use_deterministic_algorithms` has not been called. Of packed documents the mean length counts, since borders
    are on the device: a long one among many short ones is taken for short."""
    if problem.head_dim != HEAD_DIM or torch.are_deterministic_algorithms_enabled():
        return False
    documents = 1 if cu_seqlens is None else max(cu_seqlens.shape[0] - 1, 1)
    return _sees_many(problem, max(problem.length // documents, 1))


def backward_kernel(problem: Problem) -> driver.Kernel:
    constants = {
        **problem.macros,
        "CONSUMER_REGISTERS": _CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
    }
    source = driver.SOURCES / "backward.cu"
    return driver.Kernel(source, "attention_backward", constants, (_CONSUMERS + 1) * 128, params.HEADERS)


def prepost_kernel(name: str, problem: Problem) -> driver.Kernel:
    """`preprocess` or `postprocess`, whatever the rules."""
    m_blocks = _M_BLOCKS if problem.packed else 1
    constants = {**problem.macros, "LEVELS": 0, "SINKS": False, "M_BLOCKS": m_blocks}
    source = driver.SOURCES / "prepost.cu"
    return driver.Kernel(source, f"attention_{name}", constants, _PREPOST_THREADS, params.HEADERS)


class OnePass:
    """The kernels for one shape of call, and their parameters, whose pointers a call replaces. dQ is summed by float32
    atomics, in no fixed order."""

    def __init__(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
        kv_heads, clusters = problem.kv_heads, problem.num_sms // _CLUSTER
        self.problem = problem
        self.sets = problem.batch * problem.num_heads // problem.heads_per_tile
        self.scheduler = Scheduler(problem, _CLUSTER * clusters, N_BLOCKS, direct=False)
        columns, items = self.scheduler.columns, self.scheduler.items
        self.grid = _CLUSTER * (clusters if problem.packed else min(items, clusters))
        self.kernel = backward_kernel(problem)
        self.preprocess, self.postprocess = (prepost_kernel(name, problem) for name in ("preprocess", "postprocess"))
        self.lock = threading.Lock()  # one call at a time changes the parameters

        own = self.params = driver.allocate(params.Backward)
        own.scale, own.scale_log2 = problem.scale, problem.scale * LOG2E.value
        own.table = problem.rules.table.data_ptr()
        own.length, own.kv_heads, own.group = problem.length, kv_heads, problem.group
        own.groups, own.num_items = problem.batch * kv_heads, items
        own.columns.tiles[:], own.columns.segments[:] = columns.tiles, columns.segments
        own.columns.batches[:], own.columns.segment_rows = columns.batches, columns.segment_rows
        own.columns.num_partials, own.columns.wave = columns.num_partials, columns.wave
        self.maps = Maps(own, problem, q, k, v, "dout")
        rows = self.rows = driver.allocate(params.PrePost)
        rows.scale, rows.length, rows.heads = problem.scale, problem.length, problem.num_heads

    def __call__(self, x: BackwardTensors, cu_seqlens: Tensor | None, fill: Fill | None) -> None:
        """Packed documents come with the gradients to `fill` where no document is."""
        device = self.problem.device
        stream = driver.current_stream(device.index)
        counter = counter_of(device, stream)
        documents = Documents.of(stream, self.problem, _M_BLOCKS, cu_seqlens, fill, per_item=N_BLOCKS)
        m_blocks = self.sets * documents.m_blocks
        stats = x.lse.new_empty((m_blocks, 2, TILE))
        dq_accum = x.lse.new_empty((m_blocks, TILE, HEAD_DIM))
        partials = self.scheduler.workspace(stats)
        with self.lock:
            rows, own = self.rows, self.params
            rows.out, rows.dout, rows.lse = x.out.data_ptr(), x.dout.data_ptr(), x.lse.data_ptr()
            rows.dlse = None if x.dlse is None else x.dlse.data_ptr()
            rows.stats, rows.dq_accum, rows.dq = stats.data_ptr(), dq_accum.data_ptr(), x.dq.data_ptr()
            rows.documents, rows.m_blocks = documents.table.data_ptr(), documents.m_blocks
            rows.blocks = documents.m_blocks if cu_seqlens is None else documents.most_tiles
            self.preprocess.launch(self.sets * rows.blocks, rows, stream)
            self.maps.move(x.q, x.k, x.v, x.dout)
            own.stats, own.dq_accum, own.partials = stats.data_ptr(), dq_accum.data_ptr(), partials.data_ptr()
            own.dk, own.dv = x.dk.data_ptr(), x.dv.data_ptr()
            own.documents, own.counter = documents.table.data_ptr(), counter.data_ptr()
            own.m_blocks, own.most_tiles = documents.m_blocks, documents.most_tiles
            self.kernel.launch(self.grid, own, stream)
            self.postprocess.launch(self.sets * rows.blocks, rows, stream)
        self.scheduler.combine(stream, partials, x.dk, x.dv, documents)
