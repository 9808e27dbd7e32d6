// Backward for Hopper (sm_90a) in one pass over the visible pairs: warp-specialised, persistent, fed by TMA, in
// clusters of two thread blocks.
//
// A work item is four n_blocks of 64 keys of one stride level (columns of one residue, or neighbours of the local
// window), one for each consumer warpgroup of the cluster, and a segment of the queries that see them, walked from its
// last rows to its first: items of one head start on the same rows, which the L2 cache then holds. The consumers work
// on S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are left operands in registers:
//
//     P = exp2(scale_log2 * S - lse2)    dV += P^T dO    dS = P * (dP - delta)    dK += dS^T Q    dQ += dS K
//
// S and dP of a step are computed beside dK of the step before. dS goes through shared memory to both thread blocks.
// A step later it is there, so that nobody waits for the others: then a consumer multiplies that of all four with their
// keys, for half of the columns of dQ in either thread block. The consumers take turns with this. The result is added
// to a float32 `dq_accum` in memory (`prepost.cu` clears it before and rounds it after): the L2 cache adds slowly, and
// four n_blocks at once need a quarter of the additions of one. They come in any order, so dQ is not deterministic; dK
// and dV are.
//
// Of the first warpgroup one warp draws and plans items, one loads queries and dO, one keys and values, and one moves
// dS to the other thread block and dQ to `dq_accum`. Levels with few long columns are divided into segments, whose
// partial sums leave in float32 (see `scheduler.py`).
//
// For head dimension 128: with 64 two passes were as fast.
//
// Constants: those of `n_blocks.cuh`, D, PACKED, BF16 (else fp16), CONSUMER_REGISTERS, PRODUCER_REGISTERS.

#define CONSUMERS 2
#include "hopper.cuh"
#include "n_blocks.cuh"

constexpr int BOX_BYTES = 64 * D * 2;
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int ITEMS = 2;                   // planned: the one at work and the next
constexpr int STAGES = 2;                  // steps whose queries, dO and dS are held
constexpr int RANKS = N_BLOCKS / CONSUMERS;  // thread blocks of a cluster
constexpr int COLUMNS_EACH = D / RANKS;    // of dQ, a thread block
static_assert(COLUMNS_EACH == PANEL, "a panel of keys, and registers as for scores");

using Params = BackwardParams;

// Four n_blocks; arrays of N_BLOCKS have those of this thread block first.
struct Item {
    int group;            // batch x KV head, -1 after the last
    int segment;          // -1: the whole column
    int begin, length;    // of the document
    int m_block;          // the document's first
    int top, steps;       // the row after the last, and m_blocks before it
    int key[N_BLOCKS];    // first key, -1: no n_block
    int partial[CONSUMERS];  // number in the workspace
    int end[CONSUMERS];      // the row after the last that sees the n_block
    // steps (m_blocks, times sets of heads): the first that sees an n_block, that sees it in part, and the first that
    // does not any more
    int first_step[N_BLOCKS], diagonal_step[N_BLOCKS], end_step[N_BLOCKS];
    int all_step, until_step;                // steps from one to before the other see all n_blocks
    int first[N_BLOCKS][4], until[N_BLOCKS][4];  // small blocks: first keys, the row after the last (no block: -1, 0)
};

struct Shared {
    unsigned char keys[CONSUMERS][BOX_BYTES], values[CONSUMERS][BOX_BYTES];
    unsigned char other_keys[CONSUMERS][PANEL_BYTES];  // a panel of the other thread block's keys
    unsigned char queries[STAGES][BOX_BYTES], gradients[STAGES][BOX_BYTES];
    unsigned char sums[4][16 * COLUMNS_EACH * 4];                  // dQ of a step, 16 rows of a warp
    unsigned char dscores[STAGES][RANKS][CONSUMERS][PANEL_BYTES];  // dS^T, of the own n_blocks and of the others
    float lse[STAGES][ROWS], delta[STAGES][ROWS];
    Item items[ITEMS];
    unsigned long long rows_full[STAGES], queries_empty[STAGES], gradients_empty[STAGES];
    unsigned long long dscores_full[STAGES], other_full[STAGES], dscores_empty[STAGES], sums_full, sums_empty;
    unsigned long long keys_full, keys_done, item_full[ITEMS], item_empty[ITEMS], drawn_full, drawn_empty;
    unsigned long long rows_cut, keys_cut;  // what ends with its document is there, but for the zeros after it
    int drawn;
};

