// The passes over query rows around the backward (`backward.cu`), a box of 64 rows a thread block.
//
// `attention_statistics`, before it:  lse2 = lse / ln 2    delta = rowsum(dO * O) - dlse    and clears the sums of dQ.
// `attention_round`, after it:        dQ = scale * sums
//
// Constants: those of `passes.cuh` but THREADS.

#define THREADS 256
#include "passes.cuh"

constexpr int COLUMNS_EACH = D / 2;  // of a half of the sums, see `stage_sums` of backward.cu

extern "C" __global__ void __launch_bounds__(THREADS) attention_statistics(const __grid_constant__ Params params) {
    for_boxes(params, ROWS / TOKENS, [&](const Box& box) {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const int row = i * AT_ONCE + threadIdx.x / LANES;
            uint4 o = {}, d = {};
            if (row % TOKENS < box.rows_left) {
                const long long at = row_at(box, row, params) / 8 + lane;
                o = static_cast<const uint4*>(params.out)[at];
                d = static_cast<const uint4*>(params.dout)[at];
            }
            const float sum = delta_of(o, d);
            if (lane == 0) {
                const float2 own = statistics_of(box, row, sum, params);
                float* stats = params.stats + box.index * (2 * ROWS) + row;
                stats[0] = own.x;
                stats[ROWS] = own.y;
            }
        }
        clear_sums(box, params);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_round(const __grid_constant__ Params params) {
    __shared__ __align__(1024) unsigned char rows[ROWS * D * 2];
    const auto at = [&](int chunk, int row) { return columns_at(shared_address(rows), chunk, row); };
    for_boxes(params, ROWS / TOKENS, [&](const Box& box) {
        // as the backward's threads hold them
        const int lane = threadIdx.x % WARP, half = threadIdx.x / WARPGROUP;
        const int matrix_row = threadIdx.x % WARPGROUP / WARP * 16 + lane % 16;
        const float4* sums = reinterpret_cast<const float4*>(params.sums + box.index * (ROWS * D)) +
                             threadIdx.x / WARP * (16 * COLUMNS_EACH / 4) + lane;
#pragma unroll
        for (int j = 0; j < COLUMNS_EACH / 8; j += 2) {
            const float4 x = sums[j * WARP], y = sums[(j + 1) * WARP];
            const int chunk = half * (COLUMNS_EACH / 8) + j + lane / 16;  // of eight columns
            store_matrices(at(chunk, matrix_row), pack(x.x * params.scale, x.y * params.scale),
                           pack(x.z * params.scale, x.w * params.scale), pack(y.x * params.scale, y.y * params.scale),
                           pack(y.z * params.scale, y.w * params.scale));
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS / AT_ONCE; i++) {
            const int row = i * AT_ONCE + threadIdx.x / LANES, chunk = threadIdx.x % LANES;
            if (row % TOKENS < box.rows_left)
                static_cast<uint4*>(params.dq)[row_at(box, row, params) / 8 + chunk] = load_shared(at(chunk, row));
        }
        if (PACKED) __syncthreads();
    });
}
