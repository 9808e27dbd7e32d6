// Forward kernel for Hopper (sm_90a): warp-specialised, persistent, fed by TMA.
//
// One thread block holds a warpgroup whose warps plan, load and store (`rows.cuh`) and three consumer warpgroups (four
// with head dimension 64) of 64 query rows each. The consumers run the same code, so that they share the instruction
// cache: short rows would wait for instructions otherwise. For the same reason a consumer's work is one loop over all
// key tiles of all its rows: a step adds the probabilities of a key tile to the output beside the product that scores
// the next one, which may be the first of the next rows, and then turns those scores into probabilities.
//
// A maximum is replaced only by one that is more than `LAZY` larger (base 2): probabilities stay below 2^LAZY, which
// float32 sums and 16-bit factors hold. Most steps keep all maxima, need no shuffle and no rescaling.
//
// A consumer keeps the values of a key tile until the scores of the next one that it sees are on their way, so it must
// not have to walk far through the pipeline of keys in between: `support.is_deadlock_free`.
//
// Constants: those of `rows.cuh`, BF16 (else fp16), CONSUMER_REGISTERS, PRODUCER_REGISTERS.

#include "rows.cuh"

constexpr float LAZY = 8.0f, MOST = 256.0f;  // MOST = 2^LAZY
constexpr float LN2 = 0.6931471805599453f;

using Params = ForwardParams;

// Turns scores into probabilities, with new maxima and sums of the thread's two rows (sums of its own columns alone).
// Maxima are looked for only if these are the rows' first scores, or if the sums show that one has grown by much; then
// what was added up before is scaled. Every row must see one of its first keys, or it is NaN.
DEVICE void softmax(float (&scores)[32], unsigned (&probs)[16], float (&top)[2], float (&sum)[2], float (&acc)[D / 2],
                    float scale, bool first) {
    float part[2];
    bool raise = first;
#pragma unroll 1
    while (true) {
        if (raise) {
            float most[4] = {scores[0], scores[1], scores[2], scores[3]};
#pragma unroll
            for (int i = 4; i < 32; i++) most[i % 4] = fmaxf(most[i % 4], scores[i]);
            float factor[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float own = fmaxf(most[2 * r], most[2 * r + 1]);
                own = fmaxf(own, __shfl_xor_sync(ALL, own, 1));
                own = fmaxf(own, __shfl_xor_sync(ALL, own, 2));
                const float next = own * scale > top[r] + LAZY ? own * scale : top[r];
                factor[r] = exp2_fast(top[r] - next);
                top[r] = next;
                sum[r] *= factor[r];
            }
            if (!first) {
#pragma unroll
                for (int i = 0; i < D / 2; i++) acc[i] *= factor[i / 2 % 2];
            }
        }
        part[0] = part[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i += 2) {
            const int r = i / 2 % 2;
            const float low = exp2_fast(scores[i] * scale - top[r]);
            const float high = exp2_fast(scores[i + 1] * scale - top[r]);
            part[r] += low;
            part[r] += high;
            probs[i / 2] = pack(low, high);
        }
        if (raise || !__any_sync(ALL, !(fmaxf(part[0], part[1]) <= MOST))) break;
        raise = true;
    }
    sum[0] += part[0];
    sum[1] += part[1];
}

// Adds probabilities times values to the output, and scores keys.
DEVICE void products(float (&acc)[D / 2], const unsigned (&probs)[16], unsigned values, bool add, float (&scores)[32],
                     unsigned rows, unsigned keys) {
    wgmma_fence();
    score<false>(scores, rows, keys);
    accumulate(acc, probs, values, add);
}

// Rows that are worked on: where they are in shared memory, where their statistics begin, tokens to the document's end,
// rows before the first query.
struct Held {
    int place;
    unsigned statistics;
    int rows_left, rows_before;
};

