// RMS norm of rows, with a residual sum in front, and inside heads. One block per row; one warp per
// head. A row's bits depend on the row alone.
#include "cuda/async.cuh"

struct NormParams {
    const void* x;        // the row, or what is added to the residual
    void* residual;       // null without a residual
    const float* weight;
    void* out;
    const uint32_t* count;
    uint32_t rows, width;
    float eps;
};

template <typename T, int N> __device__ void norm_row(const NormParams& p, uint64_t row) {
    using V = Vec<T, N>;
    const uint32_t vectors = p.width / N;
    const V* x = static_cast<const V*>(p.x) + row * vectors;
    V* residual = p.residual == nullptr ? nullptr : static_cast<V*>(p.residual) + row * vectors;
    V* out = static_cast<V*>(p.out) + row * vectors;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        V value = x[i];
        if (residual != nullptr) {
            const V held = residual[i];
#pragma unroll
            for (int j = 0; j < N; ++j) value.at[j] = narrow<T>(widen(held.at[j]) + widen(value.at[j]));
            residual[i] = value;
        }
#pragma unroll
        for (int j = 0; j < N; ++j) sum += widen(value.at[j]) * widen(value.at[j]);
    }
    const float scale = rsqrtf(block_sum(sum) / p.width + p.eps);
    // Each thread reads back what it wrote itself.
    const V* source = residual == nullptr ? x : residual;
    for (uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        V value = source[i];
#pragma unroll
        for (int j = 0; j < N; ++j)
            value.at[j] = narrow<T>(widen(value.at[j]) * scale * p.weight[i * N + j]);
        out[i] = value;
    }
}

// Rows of up to `kEach` vectors to a thread, which keeps them: a row is read once. Weights wait for
// nothing: they are read while the kernel in front ends.
template <typename T, int kEach> __device__ __forceinline__ void norm_kept(const NormParams& p) {
    constexpr int N = kWide<T>;
    using V = Vec<T, N>;
    const uint32_t vectors = p.width / N;
    const uint64_t row = blockIdx.x;
    Vec<float, N> weight[kEach];
#pragma unroll
    for (int k = 0; k < kEach; k++) {
        const uint32_t i = threadIdx.x + k * blockDim.x;
        if (i < vectors) weight[k] = reinterpret_cast<const Vec<float, N>*>(p.weight)[i];
    }
    wait_for_previous();
    allow_next();
    if (row >= real_rows(p.count, p.rows)) return;
    const V* x = static_cast<const V*>(p.x) + row * vectors;
    V* residual = p.residual == nullptr ? nullptr : static_cast<V*>(p.residual) + row * vectors;
    V* out = static_cast<V*>(p.out) + row * vectors;
    V value[kEach], held[kEach];
#pragma unroll
    for (int k = 0; k < kEach; k++) {
        const uint32_t i = threadIdx.x + k * blockDim.x;
        if (i >= vectors) continue;
        value[k] = x[i];
        if (residual != nullptr) held[k] = residual[i];
    }
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kEach; k++) {
        const uint32_t i = threadIdx.x + k * blockDim.x;
        if (i >= vectors) continue;
        if (residual != nullptr) {
#pragma unroll
            for (int j = 0; j < N; ++j) value[k].at[j] = narrow<T>(widen(held[k].at[j]) + widen(value[k].at[j]));
            residual[i] = value[k];
        }
#pragma unroll
        for (int j = 0; j < N; ++j) sum += widen(value[k].at[j]) * widen(value[k].at[j]);
    }
    const float scale = rsqrtf(block_sum(sum) / p.width + p.eps);
#pragma unroll
    for (int k = 0; k < kEach; k++) {
        const uint32_t i = threadIdx.x + k * blockDim.x;
        if (i >= vectors) continue;
#pragma unroll
        for (int j = 0; j < N; ++j) value[k].at[j] = narrow<T>(widen(value[k].at[j]) * scale * weight[k].at[j]);
        out[i] = value[k];
    }
}

// Weights of other rows, into the second-level cache.
__device__ void fetch_weights(const float* weight, uint32_t width) {
    constexpr uint32_t kLine = 32;
    for (uint32_t i = threadIdx.x * kLine; i < width; i += blockDim.x * kLine) {
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(weight + i));
    }
}

template <typename T> __device__ void norm(const NormParams& p) {
    const bool wide = p.width % kWide<T> == 0 && aligned16(p.x) && aligned16(p.residual) && aligned16(p.out);
    const uint32_t each = (p.width / kWide<T> + blockDim.x - 1) / blockDim.x;
    // A vector's weights are up to two of 16 bytes.
    if (wide && each <= 2 && reinterpret_cast<uint64_t>(p.weight) % 32 == 0) {
        return each == 2 ? norm_kept<T, 2>(p) : norm_kept<T, 1>(p);
    }
    fetch_weights(p.weight, p.width);
    wait_for_previous();
    allow_next();
    const uint32_t row = blockIdx.x;
    if (row >= real_rows(p.count, p.rows)) return;
    if (wide) {
        norm_row<T, kWide<T>>(p, row);
    } else {
        norm_row<T, 1>(p, row);
    }
}

extern "C" __global__ void __launch_bounds__(256, 4) rms_norm_f32(const __grid_constant__ NormParams p) {
    norm<float>(p);
}
extern "C" __global__ void __launch_bounds__(256, 4) rms_norm_bf16(const __grid_constant__ NormParams p) {
    norm<bf16>(p);
}

struct HeadNormParams {
    void* x;
    const float* weight;
    const uint32_t* count;
    uint32_t rows, row, heads, offset, width, stride;
    float eps;
};

template <typename T> __device__ void head_norm(const HeadNormParams& p) {
    wait_for_previous();
    allow_next();
    const uint32_t item = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t row = item / p.heads, head = item % p.heads;
    if (row >= real_rows(p.count, p.rows)) return;
    T* x = static_cast<T*>(p.x) + uint64_t(row) * p.row + p.offset + uint64_t(head) * p.stride;
    float sum = 0.0f;
    for (uint32_t i = lane; i < p.width; i += 32) sum += widen(x[i]) * widen(x[i]);
    const float scale = rsqrtf(warp_sum(sum) / p.width + p.eps);
    for (uint32_t i = lane; i < p.width; i += 32) x[i] = narrow<T>(widen(x[i]) * scale * p.weight[i]);
}

extern "C" __global__ void __launch_bounds__(128) head_norm_f32(const __grid_constant__ HeadNormParams p) {
    head_norm<float>(p);
}
extern "C" __global__ void __launch_bounds__(128) head_norm_bf16(const __grid_constant__ HeadNormParams p) {
    head_norm<bf16>(p);
}
