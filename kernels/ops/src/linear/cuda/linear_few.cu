// The product for at most 16 rows: weights stream once from memory through registers to the tensor
// cores, 16 bytes a load.
//
// A lane's 16 bytes are 8 neighbours along k of one weight row. The tensor core wants k spread
// otherwise, but any order will do as long as both operands have it: step s of a chunk of 32 takes
// as its columns 2t, 2t + 1, 2t + 8, 2t + 9 the elements 8t + 4s .. 8t + 4s + 3. So both operands
// are loaded as they lie. The eight warps share k and add up in a fixed order: a row's bits depend
// on the row and the weights alone, not on the other rows. k is a multiple of 8 and every row
// begins on 16 bytes.
#include "cuda/mma.cuh"
#include "linear/cuda/linear.cuh"

constexpr uint32_t kWarps = 8, kUnroll = 4, kChunk = 32;
constexpr uint32_t kSpan = kChunk * kUnroll;  // of k, per warp and step

__device__ __forceinline__ uint4 stream16(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// `Halves` of 8 rows, `Tiles` of 8 outputs.
template <typename Out, int Halves, int Tiles> __device__ void linear_few(const LinearParams& p) {
    __shared__ float parts[kWarps][Tiles][16][9];
    const Rows rows = rows_of_block(p, blockIdx.y, 8 * Halves);
    if (rows.count == 0) return;
    const uint64_t batch = p.tiles == nullptr ? blockIdx.z : 0;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t n0 = blockIdx.x * Tiles * 8;

    const bf16* x = static_cast<const bf16*>(p.x) + batch * p.x_batch;
    const bf16* x_at[Halves];
    bool x_in[Halves];
#pragma unroll
    for (int h = 0; h < Halves; ++h) {
        x_in[h] = g + 8 * h < rows.count;
        x_at[h] = x + (x_in[h] ? x_row(p, rows, g + 8 * h) * p.x_stride : 0);
    }
    const bf16* w = static_cast<const bf16*>(p.w) + rows.expert * p.w_batch;
    const bf16* w_at[Tiles];
    bool w_in[Tiles];
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
        w_in[i] = n0 + 8 * i + g < p.n;
        w_at[i] = w + uint64_t(w_in[i] ? n0 + 8 * i + g : 0) * p.k;
    }

    const uint4 zero = make_uint4(0, 0, 0, 0);
    float sums[Tiles][4] = {};
    for (uint32_t base = warp * kSpan; base < p.k; base += kWarps * kSpan) {
        uint4 a[kUnroll][Halves], b[kUnroll][Tiles];
#pragma unroll
        for (uint32_t u = 0; u < kUnroll; ++u) {
            const uint32_t k = base + u * kChunk + t * 8;
            const bool in = k < p.k;
#pragma unroll
            for (int i = 0; i < Tiles; ++i) b[u][i] = in && w_in[i] ? stream16(w_at[i] + k) : zero;
        }
#pragma unroll
        for (uint32_t u = 0; u < kUnroll; ++u) {
            const uint32_t k = base + u * kChunk + t * 8;
            const bool in = k < p.k;
#pragma unroll
            for (int h = 0; h < Halves; ++h)
                a[u][h] = in && x_in[h] ? *reinterpret_cast<const uint4*>(x_at[h] + k) : zero;
        }
#pragma unroll
        for (uint32_t u = 0; u < kUnroll; ++u) {
            const uint4 low = a[u][0], high = Halves > 1 ? a[u][Halves - 1] : zero;
#pragma unroll
            for (int i = 0; i < Tiles; ++i) {
                mma_16816(sums[i], low.x, high.x, low.y, high.y, b[u][i].x, b[u][i].y);
                mma_16816(sums[i], low.z, high.z, low.w, high.w, b[u][i].z, b[u][i].w);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
        parts[warp][i][g][2 * t] = sums[i][0];
        parts[warp][i][g][2 * t + 1] = sums[i][1];
        parts[warp][i][g + 8][2 * t] = sums[i][2];
        parts[warp][i][g + 8][2 * t + 1] = sums[i][3];
    }
    __syncthreads();
    Out* out = static_cast<Out*>(p.out) + batch * p.out_batch;
    for (uint32_t item = threadIdx.x; item < 8 * Halves * Tiles * 8; item += kWarps * 32) {
        const uint32_t row = item / (Tiles * 8), column = item % (Tiles * 8), n = n0 + column;
        if (row >= rows.count || n >= p.n) continue;
        float sum = p.bias == nullptr ? 0.0f : p.bias[n];
#pragma unroll
        for (uint32_t i = 0; i < kWarps; ++i) sum += parts[i][column / 8][row][column % 8];
        out[uint64_t(rows.start + row) * p.out_stride + n] = narrow<Out>(sum);
    }
}

#define FEW(name, Out, Halves, Tiles)                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ LinearParams p) {      \
        linear_few<Out, Halves, Tiles>(p);                                                                \
    }
FEW(linear_few_8x8_bf16, bf16, 1, 1)
FEW(linear_few_8x16_bf16, bf16, 1, 2)
FEW(linear_few_16x8_bf16, bf16, 2, 1)
FEW(linear_few_16x16_bf16, bf16, 2, 2)
FEW(linear_few_16x32_bf16, bf16, 2, 4)
FEW(linear_few_8x8_f32, float, 1, 1)
FEW(linear_few_8x16_f32, float, 1, 2)
FEW(linear_few_16x8_f32, float, 2, 1)
FEW(linear_few_16x16_f32, float, 2, 2)
FEW(linear_few_16x32_f32, float, 2, 4)
