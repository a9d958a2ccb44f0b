// What kernels share: element types, reductions, vectors of 16 bytes.
//
// Sums are f32 whatever the elements are. `count` pointers hold the rows that are real: grids cover
// the padded number, so one captured graph serves every count below it.
#pragma once

#include <cuda_bf16.h>
#include <cstdint>

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }

// Rows that are real among `rows`.
__device__ __forceinline__ uint32_t real_rows(const uint32_t* count, uint32_t rows) {
    return count == nullptr ? rows : min(*count, rows);
}

// `N` elements that move as one access; `N` times the element's size is 16 bytes or one element.
template <typename T, int N> struct alignas(N * sizeof(T)) Vec {
    T at[N];
};

// Elements of a 16-byte access.
template <typename T> constexpr int kWide = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ bool aligned16(const void* p) {
    return (reinterpret_cast<uint64_t>(p) & 15) == 0;
}

// A pair of elements turned by an angle, with roundings that no compiler chooses: kernels that rotate the
// same elements store the same bits.
__device__ __forceinline__ float2 turned(float u, float v, float cosine, float sine) {
    return {__fmaf_rn(u, cosine, -__fmul_rn(v, sine)), __fmaf_rn(v, cosine, __fmul_rn(u, sine))};
}

// The power of two, within 2^-22 of it.
__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}

// The sum over a block of up to 1024 threads, to all of them; may be called again at once.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? parts[lane] : 0.0f);
}
