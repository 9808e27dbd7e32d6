// What the CUDA C++ kernels use of Hopper (sm_90a): barriers in shared memory, TMA, wgmma, registers of a warpgroup.
// Names and semantics are those of the PTX ISA. Needs no header of CUDA, so NVRTC compiles it alone.
#pragma once

#include "params.cuh"

#ifndef DEVICE
#define DEVICE __device__ __forceinline__
#endif

constexpr int WARP = 32, WARPGROUP = 128;
constexpr unsigned ALL = 0xffffffffu;
constexpr int PANEL = 64;                       // columns of 16 bits that a 128-byte swizzle spans
constexpr int PANEL_BYTES = 64 * 2 * PANEL;     // a panel of 64 rows

DEVICE unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// One lane of a warp, always the same.
DEVICE bool elected() {
    unsigned is_elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(is_elected));
    return is_elected != 0;
}

// ---------------------------------------------------------------- barriers

DEVICE void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A warp arrives by one lane, after a `__syncwarp` where the others have written or read. racecheck does not follow
// that; for it a build with EVERY_LANE has all lanes arrive (`sweep.py --every-lane`).
#ifdef EVERY_LANE
constexpr int ARRIVALS = WARP;  // of a warp
#else
constexpr int ARRIVALS = 1;
#endif

// Whether a lane arrives: the chosen one does.
DEVICE bool arrives(bool is_chosen) { return ARRIVALS == WARP || is_chosen; }

// Waits for the phase of that parity to complete.
DEVICE void barrier_wait(unsigned barrier, int parity) {
    asm volatile(
        "{ .reg .pred done; "
        "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
        "@!done bra AGAIN; }" ::"r"(barrier), "r"(parity) : "memory");
}

// Whether it has completed, the same for all lanes of a warp.
DEVICE bool barrier_test(unsigned barrier, int parity) {
    unsigned is_done;
    asm volatile(
        "{ .reg .pred done; "
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2; "
        "selp.u32 %0, 1, 0, done; }" : "=r"(is_done) : "r"(barrier), "r"(parity) : "memory");
    return __all_sync(ALL, is_done);
}

// The next of `count` pieces of work, for a warp of a thread block, or of the first one of a cluster. The `blocks` of
// them first take the piece of their own number, then draw from a counter until there is nothing left, once in vain.
// They draw as many times in all as there are pieces, and the last draw leaves the counter zero for the next launch.
DEVICE int draw(int* counter, int count, int blocks) {
    int drawn = 0;
    if (threadIdx.x % WARP == 0) {
        drawn = atomicAdd(counter, 1);
        if (drawn == count - 1) atomicExch(counter, 0);
    }
    return __shfl_sync(ALL, drawn, 0) + blocks;
}

DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// An index into a ring and the parity of its phase.
template <int SIZE>
struct Position {
    int index = 0, phase = 0;

    DEVICE void advance() {
        index++;
        if (index == SIZE) {
            index = 0;
            phase ^= 1;
        }
    }
};

// The same position, of which the compiler knows that it is the same in all lanes.
template <int SIZE>
DEVICE Position<SIZE> uniform(const Position<SIZE>& position) {
    return {__shfl_sync(ALL, position.index, 0), __shfl_sync(ALL, position.phase, 0)};
}

// ---------------------------------------------------------------- TMA, coordinates innermost first

DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

template <class... Maps>
DEVICE void prefetch_maps(const Maps&... maps) {
    (prefetch_map(&maps), ...);
}

DEVICE void tma_load(unsigned to, const TensorMap* map, unsigned barrier, int x, int token, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(token), "r"(head), "r"(batch) : "memory");
}

// Consecutive bytes, a multiple of 16.
DEVICE void copy_to_shared(unsigned to, const void* from, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Into the L2 cache.
DEVICE void tma_prefetch(const TensorMap* map, int x, int token, int head, int batch) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];"
                 ::"l"(map), "r"(x), "r"(token), "r"(head), "r"(batch) : "memory");
}

DEVICE void tma_store(const TensorMap* map, unsigned from, int x, int token, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(map), "r"(from), "r"(x), "r"(token), "r"(head), "r"(batch) : "memory");
}

// Adds consecutive float32 values, a multiple of 16 bytes, to those in memory, in no order with other additions.
DEVICE void bulk_add(float* to, unsigned from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                 ::"l"(to), "r"(from), "r"(bytes) : "memory");
}

DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Shared memory of all stores has been read.
DEVICE void tma_store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// ---------------------------------------------------------------- registers

template <int COUNT>
DEVICE void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
DEVICE void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---------------------------------------------------------------- wgmma

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of a product's registers before its wait.
template <int N>
DEVICE void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// Operands in panels of 64 rows x 128 bytes, swizzled by 128 bytes: the lower half of their descriptors, to which
// offsets in units of 16 bytes are added. Rows are the outer dimension of the product (groups of 8 rows are 1024 bytes
// apart) or the inner one (panels are `PANEL_BYTES` apart). Made uniform, so that it is kept in uniform registers.
enum Inner { COLUMNS = 1, ROWS_INNER = PANEL_BYTES >> 4 };

template <Inner INNER>
DEVICE unsigned operand_at(unsigned address) {  // which the compiler knows to be the same in all lanes
    return address >> 4 & 0x3fff | INNER << 16;
}

template <Inner INNER>
DEVICE unsigned operand(unsigned address) {
    return __shfl_sync(ALL, operand_at<INNER>(address), 0);
}

DEVICE unsigned long long descriptor(unsigned low) {
    constexpr unsigned high = 1u << 30 | 1024 >> 4;
    return static_cast<unsigned long long>(high) << 32 | low;
}

#if BF16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif

