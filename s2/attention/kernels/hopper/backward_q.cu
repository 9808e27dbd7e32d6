// dQ on Hopper (sm_90a): tiles of 3 x 64 query rows, walked as in the forward (`rows.cuh`).
//
//     P = exp2(scale_log2 * Q K^T - lse2)    dS = P * (dO V^T - delta)    dQ = scale * dS K
//
// with `lse2 = lse / ln 2` and `delta = rowsum(dO * O) - dlse`, which it computes and leaves for the dK and dV kernel.
// There is room for one set of rows: the next ones are loaded as soon as the last products with these are done, so
// dQ goes from registers to memory.
//
// Constants: those of `rows.cuh`, BF16 (else fp16), CONSUMER_REGISTERS, PRODUCER_REGISTERS.

#define ROW_SLOTS 1
#define ROW_PARTS 2
#include "rows.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;

struct Params {
    TensorMap q, dout, k, v;  // over [B, H, S, D], boxes of one panel of 64 columns
    Problem problem;
    void* dq;           // [B, S, H, D]
    const void* out;    // [B, S, H, D]
    const float* lse;   // [B, H, S]
    const float* dlse;  // [B, H, S], or null
    float* stats;       // lse2 and delta of the 64 rows of a box, over B, sets of heads, boxes
    float scale, scale_log2;
    int chunks;  // boxes of a set of heads in `stats`
};

// Which of a box's rows a thread holds in products: this one and the one 8 later, and two columns of every eight.
DEVICE int lane_row() { return threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4; }
DEVICE int lane_column() { return threadIdx.x % 4 * 2; }

// `lse2` and `delta` of a thread's two rows, which are stored for the other kernel too; rows past the end get inf and 0,
// and add nothing. Waits for the rows, of which `gradients` is dO.
DEVICE void load_statistics(const Tile& tile, int row, const Params& params, unsigned gradients, unsigned full, int phase,
                            float (&lse2)[2], float (&delta)[2]) {
    constexpr int LANES = D / 8;                // of a row, eight columns each
    constexpr int AT_ONCE = WARP / LANES;       // rows
    constexpr int LOADS = ROWS / 4 / AT_ONCE;   // for the rows of a warp
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP % 4 * 16;
    const int rows_left = tile.length - row, heads = params.problem.heads, tokens = params.problem.length;
    const long long token = static_cast<long long>(tile.batch) * tokens + tile.begin + row;
    const long long statistics = (static_cast<long long>(tile.batch) * heads + tile.head) * tokens + tile.begin + row;
    uint4 out[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int own = first + i * AT_ONCE + lane / LANES;
        out[i] = make_uint4(0, 0, 0, 0);
        if (own % TOKENS < rows_left) {
            const long long at = (token + own % TOKENS) * heads + tile.head + own / TOKENS;
            out[i] = static_cast<const uint4*>(params.out)[at * LANES + lane % LANES];
        }
    }
    float dlse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int own = lane_row() + 8 * r;
        const long long at = statistics + static_cast<long long>(own / TOKENS) * tokens + own % TOKENS;
        const bool exists = own % TOKENS < rows_left;
        lse2[r] = exists ? params.lse[at] * LOG2E : PLUS_INFINITY;
        dlse[r] = exists && params.dlse ? params.dlse[at] : 0.0f;
    }
    barrier_wait(full, phase);
    float part[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int own = first + i * AT_ONCE + lane / LANES, chunk16 = lane % LANES;
        const uint4 dout = load_shared(gradients + chunk16 / 8 * PANEL_BYTES + own * (2 * PANEL) + (chunk16 % 8 ^ own % 8) * 16);
        part[i] = dot(out[i].x, dout.x) + dot(out[i].y, dout.y) + dot(out[i].z, dout.z) + dot(out[i].w, dout.w);
    }
    // sums over the lanes of a row: every step halves the number of rows that a lane has
#pragma unroll
    for (int half = LOADS / 2, distance = LANES / 2; half > 0; half /= 2, distance /= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float sent = __shfl_xor_sync(ALL, upper ? part[i] : part[i + half], distance);
            part[i] = (upper ? part[i + half] : part[i]) + sent;
        }
    }
    part[0] += __shfl_xor_sync(ALL, part[0], 1);
    const long long set = (static_cast<long long>(tile.batch) * heads + tile.head) / (ROWS / TOKENS);
    float* stats = params.stats + (set * params.chunks + tile.chunk + row / TOKENS) * (2 * ROWS);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int own = lane_row() + 8 * r, of_warp = own - first;
        const float sum = __shfl_sync(ALL, part[0], of_warp % AT_ONCE * LANES + of_warp / AT_ONCE * 2);
        delta[r] = own % TOKENS < rows_left ? sum - dlse[r] : 0.0f;
        if (lane % 4 == 0 && rows_left > 0) {
            stats[own] = lse2[r];
            stats[own + ROWS] = delta[r];
        }
    }
}

