"""Host of the forward (`cu/forward.cu`)."""

from __future__ import annotations

import threading

from torch import Tensor

from ..triton.documents import Fill
from ..triton.forward import LOG2E
from . import driver, params
from .problem import Maps, Problem, counter_of, stream_of
from .varlen import Documents

CONSUMERS = {64: 4, 128: 3}  # warpgroups, of an m_block each, by head dimension
STAGES = {64: 8, 128: 4}  # key and value tiles in flight
_CONSUMER_REGISTERS = {3: 160, 4: 112}  # of a thread, by consumers; setmaxnreg of more is dropped without a word
_PRODUCER_REGISTERS = 32
_LAST_TILES = 5  # a SM at the end, of heads worked on together: the last tiles are short
_MANY_TILES = 32  # a SM: from there on heads are worked on one by one to the end


def kernel_of(problem: Problem) -> driver.Kernel:
    head_dim = problem.head_dim
    consumers, stages = CONSUMERS[head_dim], STAGES[head_dim]
    constants = {
        **problem.macros,
        "CONSUMERS": consumers,
        "STAGES": stages,
        "CONSUMER_REGISTERS": _CONSUMER_REGISTERS[consumers],
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
    }
    source = driver.SOURCES / "forward.cu"
    return driver.Kernel(source, "attention_forward", constants, (consumers + 1) * 128, params.HEADERS)


class Forward:
    """The kernel for one shape of call, and its parameters, whose pointers a call replaces."""

    def __init__(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.problem, self.kernel, self.num_sms = problem, kernel_of(problem), problem.num_sms
        self.consumers = consumers = CONSUMERS[problem.head_dim]
        self.pack_gqa = problem.group // problem.heads_per_tile  # m_blocks of the same rows, which pack_gqa key tiles
        m_blocks = -(-problem.length // problem.tokens_per_tile)
        tiles_per_head = -(-m_blocks * self.pack_gqa // consumers)  # of a KV head
        num_tiles = tiles_per_head * problem.batch * problem.kv_heads
        self.grid = self.num_sms if problem.packed else min(num_tiles, self.num_sms)
        self.lock = threading.Lock()  # one call at a time changes the parameters
        own = self.params = driver.allocate(params.Forward)
        own.scale_log2 = problem.scale * LOG2E.value
        shape = self.shape = own.problem
        shape.table = problem.rules.table.data_ptr()
        shape.length, shape.kv_heads, shape.group = problem.length, problem.kv_heads, problem.group
        shape.tiles_per_head, shape.num_tiles = tiles_per_head, num_tiles
        shape.together = self.together(tiles_per_head)
        self.maps = Maps(own, problem, q, k, v, "out")

    def together(self, tiles_per_head: int) -> int:
        """KV heads at the end that are worked on together."""
        heads = self.problem.batch * self.problem.kv_heads
        if tiles_per_head * heads >= _MANY_TILES * self.num_sms:
            return 1
        return min(heads, -(-_LAST_TILES * self.num_sms // tiles_per_head))

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
            documents = Documents.of(stream, self.problem, self.consumers, cu_seqlens, fill, self.pack_gqa)
        with self.lock:
            self.maps.move(q, k, v, out)
            if documents is not None:
                self.shape.documents = documents.table.data_ptr()
                self.shape.together = self.together(documents.most_tiles)
            self.shape.counter = counter.data_ptr()
            self.params.out_rows, self.params.lse = out.data_ptr(), lse.data_ptr()
            self.kernel.launch(self.grid, self.params, stream)
