"""How the columns of a plan's backward are divided into work items, and the parts that this leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from . import sums
from .columns import CHUNK, WHOLE, divide_columns
from .direct import Launch
from .plans import Plan


class Division:
    """How the columns of a plan's backward are divided into `items` work items of some chunks, and the parts that this
    leaves. Packed documents are not divided, and their items are counted on the device."""

    def __init__(self, q: Tensor, k: Tensor, plan: Plan, packed: bool, processors: int, chunks_an_item: int) -> None:
        batch, length, num_heads, head_dim = q.shape
        kv_heads, group = k.shape[2], num_heads // k.shape[2]
        groups, constants = batch * kv_heads, plan.constants
        columns, self.items = WHOLE, 0
        if not packed:
            columns = divide_columns(
                plan.rules.rows, constants["LEVELS"], length, constants["BLOCK"], groups, group, processors,
                chunks_an_item,
            )  # fmt: skip
            self.items = columns.num_items * columns.wave * -(-groups // columns.wave)
        self.columns, self.table, self.has_parts = columns, plan.rules.table, columns.num_parts > 0
        self.scalars = (columns.segment_rows, columns.num_parts, *columns.tiles, *columns.segments)
        self.shape = (max(columns.segments), groups, columns.num_parts, 2, CHUNK, head_dim)
        self.sizes = (length, kv_heads)
        self.sum = Launch(
            sums.attention_sum_parts,
            (columns.num_parts * (CHUNK // sums.SUMMED.value), groups, 1),
            {"TABLE": constants["TABLE"], "D": head_dim, "BLOCK": constants["BLOCK"], "LEVELS": constants["LEVELS"],
             "SINKS": constants["SINKS"], "CHUNKS": columns.chunks},
            (q.dtype, head_dim, q.device),
        )  # fmt: skip

    def room(self, unread: Tensor) -> Tensor:
        """For the parts; if there are none, another tensor in their place."""
        if not self.has_parts:
            return unread
        return torch.empty(self.shape, dtype=torch.float32, device=unread.device)

    def add_up(self, parts: Tensor, dk: Tensor, dv: Tensor) -> None:
        if self.has_parts:
            self.sum(parts, dk, dv, self.table, *self.sizes, *self.scalars)