DEVICE void init_barriers(Shared& shared) {
    constexpr int consumers = CONSUMERS * WARPGROUP / WARP * ARRIVALS;
    for (int i = 0; i < STAGES; i++) {
        barrier_init(shared_address(&shared.rows_full[i]), 1);
        barrier_init(shared_address(&shared.queries_empty[i]), consumers);
        barrier_init(shared_address(&shared.gradients_empty[i]), consumers);
        barrier_init(shared_address(&shared.dscores_full[i]), consumers);
        barrier_init(shared_address(&shared.other_full[i]), 1);
        barrier_init(shared_address(&shared.dscores_empty[i]), consumers);
    }
    barrier_init(shared_address(&shared.sums_full), WARPGROUP / WARP * ARRIVALS);
    barrier_init(shared_address(&shared.sums_empty), 1);
    barrier_init(shared_address(&shared.keys_full), 1);
    barrier_init(shared_address(&shared.keys_done), consumers);
    barrier_init(shared_address(&shared.rows_cut), 1);
    barrier_init(shared_address(&shared.keys_cut), 1);
    barrier_init(shared_address(&shared.drawn_full), 1);
    barrier_init(shared_address(&shared.drawn_empty), ARRIVALS);
    for (int i = 0; i < ITEMS; i++) {
        barrier_init(shared_address(&shared.item_full[i]), ARRIVALS);
        barrier_init(shared_address(&shared.item_empty[i]), 2 * ARRIVALS + consumers);  // rows, sums
    }
    barrier_init_fence();
}

// ---------------------------------------------------------------- planning and loading

// Draws items until there are none, after a first one for each cluster, and says what has to be done for each.
DEVICE void plan_items(Shared& shared, const Params& params) {
    const int lane = threadIdx.x % WARP, rank = cluster_rank(), nth = lane % N_BLOCKS;
    const int c = nth / CONSUMERS == rank ? nth % CONSUMERS : CONSUMERS + nth % CONSUMERS;
    const int num_items = PACKED ? params.documents[1] * params.groups : params.num_items;
    const int sets = params.group / ENTRIES;  // of heads that a step takes together
    Position<ITEMS> slot;
    int phase = 0;
    const auto next = [&] {  // the cluster's first thread block draws for both
        const unsigned full = shared_address(&shared.drawn_full), empty = shared_address(&shared.drawn_empty);
        int drawn;
        if (rank == 0) {
            drawn = draw(params.counter, num_items, gridDim.x / RANKS);
            barrier_wait(empty, phase ^ 1);
            if (lane == 0) store_remote(remote(shared_address(&shared.drawn), 1), drawn, remote(full, 1));
        } else {
            if (lane == 0) barrier_expect(full, 4);
            barrier_wait(full, phase);
            drawn = *const_cast<volatile int*>(&shared.drawn);
            __syncwarp();
            if (arrives(lane == 0)) barrier_arrive_remote(remote(empty, 0));
        }
        phase ^= 1;
        return drawn;
    };
    for (int item = blockIdx.x / RANKS;; item = next()) {
        if (item >= num_items) {
            if (arrives(lane == 0)) {
                if (lane == 0) shared.items[slot.index].group = -1;
                barrier_arrive(shared_address(&shared.item_full[slot.index]));
            }
            return;
        }
        int begin_token = 0, length = params.length, first_m_block = 0, partial = 0, low = 0, pair = 0;
        WorkItem work = {};
        if (PACKED) {  // heads vary fastest; sinks of all documents come first
            const int own = divide(item, params.groups);
            const int* entry = params.documents + 4 * (1 + params.most_tiles) + 4 * own;
            work.group = item - own * params.groups;
            pair = entry[0];
            begin_token = entry[1];
            length = entry[2];
            first_m_block = entry[3];
        } else {
            work = locate_item(item, params.groups, params.columns);
        }
        const int batch = divide(work.group, params.kv_heads);
        const Rule rule = load_rule(params.table + (work.group - batch * params.kv_heads) * TABLE);
        const int num_blocks = (length + BLOCK - 1) / BLOCK;
        int high = (length + TOKENS - 1) / TOKENS * TOKENS;
        work.segment = PACKED ? -1 : work.segment;
        if (PACKED) {
            const LevelTile tile = document_tile(pair, num_blocks, rule);
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
                partial = first_partial(work.level, params.columns);
            } else {
                work.segment = -1;
            }
        }
#pragma unroll 1
        for (int tile = work.first; tile < work.last; tile++) {
            const int index = tile * N_BLOCKS + nth;
            const Run run = n_block_run(index, work.level, num_blocks, low, high, rule);
            const bool exists = run.begin < run.end;
            int top = exists ? run.end : 0, bottom = run.begin;
#pragma unroll
            for (int distance = 1; distance < N_BLOCKS; distance *= 2) {
                top = maximum(top, __shfl_xor_sync(ALL, top, distance));
                bottom = minimum(bottom, __shfl_xor_sync(ALL, bottom, distance));
            }
            const int steps = maximum(top - bottom, 0) / TOKENS;
            if (steps == 0) continue;
            const int first = exists ? (top - run.end) / TOKENS : steps;
            const int end = exists ? first + (run.end - run.begin) / TOKENS : steps;
            const int diagonal = BLOCK >= KEYS && exists && run.begin == run.key;
            // n_blocks that do not exist count as seen: their keys are loaded as zeros, but not from packed documents
            const bool is_seen = !exists && !PACKED;
            int all = is_seen ? 0 : first, until = end;
#pragma unroll
            for (int distance = 1; distance < N_BLOCKS; distance *= 2) {
                all = maximum(all, __shfl_xor_sync(ALL, all, distance));
                until = minimum(until, __shfl_xor_sync(ALL, until, distance));
            }
            LevelBlock block = {};
            if (BLOCK < KEYS) {
                const int j = lane / N_BLOCKS % ENTRIES;
                block = level_block(index * ENTRIES + j, work.level, num_blocks, rule);
            }
            Item& to = shared.items[slot.index];
            if (lane < N_BLOCKS) {
                to.key[c] = exists ? run.key : -1;
                to.first_step[c] = first * sets;
                to.diagonal_step[c] = (end - diagonal) * sets;
                to.end_step[c] = end * sets;
            }
            if (lane < N_BLOCKS && c < CONSUMERS) {
                to.partial[c] = partial + index;
                to.end[c] = run.end;
            }
            if (BLOCK < KEYS && lane < N_BLOCKS * ENTRIES) {
                const bool is_worked_on = exists && block.exists;
                to.first[c][lane / N_BLOCKS] = is_worked_on ? block.block * BLOCK : -1;
                to.until[c][lane / N_BLOCKS] = is_worked_on ? block.until * BLOCK : 0;
            }
            if (lane == 0) {
                to.all_step = all * sets;
                to.until_step = until * sets;
                to.group = work.group;
                to.segment = work.segment;
                to.begin = begin_token;
                to.length = length;
                to.m_block = first_m_block;
                to.top = top;
                to.steps = steps;
            }
            __syncwarp();
            if (arrives(lane == 0)) barrier_arrive(shared_address(&shared.item_full[slot.index]));
            slot.advance();
            barrier_wait(shared_address(&shared.item_empty[slot.index]), slot.phase ^ 1);
        }
    }
}

