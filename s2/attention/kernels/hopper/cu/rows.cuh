// Tiles of query rows, an m_block of 64 for each consumer warpgroup, and the warps that feed the consumers.
//
// One warp draws tiles and plans them (`plan_tiles`), one moves rows in and outputs out (`move_rows`), two load keys
// and values (`load_tiles`). Key tiles of 64 keys go through two pipelines of stages, partial ones first (`plan.cuh`).
// Every consumer visits every stage in order and hands it back, also where it does not see the key tile: one that left
// stages out could take an older load's phase for that of its own.
//
// Blocks smaller than 64 need several query heads to a KV head. The rows of an m_block are then one query block of
// 64 / BLOCK heads, so that all see the same blocks, and a key tile is as many key blocks, each loaded from its place.
//
// Rows are counted by their places in the sequence. Where the queries are the last of longer keys (LATE), the first
// m_block may begin before them: TMA reads those rows as zeros, in packed documents as those of the document before, and
// nobody stores them.
//
// Constants: those of `plan.cuh`, D, PACKED, LATE, STAGES, ROW_SLOTS (tiles whose rows are held), ROW_PARTS (2: q comes
// with dO).
#pragma once

#include "hopper.cuh"
#include "plan.cuh"

constexpr int BOX_BYTES = ROWS * D * 2;  // of rows, keys or values
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int PLANNED = 2;               // tiles whose plans are held: the one at work and the next
constexpr int WORDS = LATE ? 5 : 4;      // of an entry of the table of packed work

// What the other warps need to know of a tile.
struct Tile {
    int index;                            // -1 after the last
    int num_partial, num_full;                     // key tiles
    int batch, kv_head, m_block;              // the first m_block, see `row_of`
    int begin, length, first_m_block;     // of the document (of its keys); m_blocks before it
#if LATE
    int first_row, before;                // where its first key would be among the queries; keys before the first query
#endif
    int row[CONSUMERS], head[CONSUMERS];  // the first ones of a consumer's m_block
    int seen[CONSUMERS];                  // bits of the entries of `keys` that it sees
    int keys[WARP];                       // first keys of the entries of the partial ones
    Range far, near, sinks, window;       // the other key tiles
};

struct Shared {
    unsigned char rows[CONSUMERS * ROW_SLOTS][ROW_PARTS][BOX_BYTES];  // in the forward later its output
    unsigned char keys[STAGES][BOX_BYTES];
    unsigned char values[STAGES][BOX_BYTES];
    Tile tiles[PLANNED];
    unsigned long long rows_full[CONSUMERS * ROW_SLOTS], rows_done[CONSUMERS * ROW_SLOTS];
    unsigned long long keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES];
    unsigned long long tile_full[PLANNED], tile_empty[PLANNED];
    unsigned long long keys_cut, values_cut;  // what ends with its document is there, but for the zeros after it
};

// Read by the host (`driver.shared_bytes_of`).
extern "C" __device__ int shared_bytes = sizeof(Shared);

DEVICE void init_barriers(Shared& shared) {
    constexpr int warps = CONSUMERS * WARPGROUP / WARP;  // a consumer's warps arrive on their own
    for (int i = 0; i < CONSUMERS * ROW_SLOTS; i++) {
        barrier_init(shared_address(&shared.rows_full[i]), 1);
        barrier_init(shared_address(&shared.rows_done[i]), WARPGROUP / WARP);
    }
    for (int i = 0; i < STAGES; i++) {
        barrier_init(shared_address(&shared.keys_full[i]), 1);
        barrier_init(shared_address(&shared.keys_empty[i]), warps);
        barrier_init(shared_address(&shared.values_full[i]), 1);
        barrier_init(shared_address(&shared.values_empty[i]), warps);
    }
    for (int i = 0; i < PLANNED; i++) {
        barrier_init(shared_address(&shared.tile_full[i]), WARP);        // lanes that have written
        barrier_init(shared_address(&shared.tile_empty[i]), 3 + warps);  // rows, keys, values, consumers
    }
    barrier_init(shared_address(&shared.keys_cut), 1);
    barrier_init(shared_address(&shared.values_cut), 1);
    barrier_init_fence();
}

