"""Host of the forward (`cu/forward.cu`)."""

from __future__ import annotations

from torch import Tensor

from ..triton.documents import Fill
from . import driver, params
from .problem import Problem, counter_of
from .rows import RowKernel, row_kernel
from .varlen import Documents

CONSUMERS = {64: 4, 128: 3}  # warpgroups, of an m_block each, by head dimension
STAGES = {64: 8, 128: 4}  # key and value tiles in flight
ROW_SLOTS = 2  # tiles whose rows are in shared memory


def kernel_of(problem: Problem) -> driver.Kernel:
    return row_kernel("forward", problem, CONSUMERS[problem.head_dim], STAGES[problem.head_dim], ROW_SLOTS)


class Forward(RowKernel):
    def __init__(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().__init__(kernel_of(problem), params.Forward, "out", problem, q, k, v)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None, fill: Fill | None,
    ) -> None:  # fmt: skip
        """Packed documents come with the results to `fill` where no document is."""
        device = self.problem.device
        stream = driver.current_stream(device.index)
        counter = counter_of(device, stream)
        documents = None
        if cu_seqlens is not None and cu_seqlens_k is not None and fill is not None:
            documents = Documents.late(
                stream, self.problem, self.consumers, cu_seqlens, cu_seqlens_k, k.shape[1], fill, self.pack_gqa
            )
        elif cu_seqlens is not None:
            documents = Documents.of(stream, self.problem, self.consumers, cu_seqlens, fill, self.pack_gqa)
        with self.lock:
            self.move(q, k, v, out, documents, counter)
            self.params.out_rows, self.params.lse = out.data_ptr(), lse.data_ptr()
            self.kernel.launch(self.grid, self.params, stream)
