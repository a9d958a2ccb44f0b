// Queries of many rows into latent space, and results out of it, head by head.
#include "mla/cuda/heads.cuh"

#define TOKENMILL_HEADS(NAME, ...)                                                                                     \
    extern "C" __global__ void __launch_bounds__(mla_heads::kThreads) NAME(const __grid_constant__ mla_heads::Params p) { \
        extern __shared__ __align__(1024) uint8_t memory[];                                                            \
        allow_next();                                                                                                  \
        mla_heads::product_of<__VA_ARGS__>(p, blockIdx.x, shared_address(memory));                                     \
    }

using FromLatent32 = mla_heads::Shape<512, 32>;
using FromLatent64 = mla_heads::Shape<512, 64>;
TOKENMILL_HEADS(mla_heads_128x64, mla_heads::ToLatent)
TOKENMILL_HEADS(mla_heads_512x32, FromLatent32)
TOKENMILL_HEADS(mla_heads_512x64, FromLatent64)
