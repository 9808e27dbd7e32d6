// Which key tiles the query rows of a tile see, in closed form: index arithmetic as in `kernels/index.py`,
// which explains it. Nothing here needs a GPU, so that tests can compile it for the host.
//
// Constants: BLOCK, LEVELS, SINKS, CONSUMERS; see `problem.py`.
#pragma once

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#else
#define DEVICE inline
#endif

constexpr int ROWS = 64;                                  // of an m_block, which is a consumer's part of a tile
constexpr int KEYS = 64;                                  // of a key tile
constexpr int TOKENS = BLOCK < ROWS ? BLOCK : ROWS;       // of an m_block: its rows are those of ROWS / TOKENS heads
constexpr int ENTRIES = BLOCK < KEYS ? KEYS / BLOCK : 1;  // blocks of a key tile
constexpr int PARTS = BLOCK > KEYS ? BLOCK / KEYS : 1;    // key tiles of a block
constexpr int TABLE = 8;                                  // columns of the rule table
constexpr int UNBOUNDED = 1 << 30;
constexpr int NOWHERE = 1 << 30;                          // a token past all others, which TMA reads as zeros

struct Rule {
    int local, sinks;
    int near_stride, near_residue, near_end;
    int far_stride, far_residue, far_end;
};

// Blocks `first, first + stride, ...` and the key tiles they make.
struct Range {
    int first, stride, blocks, tiles;
};

// Key tiles of a tile of rows: partial ones, which only some rows see or not as a whole, then those that all rows see.
struct Plan {
    Range far_partial, near_partial, sink_partial, window_partial, diagonal;
    Range far, near, sinks, window;
    int num_partial, num_full;  // key tiles in all
    int last_row;
};

struct Entry {
    int block, key;  // and its first key, or that of the part of a larger block
    bool exists;     // key tiles at a partial n_block may be short of blocks
};

DEVICE int maximum(int a, int b) { return a > b ? a : b; }
DEVICE int minimum(int a, int b) { return a < b ? a : b; }
DEVICE int divide(int a, int b) { return static_cast<unsigned>(a) / static_cast<unsigned>(b); }  // a >= 0
DEVICE int remainder(int a, int b) { return static_cast<unsigned>(a) % static_cast<unsigned>(b); }

DEVICE Rule load_rule(const int* table) {
    Rule rule = {table[0], 0, 1, 0, 0, 1, 0, 0};
    if (SINKS) rule.sinks = table[1];
    if (LEVELS >= 1) {
        rule.near_stride = table[2];
        rule.near_residue = table[3];
        rule.near_end = table[4];
    }
    if (LEVELS >= 2) {
        rule.far_stride = table[5];
        rule.far_residue = table[6];
        rule.far_end = table[7];
    }
    return rule;
}

// How many query blocks, from itself on, see a key block.
DEVICE int reach_of(int block, const Rule& rule) {
    int reach = rule.local;
    if (LEVELS >= 1 && remainder(block, rule.near_stride) == rule.near_residue) reach = rule.near_end;
    if (LEVELS >= 2 && remainder(block, rule.far_stride) == rule.far_residue) reach = rule.far_end;
    if (SINKS && block < rule.sinks) reach = UNBOUNDED;
    return reach;
}

// Number of blocks `b` in [0, bound) with `b % stride == residue`.
DEVICE int members_below(int bound, int stride, int residue) {
    return divide(maximum(bound - residue + stride - 1, 0), stride);
}

DEVICE int tiles_of(int blocks) { return (blocks * PARTS + ENTRIES - 1) / ENTRIES; }

DEVICE Range range_of(int first, int stride, int blocks) { return {first, stride, blocks, tiles_of(blocks)}; }

// Members of a level, which covers block distances [begin, end), that all rows of query blocks `i0..i1` see, and those
// that only some see or that do not fill a key tile.
DEVICE void level_ranges(int i0, int i1, int begin, int end, int stride, int residue, int sinks, Range& full,
                         Range& partial) {
    const int high = maximum(i0 - begin + 1, 0);
    const int low = maximum(i0 - end + 1, sinks);
    const int low_full = minimum(maximum(i1 - end + 1, low), maximum(high, low));
    const int before = members_below(low, stride, residue);
    const int before_full = members_below(low_full, stride, residue);
    const int partial_blocks = before_full - before;
    const int blocks = maximum(members_below(high, stride, residue) - before_full, 0);
    const int first = residue + before_full * stride;
    const int rest = blocks % ENTRIES;
    partial = range_of(residue + before * stride, stride, partial_blocks + rest);
    full = range_of(first + rest * stride, stride, blocks - rest);
}

// First row of an m_block, counted from the beginning of its document. A KV head's m_blocks stand in the order of their
// rows, those of the same rows (`pack_gqa` of them, of all its query heads) side by side, so that they share key tiles.
DEVICE int row_of(int m_block, int pack_gqa) { return divide(m_block, pack_gqa) * TOKENS; }