// A product `[64, 64]` of rows with keys or of gradients with values.
DEVICE void score(float (&x)[32], unsigned rows, unsigned keys) {
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int offset = (i / 4 * PANEL_BYTES + i % 4 * 32) / 16;
        if (i == 0)
            product_shared<0>(x, descriptor(rows + offset), descriptor(keys + offset));
        else
            product_shared<1>(x, descriptor(rows + offset), descriptor(keys + offset));
    }
    wgmma_commit();
}

// dQ += dS K.
DEVICE void accumulate(float (&dq)[D / 2], const unsigned (&ds)[16], unsigned keys, bool add) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++)
        product_registers(dq, ds + 4 * i, descriptor(keys + i * (16 * 2 * PANEL / 16)), i > 0 || add);
    wgmma_commit();
}

// P of a thread's two rows, from S.
DEVICE void exponentiate(float (&scores)[32], const float (&lse2)[2], float scale) {
#pragma unroll
    for (int i = 0; i < 32; i++) scores[i] = exp2_fast(scores[i] * scale - lse2[i / 2 % 2]);
}

// dS, in pairs.
DEVICE void differentiate(unsigned (&ds)[16], const float (&probs)[32], const float (&dprobs)[32], const float (&delta)[2]) {
#pragma unroll
    for (int i = 0; i < 16; i++)
        ds[i] = pack(probs[2 * i] * (dprobs[2 * i] - delta[i % 2]), probs[2 * i + 1] * (dprobs[2 * i + 1] - delta[i % 2]));
}

// `first`: the first row's place in [B, S, H].
DEVICE void store(const float (&dq)[D / 2], unsigned first, int rows_left, const Params& params) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int own = lane_row() + 8 * r;
        if (own % TOKENS >= rows_left) continue;
        const unsigned at = first + own % TOKENS * params.problem.heads + own / TOKENS;
        unsigned* to = static_cast<unsigned*>(params.dq) + static_cast<long long>(at) * (D / 2) + lane_column() / 2;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            to[4 * j] = pack(dq[4 * j + 2 * r] * params.scale, dq[4 * j + 2 * r + 1] * params.scale);
    }
}

// Walks past positions of both rings.
DEVICE void walk(int count, Position<STAGES>& ring, unsigned keys_full, unsigned keys_empty, unsigned values_full,
                 unsigned values_empty) {
    Position<STAGES> values = ring;
    walk(count, values, values_full, values_empty);
    walk(count, ring, keys_full, keys_empty);
}

