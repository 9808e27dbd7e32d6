"""What the launches of the Hopper kernels share: plans of calls, the table of packed work, streams and counters, and
TMA descriptors."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import schedule
from ...kept import apart
from ...pattern import Pattern
from ..triton.documents import Fill, fillers
from . import cuda, packing
from .columns import CHUNK, UNDIVIDED, PackedColumns
from .direct import Launch

if TYPE_CHECKING:
    from .launch import Forward, TwoPasses
    from .one_pass import OnePass

MAX_PLANS = 512  # of what is kept for a shape of call

Heads = tuple[int, int, int]  # layer, head_offset, total KV heads


def heads_a_box(block_size: int) -> int:
    """Query heads that the 64 rows of a box are of."""
    return max(CHUNK // block_size, 1)


def at_16(x: Tensor) -> Tensor:
    """At a multiple of 16 bytes, as TMA wants it and as a kept kernel (`Launch`) was compiled for."""
    return x.clone() if x.data_ptr() % cuda.ADDRESS_ALIGNMENT else x


# contiguous whatever the strides of its argument, as the kernels write; takes half of `torch.empty`'s time
empty_like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)


def aligned(x: Tensor) -> Tensor:
    """Contiguous too."""
    return at_16(x.contiguous())


def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def stream_of(device: torch.device) -> int:
    return cuda.current_stream(device.index)


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def counter_of(device: torch.device, stream: int) -> Tensor:
    """A zero from which the CTAs of a persistent kernel draw their work; the kernel leaves it zero. Kernels of one
    stream share one. A graph gets its own, since it may be replayed beside anything."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    counter = _COUNTERS.get((device, stream))
    if counter is None:
        counter = apart(lambda: torch.zeros(1, dtype=torch.int32).to(device), device)
        counter = _COUNTERS.setdefault((device, stream), counter)
    return counter


# ---------------------------------------------------------------- plans


@dataclass
class Plan:
    """One shape of call, packed calls as a batch of one."""

    rules: schedule.RuleSchedule
    constants: dict[str, Any]
    scale: float
    head_dim: int
    group: int  # query heads to a KV head
    forward: Forward | None = None
    backward: TwoPasses | None = None
    one_pass: OnePass | None = None
    is_long: dict[int, bool] = field(default_factory=dict)  # by (mean) length: see `_takes_one_pass`


PLANS: dict[tuple, Plan] = {}


