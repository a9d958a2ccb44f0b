// The product for any shape and alignment: 32 x 32 tiles through shared memory, ordinary arithmetic.
#include "linear/cuda/linear.cuh"

constexpr uint32_t kTile = 32;

template <typename T, typename Out> __device__ void linear_any(const LinearParams& p) {
    __shared__ float xs[kTile][kTile + 1], ws[kTile][kTile + 1];
    const Rows rows = rows_of_block(p, blockIdx.y, kTile);
    const uint64_t batch = p.tiles == nullptr ? blockIdx.z : 0;
    const T* x = static_cast<const T*>(p.x) + batch * p.x_batch;
    const T* w = static_cast<const T*>(p.w) + rows.expert * p.w_batch;
    Out* out = static_cast<Out*>(p.out) + batch * p.out_batch;
    const uint32_t n0 = blockIdx.x * kTile, column = threadIdx.x % kTile, line = threadIdx.x / kTile;
    // Grouped tiles may have more rows than a block's tile.
    for (uint32_t first = 0; first < rows.count; first += kTile) {
        float sums[kTile / 8] = {};
        for (uint32_t k0 = 0; k0 < p.k; k0 += kTile) {
            const bool in_k = k0 + column < p.k;
            for (uint32_t i = line; i < kTile; i += 8) {
                const bool in_x = in_k && first + i < rows.count, in_w = in_k && n0 + i < p.n;
                xs[i][column] = in_x ? widen(x[x_row(p, rows, first + i) * p.x_stride + k0 + column]) : 0.0f;
                ws[i][column] = in_w ? widen(w[uint64_t(n0 + i) * p.k + k0 + column]) : 0.0f;
            }
            __syncthreads();
            for (uint32_t k = 0; k < kTile; ++k) {
#pragma unroll
                for (uint32_t i = 0; i < kTile / 8; ++i) sums[i] += xs[line + 8 * i][k] * ws[column][k];
            }
            __syncthreads();
        }
        const uint32_t n = n0 + column;
#pragma unroll
        for (uint32_t i = 0; i < kTile / 8; ++i) {
            const uint32_t row = first + line + 8 * i;
            if (row >= rows.count || n >= p.n) continue;
            const float bias = p.bias == nullptr ? 0.0f : p.bias[n];
            out[uint64_t(rows.start + row) * p.out_stride + n] = narrow<Out>(sums[i] + bias);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) linear_any_f32_f32(const __grid_constant__ LinearParams p) {
    linear_any<float, float>(p);
}
extern "C" __global__ void __launch_bounds__(256) linear_any_bf16_bf16(const __grid_constant__ LinearParams p) {
    linear_any<bf16, bf16>(p);
}
extern "C" __global__ void __launch_bounds__(256) linear_any_bf16_f32(const __grid_constant__ LinearParams p) {
    linear_any<bf16, float>(p);
}
