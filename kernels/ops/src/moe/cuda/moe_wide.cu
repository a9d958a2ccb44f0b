// Products of experts by the machinery of linear/cuda/wide.cuh: gate and up with the activation, then
// down. Rows of x are laid by sorted pair before (moe_lay.cu), so that both read whole boxes.
#include "linear/cuda/wide.cuh"

#define TOKENMILL_EXPERTS(NAME, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 1) NAME##_inner(const __grid_constant__ wide::Params p) { \
        wide::run<__VA_ARGS__, wide::Grouped<__VA_ARGS__>, wide::Out::kInner>(p);                                \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 1) NAME##_down(const __grid_constant__ wide::Params p) {  \
        wide::run<__VA_ARGS__, wide::Grouped<__VA_ARGS__>, wide::Out::kBf16>(p);                                 \
    }

using Experts64 = wide::Shape<2, 1, 64, 8, 2>;
using Experts256 = wide::Shape<2, 1, 256, 32, 1>;
TOKENMILL_EXPERTS(experts_wide_64, Experts64)
TOKENMILL_EXPERTS(experts_wide_256, Experts256)
