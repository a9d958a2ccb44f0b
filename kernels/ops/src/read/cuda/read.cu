// Reads memory at the speed it gives: independent 16-byte loads that pass the first-level cache by.
//
// The XOR of all words goes to one place, so that no load can be left out.
#include "cuda/common.cuh"

struct ReadParams {
    const uint4* from;
    uint32_t* out;
    uint64_t vectors;
};

// Loads of a thread that are under way at once.
constexpr int kUnderWay = 8;

__device__ __forceinline__ uint32_t load(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v.x ^ v.y ^ v.z ^ v.w;
}

extern "C" __global__ void __launch_bounds__(512) read_all(const __grid_constant__ ReadParams p) {
    const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
    uint64_t at = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    uint32_t sum = 0;
    for (; at + (kUnderWay - 1) * step < p.vectors; at += kUnderWay * step) {
        uint32_t words[kUnderWay];
#pragma unroll
        for (int i = 0; i < kUnderWay; ++i) words[i] = load(p.from + at + i * step);
#pragma unroll
        for (int i = 0; i < kUnderWay; ++i) sum ^= words[i];
    }
    for (; at < p.vectors; at += step) sum ^= load(p.from + at);
    for (int lane = 16; lane > 0; lane /= 2) sum ^= __shfl_xor_sync(0xffffffff, sum, lane);
    if (threadIdx.x % 32 == 0 && sum != 0) atomicXor(p.out, sum);
}
