"""What `bench_decode.py` times and checks: keys kept by a layout, the bytes that a call reads of them, and calls that
go around several sets of keys, so that they come from memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from s2.attention import Pattern
from s2.attention.decode import decode_attention, decode_workspace, reference_decode
from s2.attention.grammar import UNBOUNDED
from s2.ending import FailureError

COLD_BYTES = 256 << 20  # calls go around keys of so many bytes, several times what an L2 cache holds
MOST_COPIES = 256
LARGEST_DIFFERENCE = 1e-2  # relative RMSE to the definition, in bfloat16
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A row of the report; layout "SDPA" is torch's attention to dense keys."""

    heads: int
    kv_heads: int
    batch: int
    length: int
    layout: str
    head_dim: int = 128
    block: int = 64
    mixed: bool = False  # sequences of several lengths

    @property
    def name(self) -> str:
        return f"{self.layout}, mixed" if self.mixed else self.layout

    @property
    def lengths(self) -> list[int]:
        """Of the sequences: all alike, or falling to a sixteenth, each by the same factor."""
        if not self.mixed:
            return [self.length] * self.batch
        return [max(1, round(self.length * 16 ** (-n / (self.batch - 1)))) for n in range(self.batch)]

    @property
    def kept(self) -> str:
        """The layout of the keys that are there."""
        return "dense" if self.layout == "SDPA" else self.layout


# ---------------------------------------------------------------- what is kept


def kept_regions(layout: str, kv_heads: int, length: int, block: int) -> tuple[list[list[list[int]]], int]:
    """Rows of each head's regions (see `s2.attention.decode`) for sequences of up to `length` tokens, and the slots of
    the head with most. Windows and levels that end have a block to spare, which the new token may begin."""
    num_blocks = -(-length // block)
    heads, most = [], 0
    for rule in Pattern.parse(layout, block).rules(kv_heads):
        sinks = min(rule.sinks, num_blocks)
        rows = [[0, sinks, 1, 0, 0, sinks, 0, UNBOUNDED]] if sinks else []
        begin, near = sinks * block, 0
        for stride, residue, far in ((1, 0, rule.local), *((x.stride, x.residue, x.end) for x in rule.levels)):
            capacity = min(-(-far // stride) + 1, -(-num_blocks // stride))
            rows.append([begin, capacity, stride, residue, sinks, UNBOUNDED, near, min(far, UNBOUNDED)])
            begin, near = begin + capacity * block, far
        heads.append(rows)
        most = max(most, begin)
    return heads, most


def visible_tokens(heads: list[list[list[int]]], length: int, block: int) -> int:
    """Keys that the last of `length` tokens sees, over all heads."""
    newest = (length - 1) // block
    total = 0
    for _, _, stride, residue, first, last, near, far in itertools.chain.from_iterable(heads):
        low = max(first, newest - far + 1, 0)
        seen = range(low + (residue - low) % stride, min(last - 1, newest - near) + 1, stride)
        total += len(seen) * block - (max(0, (seen[-1] + 1) * block - length) if seen else 0)
    return total


def table_of(heads: list[list[list[int]]], device: str) -> Tensor:
    regions = max(map(len, heads))
    return torch.tensor(
        [[*rows, *[[0] * 8] * (regions - len(rows))] for rows in heads], dtype=torch.int32, device=device
    )


def bytes_of(shape: Shape) -> int:
    """Of the keys and values that a call has to read."""
    heads, _ = kept_regions(shape.kept, shape.kv_heads, shape.length, shape.block)
    tokens = sum(visible_tokens(heads, length, shape.block) for length in shape.lengths)
    return 2 * DTYPE.itemsize * shape.head_dim * tokens


def copies_of(shape: Shape, held: int, room: int) -> int:
    """How many sets of keys of `held` elements the calls go around, in a pool of `room`."""
    enough = -(-COLD_BYTES // bytes_of(shape))
    return max(1, min(enough, MOST_COPIES, room // held))


# ---------------------------------------------------------------- calls


def calls_of(shape: Shape, pool: Tensor) -> list[Callable[[], Tensor]]:
    """Calls to time, each with keys and values of its own from the pool's random numbers."""
    heads, slots = kept_regions(shape.kept, shape.kv_heads, shape.length, shape.block)
    slots = shape.length if shape.layout == "SDPA" else slots
    size = (shape.batch, shape.kv_heads, slots, shape.head_dim)
    held = 2 * shape.batch * shape.kv_heads * slots * shape.head_dim
    if held > len(pool):
        raise FailureError(
            f"keys of {held * DTYPE.itemsize >> 30} GiB do not fit in {len(pool) * DTYPE.itemsize >> 30}"
        )
    q = torch.randn(shape.batch, 1, shape.heads, shape.head_dim, dtype=DTYPE, device=pool.device)
    pairs = [pool[n * held : (n + 1) * held].view(2, *size) for n in range(copies_of(shape, held, len(pool)))]
    if shape.layout == "SDPA":
        return [partial(dense, q.transpose(1, 2), *pair.unbind()) for pair in pairs]
    table = table_of(heads, pool.device)
    lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=pool.device)
    settings = {"block": shape.block, "scale": shape.head_dim**-0.5}
    workspace = decode_workspace(q, pairs[0][0], block=shape.block)
    return [
        partial(decode_attention, q, *pair.unbind(), table, lengths, workspace=workspace, **settings) for pair in pairs
    ]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def chosen_kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What SDPA takes for these."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return "?"
    return SDPBackend(choose(q, k, v, enable_gqa=q.shape[1] != k.shape[1])).name.lower().replace("_attention", "")


# ---------------------------------------------------------------- the check


def check(shape: Shape, device: str) -> float:
    """Relative RMSE to the definition of sequences up to the shape's length, one new token and four. FailureError: more
    than rounding explains."""
    heads, slots = kept_regions(shape.kept, shape.kv_heads, shape.length, shape.block)
    k, v = (torch.randn(3, shape.kv_heads, slots, shape.head_dim, dtype=DTYPE, device=device) for _ in range(2))
    lengths = torch.tensor([shape.length, shape.length // 3, 1], dtype=torch.int32, device=device)
    settings = {"block": shape.block, "scale": shape.head_dim**-0.5}
    worst = 0.0
    for tokens in (1, 4):
        q = torch.randn(3, tokens, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
        given = (table_of(heads, device), lengths)
        out = decode_attention(q, k, v, *given, backend="triton", **settings).float()
        wanted, _ = reference_decode(*(x.float() for x in (q, k, v)), *given, **settings)
        error = float((out - wanted).norm() / wanted.norm())
        if not error <= LARGEST_DIFFERENCE:
            raise FailureError(f"{shape} with {tokens} new tokens: relative RMSE {error:.2g} to the definition")
        worst = max(worst, error)
    return worst
