// dQ on Hopper (sm_90a): tiles of 3 x 64 query rows, walked as in the forward (`rows.cuh`).
//
//     P = exp2(scale_log2 * Q K^T - lse2)    dS = P * (dO V^T - delta)    dQ = scale * dS K
//
// with `lse2 = lse / ln 2` and `delta = rowsum(dO * O) - dlse`, which it computes and leaves for the dK and dV kernel.
// A step adds dS times the keys of a key tile to dQ beside the product that scores the next one. Rows are handed back
// with the last products that read them, and the next ones loaded while dQ goes from registers to memory.
//
// Constants: those of `rows.cuh`, BF16 (else fp16), CONSUMER_REGISTERS, PRODUCER_REGISTERS.

#include "rows.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr int WARP_ROWS = ROWS / 4;

using Params = BackwardQParams;

// The rows of an m_block: places of the first one in [B, S, H] and in [B, H, S], and tokens to the document's end.
struct MBlock {
    long long row, statistics;
    int rows_left;
};

// A warp's rows of O, eight columns a lane.
struct Outputs {
    static constexpr int LANES = D / 8;           // of a row
    static constexpr int AT_ONCE = WARP / LANES;  // rows
    static constexpr int LOADS = WARP_ROWS / AT_ONCE;
    uint4 x[LOADS];

    DEVICE int row(int i) const {
        return threadIdx.x / WARP % 4 * WARP_ROWS + i * AT_ONCE + threadIdx.x % WARP / LANES;
    }

    DEVICE void load(const MBlock& m_block, const Params& params) {
        const int heads = params.problem.kv_heads * params.problem.group;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            x[i] = make_uint4(0, 0, 0, 0);
            if (row(i) % TOKENS < m_block.rows_left) {
                const long long at = m_block.row + row(i) % TOKENS * heads + row(i) / TOKENS;
                x[i] = static_cast<const uint4*>(params.out)[at * LANES + threadIdx.x % LANES];
            }
        }
    }

    // Sums of their products with dO, which is in shared memory, of the thread's rows.
    DEVICE void sum(unsigned gradients, float (&sums)[2]) const {
        const int lane = threadIdx.x % WARP, chunk = lane % LANES;
        float part[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const uint4 dout =
                load_shared(gradients + chunk / 8 * PANEL_BYTES + row(i) * (2 * PANEL) + (chunk % 8 ^ row(i) % 8) * 16);
            part[i] = dot(x[i].x, dout.x) + dot(x[i].y, dout.y) + dot(x[i].z, dout.z) + dot(x[i].w, dout.w);
        }
        // over the lanes of a row: every step halves the number of rows that a lane has
#pragma unroll
        for (int half = LOADS / 2, distance = LANES / 2; half > 0; half /= 2, distance /= 2) {
            const bool is_upper = lane & distance;
#pragma unroll
            for (int i = 0; i < half; i++) {
                const float sent = __shfl_xor_sync(ALL, is_upper ? part[i] : part[i + half], distance);
                part[i] = (is_upper ? part[i + half] : part[i]) + sent;
            }
        }
        part[0] += __shfl_xor_sync(ALL, part[0], 1);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int own = lane / 4 + 8 * r;  // of the warp's rows
            sums[r] = __shfl_sync(ALL, part[0], own % AT_ONCE * LANES + own / AT_ONCE * 2);
        }
    }
};

// `lse2` and `delta` of a thread's two rows, for the other kernel in `stats` too; rows past the end get inf and 0, and
// add nothing. Waits for the rows, of which `gradients` is dO.
DEVICE void statistics(const MBlock& m_block, const Params& params, float* stats, unsigned gradients, unsigned full,
                       int phase, float (&lse2)[2], float (&delta)[2]) {
    Outputs outputs;
    outputs.load(m_block, params);
    float dlse[2];
    bool exists[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int own = lane_row() + 8 * r;
        const long long of_head = static_cast<long long>(own / TOKENS) * params.problem.length;
        const long long at = m_block.statistics + of_head + own % TOKENS;
        exists[r] = own % TOKENS < m_block.rows_left;
        lse2[r] = exists[r] ? params.lse[at] * LOG2E : PLUS_INFINITY;
        dlse[r] = exists[r] && params.dlse ? params.dlse[at] : 0.0f;
    }
    barrier_wait(full, phase);
    outputs.sum(gradients, delta);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        delta[r] = exists[r] ? delta[r] - dlse[r] : 0.0f;
        if (threadIdx.x % 4 == 0 && m_block.rows_left > 0) {
            stats[lane_row() + 8 * r] = lse2[r];
            stats[lane_row() + 8 * r + ROWS] = delta[r];
        }
    }
}

