"""Packed documents: the table of which tiles of rows and which work items they have, made on the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.documents import Fill, fill_unowned, fillers, load_document, misfits
from .n_blocks import KEYS, count_tiles
from .problem import MAX_KEPT, TILE, Problem, contiguous16
from .triton_launcher import Launch

LATE_WORDS = tl.constexpr(5)  # of an entry of `late_documents`


@triton.jit
def document_segments(length, segment_rows):
    """Number of segments of a packed document's divided columns, and the rows of each but the last: about
    `segment_rows`, in documents of more than two such segments (0: in none); else one segment."""
    m_blocks = (length + KEYS - 1) // KEYS
    most = tl.maximum(segment_rows // KEYS, 1)
    count = tl.where((segment_rows > 0) & (m_blocks > 2 * most), (m_blocks + most // 2) // most, 1)
    own = tl.maximum((m_blocks + count - 1) // count, 1)
    return tl.maximum((m_blocks + own - 1) // own, 1), own * KEYS


@triton.jit
def _tiles_of_level(blocks, stride, N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Upper bound on the tiles of a level with this stride (0 if the level is not wide)."""
    return tl.where(stride > 0, count_tiles((blocks + stride - 1) // tl.maximum(stride, 1), BLOCK, N_BLOCKS), 0)


@triton.jit
def _all_tiles(blocks, sinks, N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Upper bound on a document's tiles: sinks count twice, and the last tile of each level may be short."""
    return count_tiles(blocks, BLOCK, N_BLOCKS) + LEVELS + count_tiles(tl.minimum(blocks, sinks), BLOCK, N_BLOCKS)


@triton.jit
def wide_tiles(
    blocks, sinks, stride0, stride1, stride2, N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """Tiles of a document that many queries see, which come first in `n_blocks.document_tile`: those of sinks, and of
    every level with a stride as many as any head has. Strides: the smallest of any head, or 0."""
    tiles = count_tiles(tl.minimum(blocks, sinks), BLOCK, N_BLOCKS)
    tiles += _tiles_of_level(blocks, stride0, N_BLOCKS, BLOCK)
    tiles += _tiles_of_level(blocks, stride1, N_BLOCKS, BLOCK)
    tiles += _tiles_of_level(blocks, stride2, N_BLOCKS, BLOCK)
    return tl.minimum(tiles, _all_tiles(blocks, sinks, N_BLOCKS, BLOCK, LEVELS))


@triton.jit
def document_item(
    nth, is_divided, length, segment_rows, sinks, stride0, stride1, stride2,
    N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """`(tile of the document, segment (-1: the whole column), rows of a segment)` of an entry of the table's items.
    Divided tiles come with their last segment first."""
    segments, rows = document_segments(length, segment_rows)
    blocks = (length + BLOCK - 1) // BLOCK
    wide = tl.maximum(wide_tiles(blocks, sinks, stride0, stride1, stride2, N_BLOCKS, BLOCK, LEVELS), 1)
    return tl.where(is_divided, nth % wide, nth), tl.where(is_divided, segments - 1 - nth // wide, -1), rows


@triton.jit
def _counts(
    length, segment_rows, sinks, stride0, stride1, stride2, M_BLOCKS: tl.constexpr, PACK_GQA: tl.constexpr,
    N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Of documents: tiles of M_BLOCKS m_blocks (PACK_GQA of the same rows), m_blocks of different rows, items of wide
    tiles that are divided into segments, items of wide tiles that are not, and items of other tiles."""
    tokens: tl.constexpr = min(BLOCK, KEYS)
    blocks = (length + BLOCK - 1) // BLOCK
    segments, _ = document_segments(length, segment_rows)
    wide = wide_tiles(blocks, sinks, stride0, stride1, stride2, N_BLOCKS, BLOCK, LEVELS)
    others = tl.where(length > 0, _all_tiles(blocks, sinks, N_BLOCKS, BLOCK, LEVELS) - wide, 0)
    m_blocks = (length + tokens - 1) // tokens
    tiles = (m_blocks * PACK_GQA + M_BLOCKS - 1) // M_BLOCKS
    return tiles, m_blocks, tl.where(segments > 1, wide * segments, 0), tl.where(segments > 1, 0, wide), others


@triton.jit(do_not_specialize=[
    "width0", "width1", "width2", "num_heads", "num_documents", "num_tokens", "most_tiles", "segment_rows", "sinks",
    "stride0", "stride1", "stride2",
])  # fmt: skip
def attention_documents(
    cu_seqlens, documents, rows0, rows1, rows2, lse, width0, width1, width2, num_heads, num_documents, num_tokens,
    most_tiles, segment_rows, sinks, stride0, stride1, stride2,
    M_BLOCKS: tl.constexpr, PACK_GQA: tl.constexpr, N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The table of packed work, int32 `[1 + most_tiles + items, 4]`. First the numbers of tiles, of items, and of items
    that are a segment. Then an entry for each tile of M_BLOCKS m_blocks (64 tokens, or a smaller block; PACK_GQA of the
    same rows side by side), and after room for `most_tiles` an entry for each item of N_BLOCKS n_blocks:

        first m_block, or number in the document (`document_item`) | first token of the document | its length |
        m_blocks before the document (not counted PACK_GQA times)

    The longest items come first: of all documents the segments, then wide tiles as a whole (`wide_tiles`). A program
    writes the entries of one document; those after the last `fill_unowned`. `sinks`: the most of any head. Borders that
    do not fit leave no tiles and no items."""
    document = tl.program_id(0)
    tiles, m_blocks, divided, wide, others, all_divided, all_wide, bad = 0, 0, 0, 0, 0, 0, 0, 0
    for start in range(0, num_documents, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        exists = lane < num_documents
        begin = tl.load(cu_seqlens + lane, mask=exists, other=0)
        end = tl.load(cu_seqlens + lane + 1, mask=exists, other=0)
        bad = tl.maximum(bad, tl.max(misfits(begin, end, num_tokens).to(tl.int32), 0))
        own_tiles, own_m_blocks, own_divided, own_wide, own_others = _counts(
            end - begin, segment_rows, sinks, stride0, stride1, stride2, M_BLOCKS, PACK_GQA, N_BLOCKS, BLOCK, LEVELS
        )
        before = lane < document
        tiles += tl.sum(tl.where(before, own_tiles, 0), 0)
        m_blocks += tl.sum(tl.where(before, own_m_blocks, 0), 0)
        divided += tl.sum(tl.where(before, own_divided, 0), 0)
        wide += tl.sum(tl.where(before, own_wide, 0), 0)
        others += tl.sum(tl.where(before, own_others, 0), 0)
        all_divided += tl.sum(own_divided, 0)
        all_wide += tl.sum(own_wide, 0)
    is_bad = (bad > 0) | (tl.load(cu_seqlens) != 0)
    if document >= num_documents:
        fill_unowned(
            rows0, rows1, rows2, lse, width0, width1, width2, num_heads, tl.load(cu_seqlens + num_documents),
            num_tokens, is_bad, document - num_documents, tl.num_programs(0) - num_documents,
        )  # fmt: skip
    elif is_bad:
        for word in tl.static_range(3):
            tl.store(documents + word, 0)
    else:
        begin = tl.load(cu_seqlens + document)
        length = tl.load(cu_seqlens + document + 1) - begin
        own_tiles, _, own_divided, own_wide, own_others = _counts(
            length, segment_rows, sinks, stride0, stride1, stride2, M_BLOCKS, PACK_GQA, N_BLOCKS, BLOCK, LEVELS
        )
        if document == num_documents - 1:
            tl.store(documents, tiles + own_tiles)
            tl.store(documents + 1, all_divided + all_wide + others + own_others)
            tl.store(documents + 2, all_divided)
        for start in range(0, own_tiles, WIDTH):
            lane = start + tl.arange(0, WIDTH)
            _store_entries(
                documents + 4 * (1 + tiles), lane, lane < own_tiles, lane * M_BLOCKS, begin, length, m_blocks
            )
        items = documents + 4 * (1 + most_tiles)
        whole = items + 4 * (all_divided + wide)
        rest = items + 4 * (all_divided + all_wide + others)
        skipped = wide_tiles((length + BLOCK - 1) // BLOCK, sinks, stride0, stride1, stride2, N_BLOCKS, BLOCK, LEVELS)
        for start in range(0, own_divided, WIDTH):
            lane = start + tl.arange(0, WIDTH)
            _store_entries(items + 4 * divided, lane, lane < own_divided, lane, begin, length, m_blocks)
        for start in range(0, own_wide, WIDTH):
            lane = start + tl.arange(0, WIDTH)
            _store_entries(whole, lane, lane < own_wide, lane, begin, length, m_blocks)
        for start in range(0, own_others, WIDTH):
            lane = start + tl.arange(0, WIDTH)
            _store_entries(rest, lane, lane < own_others, skipped + lane, begin, length, m_blocks)


@triton.jit
def _store_entries(to, lane, mask, first, begin, length, m_blocks):
    entry = to + 4 * lane
    tl.store(entry, first, mask=mask)
    tl.store(entry + 1, begin + lane * 0, mask=mask)
    tl.store(entry + 2, length + lane * 0, mask=mask)
    tl.store(entry + 3, m_blocks + lane * 0, mask=mask)


@triton.jit
def _late_tiles(q_len, kv_len, M_BLOCKS: tl.constexpr, PACK_GQA: tl.constexpr, TOKENS: tl.constexpr):
    """Of documents: the first m_block with a query, and the tiles from there on."""
    first = (kv_len - q_len) // TOKENS
    m_blocks = ((kv_len + TOKENS - 1) // TOKENS - first) * PACK_GQA
    return first * PACK_GQA, tl.where(q_len > 0, (m_blocks + M_BLOCKS - 1) // M_BLOCKS, 0)


@triton.jit(do_not_specialize=["width0", "width1", "width2", "num_heads", "num_documents", "num_tokens", "num_keys"])
def late_documents(
    cu_seqlens, cu_seqlens_k, documents, rows0, rows1, rows2, lse, width0, width1, width2, num_heads, num_documents,
    num_tokens, num_keys,
    M_BLOCKS: tl.constexpr, PACK_GQA: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The same table for queries at the end of longer keys, without items: four words, of which the first is the number
    of tiles, and for each tile of M_BLOCKS m_blocks of TOKENS tokens

        first m_block, from that of the document's first key on | first key of the document | number of its keys |
        first query less the keys before it | these keys
    """
    document = tl.program_id(0)
    tiles, bad = 0, 0
    for start in range(0, num_documents, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        begin, end = load_document(cu_seqlens, lane, lane < num_documents)
        first, last = load_document(cu_seqlens_k, lane, lane < num_documents)
        wrong = misfits(begin, end, num_tokens) | misfits(first, last, num_keys) | (last - first < end - begin)
        bad = tl.maximum(bad, tl.max(wrong.to(tl.int32), 0))
        _, own_tiles = _late_tiles(end - begin, last - first, M_BLOCKS, PACK_GQA, TOKENS)
        tiles += tl.sum(tl.where(lane < document, own_tiles, 0), 0)
    is_bad = (bad > 0) | (tl.load(cu_seqlens) != 0) | (tl.load(cu_seqlens_k) != 0)
    if document >= num_documents:
        fill_unowned(
            rows0, rows1, rows2, lse, width0, width1, width2, num_heads, tl.load(cu_seqlens + num_documents),
            num_tokens, is_bad, document - num_documents, tl.num_programs(0) - num_documents,
        )  # fmt: skip
    elif is_bad:
        tl.store(documents, 0)
    else:
        q_begin, k_begin = tl.load(cu_seqlens + document), tl.load(cu_seqlens_k + document)
        q_len = tl.load(cu_seqlens + document + 1) - q_begin
        kv_len = tl.load(cu_seqlens_k + document + 1) - k_begin
        first_m_block, own_tiles = _late_tiles(q_len, kv_len, M_BLOCKS, PACK_GQA, TOKENS)
        if document == num_documents - 1:
            tl.store(documents, tiles + own_tiles)
        for start in range(0, own_tiles, WIDTH):
            lane = start + tl.arange(0, WIDTH)
            entry, exists = documents + 4 + LATE_WORDS * (tiles + lane), lane < own_tiles
            before = kv_len - q_len
            tl.store(entry, first_m_block + lane * M_BLOCKS, mask=exists)
            tl.store(entry + 1, k_begin + lane * 0, mask=exists)
            tl.store(entry + 2, kv_len + lane * 0, mask=exists)
            tl.store(entry + 3, q_begin - before + lane * 0, mask=exists)
            tl.store(entry + 4, before + lane * 0, mask=exists)


# ---------------------------------------------------------------- host


@dataclass(frozen=True)
class PackedColumns:
    """How the key columns of packed documents become work items, in pairs of n_blocks (see `scheduler`). Wide ones,
    those of sinks and of the levels that have a stride in `strides` (the smallest of any head), come first. In
    documents longer than two segments of `segment_rows` queries they are cut into segments of about as many."""

    segment_rows: int = 0  # 0: nothing is divided
    strides: tuple[int, ...] = (0, 0, 0)  # of the local window (1) and the levels; 0: not wide
    most_segments: int = 0  # of all divided pairs, whatever the lengths


UNDIVIDED = PackedColumns()
_DOCUMENTS = 64  # numbers of documents are rounded up to this for what is made from their number


@functools.lru_cache(MAX_KEPT)
def _table_launch(
    count: int, consumers: int, pack_gqa: int, per_item: int, block: int, levels: int, types: tuple[torch.dtype, ...],
    device: torch.device,
) -> Launch:  # fmt: skip
    """Kept, since what a launch prepares takes longer than a call. `types`: of the results to be filled, of which the
    forward's last is the log-sum-exp in float32."""
    constants = {
        "M_BLOCKS": consumers, "PACK_GQA": pack_gqa, "N_BLOCKS": per_item, "BLOCK": block, "LEVELS": levels,
        "WIDTH": 256,
    }  # fmt: skip
    return Launch(attention_documents, (count + fillers(device), 1, 1), constants, (types, device))


@functools.lru_cache(MAX_KEPT)
def _late_launch(
    count: int, consumers: int, pack_gqa: int, tokens: int, types: tuple[torch.dtype, ...], device: torch.device
) -> Launch:
    """The same for `late_documents`."""
    constants = {"M_BLOCKS": consumers, "PACK_GQA": pack_gqa, "TOKENS": tokens, "WIDTH": 256}
    return Launch(late_documents, (count + fillers(device), 1, 1), constants, (types, device))


@dataclass(frozen=True)
class Documents:
    """The table of packed work (`attention_documents`), where its items begin, and room for the m_blocks of a head. An
    unpacked call gets another tensor in the table's place."""

    table: Tensor
    most_tiles: int
    m_blocks: int

    @classmethod
    def of(
        cls,
        stream: int,
        problem: Problem,
        consumers: int,
        cu_seqlens: Tensor | None,
        fill: Fill | None,
        pack_gqa: int = 1,
        per_item: int = 2,
        columns: PackedColumns = UNDIVIDED,
    ) -> Documents:
        """With tiles of `consumers` m_blocks, of which `pack_gqa` of the same rows stand side by side, and items of
        `per_item` n_blocks. Rows of no document are filled in the results `fill` (of packed documents alone). `stream`
        is the current one, by its handle."""
        length, rules, block, tokens = problem.length, problem.rules, problem.block_size, problem.tokens_per_tile
        if cu_seqlens is None or fill is None:
            return cls(rules.table, 0, -(-length // tokens))
        count = cu_seqlens.shape[0] - 1
        spare_tiles = 1 if pack_gqa == 1 else 2 + pack_gqa // consumers  # of a document
        most_tiles = length * pack_gqa // (consumers * tokens) + count * spare_tiles
        sinks = max(row[1] for row in rules.rows)
        most_keys = length + count * block  # in whole blocks
        most_items = (most_keys + min(most_keys, count * sinks * block)) // (2 * TILE) + count * (rules.num_levels + 2)
        most_items += columns.most_segments
        table = torch.empty((1 + most_tiles + most_items, 4), dtype=torch.int32, device=problem.device)
        types = tuple(x.dtype for x in fill[:4])
        launch = _table_launch(
            count, consumers, pack_gqa, per_item, block, rules.num_levels, types, problem.device
        )  # fmt: skip
        numbers = (count, length, most_tiles, columns.segment_rows, sinks, *columns.strides)
        launch(stream, contiguous16(cu_seqlens), table, *fill, *numbers)
        return cls(table, most_tiles, length // tokens + -(-count // _DOCUMENTS) * _DOCUMENTS)

    @classmethod
    def late(
        cls, stream: int, problem: Problem, consumers: int, cu_seqlens: Tensor, cu_seqlens_k: Tensor, num_keys: int,
        fill: Fill, pack_gqa: int,
    ) -> Documents:  # fmt: skip
        """Of queries at the end of longer keys, of which there are `num_keys`; without items."""
        count, tokens = cu_seqlens.shape[0] - 1, problem.tokens_per_tile
        most_m_blocks = problem.length // tokens + 2 * count  # of a document the first and the last may be ragged
        most_tiles = (most_m_blocks * pack_gqa + count * (consumers - 1)) // consumers
        table = torch.empty(4 + LATE_WORDS.value * most_tiles, dtype=torch.int32, device=problem.device)
        types = tuple(x.dtype for x in fill[:4])
        launch = _late_launch(count, consumers, pack_gqa, tokens, types, problem.device)
        borders = contiguous16(cu_seqlens), contiguous16(cu_seqlens_k)
        launch(stream, *borders, table, *fill, count, problem.length, num_keys)
        return cls(table, most_tiles, most_m_blocks)
