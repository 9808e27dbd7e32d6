"""Host of the forward (`cu/forward.cu`)."""

from __future__ import annotations

import threading

from torch import Tensor

from ..triton.documents import Fill
from ..triton.forward import LOG2E
from . import driver, params
from .problem import Maps, Problem, counter_of, stream_of
from .rows import RowTiles, row_kernel
from .varlen import Documents

CONSUMERS = {64: 4, 128: 3}  # warpgroups, of an m_block each, by head dimension
STAGES = {64: 8, 128: 4}  # key and value tiles in flight
ROW_SLOTS = 2  # tiles whose rows are in shared memory


def kernel_of(problem: Problem) -> driver.Kernel:
    head_dim = problem.head_dim
    return row_kernel("forward", problem, CONSUMERS[head_dim], STAGES[head_dim], ROW_SLOTS)


class Forward:
    """The kernel for one shape of call, and its parameters, whose pointers a call replaces."""

    def __init__(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.problem, self.kernel = problem, kernel_of(problem)
        self.consumers = CONSUMERS[problem.head_dim]
        self.lock = threading.Lock()  # one call at a time changes the parameters
        own = self.params = driver.allocate(params.Forward)
        own.scale_log2 = problem.scale * LOG2E.value
        self.tiles = RowTiles(own.problem, problem, self.consumers)
        self.maps = Maps(own, problem, q, k, v, "out")

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor | None,
        fill: Fill | None,
    ) -> None:
        """Packed documents come with the results to `fill` where no document is."""
        device = self.problem.device
        stream = stream_of(device)
        counter = counter_of(device, stream)
        documents = None
        if cu_seqlens is not None:
            documents = Documents.of(stream, self.problem, self.consumers, cu_seqlens, fill, self.tiles.pack_gqa)
        with self.lock:
            self.maps.move(q, k, v, out)
            self.tiles.move(documents, counter)
            self.params.out_rows, self.params.lse = out.data_ptr(), lse.data_ptr()
            self.kernel.launch(self.tiles.grid, self.params, stream)
