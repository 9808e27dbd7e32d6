"""How the key chunks of the backward become work items. Plain arithmetic; the kernels locate their items among them
(`chunks.cuh`, `chunks.py`; packed ones `packing.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHUNK = 64  # keys of a consumer
PAIR = 2  # chunks of a work item of two passes
_WAVE_ROWS = 1 << 20  # 512 MB of q and dO at head dimension 128: beyond that fewer heads at a time were faster
_MIN_ITEM_STEPS, _MAX_ITEM_STEPS = 32, 512  # below, the fixed cost of an item shows; above, its length at the end
_SMALL_PARTS = 1 << 18  # 64 MB of parts at head dimension 128 are always granted; else 1.25 times what q takes
_DRAWN_STEPS, _MOST_BATCH = 16, 4  # tiles of few steps are drawn some at a time: more at the end would be long
_ITEMS_A_PROCESSOR = 8  # the longest item is at most an eighth of a processor's share

Table = Sequence[Sequence[int]]  # rows of the rule table, see `schedule.rule_schedule`


@dataclass(frozen=True)
class Columns:
    """How the key chunks of a launch become work items. `tiles[n]` tiles of `chunks` chunks a head belong to level n
    (0: the local window; sinks are one more level than the rules have), the most of any head; each is divided into
    `segments[n]` segments of `segment_rows` queries. An item takes `batches[n]` tiles, one after the other."""

    tiles: tuple[int, int, int, int]
    segments: tuple[int, int, int, int]
    segment_rows: int
    batches: tuple[int, int, int, int]
    wave: int  # KV heads worked on together: their queries stay in the L2 cache
    chunks: int  # of a tile

    @property
    def num_parts(self) -> int:
        """Chunks of divided levels, a head."""
        levels = zip(self.tiles, self.segments, strict=True)
        return sum(self.chunks * tiles for tiles, segments in levels if segments > 1)

    @property
    def num_items(self) -> int:
        """Work items a head."""
        levels = zip(self.tiles, self.segments, self.batches, strict=True)
        return sum(-(-tiles // batch) * segments for tiles, segments, batch in levels)


WHOLE = Columns((0, 0, 0, 0), (1, 1, 1, 1), 0, (1, 1, 1, 1), 1, 0)  # of packed documents: not known on the host


@dataclass(frozen=True)
class PackedColumns:
    """How the key chunks of packed documents become work items, in pairs. Wide ones, those of sinks and of the levels
    that have a stride in `strides` (the smallest of any head), come first. In documents longer than two segments of
    `segment_rows` queries they are cut into segments of about as many. The lengths are on the device (`packing`)."""

    segment_rows: int = 0  # 0: nothing is divided
    strides: tuple[int, ...] = (0, 0, 0)  # of the local window (1) and the levels; 0: not wide
    most_segments: int = 0  # of all divided pairs, whatever the lengths


UNDIVIDED = PackedColumns()


def _chunks_of(blocks: int, block_size: int) -> int:
    return -(-blocks * block_size // CHUNK)


def _pairs_of(blocks: int, block_size: int) -> int:
    return -(-_chunks_of(blocks, block_size) // PAIR)


def _survey(table: Table, num_levels: int, length: int, block_size: int) -> tuple[list[int], list[int], int]:
    """Of every level the most key blocks of any head, and how many chunks of queries see one of them; and the pairs of
    chunks that all these heads work on."""
    num_blocks, num_chunks = -(-length // block_size), -(-length // CHUNK)
    counts, reaches = [0, 0, 0, 0], [0, 0, 0, 0]
    pairs = 0
    for local, sinks, *levels in table:
        wider = 0
        for level in range(num_levels, -1, -1):
            stride, residue, reach = levels[3 * level - 3 : 3 * level] if level else (1, 0, local)
            belong = max(num_blocks - residue + stride - 1, 0) // stride
            blocks, wider = belong - wider, belong
            counts[level] = max(counts[level], blocks)
            if blocks > 0:
                chunks = min(_chunks_of(reach, block_size), num_chunks)
                reaches[level] = max(reaches[level], chunks)
                pairs += _chunks_of(blocks, block_size) * max(chunks - chunks * chunks // (2 * num_chunks), 1)
        if sinks > 0:
            counts[num_levels + 1] = max(counts[num_levels + 1], min(sinks, num_blocks))
            reaches[num_levels + 1] = num_chunks
            pairs += _chunks_of(min(sinks, num_blocks), block_size) * num_chunks
    return counts, reaches, pairs


def mean_chunks(table: Table, num_levels: int, length: int, block_size: int) -> float:
    """Key chunks that a chunk of queries sees."""
    _, _, pairs = _survey(table, num_levels, length, block_size)
    return pairs / (len(table) * -(-length // CHUNK))


def divide_columns(
    table: Table,
    num_levels: int,
    length: int,
    block_size: int,
    groups: int,
    group: int,
    processors: int,
    chunks: int,
) -> Columns:
    """Work items in tiles of some chunks for KV heads with these rules, repeated over a batch to `groups` heads in all,
    each read by `group` query heads."""
    num_chunks = -(-length // CHUNK)
    counts, reaches, pairs = _survey(table, num_levels, length, block_size)
    share = pairs * group * (groups // len(table)) // (2 * processors)  # steps of two chunks, for each processor
    item_steps = min(max(share // _ITEMS_A_PROCESSOR, _MIN_ITEM_STEPS), _MAX_ITEM_STEPS)
    segment_chunks = max(item_steps // group, 1)
    tiles = tuple(-(-_chunks_of(count, block_size) // chunks) for count in counts)
    long_tiles = sum(n for n, reach in zip(tiles, reaches, strict=True) if reach > 2 * segment_chunks)
    room = max(5 * groups * group * length // 4, _SMALL_PARTS) // max(256 * chunks * groups * long_tiles, 1)
    segment_chunks = -(-num_chunks // max(min(-(-num_chunks // segment_chunks), room), 1))
    num_segments = -(-num_chunks // segment_chunks)
    divided = tuple(num_segments if reach > 2 * segment_chunks else 1 for reach in reaches)
    batches = tuple(min(max(_DRAWN_STEPS // ((reach + chunks - 1) * group), 1), _MOST_BATCH) for reach in reaches)
    wave = min(max(_WAVE_ROWS // (num_chunks * CHUNK * group), 1), groups)
    return Columns(tiles, divided, segment_chunks * CHUNK, batches, wave, chunks)  # type: ignore[arg-type]


def divide_packed(
    table: Table, num_levels: int, tokens: int, block_size: int, groups: int, group: int, processors: int
) -> PackedColumns:
    """Of packed documents of so many tokens in all: segments as long as those of one sequence. There is room for more
    of them, since the lengths are not known. `groups` KV heads, each read by `group` query heads."""
    whole = divide_columns(table, num_levels, tokens, block_size, groups, group, processors, PAIR)
    divided = [level for level, count in enumerate(whole.segments) if count > 1]
    a_segment, num_chunks = whole.segment_rows // CHUNK, tokens // CHUNK
    documents = num_chunks // (2 * a_segment) if divided else 0  # divided ones have a chunk more than two segments
    narrowest = divided[0] if divided else 1  # wide ones are all from there on: tiles come from the widest level on
    smallest = [1, *(min(row[3 * level - 1] for row in table) for level in range(1, num_levels + 1)), 0, 0]
    strides = (0, 0, 0)[:narrowest] + tuple(smallest[narrowest:3])
    if documents == 0:
        return PackedColumns(strides=strides)
    num_blocks, sinks = -(-tokens // block_size), max(row[1] for row in table)
    wide = sum(_pairs_of(-(-num_blocks // stride), block_size) for stride in strides if stride)
    wide += _pairs_of(min(sinks, num_blocks), block_size)
    # a document of n chunks, the last one short, has at most n / a_segment + 1/2 segments
    segments = (2 * (num_chunks + documents) + documents * a_segment) // (2 * a_segment)
    return PackedColumns(whole.segment_rows, strides, wide * segments)
