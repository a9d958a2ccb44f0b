// Element-wise ops: the gated activation and the residual sum.
#include "cuda/async.cuh"

struct ActParams {
    const void* x;  // gate and up side by side, or what is added
    void* out;      // written, or added to
    const uint32_t* count;
    uint32_t rows, width;
};

template <typename T, int N> __device__ void silu_mul_elements(const ActParams& p) {
    using V = Vec<T, N>;
    // A block for some vectors of a row: rows are along y, as far as a grid goes.
    const uint32_t vectors = p.width / N, rows = real_rows(p.count, p.rows);
    for (uint64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        const V* x = static_cast<const V*>(p.x) + row * 2 * vectors;
        V* out = static_cast<V*>(p.out) + row * vectors;
        for (uint32_t at = blockIdx.x * blockDim.x + threadIdx.x; at < vectors; at += gridDim.x * blockDim.x) {
            V gate = x[at];
            const V up = x[vectors + at];
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float g = widen(gate.at[j]);
                gate.at[j] = narrow<T>(g / (1.0f + expf(-g)) * widen(up.at[j]));
            }
            out[at] = gate;
        }
    }
}

template <typename T, int N> __device__ void add_elements(const ActParams& p) {
    using V = Vec<T, N>;
    const uint64_t all = uint64_t(real_rows(p.count, p.rows)) * (p.width / N);
    const V* x = static_cast<const V*>(p.x);
    V* out = static_cast<V*>(p.out);
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += uint64_t(gridDim.x) * blockDim.x) {
        V sum = out[i];
        const V more = x[i];
#pragma unroll
        for (int j = 0; j < N; ++j) sum.at[j] = narrow<T>(widen(sum.at[j]) + widen(more.at[j]));
        out[i] = sum;
    }
}

template <typename T> __device__ bool wide(const ActParams& p) {
    return p.width % kWide<T> == 0 && aligned16(p.x) && aligned16(p.out);
}

template <typename T> __device__ void silu_mul(const ActParams& p) {
    wait_for_previous();
    allow_next();
    if (wide<T>(p)) {
        silu_mul_elements<T, kWide<T>>(p);
    } else {
        silu_mul_elements<T, 1>(p);
    }
}
template <typename T> __device__ void add(const ActParams& p) {
    wait_for_previous();
    allow_next();
    if (wide<T>(p)) {
        add_elements<T, kWide<T>>(p);
    } else {
        add_elements<T, 1>(p);
    }
}

extern "C" __global__ void __launch_bounds__(256) silu_mul_f32(const __grid_constant__ ActParams p) {
    silu_mul<float>(p);
}
extern "C" __global__ void __launch_bounds__(256) silu_mul_bf16(const __grid_constant__ ActParams p) {
    silu_mul<bf16>(p);
}
extern "C" __global__ void __launch_bounds__(256) add_f32(const __grid_constant__ ActParams p) {
    add<float>(p);
}
extern "C" __global__ void __launch_bounds__(256) add_bf16(const __grid_constant__ ActParams p) {
    add<bf16>(p);
}
