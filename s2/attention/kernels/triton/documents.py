"""Packed documents as the kernels see them: tiles of rows by document, and the rows that belong to none.

Borders stay on the device, since the host would have to wait for them, so it is here that they are checked: they must
begin with 0, not fall and not exceed the number of tokens. Where they do not fit there is no document, and all results
are NaN. Rows behind the last border belong to no document: they become zero (log-sum-exp: -inf), and no kernel reads
or writes them otherwise.

Where queries are the last of longer keys, these have borders of their own, and a table is of tiles of either
(`SIDE`: "queries" or "keys", else "both").
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_SCANNED = 256  # borders that a program looks at together
_FILLED = tl.constexpr(1024)  # elements that a program fills at once
# words of a tile: first token of its document, the document's length, tile of the document; for queries at the end of
# longer keys those of the queries, then first token and length of the keys
ENTRY, LATE_ENTRY = tl.constexpr(3), tl.constexpr(5)


@triton.jit
def misfits(begin, end, num_tokens):
    """Whether a document from `begin` to before `end` does not lie within the tokens."""
    return (begin < 0) | (end < begin) | (end > num_tokens)


@triton.jit
def load_document(borders, document, mask):
    """First token of a document and the one after its last."""
    return tl.load(borders + document, mask=mask, other=0), tl.load(borders + document + 1, mask=mask, other=0)


@triton.jit
def _fill_rows(to, begin, num_tokens, width, value, nth, programs):
    """Sets rows `begin, begin + 1, ...` of `[num_tokens, width]`, of which each of some programs takes its share."""
    end = num_tokens.to(tl.int64) * width
    at = begin.to(tl.int64) * width + nth * _FILLED
    while at < end:
        lane = at + tl.arange(0, _FILLED)
        tl.store(to + lane, (tl.zeros([_FILLED], tl.float32) + value).to(to.dtype.element_ty), mask=lane < end)
        at += programs * _FILLED


@triton.jit
def _fill_columns(to, begin, num_tokens, num_rows, value, nth, programs):
    """The same of columns `begin, begin + 1, ...` of float32 `[num_rows, num_tokens]`."""
    width = (num_tokens - begin).to(tl.int64)
    end = num_rows * width
    at = width * 0 + nth * _FILLED
    while at < end:
        lane = at + tl.arange(0, _FILLED)
        column = lane // width * num_tokens + begin + lane % width
        tl.store(to + column, tl.zeros([_FILLED], tl.float32) + value, mask=lane < end)
        at += programs * _FILLED


@triton.jit
def fill_unowned(
    rows0, rows1, rows2, lse, width0, width1, width2, num_heads, begin, num_tokens, is_bad, nth, programs
):  # fmt: skip
    """Of results `[num_tokens, width]` (as far as they are wider than 0) and of the log-sum-exp `[num_heads,
    num_tokens]` what belongs to no document: from the last border on, or all of it if borders do not fit."""
    begin = tl.where(is_bad, 0, begin)
    value = tl.where(is_bad, float("nan"), 0.0)
    _fill_rows(rows0, begin, num_tokens, width0, value, nth, programs)
    _fill_rows(rows1, begin, num_tokens, width1, value, nth, programs)
    _fill_rows(rows2, begin, num_tokens, width2, value, nth, programs)
    _fill_columns(lse, begin, num_tokens, num_heads, tl.where(is_bad, float("nan"), float("-inf")), nth, programs)


@triton.jit(do_not_specialize=[
    "num_documents", "num_tiles", "num_tokens", "num_others", "width0", "width1", "width2", "num_heads",
])  # fmt: skip
def attention_tiles(
    cu_seqlens, others, tiles, rows0, rows1, rows2, lse, width0, width1, width2, num_heads,
    num_documents, num_tiles, num_tokens, num_others,
    TILE: tl.constexpr, BLOCK: tl.constexpr, EXTRA: tl.constexpr, SIDE: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    """The table of tiles, int32 `[num_tiles, ENTRY or LATE_ENTRY]`: those of TILE tokens that documents, rounded up to
    whole blocks, make, and EXTRA of each that is not empty; the spare ones at the end have lengths 0. A program writes
    one document's; those after the last document write the spare ones and `fill_unowned`.

    With SIDE "queries" or "keys" documents have these at `cu_seqlens`, the `num_tokens`, and the others at `others`.
    Tiles of queries are then counted from the first key, and those which hold a query are there."""
    LATE: tl.constexpr = SIDE != "both"
    WORDS: tl.constexpr = LATE_ENTRY if LATE else ENTRY
    program = tl.program_id(0)
    before = tl.zeros([SCANNED], tl.int32)
    total = tl.zeros([SCANNED], tl.int32)
    bad = tl.zeros([SCANNED], tl.int32)
    for start in range(0, num_documents, SCANNED):
        lane = start + tl.arange(0, SCANNED)
        exists = lane < num_documents
        begin, end = load_document(cu_seqlens, lane, exists)
        bad |= misfits(begin, end, num_tokens).to(tl.int32)
        length = end - begin
        other = length
        if LATE:
            other_begin, other_end = load_document(others, lane, exists)
            other = other_end - other_begin
            too_few = other < length if SIDE == "queries" else length < other
            bad |= (misfits(other_begin, other_end, num_others) | too_few).to(tl.int32)
        _, own = _tiles_of(length, other, TILE, BLOCK, EXTRA, SIDE)
        total += own
        before += tl.where(lane < program, own, 0)
    is_bad = (tl.max(bad, 0) > 0) | (tl.load(cu_seqlens) != 0)
    if LATE:
        is_bad |= tl.load(others) != 0
    if program < num_documents:
        begin = tl.load(cu_seqlens + program)
        length = tl.load(cu_seqlens + program + 1) - begin
        q_begin, q_len, kv_begin, kv_len = begin, length, begin, length
        if SIDE == "queries":
            kv_begin = tl.load(others + program)
            kv_len = tl.load(others + program + 1) - kv_begin
        if SIDE == "keys":
            q_begin = tl.load(others + program)
            q_len = tl.load(others + program + 1) - q_begin
        first = tl.sum(before, 0)
        first_tile, own = _tiles_of(length, kv_len if SIDE == "queries" else q_len, TILE, BLOCK, EXTRA, SIDE)
        own = tl.where(is_bad, 0, own)
        for start in range(0, own, SCANNED):
            lane = start + tl.arange(0, SCANNED)
            entry = tiles + WORDS * (first + lane)
            tl.store(entry, q_begin + lane * 0, mask=lane < own)
            tl.store(entry + 1, q_len + lane * 0, mask=lane < own)
            tl.store(entry + 2, first_tile + lane, mask=lane < own)
            if LATE:
                tl.store(entry + 3, kv_begin + lane * 0, mask=lane < own)
                tl.store(entry + 4, kv_len + lane * 0, mask=lane < own)
    else:
        nth, programs = program - num_documents, tl.num_programs(0) - num_documents
        used = tl.where(is_bad, 0, tl.sum(total, 0))
        for start in range(used + nth * SCANNED, num_tiles, programs * SCANNED):
            lane = start + tl.arange(0, SCANNED)
            for word in tl.static_range(WORDS):
                tl.store(tiles + WORDS * lane + word, lane * 0, mask=lane < num_tiles)
        fill_unowned(
            rows0, rows1, rows2, lse, width0, width1, width2, num_heads, tl.load(cu_seqlens + num_documents),
            num_tokens, is_bad, nth, programs,
        )  # fmt: skip


@triton.jit
def _tiles_of(
    length, other, TILE: tl.constexpr, BLOCK: tl.constexpr, EXTRA: tl.constexpr, SIDE: tl.constexpr
):  # fmt: skip
    """First tile of documents and their number."""
    if SIDE == "queries":
        first = (other - length) // TILE
        return first, tl.where(length > 0, (other + TILE - 1) // TILE - first, 0)
    else:
        rounded = (length + BLOCK - 1) // BLOCK * BLOCK
        return 0, tl.where(length > 0, (rounded + TILE - 1) // TILE + EXTRA, 0)


@triton.jit
def locate_tile(tiles, program, LATE: tl.constexpr):
    """What `program` works on: `(first query of the document, number of its queries, tile, first key, number of its
    keys)`; lengths 0: a spare one."""
    if LATE:
        entry = tiles + LATE_ENTRY * program
        return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    else:
        entry = tiles + ENTRY * program
        begin, length = tl.load(entry), tl.load(entry + 1)
        return begin, length, tl.load(entry + 2), begin, length


@functools.cache
def fillers(device: torch.device) -> int:
    """Programs that fill rows of no document: as many as a device needs to write at its full rate."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


