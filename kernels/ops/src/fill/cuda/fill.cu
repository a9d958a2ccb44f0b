// Random weights in place: each element is a function of the tensor's key and its own index.
//
// The rule is that of the crate `weights` to the bit: no operation here may be contracted or
// reordered, hence the named roundings. A thread makes what one 16-byte store takes; the few
// elements before and after the aligned part are made one by one by the first block.
#include "cuda/common.cuh"

#include <cuda_fp16.h>

struct FillParams {
    void* out;
    uint64_t elements, key, start;
    double mean, std, unit;
    uint32_t head, stored;
};

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull;
// Eight lanes at their mean of 32767.5.
constexpr int kCentre = 262140;

__device__ __forceinline__ uint64_t mix(uint64_t z) {
    z ^= z >> 30;
    z *= 0xBF58476D1CE4E5B9ull;
    z ^= z >> 27;
    z *= 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Sum of the four 16-bit lanes, as two partial sums in the halves of a word.
__device__ __forceinline__ uint64_t pairs(uint64_t word) {
    constexpr uint64_t kLow = 0x0000FFFF0000FFFFull;
    return (word & kLow) + ((word >> 16) & kLow);
}

__device__ __forceinline__ float value(const FillParams& p, uint64_t index) {
    // Words 2i and 2i + 1 stand at steps 2i + 1 and 2i + 2 of the sequence.
    const uint64_t at = p.key + (2 * index + 1) * kGamma;
    const uint64_t sums = pairs(mix(at)) + pairs(mix(at + kGamma));
    const int sum = static_cast<int>(static_cast<uint32_t>(sums) + static_cast<uint32_t>(sums >> 32));
    const double z = __ddiv_rn(static_cast<double>(sum - kCentre), p.unit);
    const float x = __double2float_rn(__dadd_rn(p.mean, __dmul_rn(p.std, z)));
    if (p.stored == 1) return widen(narrow<bf16>(x));
    if (p.stored == 2) return __half2float(__float2half_rn(x));
    return x;
}

template <typename T> __device__ void fill(const FillParams& p) {
    constexpr int N = kWide<T>;
    T* out = static_cast<T*>(p.out);
    const uint64_t vectors = (p.elements - p.head) / N;
    const uint64_t vector = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (vector < vectors) {
        const uint64_t first = p.head + vector * N;
        Vec<T, N> values;
#pragma unroll
        for (int j = 0; j < N; ++j) values.at[j] = narrow<T>(value(p, p.start + first + j));
        *reinterpret_cast<Vec<T, N>*>(out + first) = values;
    }
    if (blockIdx.x > 0) return;
    const uint64_t tail = p.head + vectors * N;
    if (threadIdx.x < p.head) out[threadIdx.x] = narrow<T>(value(p, p.start + threadIdx.x));
    if (threadIdx.x < p.elements - tail) {
        out[tail + threadIdx.x] = narrow<T>(value(p, p.start + tail + threadIdx.x));
    }
}

extern "C" __global__ void __launch_bounds__(256) fill_f32(const __grid_constant__ FillParams p) {
    fill<float>(p);
}
extern "C" __global__ void __launch_bounds__(256) fill_bf16(const __grid_constant__ FillParams p) {
    fill<bf16>(p);
}
