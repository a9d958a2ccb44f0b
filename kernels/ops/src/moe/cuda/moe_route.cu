// From router logits to experts and weights; one warp per token.
#include "moe/cuda/route.cuh"

// The first of the highest of `n` values; 0 where there is none.
__device__ uint32_t highest(const float* values, uint32_t n, uint32_t lane) {
    float best = -INFINITY;
    uint32_t at = kNone;
    for (uint32_t i = lane; i < n; i += 32) {
        if (values[i] > best) {
            best = values[i];
            at = i;
        }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, best, step);
        const uint32_t other_at = __shfl_xor_sync(0xffffffff, at, step);
        if (other > best || (other == best && other_at < at)) {
            best = other;
            at = other_at;
        }
    }
    return at == kNone ? 0 : at;
}

// One token by one warp; `scores` is room for three numbers per expert.
template <typename T> __device__ Choice route_row(const RouteParams& p, uint64_t row, float* scores, uint32_t lane) {
    const uint32_t n = p.experts;
    if (p.groups == 0 && n <= kMostInRegisters) return choose<T>(p, row, lane);
    float* order = scores + n;
    float* group_scores = order + n;
    const T* logits = static_cast<const T*>(p.logits) + row * n;

    if (p.sigmoid) {
        for (uint32_t i = lane; i < n; i += 32) scores[i] = 1.0f / (1.0f + expf(-widen(logits[i])));
    } else {
        float top = -INFINITY, sum = 0.0f;
        for (uint32_t i = lane; i < n; i += 32) top = fmaxf(top, widen(logits[i]));
        top = warp_max(top);
        for (uint32_t i = lane; i < n; i += 32) {
            scores[i] = expf(widen(logits[i]) - top);
            sum += scores[i];
        }
        sum = warp_sum(sum);
        for (uint32_t i = lane; i < n; i += 32) scores[i] /= sum;
    }
    for (uint32_t i = lane; i < n; i += 32) order[i] = scores[i] + (p.correction == nullptr ? 0.0f : p.correction[i]);
    __syncwarp();

    if (p.groups > 0) {
        const uint32_t size = n / p.groups;
        for (uint32_t group = lane; group < p.groups; group += 32) {
            float first = -INFINITY, second = -INFINITY;
            for (uint32_t i = group * size; i < (group + 1) * size; ++i) {
                if (order[i] > first) {
                    second = first;
                    first = order[i];
                } else if (order[i] > second) {
                    second = order[i];
                }
            }
            group_scores[group] = p.sum_top2 && size > 1 ? first + second : first;
        }
        __syncwarp();
        // A chosen group's score becomes NaN, which is never the highest, and marks it open.
        for (uint32_t i = 0; i < p.open_groups; ++i) {
            const uint32_t best = highest(group_scores, p.groups, lane);
            __syncwarp();
            if (lane == 0) group_scores[best] = NAN;
            __syncwarp();
        }
        for (uint32_t i = lane; i < n; i += 32) {
            if (!isnan(group_scores[i / size])) order[i] = -INFINITY;
        }
        __syncwarp();
    }

    float sum = 1e-20f;
    Choice mine = {};
    for (uint32_t j = 0; j < p.top_k; ++j) {
        const uint32_t best = highest(order, n, lane);
        sum += scores[best];
        if (lane == j) mine = {best, scores[best]};
        __syncwarp();
        if (lane == 0) order[best] = -INFINITY;
        __syncwarp();
    }
    mine.weight *= p.norm_topk ? p.scale / sum : p.scale;
    return mine;
}

template <typename T> __device__ void route(const RouteParams& p) {
    extern __shared__ float memory[];
    wait_for_previous();
    allow_next();
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint64_t row = uint64_t(blockIdx.x) * (blockDim.x / 32) + warp;
    if (row >= real_rows(p.count, p.rows)) return;
    const Choice mine = route_row<T>(p, row, memory + warp * 3 * p.experts, lane);
    if (lane < p.top_k) {
        p.chosen[row * p.top_k + lane] = mine.expert;
        p.weights[row * p.top_k + lane] = mine.weight;
    }
}

extern "C" __global__ void __launch_bounds__(128) route_f32(const __grid_constant__ RouteParams p) {
    route<float>(p);
}
extern "C" __global__ void __launch_bounds__(128) route_bf16(const __grid_constant__ RouteParams p) {
    route<bf16>(p);
}
