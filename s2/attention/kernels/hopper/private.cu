// Before the backward in one pass (`backward.cu`), where local windows are of one block of 64: what
// `attention_statistics` does (`passes.cu`), and all work on the chunks of keys that only the queries of their own place
// see. One pair of tiles a query head has all there is to their dK and dV, and begins the sums of dQ, which would else
// be cleared.
//
// A thread block takes a box of 64 rows of a KV head's query heads, one after the other, and loads the next one's rows
// meanwhile. There are as many thread blocks on a processor as fit: they wait for memory, not for one another.
//
// Constants: those of `passes.cuh` but THREADS, and of `chunks.cuh` but PRIVATE; GROUPED: several query heads to a KV
// head.

#define THREADS 128
#include "passes.cuh"
#include "products.cuh"

constexpr int SLOTS = GROUPED ? 2 : 1;  // of queries and dO
static_assert(BLOCK == ROWS, "a chunk is a block, and is seen from one box of rows");

struct Shared {
    unsigned char keys[BOX_BYTES], values[BOX_BYTES];
    unsigned char queries[SLOTS][BOX_BYTES], gradients[SLOTS][BOX_BYTES];
    unsigned char dscores[PANEL_BYTES];
    float lse[ROWS], delta[ROWS];
};

// Begins to load the rows of a box, zeros past the document's end. `strides` of batches, tokens, heads.
DEVICE void load_rows(unsigned to, const void* tensor, const long long* strides, int head, const Box& box) {
    const int lane = threadIdx.x % LANES;
    const long long first = box.batch * strides[0] + box.token * strides[1] + head * strides[2] + lane * 8;
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const int row = i * AT_ONCE + threadIdx.x / LANES;
        const bool exists = row < box.rows_left;
        const auto* from = static_cast<const unsigned short*>(tensor) + first + (exists ? row : 0) * strides[1];
        copy_columns(columns_at(to, lane, row), from, exists ? 16 : 0);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, GROUPED ? 2 : 3)
    attention_private(const __grid_constant__ Params params) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int group = GROUPED ? divide(params.heads, params.kv_heads) : 1, lane = threadIdx.x % LANES;
    const unsigned keys = shared_address(shared.keys), values = shared_address(shared.values);
    const long long dout_strides[] = {static_cast<long long>(params.length) * params.heads * D,
                                      static_cast<long long>(params.heads) * D, D};
    for_boxes(params, group, [&](const Box& first) {
        const int kv_head = divide(first.head, group);
        const Rule rule = load_rule(params.table + kv_head * TABLE);
        const bool is_private = reach_of(divide(first.row, BLOCK), rule) == 1;
        const auto of_head = [&](int g) {
            Box box = first;
            box.head += g;
            box.index += static_cast<long long>(g) * params.chunks;
            return box;
        };
        const auto load_head = [&](int g) {
            const Box box = of_head(g);
            load_rows(shared_address(shared.gradients[g % SLOTS]), params.dout, dout_strides, box.head, box);
            if (is_private)
                load_rows(shared_address(shared.queries[g % SLOTS]), params.q, params.q_strides, box.head, box);
        };
        float dk[D / 2], dv[D / 2];
        __syncthreads();  // the box before has been read
        if (is_private) {
            load_rows(keys, params.k, params.k_strides, kv_head, first);
            load_rows(values, params.v, params.v_strides, kv_head, first);
        }
        load_head(0);
        copy_commit();
#pragma unroll 1
        for (int g = 0; g < group; g++) {
            const Box box = of_head(g);
            const unsigned queries = shared_address(shared.queries[g % SLOTS]);
            const unsigned gradients = shared_address(shared.gradients[g % SLOTS]);
            if (g > 0) __syncthreads();  // the head before has been worked on
            uint4 o[PASSES];
#pragma unroll
            for (int i = 0; i < PASSES; i++) {
                const int row = i * AT_ONCE + threadIdx.x / LANES;
                o[i] = {};
                if (row < box.rows_left)
                    o[i] = static_cast<const uint4*>(params.out)[row_at(box, row, params) / 8 + lane];
            }
            if (GROUPED && g + 1 < group) load_head(g + 1);
            copy_commit();
            copy_wait<1>();  // for all but the next head's
            __syncthreads();
#pragma unroll
            for (int i = 0; i < PASSES; i++) {
                const int row = i * AT_ONCE + threadIdx.x / LANES;
                const float sum = delta_of(o[i], load_shared(columns_at(gradients, lane, row)));
                if (lane == 0) {
                    const float2 own = statistics_of(box, row, sum, params);
                    float* stats = params.stats + box.index * (2 * ROWS) + row;
                    stats[0] = shared.lse[row] = own.x;
                    stats[ROWS] = shared.delta[row] = own.y;
                }
            }
            if (!is_private) {
                clear_sums(box, params);
                continue;
            }
            fence_async_shared();
            __syncthreads();
            float scores[32], dprobs[32];
            unsigned probs[16], left[16];
            wgmma_fence();
            score(scores, operand<COLUMNS>(keys), operand<COLUMNS>(queries));
            score(dprobs, operand<COLUMNS>(values), operand<COLUMNS>(gradients));
            wgmma_wait<1>();
            pin(scores);
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (i / 4 * 8 + i % 2 < lane_key() + i / 2 % 2 * 8 - lane_column()) scores[i] = MINUS_INFINITY;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 lse = load_shared_pair(shared_address(shared.lse + lane_column()) + 32 * j);
#pragma unroll
                for (int i = 4 * j; i < 4 * j + 4; i++)
                    scores[i] = exp2_fast(scores[i] * params.scale_log2 - (i % 2 ? lse.y : lse.x));
                probs[2 * j] = pack(scores[4 * j], scores[4 * j + 1]);
                probs[2 * j + 1] = pack(scores[4 * j + 2], scores[4 * j + 3]);
            }
            wgmma_wait<0>();
            pin(dprobs);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 delta = load_shared_pair(shared_address(shared.delta + lane_column()) + 32 * j);
#pragma unroll
                for (int i = 4 * j; i < 4 * j + 4; i++) scores[i] *= dprobs[i] - (i % 2 ? delta.y : delta.x);
                left[2 * j] = pack(scores[4 * j], scores[4 * j + 1]);
                left[2 * j + 1] = pack(scores[4 * j + 2], scores[4 * j + 3]);
            }
            stage_scores(left, shared_address(shared.dscores));
            fence_async_shared();
            wgmma_fence();
            accumulate(dv, probs, operand<ROWS_INNER>(gradients), g > 0);
            const auto row_of = [&](int own) -> long long {
                const long long token = static_cast<long long>(box.batch) * params.length + box.token + own;
                return own < box.rows_left ? token * params.kv_heads + kv_head : -1;
            };
            wgmma_wait<0>();
            pin(dv);
            if (g == group - 1) store_rows(dv, 1.0f, params.dv, row_of);
            __syncthreads();  // dS is there
            wgmma_fence();
            accumulate(dk, left, operand<ROWS_INNER>(queries), g > 0);
            wgmma_wait<0>();
            pin(dk);
            if (g == group - 1) store_rows(dk, params.scale, params.dk, row_of);
            float* sums = params.sums + box.index * (ROWS * D) + threadIdx.x / WARP * (16 * COLUMNS_EACH);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                constexpr int panel = COLUMNS_EACH / PANEL * PANEL_BYTES, within = COLUMNS_EACH % PANEL * 2;
                float dq[COLUMNS_EACH / 2];
                wgmma_fence();
                accumulate_rows(dq, operand<ROWS_INNER>(shared_address(shared.dscores)),
                                operand<ROWS_INNER>(keys + half * (panel + within)), false);
                wgmma_commit();
                wgmma_wait<0>();
                pin(dq);
                float4* to = reinterpret_cast<float4*>(sums + half * (ROWS * COLUMNS_EACH)) + threadIdx.x % WARP;
#pragma unroll
                for (int j = 0; j < COLUMNS_EACH / 8; j++)
                    to[j * WARP] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
            }
        }
    });
}