// Where the row at the first place of a tile's document is, or would be, among the queries.
DEVICE int first_row(const Tile& tile) {
#if LATE
    return tile.first_row;
#else
    return tile.begin;
#endif
}

// Keys of the document before its first query.
DEVICE int keys_before(const Tile& tile) {
#if LATE
    return tile.before;
#else
    return 0;
#endif
}

// First query head of an m_block.
DEVICE int first_head(int m_block, int kv_head, int group, int pack_gqa) {
    return kv_head * group + remainder(m_block, pack_gqa) * (ROWS / TOKENS);
}

// Draws tiles until there are none, after a first one for each thread block, and says what has to be done for each.
DEVICE void plan_tiles(Shared& shared, const Problem& problem) {
    const int lane = threadIdx.x % WARP;
    const int pack_gqa = problem.group / (ROWS / TOKENS);
    const int tiles_per_head = PACKED ? problem.documents[0] : problem.tiles_per_head;
    const int num_tiles = PACKED ? tiles_per_head * problem.kv_heads : problem.num_tiles;
    const int alone = num_tiles - problem.together * tiles_per_head;
    int index = blockIdx.x;
    Position<PLANNED> slot;
    while (index < num_tiles) {
        // head by head, longest rows first; the heads at the end together, so that the last tiles are short
        int head, nth;  // head: of the batch
        if (index < alone) {
            head = divide(index, tiles_per_head);
            nth = index - head * tiles_per_head;
        } else {
            nth = divide(index - alone, problem.together);
            head = divide(alone, tiles_per_head) + index - alone - nth * problem.together;
        }
        nth = tiles_per_head - 1 - nth;
        int m_block = nth * CONSUMERS, begin = 0, length = problem.length, first_m_block = 0, before = 0, first_row = 0;
        if (LATE) {
            m_block += problem.first_m_block;
            before = problem.offset;
            length += before;
            first_row = -before;
        }
        if (PACKED) {
            const int* entry = problem.documents + 4 + WORDS * nth;
            m_block = entry[0];
            begin = entry[1];
            length = entry[2];
            if (LATE) {
                first_row = entry[3];
                before = entry[4];
            } else {
                first_m_block = entry[3];
            }
        }
        const int batch = divide(head, problem.kv_heads), kv_head = head - batch * problem.kv_heads;
        const Rule rule = load_rule(problem.table + kv_head * TABLE);
        const Plan plan = plan_tile(m_block, pack_gqa, length, rule);
        const Entry entry = partial_entry(plan, lane);

        barrier_wait(shared_address(&shared.tile_empty[slot.index]), slot.phase ^ 1);
        Tile& tile = shared.tiles[slot.index];
        tile.keys[lane] = entry.exists ? entry.key : NOWHERE;
#pragma unroll
        for (int c = 0; c < CONSUMERS; c++) {
            const int row = row_of(m_block + c, pack_gqa);
            const unsigned seen = __ballot_sync(ALL, sees(plan, entry, row, rule));
            if (lane == 0) {
                tile.row[c] = row;
                tile.head[c] = first_head(m_block + c, kv_head, problem.group, pack_gqa);
                tile.seen[c] = seen;
            }
        }
        if (lane == 0) {
            tile.index = index;
            tile.num_partial = plan.num_partial;
            tile.num_full = plan.num_full;
            tile.batch = batch;
            tile.kv_head = kv_head;
            tile.m_block = m_block;
            tile.begin = begin;
            tile.length = length;
            tile.first_m_block = first_m_block;
#if LATE
            tile.first_row = first_row;
            tile.before = before;
#endif
            tile.far = plan.far;
            tile.near = plan.near;
            tile.sinks = plan.sinks;
            tile.window = plan.window;
        }
        barrier_arrive(shared_address(&shared.tile_full[slot.index]));
        index = draw(problem.counter, num_tiles, gridDim.x);
        slot.advance();
    }
    barrier_wait(shared_address(&shared.tile_empty[slot.index]), slot.phase ^ 1);
    if (lane == 0) shared.tiles[slot.index].index = -1;
    barrier_arrive(shared_address(&shared.tile_full[slot.index]));
}

