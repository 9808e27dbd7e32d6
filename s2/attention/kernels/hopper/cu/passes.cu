// The passes over query rows around the backward (`backward.cu`), a box of 64 rows a thread block.
//
// `attention_statistics`, before it:  lse2 = lse / ln 2    delta = rowsum(dO * O) - dlse    and clears the sums of dQ.
// `attention_round`, after it:        dQ = scale * sums
//
// The 64 rows of a box are those of one head, or those of a block of several heads; packed documents begin boxes of
// their own. Thread blocks: box by box, or of packed documents tile by tile of BOXES boxes, one set of heads after the
// other.
//
// Constants: those of `plan.cuh`, D, PACKED, BOXES (1 if not packed), BF16 (else fp16).

#define CONSUMERS BOXES
#include "hopper.cuh"
#include "plan.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr int THREADS = 256;
constexpr int LANES = D / 8;              // of a row, eight columns each
constexpr int AT_ONCE = THREADS / LANES;  // rows
constexpr int COLUMNS_EACH = D / 2;       // of a half of the sums, see `stage_sums` of backward.cu

using Params = PassParams;

// A box of rows.
struct Box {
    int rows_left;            // tokens to the document's end
    int batch, head, token;   // its first ones
    long long index;          // over B, sets of heads, boxes
};

template <class Work>
DEVICE void for_boxes(const Params& params, const Work& work) {
    const int set = divide(blockIdx.x, params.blocks), nth = blockIdx.x - set * params.blocks;
    const int sets = params.heads / (ROWS / TOKENS), batch = divide(set, sets);
    const int head = (set - batch * sets) * (ROWS / TOKENS);
    const long long first = static_cast<long long>(set) * params.chunks;
    if (!PACKED) {
        work(Box{params.length - nth * TOKENS, batch, head, nth * TOKENS, first + nth});
        return;
    }
    if (nth >= params.documents[0]) return;
    const int* entry = params.documents + 4 + 4 * nth;
    for (int box = 0; box < BOXES; box++) {
        const int row = (entry[0] + box) * TOKENS;
        if (row < entry[2]) work(Box{entry[2] - row, batch, head, entry[1] + row, first + entry[3] + entry[0] + box});
    }
}

// Where a row's columns begin in [B, S, H, D].
DEVICE long long row_at(const Box& box, int row, const Params& params) {
    const long long token = static_cast<long long>(box.batch) * params.length + box.token + row % TOKENS;
    return (token * params.heads + box.head + row / TOKENS) * D;
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_statistics(const __grid_constant__ Params params) {
    for_boxes(params, [&](const Box& box) {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int i = 0; i < ROWS / AT_ONCE; i++) {
            const int row = i * AT_ONCE + threadIdx.x / LANES;
            const bool exists = row % TOKENS < box.rows_left;
            float sum = 0.0f;
            if (exists) {
                const long long at = row_at(box, row, params) / 8 + lane;
                const uint4 o = static_cast<const uint4*>(params.out)[at];
                const uint4 d = static_cast<const uint4*>(params.dout)[at];
                sum = dot(o.x, d.x) + dot(o.y, d.y) + dot(o.z, d.z) + dot(o.w, d.w);
            }
#pragma unroll
            for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL, sum, distance);
            if (lane == 0) {  // rows past the end add nothing
                const long long head = static_cast<long long>(box.batch) * params.heads + box.head + row / TOKENS;
                const long long at = head * params.length + box.token + row % TOKENS;
                float* stats = params.stats + box.index * (2 * ROWS) + row;
                stats[0] = exists ? params.lse[at] * LOG2E : PLUS_INFINITY;
                stats[ROWS] = exists ? sum - (params.dlse ? params.dlse[at] : 0.0f) : 0.0f;
            }
        }
        float4* sums = reinterpret_cast<float4*>(params.sums + box.index * (ROWS * D));
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * D / 4; i += THREADS) sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_round(const __grid_constant__ Params params) {
    __shared__ __align__(1024) unsigned char rows[ROWS * D * 2];
    const auto at = [&](int chunk, int row) {  // eight columns
        const int swizzled = chunk % 8 ^ row % 8;
        return shared_address(rows) + chunk / 8 * PANEL_BYTES + row * (2 * PANEL) + swizzled * 16;
    };
    for_boxes(params, [&](const Box& box) {
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
