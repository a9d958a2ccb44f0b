// The product for many rows: 64 or 128 rows by 128 outputs per block, k in steps of 64 through three
// stages of shared memory, tensor cores by warp. k is a multiple of 8 and every row begins on 16
// bytes; edges are filled with zeros.
//
// A stage holds rows of 128 bytes as eight pieces of 16; piece c of row r lies at c ^ (r % 8), so the
// eight rows that one matrix load touches fall into different banks.
#include "cuda/mma.cuh"
#include "linear/cuda/linear.cuh"

constexpr uint32_t kN = 128, kStep = 64, kStages = 3, kThreads = 256;

__device__ __forceinline__ uint32_t piece(uint32_t row, uint32_t c) { return row * 128 + ((c ^ (row & 7)) * 16); }

template <typename Out, int M> __device__ void linear_many(const LinearParams& p) {
    extern __shared__ __align__(128) uint8_t memory[];
    constexpr uint32_t kA = M * 128, kStage = kA + kN * 128;
    constexpr int kMi = M / 32;  // 16-row tiles of a warp; two warps along rows, four along outputs
    const Rows rows = rows_of_block(p, blockIdx.y, M);
    if (rows.count == 0) return;
    const uint64_t batch = p.tiles == nullptr ? blockIdx.z : 0;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, wm = warp / 4, wn = warp % 4;
    const uint32_t n0 = blockIdx.x * kN, base = shared_address(memory);

    // Thread i copies piece i % 8 of rows i / 8, i / 8 + 32, ...
    const uint32_t c = threadIdx.x % 8, r0 = threadIdx.x / 8;
    const bf16* x = static_cast<const bf16*>(p.x) + batch * p.x_batch;
    const bf16* w = static_cast<const bf16*>(p.w) + rows.expert * p.w_batch;
    const bf16* x_at[M / 32];
    bool x_in[M / 32];
#pragma unroll
    for (int i = 0; i < M / 32; ++i) {
        x_in[i] = r0 + 32 * i < rows.count;
        x_at[i] = x + (x_in[i] ? x_row(p, rows, r0 + 32 * i) * p.x_stride : 0) + c * 8;
    }
    const bf16* w_at[kN / 32];
    bool w_in[kN / 32];
#pragma unroll
    for (uint32_t i = 0; i < kN / 32; ++i) {
        w_in[i] = n0 + r0 + 32 * i < p.n;
        w_at[i] = w + uint64_t(w_in[i] ? n0 + r0 + 32 * i : 0) * p.k + c * 8;
    }
    auto fetch = [&](uint32_t step) {
        const uint32_t k = step * kStep, stage = base + step % kStages * kStage;
        const bool in = k + c * 8 < p.k;
#pragma unroll
        for (int i = 0; i < M / 32; ++i) copy_async(stage + piece(r0 + 32 * i, c), x_in[i] && in ? x_at[i] + k : x, x_in[i] && in);
#pragma unroll
        for (uint32_t i = 0; i < kN / 32; ++i)
            copy_async(stage + kA + piece(r0 + 32 * i, c), w_in[i] && in ? w_at[i] + k : w, w_in[i] && in);
    };

    const uint32_t steps = (p.k + kStep - 1) / kStep;
    for (uint32_t s = 0; s + 1 < kStages; ++s) {
        if (s < steps) fetch(s);
        commit_copies();
    }
    float sums[kMi][4][4] = {};
    for (uint32_t s = 0; s < steps; ++s) {
        wait_copies<kStages - 2>();
        __syncthreads();
        if (s + kStages - 1 < steps) fetch(s + kStages - 1);
        commit_copies();
        const uint32_t stage = base + s % kStages * kStage;
#pragma unroll
        for (uint32_t kk = 0; kk < kStep / 16; ++kk) {
            uint32_t a[kMi][4], b[2][4];
#pragma unroll
            for (int i = 0; i < kMi; ++i) {
                const uint32_t row = wm * (M / 2) + i * 16 + lane % 16;
                load_matrix(a[i], stage + piece(row, kk * 2 + lane / 16));
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t row = wn * 32 + i * 16 + lane / 16 * 8 + lane % 8;
                load_matrix(b[i], stage + kA + piece(row, kk * 2 + lane / 8 % 2));
            }
#pragma unroll
            for (int i = 0; i < kMi; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    mma_16816(sums[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
    Out* out = static_cast<Out*>(p.out) + batch * p.out_batch;
#pragma unroll
    for (int i = 0; i < kMi; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const uint32_t row = wm * (M / 2) + i * 16 + lane / 4 + e / 2 * 8;
                const uint32_t n = n0 + wn * 32 + j * 8 + lane % 4 * 2 + e % 2;
                if (row >= rows.count || n >= p.n) continue;
                const float bias = p.bias == nullptr ? 0.0f : p.bias[n];
                out[uint64_t(rows.start + row) * p.out_stride + n] = narrow<Out>(sums[i][j][e] + bias);
            }
}

#define MANY(name, Out, M)                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) name(const __grid_constant__ LinearParams p) { \
        linear_many<Out, M>(p);                                                                             \
    }
MANY(linear_many_64_bf16, bf16, 64)
MANY(linear_many_128_bf16, bf16, 128)
MANY(linear_many_64_f32, float, 64)
MANY(linear_many_128_f32, float, 128)
