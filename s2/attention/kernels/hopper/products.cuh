// What a consumer of the backward does with its tiles: products of [64, 64] and [64, D] values in registers, and how
// these leave.
//
// Constants: those of `plan.cuh`, D.
#pragma once

#include "hopper.cuh"
#include "plan.cuh"

constexpr int BOX_BYTES = 64 * D * 2;
constexpr int COLUMNS_EACH = D / 2;  // of dQ, that are made together

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

// Columns of dQ (+)= dS^T of the rows of a chunk, left operand, times its keys.
DEVICE void accumulate_rows(float (&x)[COLUMNS_EACH / 2], unsigned dscores, unsigned keys, bool add) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
        constexpr int sixteen = 16 * 2 * PANEL / 16;
        product_transposed(x, descriptor(dscores + i * sixteen), descriptor(keys + i * sixteen), i > 0 || add);
    }
}

// Leaves dS^T `[64 keys, 64 queries]` in a panel of shared memory.
DEVICE void stage_scores(const unsigned (&x)[16], unsigned to) {
    const int lane = threadIdx.x % WARP, matrix_row = lane_key() / 16 * 16 + lane % 16, half = lane / 16;
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

// Stores rows `[64, D]` of a product. `row_of` says at which of `rows` one belongs, negative: nowhere.
template <class RowOf>
DEVICE void store_rows(const float (&x)[D / 2], float scale, void* rows, const RowOf& row_of) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const long long row = row_of(lane_key() + 8 * r);
        uint4* to = static_cast<uint4*>(rows) + row * (D / 8) + threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < D / 8; j += 4) {
            unsigned words[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                words[i] = pack(x[4 * (j + i) + 2 * r] * scale, x[4 * (j + i) + 2 * r + 1] * scale);
            transpose(words);
            if (row >= 0) to[j] = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}
