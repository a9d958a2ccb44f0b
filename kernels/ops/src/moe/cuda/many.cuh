// What both kernels of experts of many tokens share (moe_many.cu, moe_gathered.cu): their parameters, how
// they read weights and how they store results.
#pragma once
#include "cuda/wgmma.cuh"
#include "linear/cuda/linear.cuh"
#include "linear/cuda/wide.cuh"

namespace many {

using wide::TensorMap;

// As wide as the driver's maps are on the host.
struct alignas(128) Product {
    TensorMap w;      // boxes of the lines that are read at once by 64 along k
    TensorMap w_slab; // of 64 lines
    TensorMap x;      // boxes of some rows by 64 along k
    bf16* out;
    uint64_t out_stride;
    uint32_t lines;   // of weights of an expert
    uint32_t steps;   // of 64 along k
    uint32_t expert;  // from one expert to the next, in the last coordinate of the maps of w
    uint32_t reused;  // whether several tiles read the same weights
};
// Gate and up, down; the same of experts that all rows take.
enum Which : uint32_t { kUp, kDown, kAlwaysUp, kAlwaysDown };

struct Params {
    Product product[4];
    const uint32_t* totals;  // tiles
    const uint32_t* count;   // of real rows
    const RowTile* tiles;
    uint32_t* progress;      // units fetched; then parts of gate and up that are there, of every tile
    const bf16* x;           // gathered: [rows, width]
    const uint32_t* row_of;  // gathered: the row of every sorted pair, below 65536
    uint32_t width;
    uint32_t rows;
    uint32_t always;         // whether there are experts that all rows take
};

constexpr uint32_t kPatience = 1u << 28;

// Where somebody is in a ring.
template <uint32_t kStages> struct Place {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void load_five(uint32_t to, const TensorMap& map, uint32_t k, uint32_t c3, uint32_t c4, uint64_t keep, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %3, %4, %5}], [%6], %7;\n" ::"r"(to),
        "l"(&map), "r"(k), "r"(0), "r"(c3), "r"(c4), "r"(bar), "l"(keep)
        : "memory");
}

// Results of 64 lines of weights, from `line` on, for `N` rows.
template <int N> __device__ __forceinline__ void store_inner(const Product& of, uint32_t row, int rows, uint32_t line, float (&d)[N / 2]) {
    const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t inner = line / 2 + warp * 8;
    const bool there = inner < of.lines / 2;
    bf16* out = of.out + (row + g) * of.out_stride + inner + 2 * t;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float* v = &d[4 * j];
        const uint32_t both = wide::transposed(pack_bf16(wide::gated(v[0], v[2]), wide::gated(v[1], v[3])));
        if (there && int(8 * j + g) < rows) *reinterpret_cast<uint32_t*>(out + 8 * j * of.out_stride) = both;
    }
}
// Of each sixteen lines 2t and 2t + 1, then 8 + 2t and 8 + 2t + 1 are next to each other in the output.
template <int N> __device__ __forceinline__ void store_down(const Product& of, uint32_t row, int rows, uint32_t line, float (&d)[N / 2]) {
    const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t output = line + warp * 16;
    const bool there = output < of.lines;
    bf16* out = of.out + (row + g) * of.out_stride + output + 4 * t;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const uint2 four = {wide::transposed(pack_bf16(d[4 * j], d[4 * j + 1])), wide::transposed(pack_bf16(d[4 * j + 2], d[4 * j + 3]))};
        if (there && int(8 * j + g) < rows) *reinterpret_cast<uint2*>(out + 8 * j * of.out_stride) = four;
    }
}

}  // namespace many
