// Reads a stretch into shared memory, once, and finds the highest of the row.
#pragma once

#include "cuda/async.cuh"
#include "sample/cuda/cluster.cuh"

// Keys from here on are of positive infinity and of NaN.
constexpr uint32_t kBadKey = 0xff800000u;
// That of negative infinity.
constexpr uint32_t kNothingKey = 0x007fffffu;

// Where a stretch comes from.
struct Source {
    const float* logits;  // of the stretch
    bool wide;            // whole vectors of 16 bytes

    // Until what lies from `place` on has arrived.
    __device__ __forceinline__ void wait(const Shared& s, uint32_t place) const {
        if (wide && place % kChunk == 0) barrier_wait(shared_address(&s.arrived[place / kChunk]), 0);
    }
};

// Copies the stretch: by the copy engine where addresses allow, all of it at once.
__device__ __forceinline__ void start_reading(const Stretch& row, const Source& source) {
    if (source.wide) {
        if (threadIdx.x == 0) {
            for (uint32_t from = 0; from < row.len; from += kChunk) barrier_init(shared_address(&row.s.arrived[from / kChunk]), 1);
            fence_barrier_init();
            for (uint32_t from = 0; from < row.len; from += kChunk) {
                const uint32_t barrier = shared_address(&row.s.arrived[from / kChunk]);
                const uint32_t bytes = 4 * min(kChunk, row.len - from);
                barrier_expect(barrier, bytes);
                bulk_load(shared_address(row.logits + from), source.logits + from, bytes, barrier);
            }
        }
    } else {
#pragma unroll 8
        for (uint32_t i = threadIdx.x; i < row.padded; i += kThreads) row.logits[i] = i < row.len ? __ldg(source.logits + i) : -INFINITY;
    }
    __syncthreads();
}

// The larger number; NaN where either is.
__device__ __forceinline__ float larger(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
__device__ __forceinline__ float larger(float4 x) { return larger(larger(x.x, x.y), larger(x.z, x.w)); }

// The highest of this thread's own logits, waiting for each copy.
__device__ __forceinline__ float look(const Stretch& row, const Source& source) {
    float best = -INFINITY;
#pragma unroll 2
    for (uint32_t from = 0; from < row.padded; from += 4 * kThreads) {
        source.wait(row.s, from);
        best = larger(best, larger(row.four(from + 4 * threadIdx.x)));
    }
    return best;
}

// Order keys: the highest of the row, and the lowest of what threads found highest.
struct Tops {
    uint32_t highest, lowest;
};

// Those of this block.
__device__ __forceinline__ Tops block_tops(Shared& s, uint32_t own) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t highest = __reduce_max_sync(0xffffffff, own);
    const uint32_t lowest = __reduce_min_sync(0xffffffff, own == kNothingKey ? kLast : own);
    if (lane == 0) {
        s.words[0][warp] = highest;
        s.words[1][warp] = lowest;
    }
    __syncthreads();
    return {__reduce_max_sync(0xffffffff, s.words[0][lane % kWarps]), __reduce_min_sync(0xffffffff, s.words[1][lane % kWarps])};
}

// Those of the row.
__device__ __forceinline__ Tops row_tops(Stretch& row, const Tops& own) {
    const Tops* all = row.exchange(own);
    Tops tops = own;
    for (uint32_t block = 0; block < row.blocks; ++block) {
        tops.highest = max(tops.highest, Stretch::said(all, block).highest);
        tops.lowest = min(tops.lowest, Stretch::said(all, block).lowest);
    }
    return tops;
}

// The first token of the block that has its highest key.
__device__ __forceinline__ uint32_t first_of(const Stretch& row, uint32_t key, bool mine) {
    Shared& s = row.s;
    if (threadIdx.x == 0) s.found = kLast;
    __syncthreads();
    if (mine) {
        uint32_t first = kLast;
        for (uint32_t at = 4 * threadIdx.x; at < row.padded && first == kLast; at += 4 * kThreads) {
            for (uint32_t i = at + 3; i + 1 > at; --i) first = order_key(row.logits[i]) == key ? i : first;
        }
        atomicMin(&s.found, first);
    }
    __syncthreads();
    return s.found == kLast ? kLast : row.first + s.found;
}
