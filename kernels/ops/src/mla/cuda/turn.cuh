// Rotation of heads of 64, and products by tensor cores whose operands lie in memory as they are read.
#pragma once
#include "mla/cuda/keys.cuh"

namespace mla {

constexpr int kNope = 128;
constexpr int kValue = 128;
constexpr int kPairs = kRope / 2;

struct Turn {
    float cosine, sine;
};
__device__ __forceinline__ Turn turn_of(uint32_t position, float inv_freq, float factor) {
    Turn turn;
    sincosf(__fmul_rn(static_cast<float>(position), inv_freq), &turn.sine, &turn.cosine);
    turn.cosine *= factor, turn.sine *= factor;
    return turn;
}

// The two elements of a pair, which are neighbours or half a head apart.
struct Pair {
    int a, b;
    __device__ Pair(int pair, bool interleaved)
        : a(interleaved ? 2 * pair : pair), b(interleaved ? 2 * pair + 1 : pair + kPairs) {}
    __device__ float2 load(const bf16* x) const { return {widen(x[a]), widen(x[b])}; }
    __device__ void store(bf16* x, float2 v, Turn turn) const {
        const float2 by = turned(v.x, v.y, turn.cosine, turn.sine);
        x[a] = narrow<bf16>(by.x), x[b] = narrow<bf16>(by.y);
    }
};

// Products take the elements k of 32 in another order, the same for both operands: lane t of a quad has
// 8 t to 8 t + 7, so that all come by 16 bytes. Outputs of a warp are permuted too: column c of tile j
// is output 4 (c / 2) + 2 j + c % 2, so that a lane has four neighbours, 4 t to 4 t + 3.
__device__ __forceinline__ int output_of(int j, int lane) { return lane / 8 * 4 + 2 * j + lane / 4 % 2; }

// d[j] += x w[j] over 32 elements of k.
__device__ __forceinline__ void mma_32(float (&d)[4], uint4 low, uint4 high, uint4 w) {
    mma_16816(d, low.x, high.x, low.y, high.y, w.x, w.y);
    mma_16816(d, low.z, high.z, low.w, high.w, w.z, w.w);
}

}  // namespace mla
