// What lies in front of an expert among sorted pairs.
#pragma once
#include "cuda/common.cuh"

struct Front {
    uint32_t pairs, tiles;
};

// Sums of the threads before this one, each of which has an expert. All threads of `kWarps` warps take part.
template <uint32_t kWarps> __device__ __forceinline__ Front front_of(uint32_t mine, uint32_t my_tiles) {
    __shared__ uint32_t before[2][kWarps];  // of the warps
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t pairs = mine, tiles = my_tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint32_t a = __shfl_up_sync(0xffffffff, pairs, step), b = __shfl_up_sync(0xffffffff, tiles, step);
        if (lane >= step) {
            pairs += a;
            tiles += b;
        }
    }
    if (lane == 31) {
        before[0][warp] = pairs;
        before[1][warp] = tiles;
    }
    __syncthreads();
    Front front = {pairs - mine, tiles - my_tiles};
    for (uint32_t w = 0; w < warp; w++) {
        front.pairs += before[0][w];
        front.tiles += before[1][w];
    }
    return front;
}