// The m_blocks of an item's steps: those of all sets of heads, then those of the rows before. Calls `work(m_block, row,
// head)` with the number over B, sets of heads and m_blocks, the first row, and the first head of the batch.
template <class Work>
DEVICE void for_steps(const Item& item, const Params& params, const Work& work) {
    const int sets = params.group / ENTRIES, batch = divide(item.group, params.kv_heads);
    const int first_head = (item.group - batch * params.kv_heads) * params.group, first_set = item.group * sets;
    const int m_block = item.m_block, top = item.top, steps = item.steps;
#pragma unroll 1
    for (int n = 1; n <= steps; n++) {
        const int row = top - n * TOKENS;
#pragma unroll 1
        for (int g = 0; g < sets; g++)
            work((first_set + g) * params.m_blocks + m_block + row / TOKENS, row, first_head + g * ENTRIES);
    }
}

// Loads queries with their lse2 and dO with its delta of all steps. Rows after the end of a packed document become
// zero: they add nothing to dK and dV then, whatever the next one holds.
DEVICE void load_rows(Shared& shared, const Params& params) {
    const bool is_loader = elected();
    Position<ITEMS> slot;
    Position<STAGES> stage;
    int cut_phase = 0;
    while (true) {
        barrier_wait(shared_address(&shared.item_full[slot.index]), slot.phase);
        const Item& item = shared.items[slot.index];
        if (item.group < 0) return;
        const int batch = divide(item.group, params.kv_heads), begin = item.begin, length = item.length;
        for_steps(item, params, [&](int m_block, int row, int head) {
            const bool is_cut = PACKED && row + TOKENS > length;
            const unsigned full =
                is_cut ? shared_address(&shared.rows_cut) : shared_address(&shared.rows_full[stage.index]);
            const float* stats = params.stats + static_cast<long long>(m_block) * (2 * ROWS);
            const auto load = [&](unsigned to, const TensorMap* map, unsigned statistics, const float* from) {
                copy_to_shared(statistics, from, 4 * ROWS, full);
#pragma unroll
                for (int x = 0; x < D; x += PANEL)
                    tma_load(to + x / PANEL * PANEL_BYTES, map, full, x, begin + row, head, batch);
            };
            barrier_wait(shared_address(&shared.gradients_empty[stage.index]), stage.phase ^ 1);
            if (is_loader) {
                barrier_expect(full, 2 * (BOX_BYTES + 4 * ROWS));
                load(shared_address(shared.gradients[stage.index]), &params.dout,
                     shared_address(shared.delta[stage.index]), stats + ROWS);
            }
            __syncwarp();
            barrier_wait(shared_address(&shared.queries_empty[stage.index]), stage.phase ^ 1);
            if (is_loader)
                load(shared_address(shared.queries[stage.index]), &params.q, shared_address(shared.lse[stage.index]),
                     stats);
            __syncwarp();
            if (is_cut) {
                barrier_wait(full, cut_phase);
                cut_phase ^= 1;
#pragma unroll 1
                for (int until = TOKENS; until <= ROWS; until += TOKENS) {  // of each head
                    const int first = until - (row + TOKENS - length);
                    clear_rows(shared_address(shared.queries[stage.index]), first, until, D);
                    clear_rows(shared_address(shared.gradients[stage.index]), first, until, D);
                }
                if (is_loader) barrier_arrive(shared_address(&shared.rows_full[stage.index]));
            }
            stage.advance();
        });
        if (arrives(is_loader)) barrier_arrive(shared_address(&shared.item_empty[slot.index]));
        __syncwarp();
        slot.advance();
    }
}

