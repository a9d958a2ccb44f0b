// Guesses which tokens filters may keep, and lists them. A guess is checked against what it listed.
#pragma once

#include "sample/cuda/select.cuh"

// A logit that about as many tokens reach as are wanted, from the highest of each thread.
__device__ __forceinline__ float reached_by(Stretch& row, const Bins& bins, float own, uint32_t wanted) {
    Shared& s = row.s;
    for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) s.bins.low[i] = s.bins.high[i] = 0;
    __syncthreads();
    const uint32_t bin = bins.of(own, order_key(own));
    if (bin != kLast) atomicAdd(&s.bins.low[bin], 1);
    Stretch::cluster().sync();
    find_bin(row, wanted);
    return s.found == kLast ? bins.lowest : fmaxf(bins.lowest, bins.highest - (s.found + 1) / bins.per_logit);
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