// Normalises the output of a warp's 16 rows and leaves it in the shared memory of the rows; stores the log-sum-exp.
DEVICE void finish(float (&acc)[D / 2], const float (&top)[2], float (&sum)[2], unsigned rows, unsigned done,
                   const Held& held, const Params& params, int lane_row) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(ALL, sum[r], 1);
        sum[r] += __shfl_xor_sync(ALL, sum[r], 2);
    }
    const float factor[2] = {inverse(sum[0]), inverse(sum[1])};
    const int tokens = params.problem.length;
    if (stores_box<PACKED, LATE>(0, held.rows_before, held.rows_left)) {
        const int matrix_row = lane_row / 16 * 16 + lane % 16, half = lane / 16;
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
            const float* x = acc + 4 * j;
            const unsigned chunk = (j % 8 + half) ^ (lane % 8);
            store_matrices(rows + j / 8 * PANEL_BYTES + matrix_row * (2 * PANEL) + chunk * 16,
                           pack(x[0] * factor[0], x[1] * factor[0]), pack(x[2] * factor[1], x[3] * factor[1]),
                           pack(x[4] * factor[0], x[5] * factor[0]), pack(x[6] * factor[1], x[7] * factor[1]));
        }
        fence_async_shared();
    } else {  // queries, or a packed document's, begin or end among these rows
        const int before = LATE ? maximum(held.rows_before, 0) : 0;
        const unsigned first = held.statistics + before;  // of the first query
        const int head = first / tokens, token = static_cast<int>(first % tokens) - before;  // head: of the batch
        const int heads = params.problem.kv_heads * params.problem.group, batch = PACKED ? 0 : divide(head, heads);
        const long long place = (static_cast<long long>(batch) * tokens + token) * heads + head - batch * heads;
        store_rows(acc, factor, params.out_rows, place, held.rows_left, held.rows_before, params.problem);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(done);
    if (lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int own = lane_row + 8 * r;
            if (own % TOKENS < held.rows_left && (!LATE || own % TOKENS >= held.rows_before))
                params.lse[held.statistics + own / TOKENS * tokens + own % TOKENS] = (top[r] + log2_fast(sum[r])) * LN2;
        }
    }
}