// Sends dS of every step to the other thread block, and adds dQ of the step before to `dq_accum`. The consumers leave
// both in shared memory and go on.
DEVICE void move_dq(Shared& shared, const Params& params) {
    constexpr int dscores_bytes = CONSUMERS * PANEL_BYTES, sums_bytes = ROWS * COLUMNS_EACH * 4;
    const bool is_mover = elected();
    const int rank = cluster_rank();
    Position<ITEMS> slot;
    Position<STAGES> stage;
    int phase = 0;  // of the sums
    while (true) {
        barrier_wait(shared_address(&shared.item_full[slot.index]), slot.phase);
        const Item& item = shared.items[slot.index];
        if (item.group < 0) return;
        int before = -1;
        const auto add = [&] {
            barrier_wait(shared_address(&shared.sums_full), phase);
            if (is_mover) {
                fence_async_shared();
                bulk_add(params.dq_accum + static_cast<long long>(before) * (ROWS * D) + rank * (ROWS * COLUMNS_EACH),
                         shared_address(shared.sums), sums_bytes);
                tma_store_commit();
                tma_store_wait();
                barrier_arrive(shared_address(&shared.sums_empty));
            }
            __syncwarp();
            phase ^= 1;
        };
        for_steps(item, params, [&](int m_block, int row, int head) {
            const unsigned full = shared_address(&shared.other_full[stage.index]);
            if (is_mover) barrier_expect(full, dscores_bytes);  // what comes from the other
            barrier_wait(shared_address(&shared.dscores_full[stage.index]), stage.phase);
            if (is_mover) {
                fence_async_shared();
                const unsigned from = shared_address(shared.dscores[stage.index][0]);
                const unsigned to = shared_address(shared.dscores[stage.index][1]);
                copy_to_remote(remote(to, rank ^ 1), from, dscores_bytes, remote(full, rank ^ 1));
            }
            __syncwarp();
            if (before >= 0) add();
            before = m_block;
            stage.advance();
        });
        add();
        if (arrives(is_mover)) barrier_arrive(shared_address(&shared.item_empty[slot.index]));
        __syncwarp();
        slot.advance();
    }
}

// First key of an n_block, or of a block of one of small blocks; NOWHERE if there is none.
DEVICE int first_key(const Item& item, int c, int j) {
    const int key = BLOCK < KEYS ? item.first[c][j] : item.key[c];
    return key < 0 ? NOWHERE : key;
}

// Loads keys and values of an item, and of the other thread block's keys those columns for which this one makes dQ;
// or has the L2 cache load them.
template <bool PREFETCHES>
DEVICE void load_n_blocks(Shared& shared, const Params& params, const Item& item, unsigned full) {
    const int batch = divide(item.group, params.kv_heads), head = item.group - batch * params.kv_heads;
    if (!PREFETCHES) barrier_expect(full, 2 * CONSUMERS * BOX_BYTES + CONSUMERS * PANEL_BYTES);
    const auto load = [&](unsigned to, const TensorMap* map, int x, int token) {
        if (PREFETCHES)
            tma_prefetch(map, x, token, head, batch);
        else
            tma_load(to, map, full, x, token, head, batch);
    };
#pragma unroll
    for (int c = 0; c < (PREFETCHES ? CONSUMERS : 2 * CONSUMERS); c++) {
#pragma unroll
        for (int j = 0; j < ENTRIES; j++) {
            const int token = item.begin + first_key(item, c, j);
            const int entry = j * (KEYS / ENTRIES) * (2 * PANEL);
            if (c >= CONSUMERS) {
                load(shared_address(shared.other_keys[c - CONSUMERS]) + entry, &params.k,
                     cluster_rank() * PANEL, token);
                continue;
            }
#pragma unroll
            for (int x = 0; x < D; x += PANEL) {
                load(shared_address(shared.keys[c]) + x / PANEL * PANEL_BYTES + entry, &params.k, x, token);
                load(shared_address(shared.values[c]) + x / PANEL * PANEL_BYTES + entry, &params.v, x, token);
            }
        }
    }
}

