"""Host of what kernels over tiles of query rows share (`cu/rows.cuh`)."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from torch import Tensor

from ..triton.forward import LOG2E
from . import driver, params
from .problem import Maps, Problem
from .varlen import Documents

_REGISTERS = {3: 160, 4: 112}  # of a consumer's thread, by consumers; setmaxnreg of more is dropped without a word
_PRODUCER_REGISTERS = 32
_LAST_TILES = 5  # a SM at the end, of heads worked on together: the last tiles are short
_MANY_TILES = 32  # a SM: from there on heads are worked on one by one to the end


def row_kernel(
    name: str, problem: Problem, consumers: int, stages: int, row_slots: int, row_parts: int = 1
) -> driver.Kernel:
    """The kernel `attention_<name>` of `<name>.cu`, with tiles of `consumers` m_blocks. Shared memory holds the rows of
    `row_slots` tiles (of q, with `row_parts` 2 of dO too), and `stages` tiles of keys and of values."""
    constants = {
        **problem.macros,
        "CONSUMERS": consumers,
        "STAGES": stages,
        "ROW_SLOTS": row_slots,
        "ROW_PARTS": row_parts,
        "CONSUMER_REGISTERS": _REGISTERS[consumers],
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
    }
    source = driver.SOURCES / f"{name}.cu"
    return driver.Kernel(source, f"attention_{name}", constants, (consumers + 1) * 128, params.HEADERS)


class RowKernel:
    """Such a kernel for one shape of call, and its parameters, whose pointers one call at a time replaces, under
    the lock. `other`: the field of its tensor map of out or dO."""

    def __init__(
        self, kernel: driver.Kernel, structure: type[ctypes.Structure], other: str, problem: Problem,
        q: Tensor, k: Tensor, v: Tensor,
    ) -> None:  # fmt: skip
        self.kernel, self.problem, self.num_sms = kernel, problem, problem.num_sms
        self.consumers = kernel.threads // 128 - 1
        self.pack_gqa = problem.group // problem.heads_per_tile  # m_blocks of the same rows, which share key tiles
        tokens, first = problem.tokens_per_tile, problem.offset // problem.tokens_per_tile
        m_blocks = -(-(problem.offset + problem.length) // tokens) - first
        tiles_per_head = -(-m_blocks * self.pack_gqa // self.consumers)  # of a KV head
        num_tiles = tiles_per_head * problem.batch * problem.kv_heads
        self.grid = self.num_sms if problem.packed else min(num_tiles, self.num_sms)
        self.lock = threading.Lock()
        self.params: Any = driver.allocate(structure)
        self.params.scale_log2 = problem.scale * LOG2E.value
        shape = self.params.problem
        shape.table = problem.rules.table.data_ptr()
        shape.length, shape.kv_heads, shape.group = problem.length, problem.kv_heads, problem.group
        shape.offset, shape.first_m_block = problem.offset, first * self.pack_gqa
        shape.tiles_per_head, shape.num_tiles = tiles_per_head, num_tiles
        shape.together = self._together(tiles_per_head)
        self.maps = Maps(self.params, problem, q, k, v, other)

    def _together(self, tiles_per_head: int) -> int:
        """KV heads at the end that are worked on together."""
        heads = self.problem.batch * self.problem.kv_heads
        if tiles_per_head * heads >= _MANY_TILES * self.num_sms:
            return 1
        return min(heads, -(-_LAST_TILES * self.num_sms // tiles_per_head))

    def move(
        self, q: Tensor, k: Tensor, v: Tensor, other: Tensor, documents: Documents | None, counter: Tensor
    ) -> None:
        """To another call's tensors, and to its documents, if it is packed."""
        self.maps.move(q, k, v, other)
        shape = self.params.problem
        if documents is not None and self.problem.packed:
            shape.documents = documents.table.data_ptr()
            shape.together = self._together(documents.most_tiles)
        shape.counter = counter.data_ptr()
