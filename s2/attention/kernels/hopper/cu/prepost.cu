// The kernels before and after the backward (`backward.cu`), an m_block of 64 query rows a thread block.
//
// `attention_preprocess`:   lse2 = lse / ln 2    delta = rowsum(dO * O) - dlse    dq_accum = 0
// `attention_postprocess`:  dQ = scale * dq_accum
//
// The 64 rows of an m_block are those of one head, or those of a block of several heads; a packed document begins an
// m_block. Thread blocks: an m_block each, or of packed documents a tile of M_BLOCKS, one set of heads after the other.
//
// Constants: those of `plan.cuh`, D, PACKED, M_BLOCKS (1 if not packed), BF16 (else fp16).

#define CONSUMERS M_BLOCKS
#include "hopper.cuh"
#include "plan.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr int THREADS = 256;
constexpr int LANES = D / 8;              // of a row, eight columns each
constexpr int AT_ONCE = THREADS / LANES;  // rows
constexpr int COLUMNS_EACH = D / 2;       // of a half of dq_accum, see `stage_dq` of backward.cu

using Params = PrePostParams;

struct MBlock {
    int rows_left;            // tokens to the document's end
    int batch, head, token;   // its first ones
    long long index;          // over B, sets of heads, m_blocks
};

template <class Work>
DEVICE void for_m_blocks(const Params& params, const Work& work) {
    const int set = divide(blockIdx.x, params.blocks), nth = blockIdx.x - set * params.blocks;
    const int sets = params.heads / (ROWS / TOKENS), batch = divide(set, sets);
    const int head = (set - batch * sets) * (ROWS / TOKENS);
    const long long first = static_cast<long long>(set) * params.m_blocks;
    if (!PACKED) {
        work(MBlock{params.length - nth * TOKENS, batch, head, nth * TOKENS, first + nth});
        return;
    }
    if (nth >= params.documents[0]) return;
    const int* entry = params.documents + 4 + 4 * nth;
    for (int i = 0; i < M_BLOCKS; i++) {
        const int row = (entry[0] + i) * TOKENS;
        if (row < entry[2]) work(MBlock{entry[2] - row, batch, head, entry[1] + row, first + entry[3] + entry[0] + i});
    }
}

// Where a row's columns begin in [B, S, H, D].
DEVICE long long row_at(const MBlock& m_block, int row, const Params& params) {
    const long long token = static_cast<long long>(m_block.batch) * params.length + m_block.token + row % TOKENS;
    return (token * params.heads + m_block.head + row / TOKENS) * D;
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_preprocess(const __grid_constant__ Params params) {
    for_m_blocks(params, [&](const MBlock& m_block) {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int i = 0; i < ROWS / AT_ONCE; i++) {
            const int row = i * AT_ONCE + threadIdx.x / LANES;
            const bool exists = row % TOKENS < m_block.rows_left;
            float sum = 0.0f;
            if (exists) {
                const long long at = row_at(m_block, row, params) / 8 + lane;
                const uint4 o = static_cast<const uint4*>(params.out)[at];
                const uint4 d = static_cast<const uint4*>(params.dout)[at];
                sum = dot(o.x, d.x) + dot(o.y, d.y) + dot(o.z, d.z) + dot(o.w, d.w);
            }
#pragma unroll
            for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL, sum, distance);
            if (lane == 0) {  // rows past the end add nothing
                const long long first_head = static_cast<long long>(m_block.batch) * params.heads + m_block.head;
                const long long at = (first_head + row / TOKENS) * params.length + m_block.token + row % TOKENS;
                float* stats = params.stats + m_block.index * (2 * ROWS) + row;
                stats[0] = exists ? params.lse[at] * LOG2E : PLUS_INFINITY;
                stats[ROWS] = exists ? sum - (params.dlse ? params.dlse[at] : 0.0f) : 0.0f;
            }
        }
        float4* accum = reinterpret_cast<float4*>(params.dq_accum + m_block.index * (ROWS * D));
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * D / 4; i += THREADS) accum[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_postprocess(const __grid_constant__ Params params) {
    __shared__ __align__(1024) unsigned char rows[ROWS * D * 2];
    const auto at = [&](int chunk, int row) {  // eight columns
        const int swizzled = chunk % 8 ^ row % 8;
        return shared_address(rows) + chunk / 8 * PANEL_BYTES + row * (2 * PANEL) + swizzled * 16;
    };
    for_m_blocks(params, [&](const MBlock& m_block) {
        // as the backward's threads hold them
        const int lane = threadIdx.x % WARP, half = threadIdx.x / WARPGROUP;
        const int matrix_row = threadIdx.x % WARPGROUP / WARP * 16 + lane % 16;
        const float4* accum = reinterpret_cast<const float4*>(params.dq_accum + m_block.index * (ROWS * D)) +
                             threadIdx.x / WARP * (16 * COLUMNS_EACH / 4) + lane;
#pragma unroll
        for (int j = 0; j < COLUMNS_EACH / 8; j += 2) {
            const float4 x = accum[j * WARP], y = accum[(j + 1) * WARP];
            const int chunk = half * (COLUMNS_EACH / 8) + j + lane / 16;  // of eight columns
            store_matrices(at(chunk, matrix_row), pack(x.x * params.scale, x.y * params.scale),
                           pack(x.z * params.scale, x.w * params.scale), pack(y.x * params.scale, y.y * params.scale),
                           pack(y.z * params.scale, y.w * params.scale));
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ROWS / AT_ONCE; i++) {
            const int row = i * AT_ONCE + threadIdx.x / LANES, chunk = threadIdx.x % LANES;
            if (row % TOKENS < m_block.rows_left)
                static_cast<uint4*>(params.dq)[row_at(m_block, row, params) / 8 + chunk] = load_shared(at(chunk, row));
        }
        if (PACKED) __syncthreads();
    });
}
