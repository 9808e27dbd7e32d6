"""Tiles of query rows for the dQ kernel: three consumer warpgroups of 64 rows each, and the producer that feeds them.

The producer draws tiles from an atomic counter and turns each into the list of key tiles that any of its rows sees
(`index.key_plan`, closed form): first those with a mask for some row, at the edges of the pattern, then the others.
The list and what else the consumers need to know stand in shared memory, for two tiles, so that the next tile is
planned while this one is worked on. Key tiles go through a ring of stages. Every consumer walks every position of the
ring in order: it waits for a stage also where it does not see the tile, and hands it back. (A consumer that left
positions out could take an older load's phase for that of its own.)

Blocks smaller than 64 need several query heads to a KV head. The rows of a consumer are then one query block of
`64 // BLOCK` heads, so that all see the same blocks, and a key tile is as many key blocks, each loaded from its place.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from ...index import count_tiles, key_plan, load_rule, nth_tile, reach_of
from .common import LANES, WORDS, advance, clear_rows, flat_rows, get, load_entry, lowest_bit, votes

CONSUMERS = gl.constexpr(3)
ROWS = gl.constexpr(64)  # query rows of a consumer warpgroup
KEYS = gl.constexpr(64)  # keys of a stage
TILES = gl.constexpr(2)  # tiles planned: the one at work and the next
TILE_WORDS = gl.constexpr(32)  # see `_plan_tile`
BITS = gl.constexpr(9)  # word with the bits of the first consumer; those of the others follow
LIST = gl.constexpr(128)  # entries of a list: first keys of the blocks (parts of larger ones) of key tiles
EDGES = gl.constexpr(32)  # room for entries of masked key tiles: at most 20 tiles (blocks of 256), 8 of 4 (of 16)
HIDDEN = gl.constexpr(1 << 29)  # a position after every row


@gluon.jit
def _locate(tile, heads, tiles_per_head, length, documents, TOKENS: gl.constexpr, PACKED: gl.constexpr):
    """`(batch, first head, first row, token where the document begins, its length, its first chunk)` of a tile. Rows
    count from the beginning of the document, which is the whole sequence where nothing is packed. Heads come one after
    the other, their longest rows first."""
    group = tile // tiles_per_head
    index = tiles_per_head - 1 - tile % tiles_per_head
    row, begin, chunk = index * (TOKENS * CONSUMERS), 0, 0
    if PACKED:
        box, begin, length, chunk = load_entry(documents + 4, index)
        row = box * TOKENS
    sets = heads // (ROWS // TOKENS)
    return group // sets, group % sets * (ROWS // TOKENS), row, begin, length, chunk


@gluon.jit
def _key_plan(head, row, length, table, TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr,
              SINKS: gl.constexpr):  # fmt: skip
    """Rule of a KV head and plan of the tile whose first row is `row`: `(edges, unmasked key tiles, plan, rule, last
    row)`. The edges end with the tile's last row, where a larger block goes on."""
    rule = load_rule(table + head * TABLE, LEVELS, SINKS)
    last_row = gl.minimum(row + min(BLOCK, ROWS) * CONSUMERS, length) - 1
    full, masked = key_plan(row, last_row, rule, BLOCK, KEYS, LEVELS, SINKS)
    beyond = 0
    if BLOCK > KEYS:
        _, first, _, blocks = masked[len(masked) - 1]
        beyond = ((first + blocks) * BLOCK - last_row - 1) // KEYS
    return count_tiles(masked) - beyond, count_tiles(full), (full, masked), rule, last_row


