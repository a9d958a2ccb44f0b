// Prepares the weights of the absorbed form, once at load: the key half of `kv_b`, transposed per
// head, so that queries go to latent space by an ordinary product.
#include "cuda/common.cuh"

struct AbsorbParams {
    const void* kv_b;  // [heads * (nope + v), latent]
    void* out;         // [heads, latent, nope]
    uint32_t heads, nope, v, latent;
};

template <typename T> __device__ void absorb_weights(const AbsorbParams& p) {
    __shared__ T tile[32][33];
    const uint32_t head = blockIdx.z, n0 = blockIdx.y * 32, l0 = blockIdx.x * 32;
    const T* from = static_cast<const T*>(p.kv_b) + uint64_t(head) * (p.nope + p.v) * p.latent;
    T* to = static_cast<T*>(p.out) + uint64_t(head) * p.latent * p.nope;
    const uint32_t column = threadIdx.x % 32;
    for (uint32_t i = threadIdx.x / 32; i < 32; i += blockDim.x / 32) {
        if (n0 + i < p.nope && l0 + column < p.latent) tile[i][column] = from[uint64_t(n0 + i) * p.latent + l0 + column];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x / 32; i < 32; i += blockDim.x / 32) {
        if (l0 + i < p.latent && n0 + column < p.nope) to[uint64_t(l0 + i) * p.nope + n0 + column] = tile[column][i];
    }
}

extern "C" __global__ void __launch_bounds__(256) absorb_weights_f32(const __grid_constant__ AbsorbParams p) {
    absorb_weights<float>(p);
}
extern "C" __global__ void __launch_bounds__(256) absorb_weights_bf16(const __grid_constant__ AbsorbParams p) {
    absorb_weights<bf16>(p);
}
