// Rotary embedding inside heads, in place. One block per row: angles once, then all heads.
#include "cuda/common.cuh"

struct RopeParams {
    void* x;
    const uint32_t* positions;
    const float* inv_freq;
    const uint32_t* count;
    uint32_t rows, row, heads, offset, width, stride;
    float factor;
    uint32_t interleaved;
};

template <typename T> __device__ void rope(const RopeParams& p) {
    extern __shared__ float turn[];  // cosines, then sines
    const uint32_t row = blockIdx.x, pairs = p.width / 2;
    if (row >= real_rows(p.count, p.rows)) return;
    const float position = static_cast<float>(p.positions[row]);
    for (uint32_t i = threadIdx.x; i < pairs; i += blockDim.x) {
        float sine, cosine;
        // One rounding of the product, as the contract says, then the full range of angles.
        sincosf(__fmul_rn(position, p.inv_freq[i]), &sine, &cosine);
        turn[i] = cosine * p.factor;
        turn[pairs + i] = sine * p.factor;
    }
    __syncthreads();
    T* x = static_cast<T*>(p.x) + uint64_t(row) * p.row + p.offset;
    for (uint32_t item = threadIdx.x; item < pairs * p.heads; item += blockDim.x) {
        const uint32_t head = item / pairs, i = item % pairs;
        T* at = x + uint64_t(head) * p.stride;
        const uint32_t a = p.interleaved ? 2 * i : i, b = p.interleaved ? 2 * i + 1 : i + pairs;
        const float u = widen(at[a]), v = widen(at[b]);
        const float2 by = turned(u, v, turn[i], turn[pairs + i]);
        at[a] = narrow<T>(by.x);
        at[b] = narrow<T>(by.y);
    }
}

extern "C" __global__ void __launch_bounds__(256) rope_f32(const __grid_constant__ RopeParams p) {
    rope<float>(p);
}
extern "C" __global__ void __launch_bounds__(256) rope_bf16(const __grid_constant__ RopeParams p) {
    rope<bf16>(p);
}