// P of a thread's two rows, from S.
DEVICE void exponentiate(float (&scores)[32], const float (&lse2)[2], float scale) {
#pragma unroll
    for (int i = 0; i < 32; i++) scores[i] = exp2_fast(scores[i] * scale - lse2[i / 2 % 2]);
}

// dS, in pairs.
DEVICE void differentiate(unsigned (&ds)[16], const float (&probs)[32], const float (&dprobs)[32],
                          const float (&delta)[2]) {
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const float own = delta[i / 2 % 2];
        ds[i / 2] = pack(probs[i] * (dprobs[i] - own), probs[i + 1] * (dprobs[i + 1] - own));
    }
}

// Skips stages of both pipelines, side by side: others may need the keys of one to get to its values.
DEVICE void skip_stages(int count, Position<STAGES>& ring, unsigned keys_full, unsigned keys_empty,
                        unsigned values_full, unsigned values_empty) {
#pragma unroll 1
    for (; count > 0; count--) {
        Position<STAGES> values = ring;
        skip_stages(1, values, values_full, values_empty);
        skip_stages(1, ring, keys_full, keys_empty);
    }
}

DEVICE void consume(Shared& shared, const Params& params, int consumer) {
    const bool is_first_lane = threadIdx.x % WARP == 0;
    const unsigned keys_full = shared_address(shared.keys_full), keys_empty = shared_address(shared.keys_empty);
    const unsigned values_full = shared_address(shared.values_full), values_empty = shared_address(shared.values_empty);
    const unsigned key_base = shared_address(shared.keys), value_base = shared_address(shared.values);
    const float scale = params.scale_log2;
    Visits next = {shared, consumer};
    Position<STAGES> ring;      // of the next key tile: its keys and values stand at the same place
    Position<ROW_SLOTS> place;  // of the rows
    const int heads = params.problem.kv_heads * params.problem.group;
    while (next.open()) {
        const int slot = consumer * ROW_SLOTS + place.index;
        const unsigned row_base = shared_address(shared.rows[slot][0]);
        const unsigned gradient_base = shared_address(shared.rows[slot][1]);
        const unsigned rows_full = shared_address(&shared.rows_full[slot]);
        const unsigned rows_done = shared_address(&shared.rows_done[slot]);
        const Tile& tile = next.tile();
        const int token = tile.begin + next.row, head = tile.head[consumer];
        const int head_of_batch = tile.batch * heads + head;
        const MBlock m_block = {(static_cast<long long>(tile.batch) * params.problem.length + token) * heads + head,
                         static_cast<long long>(head_of_batch) * params.problem.length + token, tile.length - next.row};
        const int set = divide(head_of_batch, ROWS / TOKENS);
        const long long index = static_cast<long long>(set) * params.m_blocks + tile.first_m_block + next.row / TOKENS;
        float lse2[2], delta[2];
        float* stats = params.stats + index * (2 * ROWS);
        statistics(m_block, params, stats, gradient_base, rows_full, place.phase, lse2, delta);
        const unsigned rows = operand<COLUMNS>(row_base), gradients = operand<COLUMNS>(gradient_base);
        float dq[D / 2], scores[32], dprobs[32];
        unsigned ds[16];
        int stage = -1;  // of the keys whose dS is there, -1: none
        bool add = false;
        bool exists = true;
        // partial n_blocks, one after the other
#pragma unroll 1
        while (next.is_partial) {
            if (stage >= 0) {
                wgmma_fence();
                accumulate(dq, ds, operand<ROWS_INNER>(key_base + stage * BOX_BYTES), add);
                wgmma_wait<0>();
                pin(dq);
                add = true;
                if (is_first_lane) barrier_arrive(keys_empty + 8 * stage);
            }
            skip_stages(next.skip, ring, keys_full, keys_empty, values_full, values_empty);
            barrier_wait(keys_full + 8 * ring.index, ring.phase);
            barrier_wait(values_full + 8 * ring.index, ring.phase);
            wgmma_fence();
            score(scores, rows, operand<COLUMNS>(key_base + ring.index * BOX_BYTES));
            score(dprobs, gradients, operand<COLUMNS>(value_base + ring.index * BOX_BYTES));
            wgmma_wait<1>();
            pin(scores);
            exponentiate(scores, lse2, scale);
            mask(scores, next, lane_row(), lane_column(), 0.0f);
            wgmma_wait<0>();
            pin(dprobs);
            if (is_first_lane) {
                barrier_arrive(values_empty + 8 * ring.index);
                if (next.seen == 0 && next.num_full <= 0) barrier_arrive(rows_done);
            }
            differentiate(ds, scores, dprobs, delta);
            stage = ring.index;
            ring.advance();
            exists = next.advance();
            if (!next.is_partial) {  // the list of partial n_blocks is not read any more
                __syncwarp();
                if (is_first_lane) barrier_arrive(shared_address(&shared.tile_empty[next.slot.index]));
            }
        }
        if (exists) {
            // past partial n_blocks of other consumers; the keys of the last own one are kept
            static_assert(CONSUMERS - 1 <= STAGES - 2, "too few stages");
            skip_stages(next.skip, ring, keys_full, keys_empty, values_full, values_empty);
            next.skip = 0;
            // counts and positions as uniform values, which the compiler keeps in uniform registers, descriptors too
            const int count = __shfl_sync(ALL, next.num_full, 0);
            ring = uniform(ring);
            stage = __shfl_sync(ALL, stage, 0);
#pragma unroll 1
            for (int n = 0; n <= count; n++) {
                barrier_wait(keys_full + 8 * ring.index, ring.phase);
                wgmma_fence();
                accumulate(dq, ds, operand<ROWS_INNER>(key_base + stage * BOX_BYTES), add);
                score(scores, rows, operand<COLUMNS>(key_base + ring.index * BOX_BYTES));
                wgmma_wait<0>();
                pin(dq);
                pin(scores);
                if (is_first_lane) barrier_arrive(keys_empty + 8 * stage);
                barrier_wait(values_full + 8 * ring.index, ring.phase);
                wgmma_fence();
                score(dprobs, gradients, operand<COLUMNS>(value_base + ring.index * BOX_BYTES));
                exponentiate(scores, lse2, scale);
                wgmma_wait<0>();
                pin(dprobs);
                if (is_first_lane) {
                    barrier_arrive(values_empty + 8 * ring.index);
                    if (n == count) barrier_arrive(rows_done);
                }
                differentiate(ds, scores, dprobs, delta);
                add = true;
                stage = ring.index;
                ring.advance();
            }
        }
        wgmma_fence();
        accumulate(dq, ds, operand<ROWS_INNER>(key_base + stage * BOX_BYTES), add);
        wgmma_wait<0>();
        pin(dq);
        if (is_first_lane) barrier_arrive(keys_empty + 8 * stage);
        const float factor[2] = {params.scale, params.scale};
        store_rows(dq, factor, params.dq, m_block.row, m_block.rows_left, 0, params.problem);
        // partial n_blocks at the end that others see
        skip_stages(next.skip, ring, keys_full, keys_empty, values_full, values_empty);
        next.skip = 0;
        next.slot.advance();
        place.advance();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_q(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        init_barriers(shared);
        prefetch_maps(params.q, params.dout, params.k, params.v);
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(ALL, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        lower_registers<PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(ALL, threadIdx.x / WARP, 0);
        if (warp == 0)
            load_tiles<PACKED>(shared, &params.k, shared_address(shared.keys), shared_address(shared.keys_full),
                               shared_address(shared.keys_empty), shared_address(&shared.keys_cut));
        if (warp == 1)
            load_tiles<PACKED>(shared, &params.v, shared_address(shared.values), shared_address(shared.values_full),
                               shared_address(shared.values_empty), shared_address(&shared.values_cut));
        if (warp == 2) plan_tiles(shared, params.problem);
        if (warp == 3) move_rows<false>(shared, params.problem, &params.q, &params.dout, nullptr);
    } else {
        raise_registers<CONSUMER_REGISTERS>();
        consume(shared, params, warpgroup - 1);
    }
}