DEVICE void load_box(unsigned to, const TensorMap* map, unsigned full, int token, int head, int batch) {
#pragma unroll
    for (int x = 0; x < D; x += PANEL) tma_load(to + x / PANEL * PANEL_BYTES, map, full, x, token, head, batch);
}

DEVICE void store_box(const TensorMap* map, unsigned from, int token, int head, int batch) {
#pragma unroll
    for (int x = 0; x < D; x += PANEL) tma_store(map, from + x / PANEL * PANEL_BYTES, x, token, head, batch);
}

// Loads the rows of the tiles in turn, and dO with two parts. With STORES also stores what the consumers leave in their
// place, but for m_blocks that are not a box (`stores_box`): those they store themselves.
template <bool STORES>
DEVICE void move_rows(Shared& shared, const Problem& problem, const TensorMap* q, const TensorMap* dout,
                      const TensorMap* out) {
    const bool is_mover = elected();
    const int group = problem.group, pack_gqa = group / (ROWS / TOKENS);
    Position<PLANNED> slot;
    Position<ROW_SLOTS> place;
    struct {
        int m_block, kv_head, batch, begin, length, before;
    } tiles[ROW_SLOTS + 1] = {};  // those held, oldest last, after the one that comes
    int held = 0, ending = ROW_SLOTS;
    while (ending > 0) {
        bool exists = ending == ROW_SLOTS;
        if (exists) {
            barrier_wait(shared_address(&shared.tile_full[slot.index]), slot.phase);
            const Tile& tile = shared.tiles[slot.index];
            exists = tile.index >= 0;
            tiles[0] = {tile.m_block, tile.kv_head, tile.batch, first_row(tile), tile.length, keys_before(tile)};
            __syncwarp();
            if (is_mover) barrier_arrive(shared_address(&shared.tile_empty[slot.index]));
            slot.advance();
        }
        if (!exists) ending--;
#pragma unroll 1
        for (int c = 0; c < CONSUMERS; c++) {
            const int own = c * ROW_SLOTS + place.index;
            const unsigned rows = shared_address(shared.rows[own]);
            if (held == ROW_SLOTS) {
                barrier_wait(shared_address(&shared.rows_done[own]), place.phase ^ 1);
                const auto& done = tiles[ROW_SLOTS];
                const int row = row_of(done.m_block + c, pack_gqa);
                if (STORES && is_mover && stores_box<PACKED, LATE>(row, done.before, done.length)) {
                    const int head = first_head(done.m_block + c, done.kv_head, group, pack_gqa);
                    store_box(out, rows, done.begin + row, head, done.batch);
                    tma_store_commit();
                    tma_store_wait();
                }
            }
            if (exists && is_mover) {
                const unsigned full = shared_address(&shared.rows_full[own]);
                barrier_expect(full, ROW_PARTS * BOX_BYTES);
                const auto& next = tiles[0];
                const int token = next.begin + row_of(next.m_block + c, pack_gqa);
                const int head = first_head(next.m_block + c, next.kv_head, group, pack_gqa);
                load_box(rows, q, full, token, head, next.batch);
                if (ROW_PARTS > 1) load_box(rows + BOX_BYTES, dout, full, token, head, next.batch);
            }
            __syncwarp();
        }
#pragma unroll
        for (int i = ROW_SLOTS; i > 0; i--) tiles[i] = tiles[i - 1];
        if (held < ROW_SLOTS) held++;
        place.advance();
    }
}