@gluon.jit
def _key_block(n, edges, plan, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr):
    """Block and first key of the n-th entry of a plan's list, and whether there is one: the blocks (or the parts of a
    large one) of `edges` masked key tiles, some of which may be short of blocks, then those of the unmasked ones."""
    full, masked = plan
    blocks_a_tile: gl.constexpr = max(KEYS // BLOCK, 1)
    tile = n // blocks_a_tile
    first, stride, index, blocks = nth_tile(tile, masked)
    full_first, full_stride, full_index, _ = nth_tile(tile - edges, full)
    unmasked = tile >= edges
    first = gl.where(unmasked, full_first, first)
    stride = gl.where(unmasked, full_stride, stride)
    index = gl.where(unmasked, full_index, index)
    if BLOCK < KEYS:
        index = index * blocks_a_tile + n % blocks_a_tile
        exists = unmasked | (index < blocks)
        block = gl.where(exists, first + index * stride, 0)
        return block, block * BLOCK, exists
    else:
        per_block: gl.constexpr = BLOCK // KEYS
        block = first + (index // per_block) * stride
        return block, block * BLOCK + (index % per_block) * KEYS, index >= 0


@gluon.jit
def _plan_tile(
    slot, list_buf, tile_buf, table, documents, counter, length, heads, group, tiles_per_head, num_tiles,
    TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Draws a tile, writes the beginning of its list and its words: the tile (-1 after the last), masked and unmasked
    key tiles, then as `_locate`, at last for each consumer bits of the entries of masked ones that it sees."""
    TOKENS: gl.constexpr = min(BLOCK, ROWS)
    tile = gl.atomic_add(counter, 1, sem="relaxed")  # fences would cost more than the rest of the plan
    if tile == num_tiles + gl.num_programs(0) - 1:  # the last draw of all: the counter is zero for the next launch
        gl.atomic_xchg(counter, 0, sem="relaxed")
    known = gl.minimum(tile, num_tiles - 1)
    batch, head, row, begin, own_length, chunk = _locate(
        known, heads, tiles_per_head, length, documents, TOKENS, PACKED
    )
    edges, num_full, plan, rule, last_row = _key_plan(
        head // group, row, own_length, table, TABLE, BLOCK, LEVELS, SINKS
    )  # fmt: skip
    _, keys, _ = _key_block(gl.arange(0, LIST, LANES), edges, plan, BLOCK, LEVELS, SINKS)
    list_buf.index(slot).store(keys)
    lane = gl.arange(0, EDGES, LANES)
    words = gl.where(lane == 0, gl.where(tile < num_tiles, tile, -1), edges)
    words = gl.where(lane == 2, num_full, words)
    block, key, exists = _key_block(lane, edges, plan, BLOCK, LEVELS, SINKS)
    edge = exists & (lane < edges * max(KEYS // BLOCK, 1))
    until = block + reach_of(block, rule, LEVELS, SINKS)
    for c in gl.static_range(CONSUMERS):
        # a consumer past the last row looks where that one does, so that everybody sees a tile
        own = gl.minimum(row + c * TOKENS, last_row // TOKENS * TOKENS)
        seen = edge & (key <= own + (TOKENS - 1)) & (own // BLOCK < until)
        words = gl.where(lane == BITS + c, votes(seen), words)
    words = gl.where(lane == 3, batch, words)
    words = gl.where(lane == 4, head, words)
    words = gl.where(lane == 5, row, words)
    words = gl.where(lane == 6, begin, words)
    words = gl.where(lane == 7, own_length, words)
    words = gl.where(lane == 8, chunk, words)
    tile_buf.index(slot).store(words)


@gluon.jit
def read_tile(words, slot, C: gl.constexpr, TOKENS: gl.constexpr):
    """What a consumer needs to know of a tile: `(masked key tiles, unmasked ones, bits of the entries that it sees,
    batch, head, its first row, token where the document begins, its length, its first chunk)`."""
    word = slot * TILE_WORDS
    edges = get(words, word + 1)
    num_full = get(words, word + 2)
    bits = get(words, word + BITS + C)
    batch = get(words, word + 3)
    head = get(words, word + 4)
    row = get(words, word + 5) + C * TOKENS
    begin = get(words, word + 6)
    length = get(words, word + 7)
    chunk = get(words, word + 8)
    return edges, num_full, bits, batch, head, row, begin, length, chunk


@gluon.jit
def _load_rows(batch, head, row, round, q_desc, do_desc, q_buf, do_buf, q_full, q_empty, TOKENS: gl.constexpr):
    """The consumers' rows of a tile, of q and of dO."""
    D: gl.constexpr = q_desc.block_type.shape[3]
    for c in gl.static_range(CONSUMERS):
        full = q_full.index(c)
        mbarrier.wait(q_empty.index(c), (round & 1) ^ 1)
        mbarrier.expect(full, ROWS * D * 4)
        tma.async_copy_global_to_shared(q_desc, [batch, head, row + c * TOKENS, 0], full, q_buf.index(c))
        tma.async_copy_global_to_shared(do_desc, [batch, head, row + c * TOKENS, 0], full, do_buf.index(c))


@gluon.jit
def _load_keys(
    keys, entry, begin, length, batch, kv_head, stage, phase, cut, cut_entry, cut_phases,
    k_desc, v_desc, k_buf, v_buf, kv_full, kv_empty,
    STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Fills a stage with the blocks whose first keys stand from `entry` on. Keys and values after the end of a packed
    document become zero: hidden keys get P = 0 and dS = 0, which NaN in them would not heed. While they are on their
    way the next ones are loaded: `cut` is the stage that is still to be cut (-1: none)."""
    size: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = k_desc.block_type.shape[3]
    past = 0
    if PACKED:
        for j in gl.static_range(KEYS // size):
            past = gl.maximum(past, get(keys, entry + j) + size - length)
    full = kv_full.index(gl.where(past > 0, STAGES + stage, stage))
    mbarrier.wait(kv_empty.index(stage), phase ^ 1)
    mbarrier.expect(full, 2 * KEYS * D * 2)
    for j in gl.static_range(KEYS // size):
        key = begin + get(keys, entry + j)
        k, v = k_buf.index(stage), v_buf.index(stage)
        if size < KEYS:
            k, v = k.slice(j * size, size, 2), v.slice(j * size, size, 2)
        tma.async_copy_global_to_shared(k_desc, [batch, kv_head, key, 0], full, k)
        tma.async_copy_global_to_shared(v_desc, [batch, kv_head, key, 0], full, v)
    if PACKED:
        cut_phases = _cut_keys(keys, cut_entry, length, cut, cut_phases, k_buf, v_buf, kv_full, size, STAGES)
        cut = gl.where(past > 0, stage, -1)
        cut_entry = entry
    stage, phase = advance(stage, phase, STAGES)
    return stage, phase, cut, cut_entry, cut_phases


@gluon.jit
def _cut_keys(
    keys, entry, length, stage, phases, k_buf, v_buf, kv_full, size: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Zeroes keys and values after the end of the document in a stage (-1: none), whose first keys stand from `entry`
    on, and hands it over. A bit of `phases` for each stage; returns them."""
    if stage >= 0:
        mbarrier.wait(kv_full.index(STAGES + stage), (phases >> stage) & 1)
        for j in gl.static_range(KEYS // size):
            count = length - get(keys, entry + j)
            clear_rows(flat_rows(k_buf.index(stage)), j * size, size, count)
            clear_rows(flat_rows(v_buf.index(stage)), j * size, size, count)
        fence_async_shared()
        mbarrier.arrive(kv_full.index(stage), count=1)
        phases = phases ^ (1 << stage)
    return phases


@gluon.jit
def make_rings(STAGES: gl.constexpr):
    """Barriers of the consumers' rows, of the key and value stages (as many more for those that are still to be cut)
    and of the tiles planned, with their words and lists (the third is for the rest of a long list)."""
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    kv_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], barrier)
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    tile_full = gl.allocate_shared_memory(gl.int64, [TILES, 1], barrier)
    tile_empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], barrier)
    tile_buf = gl.allocate_shared_memory(gl.int32, [TILES, TILE_WORDS], WORDS)
    list_buf = gl.allocate_shared_memory(gl.int32, [TILES + 1, LIST], WORDS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_full.index(STAGES + i), count=1)
        mbarrier.init(kv_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(TILES):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    return q_full, q_empty, kv_full, kv_empty, tile_full, tile_empty, tile_buf, list_buf


@gluon.jit
def produce_rows(
    q_desc, do_desc, k_desc, v_desc, q_buf, do_buf, k_buf, v_buf, q_full, q_empty, kv_full, kv_empty,
    tile_buf, list_buf, tile_full, tile_empty,
    table, documents, counter, length, heads, group, tiles_per_head, num_tiles,
    TABLE: gl.constexpr, BLOCK: gl.constexpr, LEVELS: gl.constexpr, SINKS: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """The producer."""
    TOKENS: gl.constexpr = min(BLOCK, ROWS)
    entries: gl.constexpr = max(KEYS // BLOCK, 1)  # of the list for a key tile
    words = tile_buf._reinterpret(gl.int32, [TILES * TILE_WORDS, 1], WORDS)
    keys = list_buf._reinterpret(gl.int32, [(TILES + 1) * LIST, 1], WORDS)
    if PACKED:
        tiles_per_head = gl.load(documents)
        num_tiles = tiles_per_head * (heads // (ROWS // TOKENS))
    _plan_tile(0, list_buf, tile_buf, table, documents, counter, length, heads, group, tiles_per_head, num_tiles,
               TABLE, BLOCK, LEVELS, SINKS, PACKED)  # fmt: skip
    mbarrier.arrive(tile_full.index(0), count=1)
    stage, phase, cut, cut_entry, cut_phases, round = 0, 0, -1, 0, 0, 0
    while get(words, round % TILES * TILE_WORDS) >= 0:
        slot = round % TILES
        word = slot * TILE_WORDS
        total = get(words, word + 1) + get(words, word + 2)
        batch = get(words, word + 3)
        head = get(words, word + 4)
        row = get(words, word + 5)
        begin = get(words, word + 6)
        own_length = get(words, word + 7) if PACKED else 0
        rows_at = gl.minimum(total, STAGES) - 1  # after the stages, which are free before
        plan_at = gl.minimum(gl.maximum(total - STAGES, 1), total - 1)
        for n in range(total):
            if n == plan_at:  # the next tile, while the consumers work on the stages in flight
                other = (round + 1) % TILES
                mbarrier.wait(tile_empty.index(other), ((round + 1) // TILES & 1) ^ 1)
                _plan_tile(other, list_buf, tile_buf, table, documents, counter, length, heads, group, tiles_per_head,
                           num_tiles, TABLE, BLOCK, LEVELS, SINKS, PACKED)  # fmt: skip
                mbarrier.arrive(tile_full.index(other), count=1)
            entry = n * entries
            if (n > 0) & (entry % LIST == 0):
                edges, _, plan, _, _ = _key_plan(
                    head // group, row, get(words, word + 7), table, TABLE, BLOCK, LEVELS, SINKS
                )  # fmt: skip
                _, more, _ = _key_block(entry + gl.arange(0, LIST, LANES), edges, plan, BLOCK, LEVELS, SINKS)
                list_buf.index(TILES).store(more)
            entry = gl.where(entry < LIST, slot, TILES) * LIST + entry % LIST
            stage, phase, cut, cut_entry, cut_phases = _load_keys(
                keys, entry, begin, own_length, batch, head // group, stage, phase, cut, cut_entry, cut_phases,
                k_desc, v_desc, k_buf, v_buf, kv_full, kv_empty, STAGES, PACKED,
            )  # fmt: skip
            if n == rows_at:
                _load_rows(
                    batch, head, begin + row, round, q_desc, do_desc, q_buf, do_buf, q_full, q_empty, TOKENS
                )  # fmt: skip
        if PACKED:  # before anything is waited for that needs it
            cut_phases = _cut_keys(
                keys, cut_entry, own_length, cut, cut_phases, k_buf, v_buf, kv_full, k_desc.block_type.shape[2], STAGES
            )  # fmt: skip
            cut = -1
        round += 1


@gluon.jit
def skip_keys(count, kv_full, kv_empty, stage, phase, STAGES: gl.constexpr):
    """Walks past key tiles that a consumer does not see; returns where it is then."""
    for _ in range(count):
        mbarrier.wait(kv_full.index(stage), phase)
        mbarrier.arrive(kv_empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def seen_tiles(bits, BLOCK: gl.constexpr):
    """From bits of list entries: a bit for every key tile some of whose entries are set, at the first one's place."""
    if BLOCK == 32:
        bits = (bits | (bits >> 1)) & 0x55555555
    if BLOCK == 16:
        bits = bits | (bits >> 1)
        bits = (bits | (bits >> 2)) & 0x11111111
    return bits


@gluon.jit
def tile_of(bits, BLOCK: gl.constexpr):
    """The first key tile of those in `seen_tiles`."""
    return lowest_bit(bits) // max(KEYS // BLOCK, 1)


@gluon.jit
def edge_keys(key_list, slot, tile, bits, layout: gl.constexpr, BLOCK: gl.constexpr):
    """Positions of the keys of a masked key tile, out of everybody's sight for blocks that a consumer does not see."""
    columns = gl.arange(0, KEYS, layout)
    if BLOCK < KEYS:
        keys = columns
        for j in gl.static_range(KEYS // BLOCK):
            entry = tile * (KEYS // BLOCK) + j
            first = gl.where((bits >> entry) & 1 == 1, get(key_list, slot * LIST + entry), HIDDEN)
            keys = gl.where(columns // BLOCK == j, first + columns % BLOCK, keys)
        return keys
    else:
        return get(key_list, slot * LIST + tile) + columns
