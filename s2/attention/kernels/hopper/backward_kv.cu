// dK and dV on Hopper (sm_90a): warp-specialised, persistent, fed by TMA.
//
// Two consumer warpgroups have 64 keys each: two chunks of one stride level (columns of one residue, or neighbours of the
// local window). A work item is such a pair of chunks and a segment of the queries that see them, walked from its last
// rows to its first: items of one head start on the same rows, which the L2 cache then holds. The consumers work on
// S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are left operands in registers:
//
//     P = exp2(scale_log2 * S - lse2)    dV += P^T dO    dS = P * (dP - delta)    dK += dS^T Q
//
// The scores of the next step are computed beside dK. One warp draws and plans items, one loads queries and one dO, one moves the chunks in and the gradients out. Levels with few
// long columns are divided into segments, whose sums leave as float32 parts (see `launch.py`).
//
// Constants: those of `chunks.cuh`, D, PACKED, STAGES, BF16 (else fp16), CONSUMER_REGISTERS, PRODUCER_REGISTERS.

#define CONSUMERS 2
#include "hopper.cuh"
#include "chunks.cuh"

constexpr int BOX_BYTES = 64 * D * 2;
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int ITEMS = 2;  // planned: the one at work and the next
constexpr int HELD = 2;   // items whose keys and values are held

struct Params {
    TensorMap q, dout, k, v, dk, dv;  // over [B, H, S, D], boxes of one panel of 64 columns
    const float* stats;               // lse2 and delta of the 64 rows of a box, over B, sets of heads, boxes
    void *dk_rows, *dv_rows;          // [B, S, Hkv, D]
    float* parts;                     // [segments, B Hkv, num_parts, dK and dV, 64, D]
    const int* table;                 // rules [heads, TABLE]
    const int* documents;             // packed: pairs of chunks of documents, see `chunks.attention_documents`
    int* counter;                     // 0, and 0 again at the end
    float scale, scale_log2;
    int length, kv_heads, group, groups;  // groups: B Hkv, each read by `group` query heads
    int num_items, chunks, most_tiles;    // chunks: boxes of a set of heads in `stats`
    Columns columns;
};

// A pair of chunks.
struct Item {
    int group;               // batch x KV head, -1 after the last
    int segment;             // -1: the whole column
    int begin, length;       // of the document
    int chunk;               // boxes of rows before the document
    int top, steps;          // the row after the last, and boxes of rows before it
    int key[CONSUMERS];      // first key, -1: no chunk
    int part[CONSUMERS];     // of the divided columns
    int end[CONSUMERS];      // the row after the last that sees the chunk
    // steps (boxes of rows, times sets of heads) that do not see it, that see it as a whole, in part, not any more
    int before[CONSUMERS], inside[CONSUMERS], diagonal[CONSUMERS], after[CONSUMERS];
    int first[CONSUMERS][4], until[CONSUMERS][4];  // small blocks: first keys, the row after the last (0: no block)
};

struct Shared {
    unsigned char keys[HELD][CONSUMERS][BOX_BYTES], values[HELD][CONSUMERS][BOX_BYTES];  // later dK and dV
    unsigned char queries[STAGES][BOX_BYTES], gradients[STAGES][BOX_BYTES];
    float lse[STAGES][ROWS], delta[STAGES][ROWS];
    Item items[ITEMS];
    unsigned long long queries_full[STAGES], queries_empty[STAGES], gradients_full[STAGES], gradients_empty[STAGES];
    unsigned long long keys_full[HELD], keys_done[HELD], item_full[ITEMS], item_empty[ITEMS];
};

DEVICE void init_barriers(Shared& shared) {
    constexpr int warps = CONSUMERS * WARPGROUP / WARP;
    for (int i = 0; i < STAGES; i++) {
        barrier_init(shared_address(&shared.queries_full[i]), 1);
        barrier_init(shared_address(&shared.queries_empty[i]), warps);
        barrier_init(shared_address(&shared.gradients_full[i]), 1);
        barrier_init(shared_address(&shared.gradients_empty[i]), warps);
    }
    for (int i = 0; i < HELD; i++) {
        barrier_init(shared_address(&shared.keys_full[i]), 1);
        barrier_init(shared_address(&shared.keys_done[i]), warps);
    }
    for (int i = 0; i < ITEMS; i++) {
        barrier_init(shared_address(&shared.item_full[i]), 1);
        barrier_init(shared_address(&shared.item_empty[i]), 3);  // queries, gradients, chunks
    }
    barrier_init_fence();
}

