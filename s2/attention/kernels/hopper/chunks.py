"""Chunks of 64 keys: where they lie and which queries see them, and the pass that adds up the parts of divided columns.
Plain Triton, called from Gluon too."""

import triton
import triton.language as tl

from ..triton.indexing import load_rule, member, members_below, reach_of

CHUNK = tl.constexpr(64)
SUMMED = tl.constexpr(16)  # rows of a chunk that a program of `attention_sum_parts` adds up


@triton.jit
def chunk_block(nth, level, num_blocks, rule, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    """The `nth` key block of a level, the query block after the last one that sees it, and whether there is such a key
    block. Sinks are a level of their own, `LEVELS + 1`."""
    wider, block, count = 0, 0, 0
    for step in tl.static_range(LEVELS + 1):
        belong = num_blocks
        if step < LEVELS:
            belong = members_below(num_blocks, rule[3 * (LEVELS - step) - 1], rule[3 * (LEVELS - step)])
        count = tl.where(level == LEVELS - step, belong - wider, count)
        block = tl.where(level == LEVELS - step, member(nth, LEVELS - step, rule, LEVELS), block)
        wider = belong
    if SINKS:
        count = tl.where(level > LEVELS, tl.minimum(rule[1], num_blocks), tl.where(block < rule[1], 0, count))
        block = tl.where(level > LEVELS, nth, block)
    return block, tl.minimum(block + reach_of(block, rule, LEVELS, SINKS), num_blocks), nth < count


@triton.jit
def chunk_run(
    index, level, num_blocks, low, high, rule, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr
):
    """First key of the `index`-th chunk of a level, and the run `[begin, end)` of query rows in `[low, high)` that sees
    it; all three are `high` where there is no such chunk or run. A chunk is a part of a block, or the `CHUNK // BLOCK`
    next blocks of the level; then the run is that of any of them, and the first key one that a row of it sees."""
    if BLOCK >= CHUNK:
        per_block: tl.constexpr = BLOCK // CHUNK
        block, until, exists = chunk_block(index // per_block, level, num_blocks, rule, LEVELS, SINKS)
        key = block * BLOCK + (index % per_block) * CHUNK
        end = tl.minimum(until * BLOCK, high)
        begin = tl.maximum(key, low)
        exists = exists & (begin < end)
        return tl.where(exists, key, high), tl.where(exists, begin, high), tl.where(exists, end, high)
    else:
        key = index * 0 + high
        begin = key
        last = index * 0
        for j in tl.static_range(CHUNK // BLOCK):
            block, until, exists = chunk_block(index * (CHUNK // BLOCK) + j, level, num_blocks, rule, LEVELS, SINKS)
            own_begin = tl.maximum(block * BLOCK, low)
            own_end = tl.minimum(until * BLOCK, high)
            exists = exists & (own_begin < own_end)
            key = tl.where(exists, tl.minimum(key, block * BLOCK), key)
            begin = tl.where(exists, tl.minimum(begin, own_begin), begin)
            last = tl.where(exists, tl.maximum(last, own_end), last)
        return key, begin, tl.where(begin < last, last, high)


@triton.jit
def _items(blocks, BLOCK: tl.constexpr, CHUNKS: tl.constexpr = 2):
    """Items of CHUNKS chunks that so many blocks of a level make."""
    if BLOCK >= CHUNK:
        return (blocks * (BLOCK // CHUNK) + CHUNKS - 1) // CHUNKS
    else:
        return (blocks + CHUNKS * (CHUNK // BLOCK) - 1) // (CHUNKS * (CHUNK // BLOCK))


@triton.jit
def chunk_tile(tile, num_blocks, rule, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr):
    """`(level, tile of the level)` of a document's `tile`-th pair of chunks, sinks first, then the widest level; level
    < 0: a spare."""
    wider, found, index = 0, -1, 0
    if SINKS:
        tiles = _items(tl.minimum(rule[1], num_blocks), BLOCK)
        found = tl.where(tile < tiles, LEVELS + 1, -1)
        index = tl.where(tile < tiles, tile, 0)
        tile = tl.where(tile < tiles, tile, tile - tiles)
    for step in tl.static_range(LEVELS + 1):
        belong = num_blocks
        if step < LEVELS:
            belong = members_below(num_blocks, rule[3 * (LEVELS - step) - 1], rule[3 * (LEVELS - step)])
        tiles = _items(belong - wider, BLOCK)
        here = (found < 0) & (tile < tiles)
        found = tl.where(here, LEVELS - step, found)
        index = tl.where(here, tile, index)
        tile = tl.where(found < 0, tile - tiles, tile)
        wider = belong
    return found, index


@triton.jit
def _counts(
    length, sinks, BOXES: tl.constexpr, SHARE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Tiles of BOXES boxes of rows (SHARE of the same rows), such rows, and items of CHUNKS key chunks of documents,
    sinks twice; of the items one may be short in every level."""
    box: tl.constexpr = min(BLOCK, CHUNK)
    blocks = (length + BLOCK - 1) // BLOCK
    items = _items(blocks, BLOCK, CHUNKS) + LEVELS + _items(tl.minimum(blocks, sinks), BLOCK, CHUNKS)
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


@triton.jit
def locate_item(item, groups, wave, tiles, segments, batches, few, WIDEST: tl.constexpr):
    """`(level, segment, batch x KV head, first tile, tile after the last)` of a work item of an unpacked call. Items
    come in waves of `wave` heads, whose queries the L2 cache holds; of a wave the widest level first, and of a level
    its late segments. The items of one come head by head; if they are `few` or less, which are all worked on at once,
    the longest of all heads first."""
    items = 0
    for level in tl.static_range(WIDEST + 1):
        items += (tiles[level] + batches[level] - 1) // batches[level] * segments[level] * wave
    start = item // items * wave
    item = item % items
    found, segment, group, first, last = -1, 0, 0, 0, 0
    for step in tl.static_range(WIDEST + 1):
        most = tiles[WIDEST - step]
        batch = batches[WIDEST - step]
        per_head = (most + batch - 1) // batch
        parts = segments[WIDEST - step]
        a_segment = per_head * wave
        if (found < 0) & (item < a_segment * parts):
            rest = item % a_segment
            found = WIDEST - step
            segment = parts - 1 - item // a_segment
            group = start + tl.where(a_segment <= few, rest % wave, rest // per_head)
            first = tl.where(a_segment <= few, rest // wave, rest % per_head) * batch
            last = tl.where(group < groups, tl.minimum(first + batch, most), first)
        if found < 0:
            item -= a_segment * parts
    return found, segment, group, first, last


@triton.jit
def part_begin(level, tiles, segments, WIDEST: tl.constexpr, CHUNKS: tl.constexpr = 2):
    """First part of a level: those of wider levels that are divided into segments come before, CHUNKS a tile. Sinks
    are the widest level where there are any."""
    begin = 0
    for other in tl.static_range(1, WIDEST + 1):
        begin += tl.where((level < other) & (segments[other] > 1), CHUNKS * tiles[other], 0)
    return begin


@triton.jit(
    do_not_specialize=[
        "length",
        "kv_heads",
        "segment_rows",
        "parts",
        "tiles0",
        "tiles1",
        "tiles2",
        "tiles3",
        "segments0",
        "segments1",
        "segments2",
        "segments3",
    ]
)
def attention_sum_parts(
    part, dk, dv, table, length, kv_heads, segment_rows, parts,
    tiles0, tiles1, tiles2, tiles3, segments0, segments1, segments2, segments3,
    TABLE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, SINKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """dK and dV `[B, S, Hkv, D]` of the chunks of divided levels: the sums of their segments, first to last. Programs:
    chunks in steps of SUMMED rows, and KV heads."""
    tiles = (tiles0, tiles1, tiles2, tiles3)
    segments = (segments0, segments1, segments2, segments3)
    WIDEST: tl.constexpr = LEVELS + 1 if SINKS else LEVELS
    index = tl.program_id(0) // (CHUNK // SUMMED)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    level = -1
    for other in tl.static_range(WIDEST + 1):
        begin = part_begin(other, tiles, segments, WIDEST, CHUNKS)
        inside = (segments[other] > 1) & (index >= begin) & (index < begin + CHUNKS * tiles[other])
        level = tl.where(inside, other, level)
    rule = load_rule(table + (group % kv_heads) * TABLE, LEVELS, SINKS)
    num_blocks = (length + BLOCK - 1) // BLOCK
    high = (length + CHUNK - 1) // CHUNK * CHUNK
    own = index - part_begin(level, tiles, segments, WIDEST, CHUNKS)
    key, begin, end = chunk_run(own, level, num_blocks, 0, high, rule, BLOCK, LEVELS, SINKS)
    if begin < end:
        rows = tl.program_id(0) % (CHUNK // SUMMED) * SUMMED + tl.arange(0, SUMMED)
        column = tl.arange(0, D)
        offsets = rows[:, None] * D + column[None, :]
        sum_k = tl.zeros([SUMMED, D], tl.float32)
        sum_v = tl.zeros([SUMMED, D], tl.float32)
        for segment in range(begin // segment_rows, (end - 1) // segment_rows + 1):
            seen = begin < end
            if BLOCK < CHUNK:  # the runs of its blocks may leave a segment out
                low = segment * segment_rows
                _, own_begin, own_end = chunk_run(
                    own, level, num_blocks, low, tl.minimum(low + segment_rows, high), rule, BLOCK, LEVELS, SINKS
                )
                seen = own_begin < own_end
            source = part + ((segment * groups + group) * parts + index).to(tl.int64) * (2 * CHUNK * D)
            sum_k += tl.load(source + offsets, mask=seen, other=0.0)
            sum_v += tl.load(source + CHUNK * D + offsets, mask=seen, other=0.0)
        row = key + rows
        exists = row < length
        if BLOCK < CHUNK:
            block, _, exists = chunk_block(
                own * (CHUNK // BLOCK) + rows // BLOCK, level, num_blocks, rule, LEVELS, SINKS
            )
            row = block * BLOCK + rows % BLOCK
            exists = exists & (row < length)
        batch = (group // kv_heads).to(tl.int64)
        to = ((batch * length + row) * kv_heads + group % kv_heads)[:, None] * D + column[None, :]
        tl.store(dk + to, sum_k.to(dk.dtype.element_ty), mask=exists[:, None])
        tl.store(dv + to, sum_v.to(dv.dtype.element_ty), mask=exists[:, None])