// Whether an n_block of an item ends after its packed document.
DEVICE bool is_item_cut(const Item& item) {
    bool is_cut = false;
#pragma unroll 1
    for (int c = 0; c < N_BLOCKS; c++)
#pragma unroll 1
        for (int j = 0; j < ENTRIES; j++) is_cut |= keys_past(first_key(item, c, j), item.length) > 0;
    return is_cut;
}

// Zeroes keys and values after the end of the document: hidden keys get dS = 0, which NaN in them would not heed.
DEVICE void cut_n_blocks(Shared& shared, const Item& item) {
#pragma unroll 1
    for (int c = 0; c < N_BLOCKS; c++) {
#pragma unroll 1
        for (int j = 0; j < ENTRIES; j++) {
            const int until = (j + 1) * (KEYS / ENTRIES);
            const int first = until - keys_past(first_key(item, c, j), item.length);
            if (c < CONSUMERS) {
                clear_rows(shared_address(shared.keys[c]), first, until, D);
                clear_rows(shared_address(shared.values[c]), first, until, D);
            } else {
                clear_rows(shared_address(shared.other_keys[c - CONSUMERS]), first, until, PANEL);
            }
        }
    }
}

// Loads the n_blocks of the items in turn.
DEVICE void load_items(Shared& shared, const Params& params) {
    const bool is_loader = elected();
    const unsigned full = shared_address(&shared.keys_full), cut = shared_address(&shared.keys_cut);
    Position<ITEMS> slot;
    int phase = 1, cut_phase = 0;
    while (true) {
        barrier_wait(shared_address(&shared.item_full[slot.index]), slot.phase);
        const Item& item = shared.items[slot.index];
        if (item.group < 0) return;
        if (is_loader) load_n_blocks<true>(shared, params, item, full);
        const bool is_cut = PACKED && is_item_cut(item);
        __syncwarp();
        barrier_wait(shared_address(&shared.keys_done), phase);  // of the item before
        if (is_loader) load_n_blocks<false>(shared, params, item, is_cut ? cut : full);
        __syncwarp();
        if (is_cut) {
            barrier_wait(cut, cut_phase);
            cut_phase ^= 1;
            cut_n_blocks(shared, item);
            if (is_loader) barrier_arrive(full);
        }
        phase ^= 1;
        slot.advance();
    }
}

// ---------------------------------------------------------------- consumers

// Columns of dQ (+)= dS^T of the rows of an n_block, left operand, times its keys.
DEVICE void accumulate_rows(float (&x)[COLUMNS_EACH / 2], unsigned dscores, unsigned keys, bool add) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        constexpr int sixteen = 16 * 2 * PANEL / 16;
        product_transposed(x, descriptor(dscores + i * sixteen), descriptor(keys + i * sixteen), i > 0 || add);
    }
}

// Where a member of `Shared` is, from its beginning: known to the compiler, so that all are reached from one register.
#define PLACE(member) static_cast<unsigned>(__INTADDR__(&static_cast<Shared*>(nullptr)->member))

// Leaves dS^T `[64 keys, 64 queries]` of a consumer in its part of a slot.
DEVICE void stage_scores(const unsigned (&x)[16], unsigned to) {
    const int lane = threadIdx.x % WARP, matrix_row = lane_row() / 16 * 16 + lane % 16, half = lane / 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        store_matrices(to + matrix_row * (2 * PANEL) + ((j + half) ^ (lane % 8)) * 16, x[2 * j], x[2 * j + 1],
                       x[2 * j + 2], x[2 * j + 3]);
}

// Of a 4 x 4 matrix of words whose rows the four lanes of a quad have, gives them the columns.
DEVICE void transpose(unsigned (&x)[4]) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & distance) continue;
            const unsigned got = __shfl_xor_sync(ALL, upper ? x[i] : x[i + distance], distance);
            (upper ? x[i] : x[i + distance]) = got;
        }
    }
}

// Stores an n_block's gradient.
DEVICE void store_gradient(const float (&x)[D / 2], float scale, void* rows, const Item& item, int c,
                           const Params& params) {
    const int batch = divide(item.group, params.kv_heads), head = item.group - batch * params.kv_heads;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int own = lane_row() + 8 * r;
        int token = item.key[c] + own;
        bool exists = true;
        if (BLOCK < KEYS) {
            token = item.first[c][own / TOKENS] + own % TOKENS;
            exists = item.until[c][own / TOKENS] > 0;
        }
        const long long row = static_cast<long long>(batch) * params.length + item.begin + token;
        uint4* to = static_cast<uint4*>(rows) + (row * params.kv_heads + head) * (D / 8) + threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < D / 8; j += 4) {
            unsigned words[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                words[i] = pack(x[4 * (j + i) + 2 * r] * scale, x[4 * (j + i) + 2 * r + 1] * scale);
            transpose(words);
            if (exists && token < item.length) to[j] = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// Stores a partial sum `[64, D]` of a divided column.
DEVICE void store_partial(const float (&x)[D / 2], float scale, float* to) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float2* row = reinterpret_cast<float2*>(to + (lane_row() + 8 * r) * D + lane_column());
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            row[4 * j] = make_float2(x[4 * j + 2 * r] * scale, x[4 * j + 2 * r + 1] * scale);
    }
}

