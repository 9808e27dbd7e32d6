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
from s2.attention.decode import decode_attention, decode_shares, decode_workspace, reference_decode
from s2.attention.regions import HeadGroup, lay_out
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
    def group(self) -> HeadGroup:
        """The keys that are there."""
        return kept("dense" if self.layout == "SDPA" else self.layout, self.kv_heads, self.length, self.block)


# ---------------------------------------------------------------- what is kept


def kept(layout: str, kv_heads: int, length: int, block: int) -> HeadGroup:
    """What a cache has of a layer's heads for sequences of up to `length` tokens."""
    (group,) = lay_out(Pattern.parse(layout, block), kv_heads, 0, -(-length // block))
    return group


def visible_tokens(group: HeadGroup, length: int, block: int) -> int:
    """Keys that the last of `length` tokens sees, over all heads."""
    newest = (length - 1) // block
    total = 0
    for _, _, stride, residue, first, last, near, far in itertools.chain.from_iterable(group.regions):
        low = max(first, newest - far + 1, 0)
        seen = range(low + (residue - low) % stride, min(last - 1, newest - near) + 1, stride)
        total += len(seen) * block - (max(0, (seen[-1] + 1) * block - length) if seen else 0)
    return total


def bytes_of(shape: Shape) -> int:
    """Of the keys and values that a call has to read."""
    tokens = sum(visible_tokens(shape.group, length, shape.block) for length in shape.lengths)
    return 2 * DTYPE.itemsize * shape.head_dim * tokens


def copies_of(shape: Shape, held: int, room: int) -> int:
    """How many sets of keys of `held` elements the calls go around, in a pool of `room`."""
    enough = -(-COLD_BYTES // bytes_of(shape))
    return max(1, min(enough, MOST_COPIES, room // held))


# ---------------------------------------------------------------- calls


@dataclass(frozen=True)
class Calls:
    """attend: calls to time, each with keys and values of its own from the pool's random numbers. plan: what layers of
    one kind share in a step (`decode_shares`), which `attend` is given; None of SDPA."""

    attend: list[partial[Tensor]]
    plan: Callable[[], Tensor] | None = None


def calls_of(shape: Shape, pool: Tensor) -> Calls:
    """FailureError: the pool is too small."""
    slots = shape.length if shape.layout == "SDPA" else shape.group.num_blocks * shape.block
    size = (shape.batch, shape.kv_heads, slots, shape.head_dim)
    held = 2 * shape.batch * shape.kv_heads * slots * shape.head_dim
    if held > len(pool):
        raise FailureError(
            f"keys of {held * DTYPE.itemsize >> 30} GiB do not fit in {len(pool) * DTYPE.itemsize >> 30}"
        )
    q = torch.randn(shape.batch, 1, shape.heads, shape.head_dim, dtype=DTYPE, device=pool.device)
    pairs = [pool[n * held : (n + 1) * held].view(2, *size) for n in range(copies_of(shape, held, len(pool)))]
    if shape.layout == "SDPA":
        return Calls([partial(dense, q.transpose(1, 2), *pair.unbind()) for pair in pairs])
    table = shape.group.table.to(pool.device)
    lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=pool.device)
    plan = partial(decode_shares, q, pairs[0][0], table, lengths, block=shape.block)
    settings = {"block": shape.block, "scale": shape.head_dim**-0.5, "shares": plan()}
    workspace = decode_workspace(q, pairs[0][0], block=shape.block)
    return Calls(
        [
            partial(decode_attention, q, *pair.unbind(), table, lengths, workspace=workspace, **settings)
            for pair in pairs
        ],
        plan,
    )


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
    slots = shape.group.num_blocks * shape.block
    k, v = (torch.randn(3, shape.kv_heads, slots, shape.head_dim, dtype=DTYPE, device=device) for _ in range(2))
    lengths = torch.tensor([shape.length, shape.length // 3, 1], dtype=torch.int32, device=device)
    settings = {"block": shape.block, "scale": shape.head_dim**-0.5}
    worst = 0.0
    for tokens in (1, 4):
        q = torch.randn(3, tokens, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
        given = (shape.group.table.to(device), lengths)
        out = decode_attention(q, k, v, *given, backend="triton", **settings).float()
        wanted, _ = reference_decode(*(x.float() for x in (q, k, v)), *given, **settings)
        error = float((out - wanted).norm() / wanted.norm())
        if not error <= LARGEST_DIFFERENCE:
            raise FailureError(f"{shape} with {tokens} new tokens: relative RMSE {error:.2g} to the definition")
        worst = max(worst, error)
    return worst
