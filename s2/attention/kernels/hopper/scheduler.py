"""Work items of the backward over keys: which key tiles they take, which queries, and how partial sums are combined.

The columns of a level are as long as each other, give or take the window; long ones are cut into segments. Plain
arithmetic: the kernels find their items among those counted here (`cu/n_blocks.cuh`, `n_blocks.py`; of packed
documents `varlen.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import combine
from .problem import TILE, Problem
from .triton_launcher import Launch
from .varlen import UNDIVIDED, Documents, PackedColumns

PAIR = 2  # n_blocks of a work item of the two-pass backward
_WAVE_ROWS = 1 << 20  # 512 MB of q and dO at head dimension 128: beyond that fewer heads at a time were faster
_MIN_ITEM_STEPS, _MAX_ITEM_STEPS = 32, 512  # below, the fixed cost of an item shows; above, its length at the end
_SMALL_WORKSPACE = 1 << 18  # tiles of 256 bytes: 64 MB at head dimension 128 are always granted; else 1.25 times q
_DRAWN_STEPS, _MAX_BATCH = 16, 4  # tiles of few steps are drawn some at a time: more at the end would be long
_ITEMS_PER_SM = 8  # the longest item is at most an eighth of an SM's work
_STEPS = TILE // combine.ROWS.value  # programs of the combine kernel for an n_block
_PROGRAMS_PER_SM = 16  # as many as it runs at once

Table = Sequence[Sequence[int]]  # rows of the rule table, see `schedule.rule_schedule`


@dataclass(frozen=True)
class Columns:
    """How the key columns of a launch become work items. `tiles[n]` tiles of some n_blocks per head belong to level n,
    the most of any head; each is cut into `segments[n]` segments of `segment_rows` queries. An item takes `batches[n]`
    tiles, one after the other."""

    tiles: tuple[int, int, int, int]
    segments: tuple[int, int, int, int]
    segment_rows: int
    batches: tuple[int, int, int, int]
    wave: int  # KV heads worked on together: their queries stay in the L2 cache
    n_blocks: int  # of a tile

    @property
    def num_partials(self) -> int:
        """n_blocks of divided levels per head, which leave partial sums."""
        levels = zip(self.tiles, self.segments, strict=True)
        return sum(self.n_blocks * tiles for tiles, segments in levels if segments > 1)

    @property
    def num_items(self) -> int:
        """Work items per head."""
        levels = zip(self.tiles, self.segments, self.batches, strict=True)
        return sum(-(-tiles // batch) * segments for tiles, segments, batch in levels)


WHOLE = Columns((0, 0, 0, 0), (1, 1, 1, 1), 0, (1, 1, 1, 1), 1, 0)  # of packed documents: not known on the host


def _n_blocks_of(blocks: int, block_size: int) -> int:
    return -(-blocks * block_size // TILE)


def _survey(table: Table, num_levels: int, length: int, block_size: int) -> tuple[list[int], list[int], int]:
    """Of every level the most key blocks of any head, and the most m_blocks that see one of them; and the pairs of
    m_block and n_block of all these heads."""
    num_blocks, num_tiles = -(-length // block_size), -(-length // TILE)
    counts, reaches = [0, 0, 0, 0], [0, 0, 0, 0]
    pairs = 0
    for local, sinks, *levels in table:
        wider = 0
        for level in range(num_levels, -1, -1):
            stride, residue, reach = levels[3 * level - 3 : 3 * level] if level else (1, 0, local)
            members = max(num_blocks - residue + stride - 1, 0) // stride
            blocks, wider = members - wider, members
            counts[level] = max(counts[level], blocks)
            if blocks > 0:
                tiles = min(_n_blocks_of(reach, block_size), num_tiles)
                reaches[level] = max(reaches[level], tiles)
                pairs += _n_blocks_of(blocks, block_size) * max(tiles - tiles * tiles // (2 * num_tiles), 1)
        if sinks > 0:
            counts[num_levels + 1] = max(counts[num_levels + 1], min(sinks, num_blocks))
            reaches[num_levels + 1] = num_tiles
            pairs += _n_blocks_of(min(sinks, num_blocks), block_size) * num_tiles
    return counts, reaches, pairs


def mean_n_blocks(table: Table, num_levels: int, length: int, block_size: int) -> float:
    """n_blocks that an m_block sees."""
    _, _, pairs = _survey(table, num_levels, length, block_size)
    return pairs / (len(table) * -(-length // TILE))


def divide_columns(
    table: Table, num_levels: int, length: int, block_size: int, groups: int, group: int, num_sms: int, n_blocks: int
) -> Columns:
    """Work items in tiles of some n_blocks for KV heads with these rules, repeated over a batch to `groups` heads in
    all, each read by `group` query heads."""
    num_tiles = -(-length // TILE)
    counts, reaches, pairs = _survey(table, num_levels, length, block_size)
    steps_per_sm = pairs * group * (groups // len(table)) // (2 * num_sms)  # of two n_blocks
    item_steps = min(max(steps_per_sm // _ITEMS_PER_SM, _MIN_ITEM_STEPS), _MAX_ITEM_STEPS)
    segment_tiles = max(item_steps // group, 1)
    tiles = tuple(-(-_n_blocks_of(count, block_size) // n_blocks) for count in counts)
    long_tiles = sum(n for n, reach in zip(tiles, reaches, strict=True) if reach > 2 * segment_tiles)
    room = max(5 * groups * group * length // 4, _SMALL_WORKSPACE) // max(256 * n_blocks * groups * long_tiles, 1)
    segment_tiles = -(-num_tiles // max(min(-(-num_tiles // segment_tiles), room), 1))
    num_segments = -(-num_tiles // segment_tiles)
    divided = tuple(num_segments if reach > 2 * segment_tiles else 1 for reach in reaches)
    batches = tuple(min(max(_DRAWN_STEPS // ((reach + n_blocks - 1) * group), 1), _MAX_BATCH) for reach in reaches)
    wave = min(max(_WAVE_ROWS // (num_tiles * TILE * group), 1), groups)
    return Columns(tiles, divided, segment_tiles * TILE, batches, wave, n_blocks)  # type: ignore[arg-type]


def divide_packed(
    table: Table, num_levels: int, tokens: int, block_size: int, groups: int, group: int, num_sms: int
) -> PackedColumns:
    """Of packed documents of so many tokens in all: segments as long as those of one sequence. There is room for more
    of them, since the lengths are not known. `groups` KV heads, each read by `group` query heads."""
    whole = divide_columns(table, num_levels, tokens, block_size, groups, group, num_sms, PAIR)
    divided = [level for level, count in enumerate(whole.segments) if count > 1]
    per_segment, num_tiles = whole.segment_rows // TILE, tokens // TILE
    documents = num_tiles // (2 * per_segment) if divided else 0  # divided ones have a tile more than two segments
    narrowest = divided[0] if divided else 1  # wide ones are all from there on: tiles come from the widest level on
    smallest = [1, *(min(row[3 * level - 1] for row in table) for level in range(1, num_levels + 1)), 0, 0]
    strides = (0, 0, 0)[:narrowest] + tuple(smallest[narrowest:3])
    if documents == 0:
        return PackedColumns(strides=strides)
    num_blocks, sinks = -(-tokens // block_size), max(row[1] for row in table)
    counts = [-(-num_blocks // stride) for stride in strides if stride] + [min(sinks, num_blocks)]
    wide = sum(-(-_n_blocks_of(count, block_size) // PAIR) for count in counts)
    # a document of n tiles, the last one short, has at most n / per_segment + 1/2 segments
    segments = (2 * (num_tiles + documents) + documents * per_segment) // (2 * per_segment)
    return PackedColumns(whole.segment_rows, strides, wide * segments)


class _Scheduler:
    """What both have: a workspace of float32 partial sums `shape` of dK and dV (none if that is empty), and the kernel
    that combines them."""

    def __init__(self, problem: Problem, shape: tuple[int, ...], kernel: Any, programs: int, **constants: int) -> None:
        self.shape, self.has_partials = shape, 0 not in shape
        own = {"TABLE": problem.constants["TABLE"], "D": problem.head_dim, **problem.constants, **constants}
        kind = (problem.dtype, problem.head_dim, problem.device)
        self.kernel = Launch(kernel, (programs, 1, 1), own, kind)

    def workspace(self, unread: Tensor) -> Tensor:
        """For partial sums; if there are none, another float32 tensor in their place."""
        return unread.new_empty(self.shape) if self.has_partials else unread


class Scheduler(_Scheduler):
    """Of a batch of sequences into `items` work items of tiles of some n_blocks. With `direct` a tile that has one
    segment leaves no partial sums. Of packed documents: undivided, and the items are counted on the device."""

    documents = UNDIVIDED

    def __init__(self, problem: Problem, num_sms: int, n_blocks: int, direct: bool) -> None:
        rules, length, kv_heads = problem.rules, problem.length, problem.kv_heads
        groups = problem.batch * kv_heads
        columns, self.items = WHOLE, 0
        if not problem.packed:
            columns = divide_columns(
                rules.rows, rules.num_levels, length, problem.block_size, groups, problem.group, num_sms, n_blocks
            )
            self.items = columns.num_items * columns.wave * -(-groups // columns.wave)
        self.columns, self.table, self.sizes = columns, rules.table, (length, kv_heads)
        self.scalars = (columns.segment_rows, columns.num_partials, *columns.tiles, *columns.segments)
        shape = (max(columns.segments), groups, columns.num_partials, 2, TILE, problem.head_dim)
        programs = columns.num_partials * _STEPS * groups
        super().__init__(
            problem, shape, combine.attention_combine, programs, N_BLOCKS=columns.n_blocks, DIRECT=direct
        )  # fmt: skip

    @property
    def kernel_scalars(self) -> tuple[int, ...]:
        """What `attention_backward_kv` wants to know."""
        return (*self.scalars, *self.columns.batches, 0, *self.documents.strides)

    def combine(self, stream: int, partials: Tensor, dk: Tensor, dv: Tensor, documents: Documents) -> None:
        if self.has_partials:
            self.kernel(stream, partials, dk, dv, self.table, *self.sizes, *self.scalars)


class PackedScheduler(_Scheduler):
    """Of packed documents into work items of two n_blocks, with the same use."""

    columns, items = WHOLE, 0

    def __init__(self, problem: Problem, num_sms: int) -> None:
        rules, kv_heads = problem.rules, problem.kv_heads
        self.table, self.kv_heads = rules.table, kv_heads
        self.documents = divide_packed(
            rules.rows, rules.num_levels, problem.length, problem.block_size, kv_heads, problem.group, num_sms
        )
        self.sinks = max(row[1] for row in rules.rows)
        num_partials = PAIR * self.documents.most_segments
        self.scalars = (self.documents.segment_rows, num_partials)
        programs = kv_heads * min(num_partials * _STEPS, -(-_PROGRAMS_PER_SM * num_sms // kv_heads))
        shape = (kv_heads, num_partials, 2, TILE, problem.head_dim)
        super().__init__(problem, shape, combine.attention_combine_packed, programs, N_BLOCKS=PAIR)

    @property
    def kernel_scalars(self) -> tuple[int, ...]:
        whole = self.columns
        return (
            *self.scalars, *whole.tiles, *whole.segments, *whole.batches, self.sinks, *self.documents.strides,
        )  # fmt: skip

    def combine(self, stream: int, partials: Tensor, dk: Tensor, dv: Tensor, documents: Documents) -> None:
        if self.has_partials:
            self.kernel(
                stream, partials, dk, dv, self.table, documents.table, self.kv_heads, documents.most_tiles,
                *self.scalars, self.sinks, *self.documents.strides,
            )  # fmt: skip