// Leaves a warp's part of a step's dQ for `move_dq`, in the order of its registers: of an m_block, columns of
// either thread block, 16 rows of a warp, eight columns, a lane's four values.
DEVICE void stage_dq(const float (&x)[COLUMNS_EACH / 2], unsigned to) {
#pragma unroll
    for (int j = 0; j < COLUMNS_EACH / 8; j++) store_shared(to + (j * WARP + threadIdx.x % WARP) * 16, x + 4 * j);
}

DEVICE void consume(Shared& shared, const Params& params, int consumer) {
    const int sets = params.group / ENTRIES;
    const bool is_arriving = arrives(threadIdx.x % WARP == 0);
    const int rank = cluster_rank(), warp = threadIdx.x / WARP % 4;
    const unsigned base = shared_address(&shared), other_base = remote(base, rank ^ 1);
    const unsigned keys = base + PLACE(keys) + consumer * BOX_BYTES, values = keys + PLACE(values) - PLACE(keys);
    constexpr int SLOT_BYTES = RANKS * CONSUMERS * PANEL_BYTES;

    // Leaves dS of a step, for the other thread block too.
    const auto hand_over = [&](const unsigned (&x)[16], int stage) {
        stage_scores(x, base + PLACE(dscores) + stage * SLOT_BYTES + consumer * PANEL_BYTES);
        __syncwarp();
        if (is_arriving) barrier_arrive(base + PLACE(dscores_full) + 8 * stage);
    };
    // Waits for that of all. Ordinary stores wrote some of it: the fence of who reads puts them before its products,
    // and that of `move_dq` before its copy, so that who writes need not wait for its stores.
    const auto receive = [&](int phase) {
        barrier_wait(base + PLACE(dscores_full) + 8 * consumer, phase);
        barrier_wait(base + PLACE(other_full) + 8 * consumer, phase);
        fence_async_shared();
    };
    // dS and keys of an n_block, its columns of dQ inner; those of the other thread block's n_blocks follow.
    const auto scores_of = [&](int c) {
        return operand_at<ROWS_INNER>(base + PLACE(dscores) + consumer * SLOT_BYTES) + c * (PANEL_BYTES / 16);
    };
    const auto keys_of = [&](int c) {
        const unsigned own = operand_at<ROWS_INNER>(base + PLACE(keys) + rank * PANEL_BYTES);
        const unsigned others = operand_at<ROWS_INNER>(base + PLACE(other_keys));
        return c < CONSUMERS ? own + c * (BOX_BYTES / 16) : others + (c - CONSUMERS) * (PANEL_BYTES / 16);
    };
    // Says that its dS is not read any more.
    const auto release = [&] {
        if (is_arriving) {
            barrier_arrive(base + PLACE(dscores_empty) + 8 * consumer);
            barrier_arrive_remote(other_base + PLACE(dscores_empty) + 8 * consumer);
        }
    };
    // Leaves dQ of a step. The consumers take turns with the place, as they do with steps. `receive` has seen that
    // `move_dq` is in this step (it says what is to come from the other thread block): all sums but those of the step
    // before are gone by then, and a parity tells whether these are too.
    const auto add = [&](const float (&x)[COLUMNS_EACH / 2]) {
        barrier_wait(base + PLACE(sums_empty), consumer ^ 1);
        stage_dq(x, base + PLACE(sums) + warp * (16 * COLUMNS_EACH * 4));
        __syncwarp();
        if (is_arriving) barrier_arrive(base + PLACE(sums_full));
    };

    Position<ITEMS> slot;
    Position<STAGES> ring;
    int phase_of_keys = 0;
    while (true) {
        barrier_wait(shared_address(&shared.item_full[slot.index]), slot.phase);
        const Item& item = shared.items[slot.index];
        if (item.group < 0) return;
        barrier_wait(shared_address(&shared.keys_full), phase_of_keys);
        const int first_step = __shfl_sync(ALL, item.first_step[consumer], 0);
        const int end_step = __shfl_sync(ALL, item.end_step[consumer], 0);
        const int diagonal_step = item.diagonal_step[consumer], all_step = item.all_step, until_step = item.until_step;
        float dk[D / 2], dv[D / 2];

        // The columns of dQ of a step, from the n_blocks that its rows see.
        const auto multiply_some = [&](float (&x)[COLUMNS_EACH / 2], int nth) {
#pragma unroll
            for (int i = 0; i < COLUMNS_EACH / 2; i++) x[i] = 0.0f;
#pragma unroll
            for (int c = 0; c < N_BLOCKS; c++) {
                if (nth < item.first_step[c] || nth >= item.end_step[c]) continue;
                wgmma_fence();
                accumulate_rows(x, scores_of(c), keys_of(c), true);
                wgmma_commit();
                wgmma_wait<0>();
                pin(x);
            }
        };
        // The same, handed over at once. Of a stage the consumer of its number makes it.
        const auto finish = [&](int nth, int stage, int phase) {
            if (stage != consumer) return;
            receive(phase);
            float dq[COLUMNS_EACH / 2];
            multiply_some(dq, nth);
            release();
            add(dq);
        };
        // Steps that the consumer does not take part in but for dQ of the steps before.
        const auto idle = [&](int nth, int end) {
#pragma unroll 1
            for (; nth < end; nth++) {
                barrier_wait(base + PLACE(rows_full) + 8 * ring.index, ring.phase);
                __syncwarp();
                if (is_arriving) {
                    barrier_arrive(base + PLACE(queries_empty) + 8 * ring.index);
                    barrier_arrive(base + PLACE(gradients_empty) + 8 * ring.index);
                }
                barrier_wait(base + PLACE(dscores_empty) + 8 * ring.index, ring.phase ^ 1);
                if (!PACKED && nth < STAGES && item.key[consumer] < 0) {  // the slots keep them
                    const unsigned zeros[16] = {};
                    stage_scores(zeros, base + PLACE(dscores) + ring.index * SLOT_BYTES + consumer * PANEL_BYTES);
                }
                __syncwarp();
                if (is_arriving) barrier_arrive(base + PLACE(dscores_full) + 8 * ring.index);
                if (nth > 0) finish(nth - 1, ring.index ^ 1, ring.index ? ring.phase : ring.phase ^ 1);
                ring.advance();
            }
        };
        idle(0, first_step);
        if (end_step > first_step) {
            float scores[32], dprobs[32];
            int phase = __shfl_sync(ALL, ring.phase, 0);
            bool enters = __shfl_sync(ALL, ring.index, 0) == 1;  // in the second half of the loop
            int first[2], until[2], row = 0, turn = 0;  // small blocks: of the thread's keys; the step's first row
            if (BLOCK < KEYS) {
                row = item.end[consumer] - TOKENS;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int key = lane_row() + 8 * r;
                    first[r] = item.first[consumer][key / TOKENS] + key % TOKENS;
                    until[r] = item.until[consumer][key / TOKENS];
                }
            }
            const auto hide = [&](float (&x)[32], bool masked) {
                if (BLOCK < KEYS) {
#pragma unroll
                    for (int i = 0; i < 32; i++) {
                        const int query = row + (i / 4 * 8 + lane_column() + i % 2) % TOKENS, r = i / 2 % 2;
                        if (query < first[r] || query >= until[r]) x[i] = MINUS_INFINITY;
                    }
                } else if (masked) {
#pragma unroll
                    for (int i = 0; i < 32; i++)
                        if (i / 4 * 8 + i % 2 < lane_row() + i / 2 % 2 * 8 - lane_column()) x[i] = MINUS_INFINITY;
                }
            };
            unsigned left[16] = {}, probs[16];
            int nth = first_step;
            bool adds = false;  // sums of dQ are still in registers
            auto& sums = dprobs;  // of dQ, in registers of its own ptxas would serialise the products
            const auto step = [&](int stage) __attribute__((always_inline)) {
                const int before = stage ^ 1;
                const unsigned queries = base + PLACE(queries) + stage * BOX_BYTES;
                const unsigned gradients = base + PLACE(gradients) + stage * BOX_BYTES;
                const unsigned queries_before = base + PLACE(queries) + before * BOX_BYTES;
                const unsigned statistics = stage * (4 * ROWS) + lane_column() * 4;
                barrier_wait(base + PLACE(rows_full) + 8 * stage, phase);
                wgmma_fence();
                score(scores, operand_at<COLUMNS>(keys), operand_at<COLUMNS>(queries));
                if (adds) add(sums);
                wgmma_fence();
                score(dprobs, operand_at<COLUMNS>(values), operand_at<COLUMNS>(gradients));
                accumulate(dk, left, operand_at<ROWS_INNER>(queries_before), nth > first_step + 1);
                wgmma_wait<0>();
                pin(scores);
                pin(dprobs);
                pin(dk);
                if (nth > first_step && is_arriving) barrier_arrive(base + PLACE(queries_empty) + 8 * before);
                hide(scores, nth >= diagonal_step);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float2 lse = load_shared_pair(base + PLACE(lse) + statistics + 32 * j);
#pragma unroll
                    for (int i = 4 * j; i < 4 * j + 4; i++)
                        scores[i] = exp2_fast(scores[i] * params.scale_log2 - (i % 2 ? lse.y : lse.x));
                    probs[2 * j] = pack(scores[4 * j], scores[4 * j + 1]);
                    probs[2 * j + 1] = pack(scores[4 * j + 2], scores[4 * j + 3]);
                }
                wgmma_fence();
                accumulate(dv, probs, operand_at<ROWS_INNER>(gradients), nth > first_step);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float2 delta = load_shared_pair(base + PLACE(delta) + statistics + 32 * j);
#pragma unroll
                    for (int i = 4 * j; i < 4 * j + 4; i++) scores[i] *= dprobs[i] - (i % 2 ? delta.y : delta.x);
                    left[2 * j] = pack(scores[4 * j], scores[4 * j + 1]);
                    left[2 * j + 1] = pack(scores[4 * j + 2], scores[4 * j + 3]);
                }
                barrier_wait(base + PLACE(dscores_empty) + 8 * stage, phase ^ 1);
                hand_over(left, stage);
                adds = false;
                if (nth > 0 && before == consumer) {
                    receive(phase ^ before);
                    if (nth > all_step && nth <= until_step) {
                        wgmma_fence();
#pragma unroll
                        for (int c = 0; c < N_BLOCKS; c++) accumulate_rows(sums, scores_of(c), keys_of(c), c > 0);
                        wgmma_commit();
                        wgmma_wait<0>();
                        pin(dv);
                        pin(sums);
                    } else {
                        wgmma_wait<0>();
                        pin(dv);
                        multiply_some(sums, nth - 1);
                    }
                    adds = true;
                    release();
                } else {
                    wgmma_wait<0>();
                    pin(dv);
                }
                if (is_arriving) barrier_arrive(base + PLACE(gradients_empty) + 8 * stage);
                if (BLOCK < KEYS && ++turn == sets) {  // after all heads of a query block the one before it
                    row -= TOKENS;
                    turn = 0;
                }
                nth++;
                phase ^= stage;
            };
