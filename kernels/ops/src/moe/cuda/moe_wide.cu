// Products of experts by the machinery of linear/cuda/wide.cuh: gate and up with the activation, then
// down. Rows of x are laid by sorted pair before (moe_lay.cu), so that both read whole boxes.
#include "linear/cuda/wide.cuh"

using Experts64 = wide::Shape<2, 1, 64, 8, 2>;

extern "C" __global__ void __launch_bounds__(Experts64::kThreads, 1) experts_wide_inner(const __grid_constant__ wide::Params p) {
    wide::run<Experts64, wide::Grouped<Experts64>, wide::Out::kInner>(p);
}
extern "C" __global__ void __launch_bounds__(Experts64::kThreads, 1) experts_wide_down(const __grid_constant__ wide::Params p) {
    wide::run<Experts64, wide::Grouped<Experts64>, wide::Out::kBf16>(p);
}
