// The likeliest token of every row, where no row asks for more: a stream of logits through registers,
// so that blocks are small and many.
#include "sample/cuda/read.cuh"

struct GreedyParams {
    const float* logits;  // [rows, vocab]
    const uint32_t* count;
    uint32_t* tokens;     // [rows]
    uint32_t* faults;     // [rows]: 0 none, 1 not a number, 2 nothing allowed
    uint32_t rows, vocab;
};

extern "C" __global__ void __launch_bounds__(kThreads, 4) greedy(const __grid_constant__ GreedyParams p) {
    constexpr uint32_t kAhead = 4;
    __shared__ Shared s;
    const uint32_t index = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (index >= real_rows(p.count, p.rows)) return;
    // Others write here only once this block runs.
    auto started = Stretch::cluster().barrier_arrive();
    Stretch row = stretch_of(s, nullptr, p.vocab);
    const float* from = p.logits + uint64_t(index) * p.vocab + row.first;
    const bool wide = p.vocab % 4 == 0 && aligned16(p.logits);
    auto four = [&](uint32_t at) -> float4 {
        if (wide && at < row.len) return __ldg(reinterpret_cast<const float4*>(from + at));
        auto one = [&](uint32_t i) { return i < row.len ? __ldg(from + i) : -INFINITY; };
        return {one(at), one(at + 1), one(at + 2), one(at + 3)};
    };

    // The first four with the highest logit.
    float best = -INFINITY;
    uint32_t at = kLast;
    bool bad = false;
    for (uint32_t base = 4 * threadIdx.x; base < row.padded; base += kAhead * 4 * kThreads) {
        float4 x[kAhead];
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) x[i] = four(base + 4 * i * kThreads);
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
            const float top = larger(x[i]);
            bad |= !(top < INFINITY);
            if (top > best) {
                best = top;
                at = base + 4 * i * kThreads;
            }
        }
    }
    const uint32_t own = bad ? kLast : order_key(best);
    const uint32_t highest = block_tops(s, own).highest;
    uint32_t first = kLast;
    if (own == highest && at != kLast && !bad) {
        const float4 x = four(at);
        first = row.first + at + (x.x == best ? 0 : x.y == best ? 1 : x.z == best ? 2 : 3);
    }
    first = __reduce_min_sync(0xffffffff, first);
    if (lane == 0) s.words[2][warp] = first;
    __syncthreads();
    first = __reduce_min_sync(0xffffffff, s.words[2][lane % kWarps]);
    Stretch::cluster().barrier_wait(std::move(started));
    const uint2* all = row.tell_leader(uint2{highest, first});
    if (all == nullptr || threadIdx.x != 0) return;
    uint2 found = {0, 0};
    for (uint32_t block = 0; block < row.blocks; ++block) {
        // Blocks are in the order of tokens: of equal ones the first stays.
        if (Stretch::said(all, block).x > found.x) found = Stretch::said(all, block);
    }
    const bool nothing = found.x == kNothingKey, wrong = found.x >= kBadKey;
    p.tokens[index] = nothing || wrong ? 0 : found.y;
    p.faults[index] = wrong ? 1 : nothing ? 2 : 0;
}
