"""What the kernels' hosts share: the facts of a call, its tensors, and what a launch needs of the device."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import schedule
from ...call import Call
from ...kept import apart
from . import driver

TILE = 64  # query rows of an m_block, keys of an n_block
MAX_KEPT = 512  # of what is kept for a shape of call


@dataclass(frozen=True, eq=False)
class Problem:
    """One shape of call on q `[B, S, Hq, D]` and k, v `[B, offset + S, Hkv, D]`; a packed call is a batch of one, with
    as many keys as there are. Only the forward takes `late` calls, those whose queries are the last of longer keys."""

    rules: schedule.RuleSchedule
    block_size: int
    scale: float
    batch: int
    length: int
    num_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    packed: bool
    offset: int = 0
    late: bool = False

    @classmethod
    def of(cls, q: Tensor, k: Tensor, call: Call, packed: bool, late: bool = False) -> Problem:
        """`late`: of packed documents, which do not show it."""
        rules = schedule.rule_schedule(call, k.shape[2], q.device)
        batch, length, num_heads, head_dim = q.shape
        offset = 0 if packed else k.shape[1] - length
        return cls(
            rules, call.pattern.block_size, call.softmax_scale, batch, length, num_heads, k.shape[2], head_dim, q.dtype,
            q.device, packed, offset, late or offset > 0,
        )  # fmt: skip

    @property
    def group(self) -> int:
        """Query heads to a KV head."""
        return self.num_heads // self.kv_heads

    @property
    def heads_per_tile(self) -> int:
        return heads_per_tile(self.block_size)

    @property
    def tokens_per_tile(self) -> int:
        return min(self.block_size, TILE)

    @property
    def num_sms(self) -> int:
        return num_sms(self.device)

    @property
    def constants(self) -> dict[str, Any]:
        """Constants that kernels in Triton and Gluon are compiled with."""
        rules = {"BLOCK": self.block_size, "LEVELS": self.rules.num_levels, "SINKS": self.rules.has_sinks}
        return {"TABLE": schedule.TABLE_COLUMNS, **rules}

    @property
    def macros(self) -> dict[str, int]:
        """Constants that kernels in CUDA C++ are compiled with."""
        own = {"D": self.head_dim, "PACKED": self.packed, "LATE": self.late}
        own["BF16"] = self.dtype == torch.bfloat16
        return own | {name: self.constants[name] for name in ("BLOCK", "LEVELS", "SINKS")}


class BackwardTensors(NamedTuple):
    """q, k, v `[B, S, H, D]`, packed ones as a batch of one. The others are contiguous and used by their address: out,
    dout and the gradients `[B, S, H, D]`, lse and dlse `[B, Hq, S]` float32, packed ones without B."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor


def heads_per_tile(block_size: int) -> int:
    """Query heads in the 64 rows of an m_block: one query block of each."""
    return max(TILE // block_size, 1)


def align16(x: Tensor) -> Tensor:
    """At a multiple of 16 bytes, as TMA and the kernels compiled by Triton (`triton_launcher`) need it."""
    return x.clone() if x.data_ptr() % driver.ADDRESS_ALIGNMENT else x


def contiguous16(x: Tensor) -> Tensor:
    return align16(x.contiguous())


# contiguous whatever the strides of its argument, as the kernels write; takes half of `torch.empty`'s time
empty_like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)


def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def counter_of(device: torch.device, stream: int) -> Tensor:
    """A zero from which the CTAs of a persistent kernel draw their tiles; the kernel leaves it zero. Kernels of one
    stream share one. A graph gets its own, since it may be replayed beside anything."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    counter = _COUNTERS.get((device, stream))
    if counter is None:
        counter = apart(lambda: torch.zeros(1, dtype=torch.int32).to(device), device)
        counter = _COUNTERS.setdefault((device, stream), counter)
    return counter


class Maps:
    """TMA descriptors in the parameters of a kernel in CUDA C++: of q, k and v in fields of these names, and in the
    field `other` of contiguous tensors of q's shape. Query tiles are of `heads_per_tile` heads, key tiles of one."""

    def __init__(self, params: ctypes.Structure, problem: Problem, q: Tensor, k: Tensor, v: Tensor, other: str) -> None:
        _, length, num_heads, head_dim = q.shape
        heads, tokens = problem.heads_per_tile, problem.tokens_per_tile
        contiguous = (length * num_heads * head_dim, num_heads * head_dim, head_dim)
        self.q = _tensor_map(params, "q", q, q.stride(), heads, tokens)
        self.k = _tensor_map(params, "k", k, k.stride(), 1, tokens)
        self.v = _tensor_map(params, "v", v, v.stride(), 1, tokens)
        self.other = _tensor_map(params, other, q, contiguous, heads, tokens)  # only its shape is known yet

    def move(self, q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> None:
        """To other tensors of the same shapes and strides."""
        self.q.move(q.data_ptr())
        self.k.move(k.data_ptr())
        self.v.move(v.data_ptr())
        self.other.move(other.data_ptr())


def _tensor_map(
    params: ctypes.Structure, field: str, x: Tensor, strides: Sequence[int], heads: int, tokens: int
) -> driver.TensorMap:
    """Of `[B, S, H, D]` as `[B, H, S, D]`, in boxes of some tokens of some heads, and of 64 columns, which a 128-byte
    swizzle spans. `strides` in elements."""
    batch, length, num_heads, head_dim = x.shape
    return driver.TensorMap(
        params, field, x.data_ptr(), x.dtype, [batch, num_heads, length, head_dim],
        [x.element_size() * strides[dim] for dim in (0, 2, 1)], [1, heads, tokens, 64],
    )  # fmt: skip