DEVICE void consume(Shared& shared, const Params& params, int consumer) {
    const int lane = threadIdx.x % WARP;
    const int lane_row = threadIdx.x / WARP % 4 * 16 + lane / 4, column = lane % 4 * 2;
    const unsigned keys_full = shared_address(shared.keys_full), keys_empty = shared_address(shared.keys_empty);
    const unsigned values_full = shared_address(shared.values_full), values_empty = shared_address(shared.values_empty);
    const unsigned key_base = shared_address(shared.keys), value_base = shared_address(shared.values);
    const float scale = params.scale_log2;
    Visits next = {shared, consumer};
    float acc[D / 2], scores[32];
    unsigned probs[16] = {};
    float top[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < D / 2; i++) acc[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) scores[i] = 0.0f;

    Position<STAGES> keys, values;  // the next key tile's keys, and the values of the one whose probabilities are there
    bool is_last = false;           // the latter is the last of its rows
    bool starts = true;             // or the first
    Held held = {};
    if (!next.open()) return;
    bool more = true, any = false;
    Position<ROW_SLOTS> place;  // of the rows of `next`
    while (true) {
        // at the beginning there are no probabilities yet (but zeros, and any values), at the end no keys to score (but
        // any)
        if (more) {
            skip_stages(next.skip, keys, keys_full, keys_empty);
            if (next.is_first)
                barrier_wait(shared_address(&shared.rows_full[consumer * ROW_SLOTS + place.index]), place.phase);
            barrier_wait(keys_full + 8 * keys.index, keys.phase);
        }
        barrier_wait(values_full + 8 * values.index, values.phase);
        const unsigned rows = operand<COLUMNS>(shared_address(shared.rows[consumer * ROW_SLOTS + place.index]));
        products(acc, probs, operand<ROWS_INNER>(value_base + values.index * BOX_BYTES), !starts, scores, rows,
                 operand<COLUMNS>(key_base + keys.index * BOX_BYTES));
        wgmma_wait<0>();
        pin(acc);
        pin(scores);
        if (more && lane == 0) barrier_arrive(keys_empty + 8 * keys.index);
        if (any) {
            if (lane == 0) barrier_arrive(values_empty + 8 * values.index);
            values.advance();
        }
        if (is_last) {
            finish(acc, top, sum, shared_address(shared.rows[held.place]),
                   shared_address(&shared.rows_done[held.place]), held, params, lane_row);
            if (!more) return;
            top[0] = top[1] = MINUS_INFINITY;
            sum[0] = sum[1] = 0.0f;
        }
        skip_stages(next.skip, values, values_full, values_empty);
        any = true;
        if (next.is_partial) mask(scores, next, lane_row, column, MINUS_INFINITY);
        starts = next.is_first;
        softmax(scores, probs, top, sum, acc, scale, starts);
        if (starts) {
            const Tile& tile = next.tile();
            held.place = consumer * ROW_SLOTS + place.index;
            held.statistics = (tile.batch * params.problem.kv_heads * params.problem.group + tile.head[consumer]) *
                                  params.problem.length + first_row(tile) + next.row;
            held.rows_left = tile.length - next.row;
            held.rows_before = keys_before(tile) - next.row;
        }
        keys.advance();

        // what comes after it
        const bool was_partial = next.is_partial;
        is_last = !next.advance();
        if (was_partial && !next.is_partial) {  // the list of partial n_blocks is not read any more
            __syncwarp();
            if (lane == 0) barrier_arrive(shared_address(&shared.tile_empty[next.slot.index]));
        }
        if (!is_last && !next.is_partial) {
            // counts and positions as uniform values, which the compiler keeps in uniform registers, descriptors too
            const int skip = next.skip, count = __shfl_sync(ALL, next.num_full, 0);
            skip_stages(skip, keys, keys_full, keys_empty);
            keys = uniform(keys);
            values = uniform(values);
            bool add = !starts;
#pragma unroll 1
            for (int n = 0; n <= count; n++) {
                barrier_wait(keys_full + 8 * keys.index, keys.phase);
                barrier_wait(values_full + 8 * values.index, values.phase);
                products(acc, probs, operand<ROWS_INNER>(value_base + values.index * BOX_BYTES), add, scores, rows,
                         operand<COLUMNS>(key_base + keys.index * BOX_BYTES));
                wgmma_wait<0>();
                pin(acc);
                pin(scores);
                if (lane == 0) barrier_arrive(keys_empty + 8 * keys.index);
                if (lane == 0) barrier_arrive(values_empty + 8 * values.index);
                softmax(scores, probs, top, sum, acc, scale, false);
                add = true;
                keys.advance();
                values.advance();
                if (n == 0 && skip > 0) {
                    skip_stages(skip, values, values_full, values_empty);
                    values = uniform(values);
                }
            }
            starts = false;
            next.num_full = 0;
            is_last = !next.advance();
        }
        if (is_last) {
            next.slot.advance();
            place.advance();
            more = next.open();
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        init_barriers(shared);
        prefetch_maps(params.q, params.k, params.v, params.out);
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(ALL, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        lower_registers<PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(ALL, threadIdx.x / WARP, 0);
        if (warp == 0)
            load_tiles<false>(shared, &params.k, shared_address(shared.keys), shared_address(shared.keys_full),
                              shared_address(shared.keys_empty), 0);
        if (warp == 1)
            load_tiles<PACKED>(shared, &params.v, shared_address(shared.values), shared_address(shared.values_full),
                               shared_address(shared.values_empty), shared_address(&shared.values_cut));
        if (warp == 2) plan_tiles(shared, params.problem);
        if (warp == 3) move_rows<true>(shared, params.problem, &params.q, nullptr, &params.out);
    } else {
        raise_registers<CONSUMER_REGISTERS>();
        consume(shared, params, warpgroup - 1);
    }
}
