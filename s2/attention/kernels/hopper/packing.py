"""The table of packed work: which tiles of rows and which work items documents have."""

import triton
import triton.language as tl

from .chunks import CHUNK, chunk_items


@triton.jit
def _counts(
    length, sinks, BOXES: tl.constexpr, SHARE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Tiles of BOXES boxes of rows (SHARE of the same rows), such rows, and items of CHUNKS key chunks of documents,
    sinks twice; of the items one may be short in every level."""
    box: tl.constexpr = min(BLOCK, CHUNK)
    blocks = (length + BLOCK - 1) // BLOCK
    items = chunk_items(blocks, BLOCK, CHUNKS) + LEVELS + chunk_items(tl.minimum(blocks, sinks), BLOCK, CHUNKS)
    boxes = (length + box - 1) // box
    return (boxes * SHARE + BOXES - 1) // BOXES, boxes, tl.where(length > 0, items, 0)


@triton.jit(do_not_specialize=["num_documents", "most_tiles", "sinks"])
def attention_documents(
    cu_seqlens, documents, num_documents, most_tiles, sinks,
    BOXES: tl.constexpr, SHARE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The table of packed work, int32 `[1 + most_tiles + items, 4]`: the numbers of tiles and items; then for each tile
    of BOXES boxes of rows (64 tokens, or a smaller block; SHARE of the same rows stand side by side), and after room
    for `most_tiles` for each item of CHUNKS key chunks: its first box or its number in the document, the token where
    the document begins, its length, and the boxes before it (not counted SHARE times). A program writes one
    document's. `sinks` are the most of any head."""
    document = tl.program_id(0)
    tiles, chunks, items = 0, 0, 0
    for start in range(0, document, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        before = lane < document
        begin = tl.load(cu_seqlens + lane, mask=before, other=0)
        length = tl.load(cu_seqlens + lane + 1, mask=before, other=0) - begin
        own_tiles, own_chunks, own_items = _counts(length, sinks, BOXES, SHARE, CHUNKS, BLOCK, LEVELS)
        tiles += tl.sum(own_tiles, 0)
        chunks += tl.sum(own_chunks, 0)
        items += tl.sum(own_items, 0)
    begin = tl.load(cu_seqlens + document)
    length = tl.load(cu_seqlens + document + 1) - begin
    own_tiles, _, own_items = _counts(length, sinks, BOXES, SHARE, CHUNKS, BLOCK, LEVELS)
    if document == num_documents - 1:
        tl.store(documents, tiles + own_tiles)
        tl.store(documents + 1, items + own_items)
    for start in range(0, own_tiles, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        _store_entries(documents + 4 * (1 + tiles), lane, lane < own_tiles, lane * BOXES, begin, length, chunks)
    for start in range(0, own_items, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        _store_entries(documents + 4 * (1 + most_tiles + items), lane, lane < own_items, lane, begin, length, chunks)


@triton.jit
def _store_entries(to, lane, mask, first, begin, length, chunk):
    entry = to + 4 * lane
    tl.store(entry, first, mask=mask)
    tl.store(entry + 1, begin + lane * 0, mask=mask)
    tl.store(entry + 2, length + lane * 0, mask=mask)
    tl.store(entry + 3, chunk + lane * 0, mask=mask)