DEVICE void consume(Shared& shared, const Params& params, int consumer) {
    const bool is_first_lane = threadIdx.x % WARP == 0;
    const unsigned keys_full = shared_address(shared.keys_full), keys_empty = shared_address(shared.keys_empty);
    const unsigned values_full = shared_address(shared.values_full), values_empty = shared_address(shared.values_empty);
    const unsigned key_base = shared_address(shared.keys), value_base = shared_address(shared.values);
    const unsigned rows_full = shared_address(&shared.rows_full[consumer]);
    const unsigned rows_done = shared_address(&shared.rows_done[consumer]);
    const unsigned rows = operand<COLUMNS>(shared_address(shared.rows[consumer][0]));
    const unsigned gradients = operand<COLUMNS>(shared_address(shared.rows[consumer][1]));
    const float scale = params.scale_log2;
    Visits next = {shared, consumer};
    Position<STAGES> ring;  // of the next key tile: its keys and values stand at the same place
    while (next.open()) {
        float lse2[2], delta[2], dq[D / 2], scores[32], dprobs[32];
        unsigned ds[16];
        int held = -1;  // stage of the keys whose dS is there, -1: none
        bool add = false;
        const Tile& tile = next.tile();
        const int rows_left = tile.length - next.row;
        const unsigned first = (tile.batch * params.problem.length + tile.begin + next.row) * params.problem.heads + tile.head;
        load_statistics(tile, next.row, params, shared_address(shared.rows[consumer][1]), rows_full, next.slot.index, lse2, delta);
        bool exists = true;
        // edges, one after the other
#pragma unroll 1
        while (exists && (next.is_edge || held < 0 || next.skip > STAGES - 2)) {
            if (held >= 0) {
                wgmma_fence();
                accumulate(dq, ds, operand<ROWS_INNER>(key_base + held * BOX_BYTES), add);
                wgmma_wait<0>();
                pin(dq);
                add = true;
                if (is_first_lane) barrier_arrive(keys_empty + 8 * held);
            }
            walk(next.skip, ring, keys_full, keys_empty, values_full, values_empty);
            barrier_wait(keys_full + 8 * ring.index, ring.phase);
            barrier_wait(values_full + 8 * ring.index, ring.phase);
            wgmma_fence();
            score(scores, rows, operand<COLUMNS>(key_base + ring.index * BOX_BYTES));
            score(dprobs, gradients, operand<COLUMNS>(value_base + ring.index * BOX_BYTES));
            wgmma_wait<1>();
            pin(scores);
            if (next.is_edge && next.hides()) {
#pragma unroll
                for (int j = 0; j < ENTRIES; j++) {
                    int last[2];
#pragma unroll
                    for (int r = 0; r < 2; r++)
                        last[r] = last_seen(next.tile(), next.nth, j, next.bits, next.row, lane_row() + 8 * r) - lane_column();
#pragma unroll
                    for (int i = 0; i < 32 / ENTRIES; i++)
                        if (i / 4 * 8 + i % 2 > last[i / 2 % 2]) scores[j * (32 / ENTRIES) + i] = MINUS_INFINITY;
                }
            }
            exponentiate(scores, lse2, scale);
            wgmma_wait<0>();
            pin(dprobs);
            if (is_first_lane) {
                barrier_arrive(values_empty + 8 * ring.index);
                if (next.seen == 0 && next.fulls <= 0) barrier_arrive(rows_done);
            }
            differentiate(ds, scores, dprobs, delta);
            held = ring.index;
            ring.advance();
            const bool was_edge = next.is_edge;
            exists = next.advance();
            if (was_edge && !next.is_edge) {  // the list of edges is not read any more
                __syncwarp();
                if (is_first_lane) barrier_arrive(shared_address(&shared.tile_empty[next.slot.index]));
            }
        }
        if (exists) {
            walk(next.skip, ring, keys_full, keys_empty, values_full, values_empty);
            const int count = __shfl_sync(ALL, next.fulls, 0);
            int stage = __shfl_sync(ALL, ring.index, 0), phase = __shfl_sync(ALL, ring.phase, 0);
            int before = __shfl_sync(ALL, held, 0);
#pragma unroll 1
            for (int n = 0; n <= count; n++) {
                barrier_wait(keys_full + 8 * stage, phase);
                wgmma_fence();
                accumulate(dq, ds, operand<ROWS_INNER>(key_base + before * BOX_BYTES), add);
                score(scores, rows, operand<COLUMNS>(key_base + stage * BOX_BYTES));
                wgmma_wait<0>();
                pin(dq);
                pin(scores);
                if (is_first_lane) barrier_arrive(keys_empty + 8 * before);
                barrier_wait(values_full + 8 * stage, phase);
                wgmma_fence();
                score(dprobs, gradients, operand<COLUMNS>(value_base + stage * BOX_BYTES));
                exponentiate(scores, lse2, scale);
                wgmma_wait<0>();
                pin(dprobs);
                if (is_first_lane) {
                    barrier_arrive(values_empty + 8 * stage);
                    if (n == count) barrier_arrive(rows_done);
                }
                differentiate(ds, scores, dprobs, delta);
                add = true;
                before = stage;
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
            }
            held = before;
            ring.index = stage;
            ring.phase = phase;
            next.skip = 0;
        }
        wgmma_fence();
        accumulate(dq, ds, operand<ROWS_INNER>(key_base + held * BOX_BYTES), add);
        wgmma_wait<0>();
        pin(dq);
        if (is_first_lane) barrier_arrive(keys_empty + 8 * held);
        store(dq, first, rows_left, params);
        // edges at the end that others see
        walk(next.skip, ring, keys_full, keys_empty, values_full, values_empty);
        next.skip = 0;
        next.slot.advance();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_q(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        init_barriers(shared);
        prefetch_map(&params.q);
        prefetch_map(&params.dout);
        prefetch_map(&params.k);
        prefetch_map(&params.v);
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(ALL, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        lower_registers<PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(ALL, threadIdx.x / WARP, 0);
        if (warp == 0)
            load_tiles(shared, params.problem, &params.k, shared_address(shared.keys), shared_address(shared.keys_full),
                       shared_address(shared.keys_empty));
        if (warp == 1)
            load_tiles(shared, params.problem, &params.v, shared_address(shared.values),
                       shared_address(shared.values_full), shared_address(shared.values_empty));
        if (warp == 2) plan_tiles(shared, params.problem);
        if (warp == 3) move_rows<false>(shared, &params.q, &params.dout, nullptr);
    } else {
        raise_registers<CONSUMER_REGISTERS>();
        consume(shared, params, warpgroup - 1);
    }
}
