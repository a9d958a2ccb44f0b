// The choice of a token's experts by one warp, in registers, where no limit of groups is set. Of equal
// scores the lower number wins, NaN never does.
#pragma once
#include "cuda/async.cuh"

struct RouteParams {
    const void* logits;       // [rows, experts]
    const float* correction;  // [experts] or null
    uint32_t* chosen;         // [rows, top_k]
    float* weights;           // [rows, top_k]
    const uint32_t* count;
    uint32_t rows, experts, top_k;
    uint32_t sigmoid;         // else softmax
    uint32_t groups;          // 0: no limit
    uint32_t open_groups;
    uint32_t sum_top2;        // else the best of a group is its score
    uint32_t norm_topk;
    float scale;
};

constexpr uint32_t kNone = 0xffffffff;

// What a lane has after a choice: where it is below `top_k`, the expert in that place and its weight.
struct Choice {
    uint32_t expert;
    float weight;
};

// In the order of floats; 0 for what is never chosen.
__device__ __forceinline__ uint32_t rank_of(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (isnan(x) || x == -INFINITY) return 0;
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// Up to `32 * kEach` experts, of which at most as many as lanes are chosen. All lanes take part.
template <typename T, int kEach> __device__ Choice choose(const RouteParams& p, uint64_t row, uint32_t lane) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.experts;
    float scores[kEach];
#pragma unroll
    for (int e = 0; e < kEach; e++) scores[e] = lane + 32 * e < p.experts ? widen(logits[lane + 32 * e]) : -INFINITY;
    if (p.sigmoid) {
#pragma unroll
        for (int e = 0; e < kEach; e++) scores[e] = 1.0f / (1.0f + expf(-scores[e]));
    } else {
        float top = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int e = 0; e < kEach; e++) top = fmaxf(top, scores[e]);
        top = warp_max(top);
#pragma unroll
        for (int e = 0; e < kEach; e++) {
            scores[e] = lane + 32 * e < p.experts ? expf(scores[e] - top) : 0.0f;
            sum += scores[e];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int e = 0; e < kEach; e++) scores[e] /= sum;
    }
    uint32_t rank[kEach];
#pragma unroll
    for (int e = 0; e < kEach; e++) {
        const uint32_t expert = lane + 32 * e;
        const bool there = expert < p.experts;
        rank[e] = there ? rank_of(scores[e] + (p.correction == nullptr ? 0.0f : p.correction[expert])) : 0;
    }
    Choice mine = {};
    float sum = 1e-20f;
    for (uint32_t j = 0; j < p.top_k; j++) {
        uint32_t best = 0, at = kNone;
#pragma unroll
        for (int e = 0; e < kEach; e++) {
            if (rank[e] > best) best = rank[e], at = lane + 32 * e;
        }
        const uint32_t all = __reduce_max_sync(0xffffffff, best);
        const uint32_t expert = all == 0 ? 0 : __reduce_min_sync(0xffffffff, best == all ? at : kNone);
        float score = 0.0f;
#pragma unroll
        for (int e = 0; e < kEach; e++) {
            if (lane + 32 * e == expert) score = scores[e], rank[e] = 0;
        }
        score = __shfl_sync(0xffffffff, score, expert % 32);
        sum += score;
        if (lane == j) mine = {expert, score};
    }
    mine.weight *= p.norm_topk ? p.scale / sum : p.scale;
    return mine;
}

constexpr uint32_t kMostInRegisters = 512;

template <typename T> __device__ __forceinline__ Choice choose(const RouteParams& p, uint64_t row, uint32_t lane) {
    if (p.experts <= 64) return choose<T, 2>(p, row, lane);
    if (p.experts <= 128) return choose<T, 4>(p, row, lane);
    if (p.experts <= 256) return choose<T, 8>(p, row, lane);
    return choose<T, 16>(p, row, lane);
}