Fill = tuple[Tensor, Tensor, Tensor, Tensor, int, int, int, int]


def unowned(*results: Tensor, lse: Tensor | None = None) -> Fill:
    """The first arguments of `fill_unowned` for up to three results `[T, H, D]` and the log-sum-exp `[H, T]`."""
    absent = 3 - len(results)
    rows0, rows1, rows2 = (*results, *results[:1] * absent)
    width0, width1, width2 = (*(x.shape[1] * x.shape[2] for x in results), *(0,) * absent)
    if lse is None:
        return rows0, rows1, rows2, rows0, width0, width1, width2, 0
    return rows0, rows1, rows2, lse, width0, width1, width2, lse.shape[0]


def document_tiles(
    cu_seqlens: Tensor,
    num_tokens: int,
    tile: int,
    *,
    block: int = 1,
    extra: int = 0,
    fill: Fill | None = None,
    keys: tuple[Tensor, int] | None = None,
    queries: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, int]:
    """The table of `attention_tiles` and its number of tiles: an upper bound, known without reading the lengths.

    Args:
        cu_seqlens: int32 `[n + 1]`, contiguous.
        tile: tokens of a tile.
        block: documents are rounded up to whole blocks of so many tokens.
        extra: tiles more for each document.
        fill: results whose rows of no document are to be filled (`unowned`).
        keys: borders and number of the keys, where `cu_seqlens` are of queries at the end of longer keys.
        queries: the same the other way round. At most one of both.
    """
    num_documents = cu_seqlens.shape[0] - 1
    side = "queries" if keys else "keys" if queries else "both"
    others, num_others = keys or queries or (cu_seqlens, num_tokens)
    # tiles of queries may begin before the first one
    ragged = 2 if keys else 1
    num_tiles = (num_tokens + num_documents * (block - 1)) // tile + (ragged + extra) * num_documents
    words = ENTRY if side == "both" else LATE_ENTRY
    tiles = torch.empty((num_tiles, words.value), dtype=torch.int32, device=cu_seqlens.device)
    attention_tiles[(num_documents + fillers(cu_seqlens.device),)](
        cu_seqlens, others, tiles, *(fill or (tiles,) * 4 + (0,) * 4),
        num_documents, num_tiles, num_tokens, num_others,
        TILE=tile, BLOCK=block, EXTRA=extra, SIDE=side, SCANNED=_SCANNED,
    )  # fmt: skip
    return tiles, num_tiles
