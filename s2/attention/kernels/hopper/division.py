"""The side of a plan's backward that has to do with work items: how the columns are divided, and the parts that this
leaves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import sums
from .columns import CHUNK, PAIR, UNDIVIDED, WHOLE, divide_columns, divide_packed
from .direct import Launch
from .plans import Documents, Plan

_STEPS = CHUNK // sums.SUMMED.value  # programs for a chunk
_PROGRAMS = 16  # a processor: as many as it runs at once


class _Parts:
    """Float32 parts `shape` of dK and dV; none if that is empty."""

    def __init__(self, shape: tuple[int, ...], launch: Launch) -> None:
        self.shape, self.sum, self.has_parts = shape, launch, 0 not in shape

    def room(self, unread: Tensor) -> Tensor:
        """For the parts; if there are none, another float32 tensor in their place."""
        if not self.has_parts:
            return unread
        return unread.new_empty(self.shape)


class Division(_Parts):
    """Of a batch of sequences into `items` work items of some chunks. With `direct` a tile that has one segment leaves
    no parts. Of packed documents: undivided, and the items are counted on the device."""

    documents = UNDIVIDED

    def __init__(
        self, q: Tensor, k: Tensor, plan: Plan, processors: int, chunks: int, direct: bool, packed: bool = False
    ) -> None:
        batch, length, num_heads, head_dim = q.shape
        kv_heads, group = k.shape[2], num_heads // k.shape[2]
        groups, constants = batch * kv_heads, plan.constants
        columns, self.items = WHOLE, 0
        if not packed:
            columns = divide_columns(
                plan.rules.rows, constants["LEVELS"], length, constants["BLOCK"], groups, group, processors, chunks
            )
            self.items = columns.num_items * columns.wave * -(-groups // columns.wave)
        self.columns, self.table, self.sizes = columns, plan.rules.table, (length, kv_heads)
        self.scalars = (columns.segment_rows, columns.num_parts, *columns.tiles, *columns.segments)
        grid = (columns.num_parts * _STEPS * groups, 1, 1)
        super().__init__(
            (max(columns.segments), groups, columns.num_parts, 2, CHUNK, head_dim),
            _sum_launch(sums.attention_sum_parts, grid, q, plan, CHUNKS=columns.chunks, DIRECT=direct),
        )

    @property
    def kernel_scalars(self) -> tuple[int, ...]:
        """What `attention_backward_kv` wants to know."""
        return (*self.scalars, *self.columns.batches, 0, *self.documents.strides)

    def add_up(self, stream: int, parts: Tensor, dk: Tensor, dv: Tensor, documents: Documents) -> None:
        if self.has_parts:
            self.sum(stream, parts, dk, dv, self.table, *self.sizes, *self.scalars)


class PackedDivision(_Parts):
    """Of packed documents into work items of two chunks, with the same use."""

    items = 0

    def __init__(self, q: Tensor, k: Tensor, plan: Plan, processors: int) -> None:
        _, tokens, num_heads, head_dim = q.shape
        kv_heads = k.shape[2]
        rows = plan.rules.rows
        documents = self.documents = divide_packed(
            rows, plan.constants["LEVELS"], tokens, plan.constants["BLOCK"], kv_heads, num_heads // kv_heads, processors
        )
        self.columns, self.table, self.kv_heads = WHOLE, plan.rules.table, kv_heads
        self.sinks = max(row[1] for row in rows)
        num_parts = PAIR * documents.most_segments
        self.scalars = (documents.segment_rows, num_parts)
        programs = min(num_parts * _STEPS, -(-_PROGRAMS * processors // kv_heads))
        super().__init__(
            (kv_heads, num_parts, 2, CHUNK, head_dim),
            _sum_launch(sums.attention_sum_document_parts, (programs * kv_heads, 1, 1), q, plan, CHUNKS=PAIR),
        )

    @property
    def kernel_scalars(self) -> tuple[int, ...]:
        whole = self.columns
        return (
            *self.scalars, *whole.tiles, *whole.segments, *whole.batches, self.sinks, *self.documents.strides,
        )  # fmt: skip

    def add_up(self, stream: int, parts: Tensor, dk: Tensor, dv: Tensor, documents: Documents) -> None:
        if self.has_parts:
            self.sum(
                stream, parts, dk, dv, self.table, documents.table, self.kv_heads, documents.most_tiles,
                *self.scalars, self.sinks, *self.documents.strides,
            )  # fmt: skip


def _sum_launch(function: Any, grid: tuple[int, int, int], q: Tensor, plan: Plan, **others: int) -> Launch:
    own = {"TABLE": plan.constants["TABLE"], "D": q.shape[-1]}
    own |= {name: plan.constants[name] for name in ("BLOCK", "LEVELS", "SINKS")}
    return Launch(function, grid, {**own, **others}, (q.dtype, q.shape[-1], q.device))
