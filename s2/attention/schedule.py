"""How a pattern reaches the kernels: a few integers a head for rules with a closed form, block lists for other rules
and for masks. Everything is kept (see `kept`).

A rule whose strides nest (each divides the next) has a closed form both ways. For query block i the kept key blocks are

    sinks [0, n)  +  far level  +  near level  +  local window [i - L + 1, i]

each an arithmetic progression, and key block b is seen by the one run of query blocks `[b, b + reach(b))`, where
`reach(b)` is the end of the widest level that b belongs to. Rules with more than `MAX_LEVELS` levels, or whose strides
do not nest, go through block lists like masks do; no mask is made for them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .call import Call
from .kept import Kept, apart, remember
from .pattern import UNBOUNDED, HeadRule, Level, Pattern

MAX_LEVELS = 2
TABLE_COLUMNS = 2 + 3 * MAX_LEVELS  # local, sinks, then (stride, residue, end) from near to far


class RuleSchedule(NamedTuple):
    """Closed-form schedule. `table`: int32 `[H, TABLE_COLUMNS]`, on the host `rows`; `num_levels` is the most any head
    uses."""

    table: Tensor
    rows: list[list[int]]
    num_levels: int
    has_sinks: bool


class BlockLists(NamedTuple):
    """Block lists, int32. With queries that walk keys: query block i of head h keeps
    `blocks[offsets[h, i] : offsets[h, i + 1]]` (ascending); the other way round these are the query blocks that see key
    block i."""

    offsets: Tensor
    blocks: Tensor


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


LISTS: Kept[BlockLists] = Kept(lambda lists: lists)


def key_lists(call: Call, num_blocks: int, num_heads: int, device: torch.device, first: int = 0) -> BlockLists:
    """Of any pattern, the key blocks that query blocks from `first` on keep, of sequences of up to `num_blocks` blocks;
    lists before `first` are empty."""
    key = ("keys", call.rules_key, num_blocks, num_heads, first)
    return LISTS.get(key, device, lambda: _make_lists(call, num_blocks, num_heads, device, first, of_keys=False))


def query_lists(call: Call, num_blocks: int, num_heads: int, device: torch.device, first: int = 0) -> BlockLists:
    """The same the other way round, for the backward: of each key block the query blocks from `first` on that keep
    it."""
    key = ("queries", call.rules_key, num_blocks, num_heads, first)
    return LISTS.get(key, device, lambda: _make_lists(call, num_blocks, num_heads, device, first, of_keys=True))


def _make_lists(
    call: Call, num_blocks: int, num_heads: int, device: torch.device, first: int, of_keys: bool
) -> BlockLists:
    if call.pattern.mask is not None:
        lengths, blocks = _lists_of_mask(call.block_mask(num_blocks, num_heads)[:, first:].numpy(), first, of_keys)
    else:
        runs_of = _runs_of_keys if of_keys else _runs_of_queries
        lengths, blocks = _lists_of_runs([runs_of(rule, num_blocks, first) for rule in call.rules(num_heads)])
    if not of_keys:
        lengths = np.pad(lengths, ((0, 0), (first, 0)))
    ends = np.cumsum(lengths, dtype=np.int32).reshape(lengths.shape)
    offsets = np.concatenate([ends[:, :1] - lengths[:, :1], ends], axis=1, dtype=np.int32)
    return BlockLists(torch.from_numpy(offsets).to(device), torch.from_numpy(blocks).to(device))


def _lists_of_mask(rows: np.ndarray, first: int, of_keys: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of lists `[H, rows]`, and all that is in them, from bool `[H, n - first, n]`."""
    if of_keys:
        rows = rows.transpose(0, 2, 1)
    return rows.sum(axis=2), (rows.nonzero()[2] + (first if of_keys else 0)).astype(np.int32)


def _lists_of_runs(heads: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The same from the runs of each head, int64 `[rows, R, 3]`, in order: begin, length and stride."""
    runs = np.concatenate([head.reshape(-1, 3) for head in heads])
    begin, length, stride = runs[runs[:, 1] > 0].T
    steps = np.repeat(stride.astype(np.int32), length)  # from the one before
    if len(length):
        last = begin + (length - 1) * stride
        steps[np.cumsum(length) - length] = begin - np.pad(last[:-1], (1, 0))
    return np.stack([head[..., 1].sum(axis=1) for head in heads]), np.cumsum(steps, dtype=np.int32)


def _runs_of_queries(rule: HeadRule, num_blocks: int, first: int) -> np.ndarray:
    """Of each query block from `first` on the runs of key blocks, from far to near: int64 `[n - first, R, 3]`."""
    query = np.arange(first, num_blocks)
    runs = [(0 * query, np.minimum(rule.sinks, query + 1), 1)]
    for near, level in reversed(_reaches(rule)):
        low = np.maximum(query - level.end + 1, rule.sinks)
        begin = low + (level.residue - low) % level.stride
        runs.append((begin, np.maximum(-((begin - (query - near + 1)) // level.stride), 0), level.stride))
    return np.stack([np.stack(np.broadcast_arrays(*run), axis=-1) for run in runs], axis=1)


def _runs_of_keys(rule: HeadRule, num_blocks: int, first: int) -> np.ndarray:
    """Of each key block the runs of query blocks from `first` on: int64 `[n, R, 3]`."""
    key = np.arange(num_blocks)
    runs = []
    for near, level in _reaches(rule):
        is_sink = key < rule.sinks
        begin = np.maximum(key + near, first)
        end = np.where(is_sink & (near == 0), num_blocks, np.minimum(key + level.end, num_blocks))
        is_seen = np.where(is_sink, near == 0, key % level.stride == level.residue)
        runs.append((begin, np.where(is_seen, np.maximum(end - begin, 0), 0), 1))
    return np.stack([np.stack(np.broadcast_arrays(*run), axis=-1) for run in runs], axis=1)


def _reaches(rule: HeadRule) -> list[tuple[int, Level]]:
    """From near to far at which distance levels begin, the local window as one of them."""
    levels = [Level(1, 0, rule.local), *rule.levels]
    return list(zip([0, *(level.end for level in levels)], levels, strict=False))