// ---------------------------------------------------------------- planning and loading

DEVICE void plan_items(Shared& shared, const Params& params) {
    const int lane = threadIdx.x % WARP, c = lane % CONSUMERS;
    const int num_items = PACKED ? params.documents[1] * params.groups : params.num_items;
    const int sets = params.group / ENTRIES;  // of heads that a step takes together
    Position<ITEMS> slot;
    for (int item = blockIdx.x;; item = draw(params.counter, num_items)) {
        if (item >= num_items) {
            if (lane == 0) {
                shared.items[slot.index].group = -1;
                barrier_arrive(shared_address(&shared.item_full[slot.index]));
            }
            return;
        }
        int begin_token = 0, length = params.length, first_chunk = 0, part = 0, low = 0, pair = 0;
        WorkItem work = {};
        if (PACKED) {  // heads vary fastest: all start with a document's widest columns
            const int nth = divide(item, params.groups);
            const int* entry = params.documents + 4 * (1 + params.most_tiles) + 4 * nth;
            work.group = item - nth * params.groups;
            pair = entry[0];
            begin_token = entry[1];
            length = entry[2];
            first_chunk = entry[3];
        } else {
            work = locate_item(item, params.groups, params.columns);
        }
        const int batch = divide(work.group, params.kv_heads);
        const Rule rule = load_rule(params.table + (work.group - batch * params.kv_heads) * TABLE);
        const int num_blocks = (length + BLOCK - 1) / BLOCK;
        int high = (length + TOKENS - 1) / TOKENS * TOKENS;
        work.segment = PACKED ? -1 : work.segment;
        if (PACKED) {
            const LevelTile tile = chunk_tile(pair, num_blocks, rule);
            work.level = tile.level;
            work.first = tile.index;
            work.last = tile.level < 0 ? tile.index : tile.index + 1;
        } else {
            int segments = 1;
#pragma unroll
            for (int level = 0; level <= WIDEST; level++)
                if (work.level == level) segments = params.columns.segments[level];
            if (segments > 1) {
                low = work.segment * params.columns.segment_rows;
                high = minimum(low + params.columns.segment_rows, high);
                part = part_begin(work.level, params.columns);
            } else {
                work.segment = -1;
            }
        }
#pragma unroll 1
        for (int tile = work.first; tile < work.last; tile++) {
            const int index = tile * CONSUMERS + c;
            const Run run = chunk_run(index, work.level, num_blocks, low, high, rule);
            const bool exists = run.begin < run.end;
            int top = exists ? run.end : 0, bottom = run.begin;
            top = maximum(top, __shfl_xor_sync(ALL, top, 1));
            bottom = minimum(bottom, __shfl_xor_sync(ALL, bottom, 1));
            const int steps = maximum(top - bottom, 0) / TOKENS;
            if (steps == 0) continue;
            const int before = exists ? (top - run.end) / TOKENS : steps;
            int inside = exists ? (run.end - run.begin) / TOKENS : 0;
            const int after = steps - before - inside;
            const int diagonal = BLOCK >= KEYS && exists && run.begin == run.key;
            inside -= diagonal;
            ChunkBlock block = {};
            if (BLOCK < KEYS) {
                const int j = lane / CONSUMERS % ENTRIES;
                block = chunk_block(index * ENTRIES + j, work.level, num_blocks, rule);
            }
            Item& to = shared.items[slot.index];
            if (lane < CONSUMERS) {
                to.key[c] = exists ? run.key : -1;
                to.part[c] = part + index;
                to.end[c] = run.end;
                to.before[c] = before * sets;
                to.inside[c] = inside * sets;
                to.diagonal[c] = diagonal * sets;
                to.after[c] = after * sets;
            }
            if (BLOCK < KEYS && lane < CONSUMERS * ENTRIES) {
                to.first[c][lane / CONSUMERS] = block.exists ? block.block * BLOCK : 0;
                to.until[c][lane / CONSUMERS] = block.exists ? block.until * BLOCK : 0;
            }
            if (lane == 0) {
                to.group = work.group;
                to.segment = work.segment;
                to.begin = begin_token;
                to.length = length;
                to.chunk = first_chunk;
                to.top = top;
                to.steps = steps;
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(shared_address(&shared.item_full[slot.index]));
            slot.advance();
            barrier_wait(shared_address(&shared.item_empty[slot.index]), slot.phase ^ 1);
        }
    }
}

// Loads queries with their lse2, or dO with its delta, of all steps into a ring.
DEVICE void load_steps(Shared& shared, const Params& params, const TensorMap* map, unsigned ring, unsigned ring_full,
                       unsigned ring_empty, unsigned statistics, const float* from) {
    const bool is_loader = elected();
    const int sets = params.group / ENTRIES;
    Position<ITEMS> slot;
    Position<STAGES> stage;
    while (true) {
        barrier_wait(shared_address(&shared.item_full[slot.index]), slot.phase);
        const Item& item = shared.items[slot.index];
        if (item.group < 0) return;
        const int batch = divide(item.group, params.kv_heads);
        const int first_head = (item.group - batch * params.kv_heads) * params.group;
        const int first_set = item.group * sets, begin = item.begin, chunk = item.chunk, top = item.top, steps = item.steps;
        __syncwarp();
        if (is_loader) barrier_arrive(shared_address(&shared.item_empty[slot.index]));
        slot.advance();
#pragma unroll 1
        for (int n = 1; n <= steps; n++) {
            const int row = top - n * TOKENS;
#pragma unroll 1
            for (int g = 0; g < sets; g++) {
                const unsigned full = ring_full + 8 * stage.index;
                barrier_wait(ring_empty + 8 * stage.index, stage.phase ^ 1);
                if (is_loader) {
                    barrier_expect(full, BOX_BYTES + 4 * ROWS);
                    const long long box = static_cast<long long>(first_set + g) * params.chunks + chunk + row / TOKENS;
                    copy_to_shared(statistics + stage.index * (4 * ROWS), from + box * (2 * ROWS), 4 * ROWS, full);
#pragma unroll
                    for (int x = 0; x < D; x += PANEL)
                        tma_load(ring + stage.index * BOX_BYTES + x / PANEL * PANEL_BYTES, map, full, x, begin + row,
                                 first_head + g * ENTRIES, batch);
                }
                stage.advance();
            }
        }
    }
}

// Whether a chunk's gradients leave by TMA; the consumers store them otherwise.
DEVICE bool leaves_by_tma(const Item& item, int c) {
    return item.segment < 0 && item.key[c] >= 0 && (!PACKED || (BLOCK >= KEYS && item.key[c] + CHUNK <= item.length));
}

// Loads keys and values of an item, or stores the gradients that stand in their place.
template <bool STORES>
DEVICE void move_chunks(Shared& shared, const Params& params, const Item& item, int place) {
    const int batch = divide(item.group, params.kv_heads), head = item.group - batch * params.kv_heads;
    const unsigned full = shared_address(&shared.keys_full[place]);
    if (!STORES) barrier_expect(full, 2 * CONSUMERS * BOX_BYTES);
#pragma unroll
    for (int c = 0; c < CONSUMERS; c++) {
        const unsigned keys = shared_address(shared.keys[place][c]), values = shared_address(shared.values[place][c]);
        if (STORES && !leaves_by_tma(item, c)) continue;
#pragma unroll
        for (int j = 0; j < ENTRIES; j++) {
            if (STORES && BLOCK < KEYS && item.until[c][j] == 0) continue;
            const int first = BLOCK < KEYS ? item.first[c][j] : item.key[c];
            const int token = item.begin + (first < 0 ? item.length : first);
#pragma unroll
            for (int x = 0; x < D; x += PANEL) {
                const int offset = x / PANEL * PANEL_BYTES + j * (KEYS / ENTRIES) * (2 * PANEL);
                if (STORES) {
                    tma_store(&params.dk, keys + offset, x, token, head, batch);
                    tma_store(&params.dv, values + offset, x, token, head, batch);
                } else {
                    tma_load(keys + offset, &params.k, full, x, token, head, batch);
                    tma_load(values + offset, &params.v, full, x, token, head, batch);
                }
            }
        }
    }
    if (STORES) {
        tma_store_commit();
        tma_store_wait();
    }
}

// Loads the chunks of the items in turn, a turn ahead, and stores the gradients.
DEVICE void move_items(Shared& shared, const Params& params) {
    const bool is_mover = elected();
    Position<ITEMS> slot, ahead;
    Position<HELD> place;
    bool more = true, any = false;
    while (true) {
        if (more) {
            barrier_wait(shared_address(&shared.item_full[ahead.index]), ahead.phase);
            const Item& item = shared.items[ahead.index];
            more = item.group >= 0;
            if (more && is_mover) move_chunks<false>(shared, params, item, any ? place.index ^ 1 : place.index);
            __syncwarp();
            ahead.advance();
        }
        if (any) {
            barrier_wait(shared_address(&shared.keys_done[place.index]), place.phase);
            if (is_mover) {
                move_chunks<true>(shared, params, shared.items[slot.index], place.index);
                barrier_arrive(shared_address(&shared.item_empty[slot.index]));
            }
            __syncwarp();
            slot.advance();
            place.advance();
        }
        if (!more) return;
        any = true;
    }
}

// ---------------------------------------------------------------- consumers

// A product `[64, 64]` of a chunk with the rows of a step.
DEVICE void score(float (&x)[32], unsigned chunk, unsigned rows) {
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int offset = (i / 4 * PANEL_BYTES + i % 4 * 32) / 16;
        if (i == 0)
            product_shared<0>(x, descriptor(chunk + offset), descriptor(rows + offset));
        else
            product_shared<1>(x, descriptor(chunk + offset), descriptor(rows + offset));
    }
    wgmma_commit();
}

