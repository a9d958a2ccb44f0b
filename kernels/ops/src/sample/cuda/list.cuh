// Guesses which tokens filters may keep, and lists them. A guess is checked against what it listed.
#pragma once

#include "sample/cuda/read.cuh"
#include "sample/cuda/select.cuh"

// What blocks say of the highest logits of their threads.
struct Highest {
    Tops tops;     // order keys
    float bound;   // that as many of them reach as are wanted of a block
};

// A logit that `wanted` of the block's threads reach with their highest, and hardly more do.
__device__ __forceinline__ float reached_here(Shared& s, const Tops& tops, float own, uint32_t wanted) {
    constexpr uint32_t kEach = kBins / kThreads;
    const Bins bins = bins_between(key_value(tops.highest), key_value(tops.lowest));
    for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) s.bins.low[i] = 0;
    if (threadIdx.x == 0) s.found = kLast;
    __syncthreads();
    const uint32_t bin = bins.of(own, order_key(own));
    if (bin != kLast) atomicAdd(&s.bins.low[bin], 1);
    __syncthreads();
    uint32_t mine[kEach], sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) sum += mine[i] = s.bins.low[kEach * threadIdx.x + i];
    uint32_t before = static_cast<uint32_t>(block_prefix(s, sum).until) - sum;
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) {
        if (before < wanted && before + mine[i] >= wanted) s.found = kEach * threadIdx.x + i;
        before += mine[i];
    }
    __syncthreads();
    return s.found == kLast ? bins.lowest : fmaxf(bins.lowest, bins.highest - (s.found + 1) / bins.per_logit);
}

// What the row's blocks say, where at least `wanted` tokens are asked for, or none: then the bound is
// nothing to look at. Blocks hold much the same, so each is asked for its part.
__device__ __forceinline__ Highest row_highest(Stretch& row, const Tops& here, float own, uint32_t wanted) {
    Highest all = {here, 0.0f};
    if (wanted > 0) all.bound = reached_here(row.s, here, own, (wanted + row.blocks - 1) / row.blocks);
    const Highest* said = row.exchange(all);
    for (uint32_t block = 0; block < row.blocks; ++block) {
        const Highest& other = Stretch::said(said, block);
        all.tops.highest = max(all.tops.highest, other.tops.highest);
        all.tops.lowest = min(all.tops.lowest, other.tops.lowest);
        all.bound = fminf(all.bound, other.bound);
    }
    return all;
}

// What is listed of a row.
struct Listed {
    uint64_t whole, mass;  // of the row, where it is wanted, and of the list
    uint32_t tokens, lower;  // of the row, and of the blocks before this one
};

// Lists the logits and places that `pick` takes. Returns what all blocks listed.
template <bool kWhole, typename Pick>
__device__ __forceinline__ Listed list_where(Stretch& row, const Weigher& weigher, Pick pick) {
    Shared& s = row.s;
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    uint64_t whole = 0, listed = 0;
    row.each([&](uint32_t at, float x) {
        const uint64_t mass = kWhole ? weigher.mass(x) : 0;
        whole += mass;
        if (at < row.len && pick(x, at)) {
            listed += mass;
            const uint32_t place = atomicAdd(&s.count, 1);
            if (place < kList) s.places[place] = static_cast<uint16_t>(at);
        }
    });
    __syncthreads();
    Listed mine = {0, 0, s.count, 0};
    if (kWhole) {
        mine.whole = block_prefix(s, whole).whole;
        mine.mass = block_prefix(s, listed).whole;
    }
    const Listed* all = row.exchange(mine);
    Listed sum = {0, 0, 0, 0};
    for (uint32_t block = 0; block < row.blocks; ++block) {
        if (block == row.rank) sum.lower = sum.tokens;
        sum.whole += Stretch::said(all, block).whole;
        sum.mass += Stretch::said(all, block).mass;
        sum.tokens += Stretch::said(all, block).tokens;
    }
    return sum;
}
