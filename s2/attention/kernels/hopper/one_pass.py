"""Host side of the backward in one pass over the visible pairs (`backward.cu`), and of the passes over rows around it
(`passes.cu`)."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor

from ..triton.documents import Fill
from ..triton.forward import LOG2E
from . import cuda, plans, structs
from .columns import CHUNK
from .division import Division

CHUNKS = 4  # of a work item, two of either thread block of a cluster (chunks.cuh)
_CONSUMERS = 2
_CLUSTER = 2
_REGISTERS = 240  # of a consumer's thread
_PRODUCER_REGISTERS = 24  # with two consumers' all that a thread block has
_BOXES = 3  # of rows, that a thread block of the passes over packed documents takes
_PASS_THREADS = 256


def backward_kernel(
    dtype: torch.dtype, head_dim: int, block: int, levels: int, sinks: bool, packed: bool
) -> cuda.Kernel:
    constants = {
        **plans.macros_of(dtype, head_dim, block, levels, sinks, packed),
        "CONSUMER_REGISTERS": _REGISTERS,
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
    }
    source = Path(__file__).with_name("backward.cu")
    shared_bytes = structs.backward_shared_bytes(head_dim)
    return cuda.Kernel(source, "attention_backward", constants, (_CONSUMERS + 1) * 128, shared_bytes)


def pass_kernel(name: str, dtype: torch.dtype, head_dim: int, block: int, packed: bool) -> cuda.Kernel:
    """`statistics` or `round`, whatever the rules."""
    constants = {**plans.macros_of(dtype, head_dim, block, 0, False, packed), "BOXES": _BOXES if packed else 1}
    return cuda.Kernel(Path(__file__).with_name("passes.cu"), f"attention_{name}", constants, _PASS_THREADS, 0)


class OnePass:
    """A plan's kernels, and their parameters, whose pointers a call replaces. Adds up dQ in float32, in no order."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, plan: plans.Plan, packed: bool) -> None:
        batch, length, num_heads, head_dim = q.shape
        rules, block = plan.rules, plan.constants["BLOCK"]
        kv_heads, group = k.shape[2], num_heads // k.shape[2]
        groups, clusters = batch * kv_heads, plans.processors_of(q.device) // _CLUSTER
        self.plan = plan
        self.sets = batch * num_heads // plans.heads_a_box(block)
        self.division = Division(q, k, plan, _CLUSTER * clusters, CHUNKS, direct=False, packed=packed)
        columns, items = self.division.columns, self.division.items
        self.grid = _CLUSTER * (clusters if packed else min(items, clusters))
        self.kernel = backward_kernel(q.dtype, head_dim, block, rules.num_levels, rules.has_sinks, packed)
        self.statistics, self.round = (
            pass_kernel(name, q.dtype, head_dim, block, packed) for name in ("statistics", "round")
        )
        self.lock = threading.Lock()  # one call at a time changes the parameters

        params = self.params = cuda.allocate(structs.Backward)
        params.scale, params.scale_log2 = plan.scale, plan.scale * LOG2E.value
        params.table = rules.table.data_ptr()
        params.length, params.kv_heads, params.group, params.groups = length, kv_heads, group, groups
        params.num_items = items
        own = params.columns
        own.tiles[:], own.segments[:], own.batches[:] = columns.tiles, columns.segments, columns.batches
        own.segment_rows, own.num_parts, own.wave = columns.segment_rows, columns.num_parts, columns.wave
        self.maps = plans.Maps(params, q, k, v, "dout", block)
        rows = self.rows = cuda.allocate(structs.Passes)
        rows.scale, rows.length, rows.heads = plan.scale, length, num_heads

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens: Tensor | None,
        fill: Fill | None,
    ) -> None:
        """All contiguous but q, k and v. Packed ones as a batch of one, with the gradients to `fill`."""
        device = q.device
        stream = plans.stream_of(device)
        counter = plans.counter_of(device, stream)
        documents = plans.Documents.of(stream, q, self.plan, _BOXES, cu_seqlens, fill, an_item=CHUNKS)
        boxes = self.sets * documents.boxes
        stats = lse.new_empty((boxes, 2, CHUNK))
        sums = lse.new_empty((boxes, CHUNK, q.shape[-1]))
        parts = self.division.room(stats)
        with self.lock:
            rows, params = self.rows, self.params
            rows.out, rows.dout, rows.lse = out.data_ptr(), dout.data_ptr(), lse.data_ptr()
            rows.dlse = None if dlse is None else dlse.data_ptr()
            rows.stats, rows.sums, rows.dq = stats.data_ptr(), sums.data_ptr(), dq.data_ptr()
            rows.documents, rows.chunks = documents.table.data_ptr(), documents.boxes
            rows.blocks = documents.boxes if cu_seqlens is None else documents.most_tiles
            self.statistics.launch(self.sets * rows.blocks, rows, stream)
            self.maps.move(q, k, v, dout)
            params.stats, params.sums, params.parts = stats.data_ptr(), sums.data_ptr(), parts.data_ptr()
            params.dk, params.dv = dk.data_ptr(), dv.data_ptr()
            params.documents, params.counter = documents.table.data_ptr(), counter.data_ptr()
            params.chunks, params.most_tiles = documents.boxes, documents.most_tiles
            self.kernel.launch(self.grid, params, stream)
            self.round.launch(self.sets * rows.blocks, rows, stream)
        self.division.add_up(stream, parts, dk, dv, documents)
