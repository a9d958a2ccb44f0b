// One block works on one row of logits: orders, masses, cuts and walks.
//
// The order is that of the contract: higher logits first, equal ones by token. Masses are integers
// (44 bits behind the point), so a sum is the same in whatever order atomics and warps add it up,
// and a row's draw depends on the row alone. Weights of the likeliest are 1, so 2^18 tokens fit
// easily into 64 bits.
#pragma once

#include "cuda/common.cuh"

constexpr uint32_t kRowThreads = 1024, kWarps = kRowThreads / 32, kBins = 2048;
constexpr float kPoint = 17592186044416.0f;  // 2^44
constexpr uint32_t kLast = 0xffffffff;

// A bit pattern that grows with the number; zeros of both signs are one.
__device__ __forceinline__ uint32_t order_key(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
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

// A row, and how its logits become weights.
struct Row {
    const float* logits;
    uint32_t vocab;
    float highest, scale, min_p;
    Cut cut;

    __device__ __forceinline__ float weight(float logit) const {
        return exact_exp(__fmul_rn(__fsub_rn(logit, highest), scale));
    }
    __device__ __forceinline__ uint64_t mass(float logit) const {
        return static_cast<uint64_t>(weight(logit) * kPoint);
    }
    // What a token that no filter took away adds to the draw.
    __device__ __forceinline__ uint64_t kept_mass(uint32_t token) const {
        const float logit = logits[token];
        if (!cut.keeps(order_key(logit), token)) return 0;
        const float w = weight(logit);
        return w >= min_p ? static_cast<uint64_t>(w * kPoint) : 0;
    }
};

struct RowShared {
    unsigned long long bins[kBins];
    unsigned long long parts[kWarps];
    unsigned long long before;
    uint32_t found;
    float floats[kWarps];
    uint32_t tokens[kWarps];
};

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__device__ __forceinline__ uint64_t warp_prefix(uint64_t x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t lower = __shfl_up_sync(0xffffffff, x, step);
        if (threadIdx.x % 32 >= step) x += lower;
    }
    return x;
}

__device__ __forceinline__ uint64_t block_total(RowShared& s, uint64_t x) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s.parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(static_cast<uint64_t>(s.parts[threadIdx.x % 32]));
}

// The first token at which the running sum of `amount` reaches `target`; kLast where it never does.
// Each warp sums a stretch, the stretch that holds the target is cut up again.
template <typename Amount> __device__ uint32_t walk(RowShared& s, uint32_t vocab, uint64_t target, Amount amount) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t begin = 0, end = vocab;
    while (end - begin > 32) {
        const uint32_t stretch = (end - begin + kWarps - 1) / kWarps;
        const uint32_t from = min(begin + warp * stretch, end), to = min(from + stretch, end);
        uint64_t sum = 0;
        for (uint32_t i = from + lane; i < to; i += 32) sum += amount(i);
        sum = warp_sum(sum);
        __syncthreads();
        if (lane == 0) s.parts[warp] = sum;
        __syncthreads();
        const uint64_t until = warp_prefix(static_cast<uint64_t>(s.parts[lane]));
        const uint32_t reached = __ballot_sync(0xffffffff, until >= target);
        if (reached == 0) return kLast;
        const uint32_t at = __ffs(reached) - 1;
        const uint64_t below = __shfl_sync(0xffffffff, until, max(at, 1u) - 1);
        target -= at == 0 ? 0 : below;
        begin = min(begin + at * stretch, end);
        end = min(begin + stretch, end);
    }
    const uint64_t until = warp_prefix(begin + lane < end ? amount(begin + lane) : 0);
    const uint32_t reached = __ballot_sync(0xffffffff, until >= target);
    return reached == 0 ? kLast : begin + __ffs(reached) - 1;
}

// The cut of the shortest beginning of the order whose amounts reach `target`; `row.cut` where even
// all do not. Radix select: three digits of the key, from the top; at each the bin that holds the
// target is found from the sums of bins. `by_mass`: amounts are masses, else each token counts one.
__device__ Cut select(RowShared& s, const Row& row, uint64_t target, bool by_mass) {
    const uint32_t shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
    uint32_t prefix = 0;
    uint64_t in_bin = 0;
    for (int digit = 0; digit < 3; ++digit) {
        const uint32_t shift = shifts[digit], mask = (1u << widths[digit]) - 1;
        for (uint32_t i = threadIdx.x; i < kBins; i += kRowThreads) s.bins[i] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < row.vocab; i += kRowThreads) {
            const float logit = row.logits[i];
            const uint32_t key = order_key(logit);
            // The digits above this one; all of a 32-bit key above the first are none.
            const bool same = digit == 0 || key >> (shift + widths[digit]) == prefix;
            if (!same || !row.cut.keeps(key, i)) continue;
            const uint64_t amount = by_mass ? row.mass(logit) : 1;
            if (amount > 0) atomicAdd(&s.bins[key >> shift & mask], static_cast<unsigned long long>(amount));
        }
        __syncthreads();
        // Thread t has bins 2047 - 2t and 2046 - 2t: likelier ones belong to lower threads.
        const uint32_t high = kBins - 1 - 2 * threadIdx.x;
        const uint64_t a = s.bins[high], b = s.bins[high - 1];
        uint64_t until = warp_prefix(a + b);
        if (threadIdx.x % 32 == 31) s.parts[threadIdx.x / 32] = until;
        if (threadIdx.x == 0) s.found = kLast;
        __syncthreads();
        uint64_t below = 0;
        for (uint32_t i = 0; i < threadIdx.x / 32; ++i) below += s.parts[i];
        until += below;
        const uint64_t before = until - a - b;
        if (before < target && until >= target) {
            const bool first = before + a >= target;
            s.found = first ? high : high - 1;
            s.before = before + (first ? 0 : a);
        }
        __syncthreads();
        if (s.found == kLast) return row.cut;
        target -= s.before;
        prefix = prefix << widths[digit] | s.found;
        in_bin = s.bins[s.found];
        __syncthreads();
    }
    // Tokens of one logit: as many of the first as the target needs.
    if (target >= in_bin) return {prefix, prefix == row.cut.key ? row.cut.token : kLast};
    const uint32_t token = walk(s, row.vocab, target, [&](uint32_t i) -> uint64_t {
        const float logit = row.logits[i];
        const uint32_t key = order_key(logit);
        return key == prefix && row.cut.keeps(key, i) ? (by_mass ? row.mass(logit) : 1) : 0;
    });
    return {prefix, token};
}
