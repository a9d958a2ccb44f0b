// Products head by head for many rows: one block has 64 outputs of a head and some rows, and all of what
// it multiplies in shared memory at once. Weights are on their way before the kernel in front has ended.
#pragma once
#include "linear/cuda/wide.cuh"

namespace mla_heads {

struct alignas(128) Params {
    wide::TensorMap w;      // [heads, outputs, inputs], boxes of 64 along the inputs by 64 outputs
    wide::TensorMap x;      // [rows, heads, inputs], boxes of 64 along the inputs by a tile's rows
    bf16* out;              // [rows, heads, outputs], out_row apart
    const uint32_t* count;  // of real rows
    uint64_t out_row;
    uint32_t rows, heads, outputs;
};

constexpr int kThreads = 128;
constexpr int kOutputs = 64;

template <int kInputs, int kRows_> struct Shape {
    static constexpr int kRows = kRows_, kChunks = kInputs / 64;
    static constexpr uint32_t kW = kOutputs * wide::kLine, kX = kRows * wide::kLine, kChunk = kW + kX;
    static constexpr uint32_t kShared = kChunks * (kChunk + 8);  // as heads.rs says
};

__device__ __forceinline__ void load_head(uint32_t to, const wide::TensorMap& map, uint32_t k, uint32_t head, uint32_t row, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(to),
        "l"(&map), "r"(k), "r"(head), "r"(row), "r"(bar)
        : "memory");
}

// Item: part of the outputs, head, tile of rows. `memory` begins on 1024 bytes.
template <class S> __device__ __forceinline__ void product_of(const Params& p, uint32_t item, uint32_t memory) {
    const uint32_t parts = p.outputs / kOutputs, part = item % parts, head = item / parts % p.heads;
    const uint32_t row = item / parts / p.heads * S::kRows, real = real_rows(p.count, p.rows);
    if (row >= real) {
        wait_for_previous();
        return;
    }
    const auto bar = [&](uint32_t chunk) { return memory + S::kChunks * S::kChunk + 8 * chunk; };
    const auto w = [&](uint32_t chunk) { return memory + chunk * S::kChunk; };
    if (threadIdx.x == 0) {
        for (uint32_t c = 0; c < S::kChunks; c++) barrier_init(bar(c), 1);
        fence_barrier_init();
        for (uint32_t c = 0; c < S::kChunks; c++) {
            barrier_expect(bar(c), S::kChunk);
            wide::load_lines(w(c), p.w, c * 64, part * kOutputs, head, wide::kEvictNormal, bar(c));
        }
    }
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x == 0) {
        for (uint32_t c = 0; c < S::kChunks; c++) load_head(w(c) + S::kW, p.x, c * 64, head, row, bar(c));
    }
    float d[S::kRows / 2] = {};
#pragma unroll
    for (uint32_t c = 0; c < S::kChunks; c++) {
        barrier_wait(bar(c), 0);
        products_begin();
#pragma unroll
        for (int step = 0; step < 4; step++) product<S::kRows>(d, operand(w(c)) + step * kStep16, operand(w(c) + S::kW) + step * kStep16);
        products_commit();
    }
    products_wait<0>();
    const wide::Target to = {p.out + head * p.outputs, p.out_row, p.outputs, nullptr};
    const wide::Segment rows = {0, 0, row, min(uint32_t(S::kRows), real - row), 0, 0, 0};
    wide::store<S::kRows, wide::Out::kBf16>(to, rows, part * kOutputs, d);
}

using ToLatent = Shape<128, 64>;

}  // namespace mla_heads
