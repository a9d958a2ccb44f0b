// Which experts few tokens touch, found by every block by itself.
#pragma once
#include "linear/cuda/stream.cuh"
#include "moe/cuda/route.cuh"

constexpr uint32_t kMostHeld = 512, kMostPairs = 128;

// The experts held here that are touched, in the order of their numbers, so that a token's sum is the
// same whatever the others choose.
struct Touched {
    uint32_t count;
    uint32_t held[kMostHeld / 32];  // a bit for every expert
    uint32_t expert[kMostPairs];
    uint32_t mask[kMostPairs];                              // which tokens take it
    alignas(16) uint8_t pair[kMostPairs][stream::kTokens];  // and which of their choices it is
    alignas(16) float weight[kMostPairs][stream::kTokens];
};

// What is chosen, or by what.
struct Chosen {
    uint32_t* experts;  // [tokens, top_k]
    float* weights;     // [tokens, top_k]
    RouteParams route;  // its logits are null where the choice is made already
    uint32_t top_k, first, held;
};

// By the warps that multiply, one for each token; `wait` waits for the kernel in front. A choice made
// here is left in memory by the first block. All of it runs twice, first on what lies there before the
// kernel in front has ended: otherwise everybody would wait for instructions to be fetched.
template <class Wait> __device__ void touch(const Chosen& p, Touched& t, uint32_t tokens, Wait wait) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t pass = 0; pass < 2; pass++) {
        if (threadIdx.x < kMostHeld / 32) t.held[threadIdx.x] = 0;
        if (threadIdx.x < kMostPairs) t.mask[threadIdx.x] = 0;
        stream::multipliers_meet();
        if (pass == 1) wait();
        Choice mine = {};
        const uint32_t pair = warp * p.top_k + lane;
        const bool chooses = warp < tokens && lane < p.top_k;
        if (p.route.logits != nullptr) {
            if (warp < tokens) mine = choose<float>(p.route, warp, lane);
        } else if (chooses) {
            mine = {__ldcg(p.experts + pair), __ldcg(p.weights + pair)};
        }
        const uint32_t own = chooses ? mine.expert - p.first : kNone;
        if (own < p.held) atomicOr(&t.held[own / 32], 1u << own % 32);
        stream::multipliers_meet();
        // An expert for each lane, in the order of their numbers.
        uint32_t count = 0;
        for (uint32_t word = 0; word < (p.held + 31) / 32; word++) {
            const uint32_t bits = t.held[word], expert = word * 32 + lane;
            const uint32_t place = count + __popc(bits & ((1u << lane) - 1));
            count += __popc(bits);
            float weight = 0;
            uint32_t which = kNone;
            for (uint32_t j = 0; j < p.top_k; j++) {
                const uint32_t other = __shfl_sync(0xffffffff, own, j);
                const float more = __shfl_sync(0xffffffff, mine.weight, j);
                if (other != expert) continue;
                if (which == kNone) which = j;
                weight += more;
            }
            if (!(bits >> lane & 1)) continue;
            if (warp == 0) t.expert[place] = expert;
            t.pair[place][warp] = which;
            t.weight[place][warp] = weight;
            if (which != kNone) atomicOr(&t.mask[place], 1u << warp);
        }
        if (threadIdx.x == 0) t.count = count;
        stream::multipliers_meet();
        if (pass == 1 && blockIdx.x == 0 && chooses && p.route.logits != nullptr) {
            p.experts[pair] = mine.expert;
            p.weights[pair] = mine.weight;
        }
    }
}