#define S4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define S16(x, i) S4(x, i), S4(x, i + 4), S4(x, i + 8), S4(x, i + 12)
#define REGS32                                                                                                         \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define REGS64                                                                                                         \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// [64, 64] (+)= A [64, 16] B [64, 16]^T, both in shared memory.
template <int ADD>
DEVICE void product_shared(float (&x)[32], unsigned long long a, unsigned long long b) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; "
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " " REGS32
                 ", %32, %33, p, 1, 1, 0, 0; }"
                 : S16(x, 0), S16(x, 16)
                 : "l"(a), "l"(b), "n"(ADD));
}

// [64, 64] (+)= A [16, 64]^T B [16, 64], both with their columns along shared memory's rows.
DEVICE void product_transposed(float (&x)[32], unsigned long long a, unsigned long long b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; "
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " " REGS32
                 ", %32, %33, p, 1, 1, 1, 1; }"
                 : S16(x, 0), S16(x, 16)
                 : "l"(a), "l"(b), "r"(add));
}

// [64, columns] (+)= A [64, 16] B [16, columns], A in registers, B with its columns along shared memory's rows.
DEVICE void product_registers(float (&x)[32], const unsigned* a, unsigned long long b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; "
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT " " REGS32
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
                 : S16(x, 0), S16(x, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

DEVICE void product_registers(float (&x)[64], const unsigned* a, unsigned long long b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; "
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT "." ELEMENT " " REGS64
                 ", {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
                 : S16(x, 0), S16(x, 16), S16(x, 32), S16(x, 48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// Which of a product's 64 rows a thread holds: this one and the one 8 later, and two columns of every eight.
DEVICE int lane_row() { return threadIdx.x / WARP % 4 * 16 + threadIdx.x % WARP / 4; }
DEVICE int lane_column() { return threadIdx.x % 4 * 2; }

// x = A B^T, both `[64, D]` in panels of shared memory. A group of its own, or the beginning of the next one.
template <bool COMMITS = true>
DEVICE void score(float (&x)[32], unsigned a, unsigned b) {
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int offset = (i / 4 * PANEL_BYTES + i % 4 * 32) / 16;
        if (i == 0)
            product_shared<0>(x, descriptor(a + offset), descriptor(b + offset));
        else
            product_shared<1>(x, descriptor(a + offset), descriptor(b + offset));
    }
    if (COMMITS) wgmma_commit();
}

// x (+)= A B, A `[64, 64]` in registers, B `[64, D]` in panels of shared memory.
DEVICE void accumulate(float (&x)[D / 2], const unsigned (&a)[16], unsigned b, bool add) {
#pragma unroll
    for (int i = 0; i < 64 / 16; i++)
        product_registers(x, a + 4 * i, descriptor(b + i * (16 * 2 * PANEL / 16)), i > 0 || add);
    wgmma_commit();
}

// ---------------------------------------------------------------- arithmetic

#define MINUS_INFINITY __int_as_float(0xff800000)
#define PLUS_INFINITY __int_as_float(0x7f800000)

// Two values as a pair of 16 bits, the first in the lower half.
DEVICE unsigned pack(float low, float high) {
    unsigned pair;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}

// Sum of the products of two pairs of 16 bits.
DEVICE float dot(unsigned a, unsigned b) {
#if BF16
    return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
           __uint_as_float(a & 0xffff0000) * __uint_as_float(b & 0xffff0000);
#else
    float x[4];
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(x[0]), "=f"(x[1]) : "r"(a));
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(x[2]), "=f"(x[3]) : "r"(b));
    return x[0] * x[2] + x[1] * x[3];
#endif
}

#define APPROXIMATE(name, instruction)                                                                                 \
    DEVICE float name(float x) {                                                                                       \
        float y;                                                                                                       \
        asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));                                                 \
        return y;                                                                                                      \
    }
APPROXIMATE(exp2_fast, "ex2")
APPROXIMATE(log2_fast, "lg2")
APPROXIMATE(inverse, "rcp")

DEVICE float2 load_shared_pair(unsigned from) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
    return x;
}

DEVICE void store_shared(unsigned to, const float* x) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

// Zeroes rows [first, until) of the panels of a box `[64, columns]`, by a warp. What follows of the async proxy, here or
// after a barrier that a lane arrives on, sees it: TMA has no documents, so it fills a box whose document ends in it with
// the next one's rows, and 0 times what stands there need not be 0.
DEVICE void clear_rows(unsigned box, int first, int until, int columns) {
    const float zeros[4] = {};
#pragma unroll 1
    for (int x = 0; x < columns; x += PANEL, box += PANEL_BYTES)
#pragma unroll 4
        for (int at = first * (2 * PANEL) + threadIdx.x % WARP * 16; at < until * (2 * PANEL); at += WARP * 16)
            store_shared(box + at, zeros);
    fence_async_shared();
    __syncwarp();
}

DEVICE uint4 load_shared(unsigned from) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
    return x;
}

// Four matrices of 8 x 8 elements of 16 bits; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void store_matrices(unsigned to, unsigned a, unsigned b, unsigned c, unsigned d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---------------------------------------------------------------- clusters

DEVICE int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all thread blocks of the cluster.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in another thread block's shared memory.
DEVICE unsigned remote(unsigned address, int rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

DEVICE void barrier_arrive_remote(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Stores a word and counts its bytes at a barrier, both in one other thread block.
DEVICE void store_remote(unsigned to, int value, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                 ::"r"(to), "r"(value), "r"(barrier) : "memory");
}

// The same with a copy of shared memory, a multiple of 16 bytes.
DEVICE void copy_to_remote(unsigned to, unsigned from, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "r"(from), "r"(bytes), "r"(barrier) : "memory");
}