// Loads keys or values of the tiles in turn into a pipeline. With CUTS those after the end of a packed document become
// zero (only partial n_blocks reach it): hidden keys have the probability 0, which NaN in their values would not heed.
// While they are on their way (`cut_full`) others are loaded: they are cut once they are there, or before the warp would
// have to wait for something else.
template <bool CUTS>
DEVICE void load_tiles(Shared& shared, const TensorMap* map, unsigned ring, unsigned ring_full, unsigned ring_empty,
                       unsigned cut_full) {
    const int lane = threadIdx.x % WARP;
    const bool is_loader = elected();
    Position<STAGES> stage;
    Position<PLANNED> slot;
    int cut = -1, cut_phase = 0, past = 0;  // the stage to be cut, and keys of its entries past the end, one per lane
    const auto settle = [&] {
        if (cut < 0) return;
        barrier_wait(cut_full, cut_phase);
        cut_phase ^= 1;
#pragma unroll 1
        for (int j = 0; j < ENTRIES; j++) {
            const int until = (j + 1) * (KEYS / ENTRIES);
            clear_rows(ring + cut * BOX_BYTES, until - __shfl_sync(ALL, past, j), until, D);
        }
        if (is_loader) barrier_arrive(ring_full + 8 * cut);
        cut = -1;
    };
    const auto wait = [&](unsigned barrier, int parity) {
        if (CUTS && cut >= 0 && (barrier_test(cut_full, cut_phase) || !barrier_test(barrier, parity))) settle();
        barrier_wait(barrier, parity);
    };
    while (true) {
        wait(shared_address(&shared.tile_full[slot.index]), slot.phase);
        const Tile& tile = shared.tiles[slot.index];
        if (tile.index < 0) break;
        const int begin = tile.begin, batch = tile.batch, kv_head = tile.kv_head;
        const int num_partial = tile.num_partial, total = num_partial + tile.num_full;
#pragma unroll 1
        for (int base = 0; base < total; base += WARP / ENTRIES) {
            const int nth = base * ENTRIES + lane - num_partial * ENTRIES;
            int key = tile.keys[lane];
            if (nth >= 0) {
                int of_range = nth / ENTRIES;
                const Range range = pick(of_range, tile.far, tile.near, tile.sinks, tile.window);
                key = entry_of(range, of_range, nth).key;
            }
            const int own_past = CUTS && nth < 0 ? keys_past(key, tile.length) : 0;
            const unsigned ends = CUTS ? __ballot_sync(ALL, own_past > 0) : 0;
            const int count = minimum(total - base, WARP / ENTRIES);
#pragma unroll 1
            for (int n = 0; n < count; n++) {
                unsigned full = ring_full + 8 * stage.index;
                wait(ring_empty + 8 * stage.index, stage.phase ^ 1);
                if (CUTS && (ends >> n * ENTRIES & ((1u << ENTRIES) - 1))) {
                    settle();
                    cut = stage.index;
                    past = __shfl_sync(ALL, own_past, n * ENTRIES + lane % ENTRIES);
                    full = cut_full;
                }
                if (is_loader) barrier_expect(full, BOX_BYTES);
#pragma unroll
                for (int j = 0; j < ENTRIES; j++) {
                    const int first = begin + __shfl_sync(ALL, key, n * ENTRIES + j);
                    const unsigned to = ring + stage.index * BOX_BYTES + j * (KEYS / ENTRIES) * PANEL * 2;
                    if (is_loader) load_box(to, map, full, first, kv_head, batch);
                }
                stage.advance();
            }
        }
        __syncwarp();
        if (is_loader) barrier_arrive(shared_address(&shared.tile_empty[slot.index]));
        slot.advance();
    }
    if (CUTS) settle();
}

// The key tiles that a consumer's rows see, one after the other, over all tiles.
struct Visits {
    Shared& shared;
    const int consumer;
    Position<PLANNED> slot;  // of the tile
    unsigned bits;           // entries of partial n_blocks that are seen
    unsigned seen;           // partial n_blocks to come, a bit each at its first entry
    int num_partial, num_full;        // partial n_blocks in all, other key tiles to come after this one
    int at;                  // positions of the pipelines that lie behind in this tile
    int row;                 // the first of the own rows
    bool is_partial, is_first;
    int nth;                 // of the partial n_blocks
    int skip = 0;            // stages to skip before it

    // The tile at `slot`; false after the last.
    DEVICE bool open() {
        barrier_wait(shared_address(&shared.tile_full[slot.index]), slot.phase);
        if (tile().index < 0) return false;
        num_partial = tile().num_partial;
        num_full = tile().num_full;
        bits = tile().seen[consumer];
        seen = bits;
        if (BLOCK == 32) seen = (seen | seen >> 1) & 0x55555555u;
        if (BLOCK == 16) {
            seen |= seen >> 1;
            seen = (seen | seen >> 2) & 0x11111111u;
        }
        at = 0;
        row = tile().row[consumer];
        next_partial();
        is_first = true;
        return true;
    }