// Of the tile whose first m_block is `m_block`, in a document of `length` rows.
DEVICE Plan plan_tile(int m_block, int pack_gqa, int length, const Rule& rule) {
    Plan plan = {};
    const int m_blocks = (length + TOKENS - 1) / TOKENS * pack_gqa;
    plan.last_row = minimum(row_of(minimum(m_block + CONSUMERS, m_blocks) - 1, pack_gqa) + TOKENS, length) - 1;
    const int i0 = row_of(m_block, pack_gqa) / BLOCK, i1 = plan.last_row / BLOCK;
    const int begin = maximum(i0 - rule.local + 1, 0);  // of the local window
    const int begin_full = minimum(maximum(i1 - rule.local + 1, 0), i0);
    const int rest = (i0 - begin_full) % ENTRIES;
    const int sinks = minimum(rule.sinks, begin);
    if (LEVELS >= 1)
        level_ranges(i0, i1, rule.local, rule.near_end, rule.near_stride, rule.near_residue, rule.sinks, plan.near,
                     plan.near_partial);
    if (LEVELS >= 2)
        level_ranges(i0, i1, rule.near_end, rule.far_end, rule.far_stride, rule.far_residue, rule.sinks, plan.far,
                     plan.far_partial);
    plan.sink_partial = range_of(0, 1, sinks % ENTRIES);
    plan.sinks = range_of(sinks % ENTRIES, 1, sinks - sinks % ENTRIES);
    plan.window_partial = range_of(begin, 1, begin_full - begin);
    plan.window = range_of(begin_full, 1, i0 - begin_full - rest);
    plan.diagonal = range_of(i0 - rest, 1, i1 - i0 + rest + 1);
    if (BLOCK > KEYS) plan.diagonal.tiles -= ((i1 + 1) * BLOCK - plan.last_row - 1) / KEYS;  // past the last row
    plan.num_partial = plan.far_partial.tiles + plan.near_partial.tiles + plan.sink_partial.tiles +
                       plan.window_partial.tiles + plan.diagonal.tiles;
    plan.num_full = plan.far.tiles + plan.near.tiles + plan.sinks.tiles + plan.window.tiles;
    return plan;
}

// Of ranges that follow each other, the one with a key tile; `tile` then counts from its beginning.
DEVICE Range pick(int& tile, const Range& far, const Range& near, const Range& sinks, const Range& window) {
    if (LEVELS >= 2 && tile < far.tiles) return far;
    tile -= far.tiles;
    if (LEVELS >= 1 && tile < near.tiles) return near;
    tile -= near.tiles;
    if (SINKS && tile < sinks.tiles) return sinks;
    tile -= sinks.tiles;
    return window;
}

DEVICE Entry entry_of(const Range& range, int tile, int nth) {
    const int index = tile * ENTRIES + nth % ENTRIES;
    const int block = range.first + index / PARTS * range.stride;
    return {block, block * BLOCK + index % PARTS * KEYS, BLOCK >= KEYS || index < range.blocks};
}

// Entry `nth` of the partial n_blocks; ENTRIES of them make a key tile.
DEVICE Entry partial_entry(const Plan& plan, int nth) {
    int tile = nth / ENTRIES;
    if (tile >= plan.num_partial) return {0, 0, false};
    const Range range = pick(tile, plan.far_partial, plan.near_partial, plan.sink_partial, plan.window_partial);
    if (tile < range.tiles) return entry_of(range, tile, nth);
    return entry_of(plan.diagonal, tile - plan.window_partial.tiles, nth);
}

// Whether the results of an m_block whose first row is `row` are stored as a box, by TMA, or row by row. Boxes may end
// after the tensor, but stores must not begin before it as loads may: that is an illegal instruction. Packed documents
// have neighbours at both ends. `before` of the document's `length` rows are before its first query.
template <bool IS_PACKED, bool IS_LATE>
DEVICE bool stores_box(int row, int before, int length) {
    return (!IS_LATE || row >= before) && (!IS_PACKED || row + TOKENS <= length);
}

// How many of an entry's TOKENS keys come after a document of `length` tokens; none of an entry that is NOWHERE.
DEVICE int keys_past(int key, int length) { return key < length ? maximum(key + TOKENS - length, 0) : 0; }

// Whether an m_block whose first row is `row` sees an entry of a partial n_block. An m_block past the last row looks
// where that one does, so that every consumer sees a key tile.
DEVICE bool sees(const Plan& plan, const Entry& entry, int row, const Rule& rule) {
    const int own = minimum(row, plan.last_row / TOKENS * TOKENS);
    return entry.exists && entry.key <= own + TOKENS - 1 && own / BLOCK < entry.block + reach_of(entry.block, rule);
}
