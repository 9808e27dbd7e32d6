"""How a pattern reaches the kernels: a few integers a head for rules, block lists for masks. No tensor grows with N
squared for rules. Everything is kept (see `kept`).

A rule whose strides nest (each divides the next) has a closed form both ways. For query block i the kept key blocks are

    sinks [0, n)  +  far level  +  near level  +  local window [i - L + 1, i]

each an arithmetic progression, and key block b is seen by the one run of query blocks `[b, b + reach(b))`, where
`reach(b)` is the end of the widest level that b belongs to. Rules with more than `MAX_LEVELS` levels, or whose strides
do not nest, go through block lists like masks do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call
from .kept import Kept, apart, remember
from .pattern import UNBOUNDED, HeadRule, Pattern

MAX_LEVELS = 2
TABLE_COLUMNS = 2 + 3 * MAX_LEVELS  # local, sinks, then (stride, residue, end) from near to far


class RuleSchedule(NamedTuple):
    """Closed-form schedule. `table`: int32 `[H, TABLE_COLUMNS]`, on the host `rows`; `num_levels` is the most any head
    uses."""

    table: Tensor
    rows: list[list[int]]
    num_levels: int
    has_sinks: bool


class ListSchedule(NamedTuple):
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


_TABLES: dict[tuple, Tensor] = {}  # by content and device; graphs read them for ever, and they take 1 KB


_SCHEDULES: dict[tuple, RuleSchedule] = {}  # not by call: that would keep what hangs on it


def rule_schedule(call: Call, num_heads: int, device: torch.device) -> RuleSchedule:
    """The schedule of the KV heads of a call whose pattern has a closed form."""
    key = (call.rules_key, num_heads, device)
    return _SCHEDULES.get(key) or remember(_SCHEDULES, key, _make_schedule(call, num_heads, device))


def _make_schedule(call: Call, num_heads: int, device: torch.device) -> RuleSchedule:
    rules = call.rules(num_heads)
    rows = [_table_row(rule) for rule in rules]
    content = (tuple(map(tuple, rows)), device)
    if content not in _TABLES:
        table = apart(lambda: torch.tensor(rows, dtype=torch.int32, device=device), device)
        _TABLES.setdefault(content, table)
    most_levels = max(len(rule.levels) for rule in rules)
    return RuleSchedule(_TABLES[content], rows, most_levels, any(rule.sinks > 0 for rule in rules))


def _table_row(rule: HeadRule) -> list[int]:
    row = [rule.local, rule.sinks]
    for level in rule.levels:
        row += [level.stride, level.residue, level.end]
    absent = [UNBOUNDED, UNBOUNDED, UNBOUNDED]  # no block is congruent to the residue
    return row + absent * (MAX_LEVELS - len(rule.levels))


LISTS: Kept[ListSchedule] = Kept(lambda lists: lists)


def list_schedule(call: Call, num_blocks: int, num_heads: int, device: torch.device) -> ListSchedule:
    """Block lists of any pattern for sequences of up to `num_blocks` blocks."""
    key = (call.rules_key, num_blocks, num_heads)
    return LISTS.get(key, device, lambda: _make_lists(call, num_blocks, num_heads, device))


def _make_lists(call: Call, num_blocks: int, num_heads: int, device: torch.device) -> ListSchedule:
    def compress(rows: Tensor) -> tuple[Tensor, Tensor]:
        counts = rows.sum(dim=2)  # [H, n]
        ends = counts.flatten().cumsum(0).view_as(counts)
        first = ends[:, :1] - counts[:, :1]
        offsets = torch.cat([first, ends], dim=1)
        return offsets.int().to(device), rows.nonzero()[:, 2].int().to(device)

    mask = call.block_mask(num_blocks, num_heads)
    return ListSchedule(*compress(mask), *compress(mask.transpose(1, 2)))