    DEVICE const Tile& tile() const { return shared.tiles[slot.index]; }

    // Whether some row does not see some key of the partial n_block.
    DEVICE bool hides() const { return BLOCK < KEYS || tile().keys[nth] + KEYS - 1 > row; }

    // To the next partial n_block.
    DEVICE void next_partial() {
        nth = (__ffs(seen) - 1) / ENTRIES;
        seen &= seen - 1;
        skip += nth - at;
        at = nth + 1;
        is_partial = true;
    }

    // To the next one of the tile; false after the last.
    DEVICE bool advance() {
        is_first = false;
        skip = 0;
        if (seen != 0) {
            next_partial();
            return true;
        }
        is_partial = false;
        skip = num_partial - at;
        at = num_partial;
        return num_full-- > 0;
    }
};

// Skips stages of a pipeline.
DEVICE void skip_stages(int count, Position<STAGES>& ring, unsigned full, unsigned empty) {
#pragma unroll 1
    for (; count > 0; count--) {
        barrier_wait(full + 8 * ring.index, ring.phase);
        if (threadIdx.x % WARP == 0) barrier_arrive(empty + 8 * ring.index);
        ring.advance();
    }
}

// Position of the last key, counted from the first of a partial n_block's entry, that a row sees in it: keys after it
// are hidden. `nth` of the partial n_blocks, `row`: the first of the consumer's rows, `lane_row`: which of them.
DEVICE int last_seen(const Tile& tile, int nth, int j, unsigned bits, int row, int lane_row) {
    const int entry = nth * ENTRIES + j;
    const bool is_seen = BLOCK >= KEYS || (bits >> entry & 1);
    return is_seen ? row + lane_row % TOKENS - tile.keys[entry] : -1;
}

// Replaces what keys of a partial n_block are to rows that do not see them. `lane_row`: the first of the thread's two
// rows, 8 apart; `column`: the first of its two columns of every eight.
DEVICE void mask(float (&x)[32], const Visits& visit, int lane_row, int column, float hidden) {
    if (!visit.hides()) return;
    const Tile& tile = visit.tile();
#pragma unroll
    for (int j = 0; j < ENTRIES; j++) {
        int last[2];
#pragma unroll
        for (int r = 0; r < 2; r++)
            last[r] = last_seen(tile, visit.nth, j, visit.bits, visit.row, lane_row + 8 * r) - column;
#pragma unroll
        for (int i = 0; i < 32 / ENTRIES; i++)
            if (i / 4 * 8 + i % 2 > last[i / 2 % 2]) x[j * (32 / ENTRIES) + i] = hidden;
    }
}

// Stores a warp's 16 rows of a result, each times a factor, to [B, S, H, D], as far as there are tokens: those from
// `rows_before` on (with LATE), `rows_left` in all. `first`: the place of the m_block's first row in [B, S, H].
DEVICE void store_rows(const float (&x)[D / 2], const float (&factor)[2], void* to, long long first, int rows_left,
                       int rows_before, const Problem& problem) {
    const int heads = problem.kv_heads * problem.group, lane = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int own = threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4 + 8 * r;
        uint4* row = static_cast<uint4*>(to) + (first + own % TOKENS * heads + own / TOKENS) * (D / 8);
#pragma unroll
        for (int j = 0; j < D / 8; j += 4) {
            // four lanes have the words of eight columns, four times: each gets those of one
            unsigned a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = x + 4 * (j + i) + 2 * r;
                a[i] = pack(pair[0] * factor[r], pair[1] * factor[r]);
            }
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                const unsigned other = __shfl_xor_sync(ALL, lane % 2 ? a[i] : a[i + 1], 1);
                b[i] = lane % 2 ? other : a[i];
                b[i + 1] = lane % 2 ? a[i + 1] : other;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const unsigned other = __shfl_xor_sync(ALL, lane / 2 ? b[i] : b[i + 2], 2);
                a[i] = lane / 2 ? other : b[i];
                a[i + 2] = lane / 2 ? b[i + 2] : other;
            }
            if (own % TOKENS < rows_left && (!LATE || own % TOKENS >= rows_before))
                row[j + lane] = make_uint4(a[0], a[1], a[2], a[3]);
        }
    }
}