DEVICE void accumulate(float (&x)[D / 2], const unsigned (&left)[16], unsigned rows, bool add) {
#pragma unroll
    for (int i = 0; i < ROWS / 16; i++)
        product_registers(x, left + 4 * i, descriptor(rows + i * (16 * 2 * PANEL / 16)), i > 0 || add);
    wgmma_commit();
}

// Which of a chunk's keys a thread holds in products: this one and the one 8 later, and two queries of every eight.
DEVICE int lane_key() { return threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4; }
DEVICE int lane_column() { return threadIdx.x % 4 * 2; }

// What a consumer works on: a step's rows and its own chunk, as operands.
struct Step {
    unsigned keys, values;                // of the chunk, rows outer
    unsigned queries, gradients;          // bases of the rings
    unsigned queries_full, queries_empty, gradients_full, gradients_empty;
    unsigned lse, delta;
    float scale;

    DEVICE unsigned outer(unsigned ring, int stage) const { return operand<COLUMNS>(ring + stage * BOX_BYTES); }
    DEVICE unsigned inner(unsigned ring, int stage) const { return operand<ROWS_INNER>(ring + stage * BOX_BYTES); }
};

// Walks past steps that a consumer does not take part in.
DEVICE void walk(int count, Position<STAGES>& ring, const Step& at) {
#pragma unroll 1
    for (; count > 0; count--) {
        barrier_wait(at.queries_full + 8 * ring.index, ring.phase);
        barrier_wait(at.gradients_full + 8 * ring.index, ring.phase);
        if (threadIdx.x % WARP == 0) {
            barrier_arrive(at.queries_empty + 8 * ring.index);
            barrier_arrive(at.gradients_empty + 8 * ring.index);
        }
        ring.advance();
    }
}