#pragma unroll 1
            while (true) {
                if (!enters) {
                    step(0);
                    if (nth == end_step) break;
                }
                enters = false;
                step(1);
                if (nth == end_step) break;
            }
            ring.index = (ring.index + end_step - first_step) % STAGES;
            ring.phase = phase;
            const int before = ring.index ^ 1;
            if (adds) add(sums);
            wgmma_fence();
            accumulate(dk, left, operand<ROWS_INNER>(base + PLACE(queries) + before * BOX_BYTES),
                       end_step > first_step + 1);
            wgmma_wait<0>();
            pin(dk);
            if (is_arriving) barrier_arrive(base + PLACE(queries_empty) + 8 * before);
        }
        const int steps = item.steps * sets;
        idle(end_step, steps);
        finish(steps - 1, ring.index ^ 1, ring.index ? ring.phase : ring.phase ^ 1);
        __syncwarp();
        if (is_arriving) barrier_arrive(base + PLACE(keys_done));  // the next ones may come
        if (end_step > first_step) {
            if (item.segment >= 0) {
                const long long at = (static_cast<long long>(item.segment) * params.groups + item.group) *
                                           params.columns.num_partials + item.partial[consumer];
                store_partial(dk, params.scale, params.partials + at * (2 * KEYS * D));
                store_partial(dv, 1.0f, params.partials + at * (2 * KEYS * D) + KEYS * D);
            } else {
                store_gradient(dk, params.scale, params.dk, item, consumer, params);
                store_gradient(dv, 1.0f, params.dv, item, consumer, params);
            }
        }
        __syncwarp();
        if (is_arriving) barrier_arrive(base + PLACE(item_empty) + 8 * slot.index);
        slot.advance();
        phase_of_keys ^= 1;
    }
}

extern "C" __global__ void __cluster_dims__(RANKS, 1, 1) __launch_bounds__(THREADS, 1)
    attention_backward(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        init_barriers(shared);
        prefetch_maps(params.q, params.dout, params.k, params.v);
    }
    cluster_sync();
    const int warpgroup = __shfl_sync(ALL, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        lower_registers<PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(ALL, threadIdx.x / WARP, 0);
        if (warp == 0) load_rows(shared, params);
        if (warp == 1) move_dq(shared, params);
        if (warp == 2) plan_items(shared, params);
        if (warp == 3) load_items(shared, params);
    } else {
        raise_registers<CONSUMER_REGISTERS>();
        consume(shared, params, warpgroup - 1);
    }
    cluster_sync();  // the other thread block's shared memory must not be gone while it is written to
}

// Read by the host (`driver.shared_bytes_of`).
extern "C" __device__ int shared_bytes = sizeof(Shared);
