// How logits are ordered and weighed.
//
// The order is that of the contract: higher logits first, equal ones by token. Masses are integers
// (44 bits behind the point), so a sum is the same in whatever order atomics and warps add it up,
// and a row's draw depends on the row alone. Weights of the likeliest are 1, so the masses of 2^19
// tokens fit into 63 bits.
#pragma once

#include "cuda/common.cuh"

constexpr float kPoint = 17592186044416.0f;  // 2^44
constexpr uint32_t kLast = 0xffffffff;
// Further below the likeliest, in units of the temperature, no mass is left: ln 2^44 is 30.5.
constexpr float kReach = 31.0f;

// A bit pattern that grows with the number; zeros of both signs are one.
__device__ __forceinline__ uint32_t order_key(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_value(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// exp(x) for x <= 0, to the bit what the processor's path computes: no fused operations.
__device__ __forceinline__ float exact_exp(float x) {
    const float kRound = 12582912.0f;
    const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896341f), kRound);
    const float n = __fsub_rn(shifted, kRound);
    const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 355.0f / 512.0f)), __fmul_rn(n, -2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3982e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 0.16666665f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    const float power = __uint_as_float((__float_as_uint(shifted) << 23) + __float_as_uint(1.0f));
    const float y = __fmul_rn(__fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f), power);
    return x < -87.0f ? 0.0f : y;
}

// The last token that is kept, by the order.
struct Cut {
    uint32_t key, token;
    __device__ __forceinline__ bool keeps(uint32_t k, uint32_t t) const { return k > key || (k == key && t <= token); }
};
constexpr Cut kKeepAll = {0, kLast};

// How a row's logits become weights, and which were filtered away so far.
struct Weigher {
    float highest, scale;
    Cut cut;

    __device__ __forceinline__ float weight(float logit) const {
        return exact_exp(__fmul_rn(__fsub_rn(logit, highest), scale));
    }
    __device__ __forceinline__ uint64_t mass(float logit) const {
        return static_cast<uint64_t>(weight(logit) * kPoint);
    }
    __device__ __forceinline__ bool keeps(float logit, uint32_t token) const {
        return cut.keeps(order_key(logit), token);
    }
};