def plan_of(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, heads: Heads, softmax_scale: float, packed: bool
) -> Plan:
    strides = (q.stride(), k.stride(), v.stride())
    key = (q.shape, k.shape, strides, q.dtype, q.device, pattern.key, heads, softmax_scale, packed)
    plan = PLANS.get(key)
    if plan is None:
        if len(PLANS) >= MAX_PLANS:
            del PLANS[next(iter(PLANS))]  # the oldest
        rules = schedule.rule_schedule(pattern.key, k.shape[2], *heads, q.device)
        constants = {
            "TABLE": schedule.TABLE_COLUMNS,
            "BLOCK": pattern.block_size,
            "LEVELS": rules.num_levels,
            "SINKS": rules.has_sinks,
        }
        plan = PLANS[key] = Plan(rules, constants, softmax_scale, q.shape[3], q.shape[2] // k.shape[2])
    return plan


@functools.lru_cache(MAX_PLANS)
def _table_launch(
    count: int, consumers: int, share: int, an_item: int, block: int, levels: int, dtype: torch.dtype,
    device: torch.device,
) -> Launch:  # fmt: skip
    """Kept, since what a launch prepares takes longer than a call. `dtype`: of the results."""
    constants = {"BOXES": consumers, "SHARE": share, "CHUNKS": an_item, "BLOCK": block, "LEVELS": levels, "WIDTH": 256}
    return Launch(packing.attention_documents, (count + fillers(device), 1, 1), constants, (dtype, device))


_DOCUMENTS = 64  # numbers of documents are rounded up to this for what is made from their number


@dataclass(frozen=True)
class Documents:
    """The table of packed work (`packing.attention_documents`), where its items begin, and room for the boxes of rows
    of a head. An unpacked call gets another tensor in the table's place."""

    table: Tensor
    most_tiles: int
    boxes: int

    @classmethod
    def of(
        cls,
        stream: int,
        q: Tensor,
        plan: Plan,
        consumers: int,
        cu_seqlens: Tensor | None,
        fill: Fill | None,
        share: int = 1,
        an_item: int = 2,
        columns: PackedColumns = UNDIVIDED,
    ) -> Documents:
        """With tiles of `consumers` boxes, of which `share` of the same rows stand side by side, and items of `an_item`
        chunks. Rows of no document are filled in the results `fill` (of packed documents alone). `stream` is the
        current one, by its handle."""
        length = q.shape[1]
        levels, block = plan.constants["LEVELS"], plan.constants["BLOCK"]
        tokens = min(block, CHUNK)
        if cu_seqlens is None or fill is None:
            return cls(plan.rules.table, 0, -(-length // tokens))
        count = cu_seqlens.shape[0] - 1
        most_tiles = length * share // (consumers * tokens) + count * (1 if share == 1 else 2 + share // consumers)
        sinks = max(row[1] for row in plan.rules.rows)
        most_keys = length + count * block  # in whole blocks
        most_items = (most_keys + min(most_keys, count * sinks * block)) // (2 * CHUNK) + count * (levels + 2)
        most_items += columns.most_segments
        table = torch.empty((1 + most_tiles + most_items, 4), dtype=torch.int32, device=q.device)
        launch = _table_launch(count, consumers, share, an_item, block, levels, q.dtype, q.device)
        numbers = (count, length, most_tiles, columns.segment_rows, sinks, *columns.strides)
        launch(stream, aligned(cu_seqlens), table, *fill, *numbers)
        return cls(table, most_tiles, length // tokens + -(-count // _DOCUMENTS) * _DOCUMENTS)


# ---------------------------------------------------------------- kernels in CUDA C++


def macros_of(dtype: torch.dtype, head_dim: int, block: int, levels: int, sinks: bool, packed: bool) -> dict[str, int]:
    """The constants that all of them are compiled with."""
    return {
        "D": head_dim,
        "BLOCK": block,
        "LEVELS": levels,
        "SINKS": sinks,
        "PACKED": packed,
        "BF16": dtype == torch.bfloat16,
    }


class Maps:
    """TMA descriptors in the parameters of a kernel: of q, k and v in fields of these names, and in the field `other`
    of tensors of q's shape that are contiguous. Boxes of rows are of `heads_a_box` heads, those of keys of one."""

    def __init__(self, params: ctypes.Structure, q: Tensor, k: Tensor, v: Tensor, other: str, block_size: int) -> None:
        _, length, num_heads, head_dim = q.shape
        tokens, some_heads = min(block_size, CHUNK), heads_a_box(block_size)
        contiguous = (length * num_heads * head_dim, num_heads * head_dim, head_dim)
        self.q = _tensor_map(params, "q", q, q.stride(), some_heads, tokens)
        self.k = _tensor_map(params, "k", k, k.stride(), 1, tokens)
        self.v = _tensor_map(params, "v", v, v.stride(), 1, tokens)
        self.other = _tensor_map(params, other, q, contiguous, some_heads, tokens)  # only its shape is known yet

    def move(self, q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> None:
        """To other tensors of the same shapes and strides."""
        self.q.move(q.data_ptr())
        self.k.move(k.data_ptr())
        self.v.move(v.data_ptr())
        self.other.move(other.data_ptr())


def _tensor_map(
    params: ctypes.Structure, field: str, x: Tensor, strides: tuple[int, ...], some_heads: int, tokens: int
) -> cuda.TensorMap:
    """Of `[B, S, H, D]` as `[B, H, S, D]`, in boxes of `tokens` tokens of some heads, and of 64 columns, which a
    128-byte swizzle spans. `strides` in elements."""
    batch, length, heads, head_dim = x.shape
    return cuda.TensorMap(
        params, field, x.data_ptr(), x.dtype, [batch, heads, length, head_dim],
        [x.element_size() * strides[dim] for dim in (0, 2, 1)], [1, some_heads, tokens, 64],
    )  # fmt: skip
