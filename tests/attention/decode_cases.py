"""Kept keys for the tests of decoding: regions of a pattern's heads, and storage filled as tokens arrive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2.attention import HeadRule, Pattern, s2_attention
from s2.attention.grammar import UNBOUNDED


def regions_of(rule: HeadRule, num_blocks: int, slack: int = 1) -> list[list[int]]:
    """`[capacity, stride, residue, first, last, near, far]` of what a head keeps for up to `num_blocks` blocks."""
    sinks = min(rule.sinks, num_blocks)
    regions = [[sinks, 1, 0, 0, sinks, 0, UNBOUNDED]] if sinks else []
    near = 0
    levels = [(1, 0, rule.local), *((level.stride, level.residue, level.end) for level in rule.levels)]
    for stride, residue, far in levels:
        capacity = -(-min(far + slack * stride, num_blocks + stride) // stride)
        regions.append([capacity, stride, residue, sinks, UNBOUNDED, near, min(far, UNBOUNDED)])
        near = far
    return regions


def table_of(rules: list[HeadRule], num_blocks: int, block: int, slack: int = 1) -> tuple[Tensor, int]:
    """int32 `[H, R, 8]`, and slots of the head with most."""
    heads = [regions_of(rule, num_blocks, slack) for rule in rules]
    table = torch.zeros(len(heads), max(map(len, heads)), 8, dtype=torch.int32)
    slots = 0
    for head, regions in zip(table, heads, strict=True):
        begin = 0
        for row, region in zip(head, regions, strict=False):
            row[:] = torch.tensor([begin, *region])
            begin += region[0] * block
        slots = max(slots, begin)
    return table, slots


def fill(storage: Tensor, full: Tensor, table: Tensor, lengths: list[int], block: int) -> None:
    """Writes tokens `[B, N, H, D]` into `[B, H, C, D]` one block after the other, as they arrive."""
    for b, length in enumerate(lengths):
        for h, regions in enumerate(table.tolist()):
            for begin, capacity, stride, residue, first, last, *_ in regions:
                for j in range(first, min(last, -(-length // block))):
                    if j % stride == residue:
                        slot = begin + (j - residue) // stride % capacity * block
                        tokens = full[b, j * block : min((j + 1) * block, length), h]
                        storage[b, h, slot : slot + len(tokens)] = tokens


@dataclass(frozen=True)
class DecodeCase:
    pattern: Pattern
    lengths: tuple[int, ...]
    tokens: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    rotation: int = 0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def inputs(self, dtype: torch.dtype, device: str, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """q, k, v, table and lengths for `decode_attention`, and q, k, v `[B, N, H, D]` of the whole sequences. Slots
        that nothing was written into hold NaN."""
        generator = torch.Generator().manual_seed(seed)
        block, longest = self.pattern.block_size, max(*self.lengths, self.tokens)

        def draw(heads: int) -> Tensor:
            shape = (len(self.lengths), longest, heads, self.head_dim)
            return torch.randn(shape, generator=generator).to(dtype)

        q, k, v = draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)
        rules = self.pattern.rules(self.kv_heads, layer=self.rotation)
        table, slots = table_of(list(rules), -(-longest // block), block)
        storage = [torch.full((len(q), self.kv_heads, slots, self.head_dim), torch.nan, dtype=dtype) for _ in "kv"]
        for kept, full in zip(storage, (k, v), strict=True):
            fill(kept, full, table, list(self.lengths), block)
        newest = torch.zeros(len(q), self.tokens, *q.shape[2:], dtype=dtype)
        for b, length in enumerate(self.lengths):
            count = min(length, self.tokens)
            newest[b, self.tokens - count :] = q[b, length - count : length]
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        given = [x.to(device) for x in (newest, *storage, table, lengths)]
        return given, [q, k, v]

    def exact(self, whole: list[Tensor]) -> tuple[Tensor, Tensor]:
        """`s2_attention`'s definition in float64, out `[B, S, Hq, D]` and lse `[B, S, Hq]`."""
        out = torch.zeros(len(self.lengths), self.tokens, self.heads, self.head_dim, dtype=torch.float64)
        lse = torch.full(out.shape[:3], -torch.inf, dtype=torch.float64)
        for b, length in enumerate(self.lengths):
            count = min(length, self.tokens)
            if count:
                q, k, v = (x[b : b + 1, :length].double() for x in whole)
                found, found_lse = s2_attention(
                    q[:, length - count :], k, v, self.pattern, rotation=self.rotation, softmax_scale=self.scale,
                    return_lse=True, backend="reference",
                )  # fmt: skip
                out[b, self.tokens - count :] = found[0]
                lse[b, self.tokens - count :] = found_lse[0].T
        return out, lse
