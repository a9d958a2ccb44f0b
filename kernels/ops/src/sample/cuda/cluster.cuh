// One cluster works on one row of logits: each block holds a stretch of it in shared memory, so that
// the row is read once, and blocks tell each other sums and lists through distributed shared memory.
//
// Blocks leave when nobody needs them any more. Invariant: nobody reads another block's memory after
// the barrier that ends the phase it was written in; boxes alternate, so one barrier per exchange is
// enough.
#pragma once

#include <cooperative_groups.h>

#include <utility>

#include "sample/cuda/weight.cuh"

constexpr uint32_t kThreads = 512, kWarps = kThreads / 32;
constexpr uint32_t kBlocks = 8;      // of a cluster, at most
constexpr uint32_t kBins = 1024;     // two per thread
constexpr uint32_t kList = 1024;     // tokens that are sorted, at most; two per thread
constexpr uint32_t kBoxBytes = 32;
constexpr uint32_t kChunk = 4096;    // logits of one copy into shared memory
constexpr uint32_t kChunks = 12;     // so a block holds up to 49,152, whose places fit 16 bits

struct Shared {
    union {
        struct {
            uint32_t low[kBins], high[kBins];  // halves of 64-bit sums
        } bins;
        unsigned long long list[kList];  // order key and inverted token; of the leader
    };
    uint16_t places[kList];  // of what is listed, in the stretch
    alignas(16) unsigned char boxes[2][kBlocks][kBoxBytes];
    unsigned long long arrived[kChunks];  // barriers of the copies
    unsigned long long parts[kWarps];
    unsigned long long before;
    uint32_t words[3][kWarps];
    uint32_t found, count;
};

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__device__ __forceinline__ uint64_t warp_prefix(uint64_t x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t lower = __shfl_up_sync(0xffffffff, x, step);
        if (threadIdx.x % 32 >= step) x += lower;
    }
    return x;
}

// The sum up to this thread and that of the whole block; may be called again at once.
struct Prefix {
    uint64_t until, whole;
};
__device__ __forceinline__ Prefix block_prefix(Shared& s, uint64_t x) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint64_t until = warp_prefix(x);
    __syncthreads();
    if (lane == 31) s.parts[warp] = until;
    __syncthreads();
    const uint64_t parts = warp_prefix(lane < kWarps ? s.parts[lane] : 0);
    const uint64_t below = __shfl_sync(0xffffffff, parts, (warp + 31) % 32);
    return {until + (warp == 0 ? 0 : below), __shfl_sync(0xffffffff, parts, 31)};
}

// The stretch of a row that a block holds.
struct Stretch {
    Shared& s;
    float* logits;    // [padded]: this stretch, then negative infinity up to a whole vector
    uint32_t first;   // its first token
    uint32_t len, padded;
    uint32_t rank, blocks;
    uint32_t turn;

    __device__ __forceinline__ static cooperative_groups::cluster_group cluster() {
        return cooperative_groups::this_cluster();
    }
    __device__ __forceinline__ bool leads() const { return rank == 0; }

    // Tells all blocks, from the first warp, and hears of all; a barrier of the cluster.
    template <typename T> __device__ const T* exchange(const T& mine) {
        static_assert(sizeof(T) <= kBoxBytes);
        turn ^= 1;
        if (threadIdx.x < blocks) {
            *reinterpret_cast<T*>(cluster().map_shared_rank(s.boxes[turn][rank], threadIdx.x)) = mine;
        }
        cluster().sync();
        return reinterpret_cast<const T*>(s.boxes[turn]);
    }

    // Tells the leader, for the last time: others get null, and nobody needs them any more.
    template <typename T> __device__ const T* tell_leader(const T& mine) {
        static_assert(sizeof(T) <= kBoxBytes);
        turn ^= 1;
        if (threadIdx.x == 0) *reinterpret_cast<T*>(cluster().map_shared_rank(s.boxes[turn][rank], 0)) = mine;
        return leave_to_leader() ? reinterpret_cast<const T*>(s.boxes[turn]) : nullptr;
    }

    // Whether this is the leader, which now has what all sent it; the others are done.
    __device__ bool leave_to_leader() const {
        auto sent = cluster().barrier_arrive();
        if (rank != 0) return false;
        cluster().barrier_wait(std::move(sent));
        return true;
    }

    // What a block said in an exchange.
    template <typename T> __device__ static __forceinline__ const T& said(const T* all, uint32_t block) {
        return *reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(all) + block * kBoxBytes);
    }

    // All logits of the stretch, with their places. Whole warps visit together; padding is visited.
    template <typename Visit> __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll 1
        for (uint32_t from = 0; from < padded; from += 4 * kThreads) {
            const uint32_t at = from + 4 * threadIdx.x;
            const float4 x = four(at);
            visit(at, x.x);
            visit(at + 1, x.y);
            visit(at + 2, x.z);
            visit(at + 3, x.w);
        }
    }

    __device__ __forceinline__ float4 four(uint32_t at) const {
        if (at < padded) return *reinterpret_cast<const float4*>(logits + at);
        return {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    }

    // Where this thread's own run of consecutive places begins; its length is odd, so that threads
    // in step meet different banks.
    __device__ __forceinline__ uint32_t run() const { return ((len + kThreads - 1) / kThreads) | 1; }
};

// The stretch of this block, still empty. Lengths are whole vectors, the last one's aside.
__device__ __forceinline__ Stretch stretch_of(Shared& s, float* logits, uint32_t vocab) {
    const auto cluster = Stretch::cluster();
    const uint32_t rank = cluster.block_rank(), blocks = cluster.num_blocks();
    const uint32_t share = ((vocab + blocks - 1) / blocks + 3) / 4 * 4;
    const uint32_t first = min(rank * share, vocab), len = min(share, vocab - first);
    return {s, logits, first, len, (len + 3) / 4 * 4, rank, blocks, 0};
}