// Leaves a chunk's gradient in the shared memory of its keys or values.
DEVICE void stage_gradient(const float (&x)[D / 2], float scale, unsigned to) {
    const int lane = threadIdx.x % WARP, matrix_row = lane_key() / 16 * 16 + lane % 16, half = lane / 16;
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
        const float* y = x + 4 * j;
        const unsigned chunk = (j % 8 + half) ^ (lane % 8);
        store_matrices(to + j / 8 * PANEL_BYTES + matrix_row * (2 * PANEL) + chunk * 16,
                       pack(y[0] * scale, y[1] * scale), pack(y[2] * scale, y[3] * scale),
                       pack(y[4] * scale, y[5] * scale), pack(y[6] * scale, y[7] * scale));
    }
}

// Stores a chunk's gradient row by row.
DEVICE void store_gradient(const float (&x)[D / 2], float scale, void* rows, const Item& item, int c, const Params& params) {
    const int batch = divide(item.group, params.kv_heads), head = item.group - batch * params.kv_heads;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int own = lane_key() + 8 * r;
        int token = item.key[c] + own;
        bool exists = true;
        if (BLOCK < KEYS) {
            token = item.first[c][own / TOKENS] + own % TOKENS;
            exists = item.until[c][own / TOKENS] > 0;
        }
        if (!exists || token >= item.length) continue;
        const long long at = (static_cast<long long>(batch) * params.length + item.begin + token) * params.kv_heads + head;
        unsigned* to = static_cast<unsigned*>(rows) + at * (D / 2) + lane_column() / 2;
#pragma unroll
        for (int j = 0; j < D / 8; j++) to[4 * j] = pack(x[4 * j + 2 * r] * scale, x[4 * j + 2 * r + 1] * scale);
    }
}

