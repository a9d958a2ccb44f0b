// Products of tens to hundreds of rows by the machinery of wide.cuh.
#include "linear/cuda/wide.cuh"

#define TOKENMILL_WIDE(NAME, ...)                                                                               \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 1) NAME##_bf16(const __grid_constant__ wide::Params p) { \
        wide::run<__VA_ARGS__, wide::Balanced<__VA_ARGS__>, wide::Out::kBf16>(p);                               \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 1) NAME##_f32(const __grid_constant__ wide::Params p) {  \
        wide::run<__VA_ARGS__, wide::Balanced<__VA_ARGS__>, wide::Out::kF32>(p);                                \
    }

// silu(gate) * up of as many lines of both.
#define TOKENMILL_WIDE_GATE(NAME, ...)                                                                          \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 1) NAME##_gate(const __grid_constant__ wide::Params p) { \
        wide::run<__VA_ARGS__, wide::Balanced<__VA_ARGS__>, wide::Out::kInner>(p);                              \
    }

// Small tiles leave room for a second block, so that the next product can begin; large ones take two
// boxes at once of the lines of weights while rows are few.
template <int kTile, int kRows>
using WideShape = wide::Shape<kTile / 64, 1, kRows, kRows, kTile == 128 && kRows <= 64 ? 2 : 1, kTile == 64 ? 2 : 1>;
using Wide64x16 = WideShape<64, 16>;
using Wide64x32 = WideShape<64, 32>;
using Wide64x64 = WideShape<64, 64>;
using Wide64x96 = WideShape<64, 96>;
using Wide64x128 = WideShape<64, 128>;
using Wide128x16 = WideShape<128, 16>;
using Wide128x32 = WideShape<128, 32>;
using Wide128x64 = WideShape<128, 64>;
using Wide128x96 = WideShape<128, 96>;
using Wide128x128 = WideShape<128, 128>;
using Wide128x192 = WideShape<128, 192>;
using Wide128x256 = WideShape<128, 256>;
TOKENMILL_WIDE(linear_wide_64x16, Wide64x16)
TOKENMILL_WIDE(linear_wide_64x32, Wide64x32)
TOKENMILL_WIDE(linear_wide_64x64, Wide64x64)
TOKENMILL_WIDE(linear_wide_64x96, Wide64x96)
TOKENMILL_WIDE(linear_wide_64x128, Wide64x128)
TOKENMILL_WIDE(linear_wide_128x16, Wide128x16)
TOKENMILL_WIDE(linear_wide_128x32, Wide128x32)
TOKENMILL_WIDE(linear_wide_128x64, Wide128x64)
TOKENMILL_WIDE(linear_wide_128x96, Wide128x96)
TOKENMILL_WIDE(linear_wide_128x128, Wide128x128)
TOKENMILL_WIDE(linear_wide_128x192, Wide128x192)
TOKENMILL_WIDE(linear_wide_128x256, Wide128x256)
TOKENMILL_WIDE_GATE(linear_wide_64x16, Wide64x16)
TOKENMILL_WIDE_GATE(linear_wide_64x32, Wide64x32)
TOKENMILL_WIDE_GATE(linear_wide_64x64, Wide64x64)
TOKENMILL_WIDE_GATE(linear_wide_128x16, Wide128x16)
TOKENMILL_WIDE_GATE(linear_wide_128x32, Wide128x32)
TOKENMILL_WIDE_GATE(linear_wide_128x64, Wide128x64)
