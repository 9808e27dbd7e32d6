// What the passes over query rows around the backward have in common: parameters, boxes of 64 rows, their statistics.
//
// The 64 rows of a box are those of one head, or those of a block of several heads; packed documents begin boxes of
// their own. Thread blocks: box by box, or of packed documents tile by tile of BOXES boxes, one set of heads after the
// other.
//
// Constants: those of `plan.cuh`, THREADS, D, PACKED, BOXES (1 if not packed), BF16 (else fp16).
#pragma once

#define CONSUMERS BOXES
#include "hopper.cuh"
#include "plan.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr int LANES = D / 8;              // of a row, eight columns each
constexpr int AT_ONCE = THREADS / LANES;  // rows
constexpr int PASSES = ROWS / AT_ONCE;    // of all threads over a box

struct Params {
    const void *out, *dout;  // [B, S, H, D]
    const float* lse;        // [B, H, S]
    const float* dlse;       // [B, H, S], or null
    float* stats;            // lse2 and delta of the 64 rows of a box, over B, sets of heads, boxes
    float* sums;             // of dQ, [64, D] of a box, over the same
    void* dq;                // [B, S, H, D]
    const int* documents;    // packed: tiles of documents, see `chunks.attention_documents`
    float scale;
    int length, heads;
    int chunks;  // boxes of a set of heads, in `stats` and `sums`
    int blocks;  // thread blocks of a set of heads
    // for `private.cu` alone
    int kv_heads;
    float scale_log2;
    const int* table;                             // rules [kv_heads, TABLE]
    const void *q, *k, *v;                        // [B, S, heads, D]
    void *dk, *dv;                                // [B, S, kv_heads, D]
    long long q_strides[3], k_strides[3], v_strides[3];  // of batches, tokens, heads, in elements
};

// A box of rows.
struct Box {
    int row, rows_left;      // its first token in its document, and tokens from there to the document's end
    int batch, head, token;  // its first ones
    long long index;         // over B, sets of heads, boxes
};

// Calls `work(box)` with those of a thread block: of one head of every `heads_each`, which must be whole sets.
template <class Work>
DEVICE void for_boxes(const Params& params, int heads_each, const Work& work) {
    const int nth_set = divide(blockIdx.x, params.blocks), nth = blockIdx.x - nth_set * params.blocks;
    const int sets = divide(params.heads, heads_each), batch = divide(nth_set, sets);
    const int head = (nth_set - batch * sets) * heads_each;
    const long long first = static_cast<long long>(nth_set) * (heads_each / (ROWS / TOKENS)) * params.chunks;
    if (!PACKED) {
        const int row = nth * TOKENS;
        work(Box{row, params.length - row, batch, head, row, first + nth});
        return;
    }
    if (nth >= params.documents[0]) return;
    const int* entry = params.documents + 4 + 4 * nth;
    for (int box = 0; box < BOXES; box++) {
        const int row = (entry[0] + box) * TOKENS;
        if (row < entry[2])
            work(Box{row, entry[2] - row, batch, head, entry[1] + row, first + entry[3] + entry[0] + box});
    }
}

// Where a row's columns begin in [B, S, H, D].
DEVICE long long row_at(const Box& box, int row, const Params& params) {
    const long long token = static_cast<long long>(box.batch) * params.length + box.token + row % TOKENS;
    return (token * params.heads + box.head + row / TOKENS) * D;
}

// Where eight columns of a row are in panels of shared memory.
DEVICE unsigned columns_at(unsigned rows, int lane, int row) {
    return rows + lane / 8 * PANEL_BYTES + row * (2 * PANEL) + (lane % 8 ^ row % 8) * 16;
}

// Whatever eight columns of O and dO a thread has, of a row that LANES threads share: all of these get `delta`.
DEVICE float delta_of(const uint4& o, const uint4& d) {
    float sum = dot(o.x, d.x) + dot(o.y, d.y) + dot(o.z, d.z) + dot(o.w, d.w);
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL, sum, distance);
    return sum;
}

// lse2 and delta of a row of a box, of which `sum` is rowsum(dO * O). Rows past the end add nothing.
DEVICE float2 statistics_of(const Box& box, int row, float sum, const Params& params) {
    if (row % TOKENS >= box.rows_left) return make_float2(PLUS_INFINITY, 0.0f);
    const long long head = static_cast<long long>(box.batch) * params.heads + box.head + row / TOKENS;
    const long long at = head * params.length + box.token + row % TOKENS;
    return make_float2(params.lse[at] * LOG2E, sum - (params.dlse ? params.dlse[at] : 0.0f));
}

DEVICE void clear_sums(const Box& box, const Params& params) {
    float4* sums = reinterpret_cast<float4*>(params.sums + box.index * (ROWS * D));
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * D / 4; i += THREADS) sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}
