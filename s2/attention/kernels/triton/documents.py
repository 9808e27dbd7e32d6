"""Packed documents as the kernels see them: tiles of rows by document, and the rows that belong to none.

Borders stay on the device, since the host would have to wait for them, so it is here that they are checked: they must
begin with 0, not fall and not exceed the number of tokens. Where they do not fit there is no document, and all results
are NaN. Rows behind the last border belong to no document: they become zero (log-sum-exp: -inf), and no kernel reads
or writes them otherwise.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_SCANNED = 256  # borders that a program looks at together
_FILLED = tl.constexpr(1024)  # elements that a program fills at once
ENTRY = tl.constexpr(3)  # words of a tile: first token of its document, the document's length, tile of the document


@triton.jit
def misfits(begin, end, num_tokens):
    """Whether a document from `begin` to before `end` does not lie within the tokens."""
    return (begin < 0) | (end < begin) | (end > num_tokens)


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


@triton.jit(do_not_specialize=["num_documents", "num_tiles", "num_tokens", "width0", "width1", "width2", "num_heads"])
def attention_tiles(
    cu_seqlens, tiles, rows0, rows1, rows2, lse, width0, width1, width2, num_heads,
    num_documents, num_tiles, num_tokens,
    TILE: tl.constexpr, BLOCK: tl.constexpr, EXTRA: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    """The table of tiles, int32 `[num_tiles, ENTRY]`: those of TILE tokens that documents, rounded up to whole blocks,
    make, and EXTRA of each that is not empty; the spare ones at the end have length 0. A program writes one document's;
    those after the last document write the spare ones and `fill_unowned`."""
    program = tl.program_id(0)
    before = tl.zeros([SCANNED], tl.int32)
    total = tl.zeros([SCANNED], tl.int32)
    bad = tl.zeros([SCANNED], tl.int32)
    for start in range(0, num_documents, SCANNED):
        lane = start + tl.arange(0, SCANNED)
        exists = lane < num_documents
        begin = tl.load(cu_seqlens + lane, mask=exists, other=0)
        end = tl.load(cu_seqlens + lane + 1, mask=exists, other=0)
        bad |= misfits(begin, end, num_tokens).to(tl.int32)
        own = _tiles_of(end - begin, TILE, BLOCK, EXTRA)
        total += own
        before += tl.where(lane < program, own, 0)
    is_bad = (tl.max(bad, 0) > 0) | (tl.load(cu_seqlens) != 0)
    if program < num_documents:
        begin = tl.load(cu_seqlens + program)
        length = tl.load(cu_seqlens + program + 1) - begin
        first = tl.sum(before, 0)
        own = tl.where(is_bad, 0, _tiles_of(length, TILE, BLOCK, EXTRA))
        for start in range(0, own, SCANNED):
            lane = start + tl.arange(0, SCANNED)
            entry = tiles + ENTRY * (first + lane)
            tl.store(entry, begin + lane * 0, mask=lane < own)
            tl.store(entry + 1, length + lane * 0, mask=lane < own)
            tl.store(entry + 2, lane, mask=lane < own)
    else:
        nth, programs = program - num_documents, tl.num_programs(0) - num_documents
        used = tl.where(is_bad, 0, tl.sum(total, 0))
        for start in range(used + nth * SCANNED, num_tiles, programs * SCANNED):
            lane = start + tl.arange(0, SCANNED)
            for word in tl.static_range(ENTRY):
                tl.store(tiles + ENTRY * lane + word, lane * 0, mask=lane < num_tiles)
        fill_unowned(
            rows0, rows1, rows2, lse, width0, width1, width2, num_heads, tl.load(cu_seqlens + num_documents),
            num_tokens, is_bad, nth, programs,
        )  # fmt: skip


@triton.jit
def _tiles_of(length, TILE: tl.constexpr, BLOCK: tl.constexpr, EXTRA: tl.constexpr):
    rounded = (length + BLOCK - 1) // BLOCK * BLOCK
    return tl.where(length > 0, (rounded + TILE - 1) // TILE + EXTRA, 0)


@triton.jit
def locate_tile(tiles, program):
    """What `program` works on: `(first token of the document, its length, tile)`; length 0: a spare one."""
    entry = tiles + ENTRY * program
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


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
) -> tuple[Tensor, int]:
    """The table of `attention_tiles` and its number of tiles: an upper bound, known without reading the lengths.

    Args:
        cu_seqlens: int32 `[n + 1]`, contiguous.
        tile: tokens of a tile.
        block: documents are rounded up to whole blocks of so many tokens.
        extra: tiles more for each document.
        fill: results whose rows of no document are to be filled (`unowned`).
    """
    num_documents = cu_seqlens.shape[0] - 1
    num_tiles = (num_tokens + num_documents * (block - 1)) // tile + (1 + extra) * num_documents
    tiles = torch.empty((num_tiles, ENTRY.value), dtype=torch.int32, device=cu_seqlens.device)
    attention_tiles[(num_documents + fillers(cu_seqlens.device),)](
        cu_seqlens, tiles, *(fill or (tiles,) * 4 + (0,) * 4), num_documents, num_tiles, num_tokens,
        TILE=tile, BLOCK=block, EXTRA=extra, SCANNED=_SCANNED,
    )  # fmt: skip
    return tiles, num_tiles
