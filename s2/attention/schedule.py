"""How a pattern reaches the kernels: a few integers a head for rules, block lists for masks, and the division of
packed documents into tiles. Everything here is small (no tensor grows with N squared for rules) and cached.

A rule whose strides nest (each divides the next) has a closed form both ways. For query block i the kept key blocks are

    sinks [0, n)  +  far level  +  near level  +  local window [i - L + 1, i]

each an arithmetic progression, and key block b is seen by the one run of query blocks `[b, b + reach(b))`, where
`reach(b)` is the end of the widest level that b belongs to. Rules with more than `MAX_LEVELS` levels, or whose strides
do not nest, go through block lists like masks do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .pattern import UNBOUNDED, HeadRule, Pattern, pattern_from_key

MAX_LEVELS = 2
TABLE_COLUMNS = 2 + 3 * MAX_LEVELS  # local, sinks, then (stride, residue, end) from near to far


@dataclass(frozen=True)
class RuleSchedule:
    """Closed-form schedule. `table`: int32 `[H, TABLE_COLUMNS]`, on the host `rows`; `num_levels` is the most any head
    uses."""

    table: Tensor
    rows: list[list[int]]
    num_levels: int
    has_sinks: bool


@dataclass(frozen=True)
class ListSchedule:
    """Block lists. Query block i of head h keeps `key_blocks[key_offsets[h, i] : key_offsets[h, i + 1]]` (ascending);
    key block b is seen by `query_blocks[query_offsets[h, b] : query_offsets[h, b + 1]]` (ascending). All int32."""

    key_offsets: Tensor
    key_blocks: Tensor
    query_offsets: Tensor
    query_blocks: Tensor


def has_closed_form(pattern: Pattern) -> bool:
    """Whether the kernels know the pattern in closed form (else through block lists)."""
    if pattern.mask is not None:
        return False
    rules = pattern.rules(len(pattern.heads) or 1)
    return all(rule.is_nested and len(rule.levels) <= MAX_LEVELS for rule in rules)


@lru_cache(maxsize=256)
def rule_schedule(
    key: str, num_heads: int, layer: int, head_offset: int, total_heads: int, device: torch.device
) -> RuleSchedule:
    """The schedule of heads `[head_offset, head_offset + num_heads)` of a closed-form pattern."""
    rules = pattern_from_key(key).rules(total_heads, layer=layer)[head_offset : head_offset + num_heads]
    rows = [_table_row(rule) for rule in rules]
    return RuleSchedule(
        table=torch.tensor(rows, dtype=torch.int32, device=device),
        rows=rows,
        num_levels=max(len(rule.levels) for rule in rules),
        has_sinks=any(rule.sinks > 0 for rule in rules),
    )


def _table_row(rule: HeadRule) -> list[int]:
    row = [rule.local, rule.sinks]
    for level in rule.levels:
        row += [level.stride, level.residue, level.end]
    absent = [UNBOUNDED, UNBOUNDED, UNBOUNDED]  # no block is congruent to the residue
    return row + absent * (MAX_LEVELS - len(rule.levels))


@lru_cache(maxsize=32)
def list_schedule(
    key: str,
    num_blocks: int,
    num_heads: int,
    layer: int,
    head_offset: int,
    total_heads: int,
    device: torch.device,
) -> ListSchedule:
    """Block lists of any pattern for sequences of up to `num_blocks` blocks."""
    pattern = pattern_from_key(key)
    mask = pattern.block_mask(num_blocks, total_heads, layer=layer)[head_offset : head_offset + num_heads]

    def compress(rows: Tensor) -> tuple[Tensor, Tensor]:
        counts = rows.sum(dim=2)  # [H, n]
        ends = counts.flatten().cumsum(0).view_as(counts)
        first = ends[:, :1] - counts[:, :1]
        offsets = torch.cat([first, ends], dim=1)
        return offsets.int().to(device), rows.nonzero()[:, 2].int().to(device)

    return ListSchedule(*compress(mask), *compress(mask.transpose(1, 2)))


@dataclass(frozen=True)
class DocumentTiles:
    """Which document each tile of a packed batch belongs to.

    `first`: int32 `[n + 1]`, the first tile of each document; `document`: int32 `[num_tiles]`, n for spare tiles.
    `num_tiles` is an upper bound known without reading the lengths, so nothing waits for the device.
    """

    first: Tensor
    document: Tensor
    num_tiles: int


def document_tiles(
    cu_seqlens: Tensor, total_tokens: int, tile: int, *, block: int = 1, extra: int = 0
) -> DocumentTiles:
    """Divide packed documents into tiles of `tile` tokens (whole blocks of `block`), plus `extra` a document."""
    num_documents = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens.diff()
    rounded = (lengths + block - 1) // block * block
    tiles = (rounded + tile - 1) // tile + extra * (lengths > 0)
    first = torch.zeros_like(cu_seqlens)
    first[1:] = tiles.cumsum(0)
    num_tiles = (total_tokens + num_documents * (block - 1)) // tile + (1 + extra) * num_documents
    index = torch.arange(num_tiles, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(first, index, right=True, out_int32=True) - 1
    return DocumentTiles(first, document, num_tiles)
