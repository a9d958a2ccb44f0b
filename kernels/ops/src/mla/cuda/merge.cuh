// Partial results of pieces, merged by their maxima and masses.
#pragma once
#include "mla/cuda/keys.cuh"

namespace mla_decode {

using mla::kLatent;
constexpr int kLines = 16;  // heads of a piece, padded

// A part of one row and head, four columns of it.
struct Merged {
    float top = -INFINITY, mass = 0.0f;
    float4 sum = {};

    // The factor of what has `high` for its maximum; where all is minus infinity nothing is subtracted.
    __device__ static float floor_of(float high) { return high == -INFINITY ? 0.0f : high; }

    __device__ void rise(float high) {
        const float shrink = exp2f(top - floor_of(high));
        top = high;
        mass *= shrink, sum.x *= shrink, sum.y *= shrink, sum.z *= shrink, sum.w *= shrink;
    }
    // What was added before has a maximum that is not above.
    __device__ void add(float2 lse, float4 v) {
        const float by = exp2f(lse.x - floor_of(top));
        mass += lse.y * by;
        sum.x += v.x * by, sum.y += v.y * by, sum.z += v.z * by, sum.w += v.w * by;
    }
    __device__ uint2 result() const {
        const float by = 1.0f / mass;
        const __nv_bfloat162 low = __floats2bfloat162_rn(sum.x * by, sum.y * by);
        const __nv_bfloat162 high = __floats2bfloat162_rn(sum.z * by, sum.w * by);
        return {*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
    }
};

// `sums` is [slots, 16, 512], `lse` [slots, 16]: maximum (base 2), mass.
struct Slots {
    const float* sums;
    const float2* lse;
};

// Pieces `first`, `first + step`, .. of the `mine.y` from slot `mine.x` on, `kAtOnce` loads under way.
template <int kAtOnce>
__device__ Merged merge_pieces(const Slots& p, uint2 mine, uint32_t line, uint32_t column, uint32_t first, uint32_t step) {
    Merged m;
    for (uint32_t base = first; base < mine.y; base += step * kAtOnce) {
        float4 v[kAtOnce];
        float2 of[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const uint32_t piece = min(base + i * step, mine.y - 1);
            const uint32_t place = (mine.x + piece) * kLines + line;
            of[i] = p.lse[place];
            v[i] = *reinterpret_cast<const float4*>(p.sums + uint64_t(place) * kLatent + column);
        }
        float high = m.top;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) high = fmaxf(high, of[i].x);
        m.rise(high);
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            if (base + i * step < mine.y) m.add(of[i], v[i]);
        }
    }
    return m;
}

// What several ways have merged; `sums` are `stride` apart.
__device__ __forceinline__ Merged merge_ways(const float2* lse, const float4* sums, uint32_t stride, uint32_t ways) {
    float high = -INFINITY;
    for (uint32_t w = 0; w < ways; w++) high = fmaxf(high, lse[w].x);
    Merged m;
    m.rise(high);
#pragma unroll 4
    for (uint32_t w = 0; w < ways; w++) m.add(lse[w], sums[w * stride]);
    return m;
}

}  // namespace mla_decode
