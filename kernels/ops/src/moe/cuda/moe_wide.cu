// Products of experts by the machinery of linear/cuda/wide.cuh: gate and up with the activation, then
// down. Rows of x are laid by sorted pair before, so that both read whole boxes.
#include "linear/cuda/wide.cuh"

struct GatherParams {
    const uint4* x;         // [rows, vectors]
    const uint32_t* pairs;  // sorted place to pair
    const uint32_t* totals; // tiles, pairs
    uint4* out;             // [pairs, vectors]
    uint32_t top_k, vectors;
};

// Any number of blocks.
extern "C" __global__ void __launch_bounds__(256) gather_pairs(const __grid_constant__ GatherParams p) {
    wait_for_previous();
    // Not before: who comes next reads the tiles without waiting.
    allow_next();
    const uint32_t pairs = __ldcg(p.totals + 1);
    for (uint32_t place = blockIdx.x; place < pairs; place += gridDim.x) {
        const uint4* from = p.x + uint64_t(__ldcg(p.pairs + place) / p.top_k) * p.vectors;
        uint4* to = p.out + uint64_t(place) * p.vectors;
        for (uint32_t i = threadIdx.x; i < p.vectors; i += blockDim.x) to[i] = from[i];
    }
}

#define TOKENMILL_EXPERTS(NAME, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 1) NAME##_inner(const __grid_constant__ wide::Params p) { \
        wide::run<__VA_ARGS__, wide::Grouped<__VA_ARGS__>, wide::Out::kInner>(p);                                \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 1) NAME##_down(const __grid_constant__ wide::Params p) {  \
        wide::run<__VA_ARGS__, wide::Grouped<__VA_ARGS__>, wide::Out::kBf16>(p);                                 \
    }

using Experts64 = wide::Shape<2, 1, 64, 8, 2>;
using Experts256 = wide::Shape<2, 1, 256, 64, 1>;
TOKENMILL_EXPERTS(experts_wide_64, Experts64)
TOKENMILL_EXPERTS(experts_wide_256, Experts256)