// Stores a part `[64, D]` of a divided column.
DEVICE void store_part(const float (&x)[D / 2], float scale, float* to) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float2* row = reinterpret_cast<float2*>(to + (lane_key() + 8 * r) * D + lane_column());
#pragma unroll
        for (int j = 0; j < D / 8; j++) row[4 * j] = make_float2(x[4 * j + 2 * r] * scale, x[4 * j + 2 * r + 1] * scale);
    }
}

DEVICE void consume(Shared& shared, const Params& params, int consumer) {
    Position<ITEMS> slot;
    Position<HELD> place;
    Position<STAGES> ring;
    Step at = {};
    at.queries = shared_address(shared.queries);
    at.gradients = shared_address(shared.gradients);
    at.queries_full = shared_address(shared.queries_full);
    at.queries_empty = shared_address(shared.queries_empty);
    at.gradients_full = shared_address(shared.gradients_full);
    at.gradients_empty = shared_address(shared.gradients_empty);
    at.lse = shared_address(shared.lse);
    at.delta = shared_address(shared.delta);
    at.scale = params.scale_log2;
    const int sets = params.group / ENTRIES;
    const bool is_first_lane = threadIdx.x % WARP == 0;
    while (true) {
        barrier_wait(shared_address(&shared.item_full[slot.index]), slot.phase);
        const Item& item = shared.items[slot.index];
        if (item.group < 0) return;
        const unsigned keys = shared_address(shared.keys[place.index][consumer]);
        const unsigned values = shared_address(shared.values[place.index][consumer]);
        barrier_wait(shared_address(&shared.keys_full[place.index]), place.phase);
        walk(item.before[consumer], ring, at);
        const int inside = __shfl_sync(ALL, item.inside[consumer], 0);
        const int total = inside + __shfl_sync(ALL, item.diagonal[consumer], 0);
        if (total > 0) {
            at.keys = operand<COLUMNS>(keys);
            at.values = operand<COLUMNS>(values);
            float scores[32], dprobs[32], dk[D / 2], dv[D / 2];
            int stage = __shfl_sync(ALL, ring.index, 0), phase = __shfl_sync(ALL, ring.phase, 0);
            int first[2], until[2], row = 0, turn = 0;  // small blocks: of the thread's keys; the step's first row
            if (BLOCK < KEYS) {
                row = item.end[consumer] - TOKENS;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int own = lane_key() + 8 * r;
                    first[r] = item.first[consumer][own / TOKENS] + own % TOKENS;
                    until[r] = item.until[consumer][own / TOKENS];
                }
            }
            bool masked = false;
            const auto hide = [&](float (&x)[32]) {
                if (BLOCK < KEYS) {
#pragma unroll
                    for (int i = 0; i < 32; i++) {
                        const int query = row + (i / 4 * 8 + lane_column() + i % 2) % TOKENS, r = i / 2 % 2;
                        if (query < first[r] || query >= until[r]) x[i] = MINUS_INFINITY;
                    }
                } else if (masked) {
#pragma unroll
                    for (int i = 0; i < 32; i++)
                        if (i / 4 * 8 + i % 2 < lane_key() + i / 2 % 2 * 8 - lane_column()) x[i] = MINUS_INFINITY;
                }
            };
            // A step: S and dP beside the product for dK of the step before, P, then dS beside the product for dV. What a
            // warp does between products waits for those of the other consumer to start, so they are issued together.
            unsigned left[16] = {};
            int before = stage;
#pragma unroll 1
            for (int n = 0; n < total; n++) {
                barrier_wait(at.queries_full + 8 * stage, phase);
                barrier_wait(at.gradients_full + 8 * stage, phase);
                wgmma_fence();
                score(scores, at.keys, at.outer(at.queries, stage));
                score(dprobs, at.values, at.outer(at.gradients, stage));
                accumulate(dk, left, at.inner(at.queries, before), n > 1);
                wgmma_wait<0>();
                pin(scores);
                pin(dprobs);
                pin(dk);
                if (n > 0 && is_first_lane) barrier_arrive(at.queries_empty + 8 * before);
                masked = n >= inside;
                hide(scores);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float2 lse = load_shared_pair(at.lse + stage * (4 * ROWS) + (8 * j + lane_column()) * 4);
#pragma unroll
                    for (int i = 4 * j; i < 4 * j + 4; i++)
                        scores[i] = exp2_fast(scores[i] * at.scale - (i % 2 ? lse.y : lse.x));
                    left[2 * j] = pack(scores[4 * j], scores[4 * j + 1]);
                    left[2 * j + 1] = pack(scores[4 * j + 2], scores[4 * j + 3]);
                }
                wgmma_fence();
                accumulate(dv, left, at.inner(at.gradients, stage), n > 0);
                wgmma_wait<0>();
                pin(dv);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float2 delta = load_shared_pair(at.delta + stage * (4 * ROWS) + (8 * j + lane_column()) * 4);
#pragma unroll
                    for (int i = 4 * j; i < 4 * j + 4; i++) scores[i] *= dprobs[i] - (i % 2 ? delta.y : delta.x);
                    left[2 * j] = pack(scores[4 * j], scores[4 * j + 1]);
                    left[2 * j + 1] = pack(scores[4 * j + 2], scores[4 * j + 3]);
                }
                if (is_first_lane) barrier_arrive(at.gradients_empty + 8 * stage);
                before = stage;
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
                if (BLOCK < KEYS && ++turn == sets) {  // after all heads of a query block the one before it
                    row -= TOKENS;
                    turn = 0;
                }
            }
            wgmma_fence();
            accumulate(dk, left, at.inner(at.queries, before), total > 1);
            wgmma_wait<0>();
            pin(dk);
            if (is_first_lane) barrier_arrive(at.queries_empty + 8 * before);
            ring.index = stage;
            ring.phase = phase;

            if (item.segment >= 0) {
                const long long part = (static_cast<long long>(item.segment) * params.groups + item.group) *
                                           params.columns.num_parts + item.part[consumer];
                store_part(dk, params.scale, params.parts + part * (2 * CHUNK * D));
                store_part(dv, 1.0f, params.parts + part * (2 * CHUNK * D) + CHUNK * D);
            } else if (leaves_by_tma(item, consumer)) {
                stage_gradient(dk, params.scale, keys);
                stage_gradient(dv, 1.0f, values);
                fence_async_shared();
            } else {
                store_gradient(dk, params.scale, params.dk_rows, item, consumer, params);
                store_gradient(dv, 1.0f, params.dv_rows, item, consumer, params);
            }
        }
        __syncwarp();
        const int after = item.after[consumer];
        if (threadIdx.x % WARP == 0) barrier_arrive(shared_address(&shared.keys_done[place.index]));
        walk(after, ring, at);
        slot.advance();
        place.advance();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_kv(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        init_barriers(shared);
        prefetch_map(&params.q);
        prefetch_map(&params.dout);
        prefetch_map(&params.k);
        prefetch_map(&params.v);
        prefetch_map(&params.dk);
        prefetch_map(&params.dv);
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(ALL, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        lower_registers<PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(ALL, threadIdx.x / WARP, 0);
        if (warp == 0)
            load_steps(shared, params, &params.q, shared_address(shared.queries), shared_address(shared.queries_full),
                       shared_address(shared.queries_empty), shared_address(shared.lse), params.stats);
        if (warp == 1)
            load_steps(shared, params, &params.dout, shared_address(shared.gradients),
                       shared_address(shared.gradients_full), shared_address(shared.gradients_empty),
                       shared_address(shared.delta), params.stats + ROWS);
        if (warp == 2) plan_items(shared, params);
        if (warp == 3) move_items(shared, params);
    } else {
        raise_registers<CONSUMER_REGISTERS>();
        consume(shared, params, warpgroup - 1);
    }
}
