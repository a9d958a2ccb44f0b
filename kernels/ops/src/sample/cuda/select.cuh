// Finds the cut of a filter: the shortest beginning of the order whose amounts reach a target.
//
// Logits fall into bins of equal width between the likeliest and the lowest that matters, so that
// even a flat row spreads out; the bin that holds the target is found from the sums of all blocks.
// Where few tokens lie in it they are listed and sorted; where many, their keys are cut into bins
// again; where all have one key, the first by token are taken.
#pragma once

#include "sample/cuda/cluster.cuh"

// Which bin a logit belongs to, likeliest first.
struct Bins {
    float highest, per_logit, lowest;  // of the first level
    uint32_t top, bottom, shift;       // keys of a later level
    bool by_key;

    // kLast: none of them.
    __device__ __forceinline__ uint32_t of(float x, uint32_t key) const {
        if (by_key) return key > top || key < bottom ? kLast : (top - key) >> shift;
        // Every rounding is monotonic; of equal logits the product is not a number, which becomes 0.
        return x < lowest ? kLast : min(static_cast<uint32_t>((highest - x) * per_logit), kBins - 1);
    }
};

// Bins from `highest` down to `lowest`; what lies below is left out.
__device__ __forceinline__ Bins bins_between(float highest, float lowest) {
    return {highest, float(kBins) / (highest - lowest), lowest, 0, 0, 0, false};
}

// Tokens in a bin, and the keys there.
struct Tally {
    uint32_t tokens, top, bottom;
};

__device__ __forceinline__ void add64(Shared& s, uint32_t bin, uint64_t amount) {
    const uint32_t low = static_cast<uint32_t>(amount);
    const uint32_t old = atomicAdd(&s.bins.low[bin], low);
    const uint32_t high = static_cast<uint32_t>(amount >> 32) + (old + low < old);
    if (high > 0) atomicAdd(&s.bins.high[bin], high);
}

// Adds the amounts of this block to its bins; returns the mass of everything, of this thread.
template <bool kMass>
__device__ uint64_t fill_bins(const Stretch& row, const Weigher& weigher, const Bins& bins, uint64_t least) {
    Shared& s = row.s;
    for (uint32_t i = threadIdx.x; i < kBins; i += kThreads) s.bins.low[i] = s.bins.high[i] = 0;
    __syncthreads();
    uint64_t whole = 0;
    row.each([&](uint32_t at, float x) {
        const uint32_t key = order_key(x);
        uint32_t bin = kLast;
        if (at < row.len && weigher.cut.keeps(key, row.first + at)) bin = bins.of(x, key);
        if constexpr (!kMass) {
            if (bin != kLast) atomicAdd(&s.bins.low[bin], 1);
            return;
        }
        const uint64_t mass = bin == kLast ? 0 : weigher.mass(x);
        whole += mass;
        const bool counts = mass >= least;
        const uint32_t lanes = __ballot_sync(0xffffffff, counts);
        if (lanes == 0) return;
        // Many equal logits would queue up for one bin.
        const uint32_t one = __shfl_sync(0xffffffff, bin, __ffs(lanes) - 1);
        if (__all_sync(0xffffffff, !counts || bin == one)) {
            const uint64_t sum = warp_sum(counts ? mass : 0);
            if (threadIdx.x % 32 == 0) add64(s, one, sum);
        } else if (counts) {
            add64(s, bin, mass);
        }
    });
    return whole;
}

// The bin in which the sums of all blocks reach `target`, into `found`, and what lies `before` it.
__device__ __forceinline__ void find_bin(const Stretch& row, uint64_t target) {
    Shared& s = row.s;
    const uint32_t bin = 2 * threadIdx.x;
    uint64_t a = 0, b = 0;
#pragma unroll 4
    for (uint32_t block = 0; block < row.blocks; ++block) {
        const Shared* other = Stretch::cluster().map_shared_rank(&s, block);
        const uint2 low = *reinterpret_cast<const uint2*>(&other->bins.low[bin]);
        const uint2 high = *reinterpret_cast<const uint2*>(&other->bins.high[bin]);
        a += uint64_t(high.x) << 32 | low.x;
        b += uint64_t(high.y) << 32 | low.y;
    }
    if (threadIdx.x == 0) s.found = kLast;
    const uint64_t until = block_prefix(s, a + b).until, before = until - a - b;
    if (before < target && until >= target) {
        const bool first = before + a >= target;
        s.found = first ? bin : bin + 1;
        s.before = before + (first ? 0 : a);
    }
    __syncthreads();
}

// Lists the places of what lies in the bin `found`. Says how many there are in the row, and in `lower`
// blocks.
__device__ __forceinline__ Tally list_bin(Stretch& row, const Cut& cut, const Bins& bins, uint32_t found, uint32_t& lower) {
    Shared& s = row.s;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    uint32_t top = 0, bottom = kLast;
    row.each([&](uint32_t at, float x) {
        const uint32_t key = order_key(x);
        const bool inside = bins.of(x, key) == found && at < row.len && cut.keeps(key, row.first + at);
        const uint32_t lanes = __ballot_sync(0xffffffff, inside);
        if (lanes == 0) return;
        uint32_t from = 0;
        if (lane == 0) from = atomicAdd(&s.count, __popc(lanes));
        const uint32_t place = __shfl_sync(0xffffffff, from, 0) + __popc(lanes & ((1u << lane) - 1));
        if (!inside) return;
        if (place < kList) s.places[place] = static_cast<uint16_t>(at);
        top = max(top, key);
        bottom = min(bottom, key);
    });
    top = __reduce_max_sync(0xffffffff, top);
    bottom = __reduce_min_sync(0xffffffff, bottom);
    if (lane == 0) {
        s.words[0][warp] = top;
        s.words[1][warp] = bottom;
    }
    __syncthreads();
    top = __reduce_max_sync(0xffffffff, s.words[0][lane % kWarps]);
    bottom = __reduce_min_sync(0xffffffff, s.words[1][lane % kWarps]);
    const Tally* all = row.exchange(Tally{s.count, top, bottom});
    Tally whole = {0, 0, kLast};
    for (uint32_t block = 0; block < row.blocks; ++block) {
        if (block == row.rank) lower = whole.tokens;
        const Tally& other = Stretch::said(all, block);
        whole.tokens += other.tokens;
        whole.top = max(whole.top, other.top);
        whole.bottom = min(whole.bottom, other.bottom);
    }
    return whole;
}

// Sends what this block listed to the leader, whose bins are over. A barrier must follow.
__device__ __forceinline__ void send_list(const Stretch& row, uint32_t to) {
    unsigned long long* list = Stretch::cluster().map_shared_rank(row.s.list, 0);
    for (uint32_t i = threadIdx.x; i < row.s.count; i += kThreads) {
        const uint32_t at = row.s.places[i];
        list[to + i] = uint64_t(order_key(row.logits[at])) << 32 | ~(row.first + at);
    }
}

// Sorts the leader's list, highest first. Pairs of a warp lie within 64 items where they are close.
__device__ __forceinline__ void sort_list(Shared& s, uint32_t count) {
    const uint32_t size = count <= 2 ? 2 : 1u << (32 - __clz(count - 1));
    for (uint32_t i = count + threadIdx.x; i < size; i += kThreads) s.list[i] = 0;
    __syncthreads();
    const uint32_t t = threadIdx.x;
    for (uint32_t run = 2; run <= size; run *= 2) {
        for (uint32_t step = run / 2; step > 0; step /= 2) {
            if (t < size / 2) {
                const uint32_t i = 2 * t - (t & (step - 1)), j = i + step;
                const unsigned long long a = s.list[i], b = s.list[j];
                if ((a < b) == ((i & run) == 0)) {
                    s.list[i] = b;
                    s.list[j] = a;
                }
            }
            if (step > 32 || (step == 1 && run >= 64)) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
}

// The first token at which the running sum of the leader's sorted list reaches `target`.
template <bool kMass> __device__ __forceinline__ Cut cut_of_list(Shared& s, const Weigher& weigher, uint32_t count, uint64_t target) {
    const uint32_t i = 2 * threadIdx.x;
    const unsigned long long items[2] = {i < count ? s.list[i] : 0, i + 1 < count ? s.list[i + 1] : 0};
    uint64_t amounts[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        amounts[j] = kMass ? weigher.mass(key_value(uint32_t(items[j] >> 32))) : 1;
        if (i + j >= count) amounts[j] = 0;
    }
    const uint64_t until = block_prefix(s, amounts[0] + amounts[1]).until, before = until - amounts[0] - amounts[1];
    if (before < target && until >= target) s.before = before + amounts[0] >= target ? items[0] : items[1];
    __syncthreads();
    const unsigned long long item = s.before;
    return {uint32_t(item >> 32), ~uint32_t(item)};
}

// The token with which the tokens of one key, in order, are `rank` many.
__device__ __forceinline__ uint32_t token_of_key(Stretch& row, const Cut& cut, uint32_t key, uint64_t rank) {
    Shared& s = row.s;
    const uint32_t from = threadIdx.x * row.run(), to = min(from + row.run(), row.len);
    auto counts = [&](uint32_t at) { return order_key(row.logits[at]) == key && cut.keeps(key, row.first + at); };
    uint64_t sum = 0;
    for (uint32_t at = from; at < to; ++at) sum += counts(at);
    const Prefix prefix = block_prefix(s, sum);
    const uint64_t* all = row.exchange(prefix.whole);
    uint64_t below = 0;
    for (uint32_t block = 0; block < row.rank; ++block) below += Stretch::said(all, block);
    uint64_t until = below + prefix.until - sum;
    if (threadIdx.x == 0) s.found = kLast;
    __syncthreads();
    if (until < rank && until + sum >= rank) {
        for (uint32_t at = from; at < to; ++at) {
            until += counts(at);
            if (until == rank) {
                s.found = row.first + at;
                break;
            }
        }
    }
    __syncthreads();
    const uint32_t* found = row.exchange(s.found);
    uint32_t token = kLast;
    for (uint32_t block = 0; block < row.blocks; ++block) token = min(token, Stretch::said(found, block));
    return token;
}

// `target` counts tokens, or it is made of a `share` of the mass. Where it is not reached nothing more
// is cut.
template <bool kMass>
__device__ Cut select(Stretch& row, const Weigher& weigher, Bins bins, uint64_t target, float share, uint32_t vocab) {
    Shared& s = row.s;
    // Lighter ones weigh less than 1 - share together, so the cut does not lie among them; half of it
    // leaves room for rounding.
    const uint64_t least = kMass ? max(1.0, (1.0 - double(share)) * double(kPoint) * 0.5 / vocab) : 1.0;
#pragma unroll 1
    for (bool first = true;; first = false) {
        const uint64_t mine = fill_bins<kMass>(row, weigher, bins, least);
        const uint64_t sum = kMass ? block_prefix(s, mine).whole : 0;
        const uint64_t* all = row.exchange(sum);
        if (kMass && first) {
            uint64_t whole = 0;
            for (uint32_t block = 0; block < row.blocks; ++block) whole += Stretch::said(all, block);
            target = max(uint64_t(1), uint64_t(ceil(double(share) * double(whole))));
        }
        find_bin(row, target);
        const uint32_t found = s.found;
        // In every block alike.
        if (found == kLast) return weigher.cut;
        target -= s.before;
        uint32_t lower = 0;
        const Tally tally = list_bin(row, weigher.cut, bins, found, lower);
        if (tally.tokens <= kList) {
            send_list(row, lower);
            Stretch::cluster().sync();
            Cut cut = weigher.cut;
            if (row.leads()) {
                sort_list(s, tally.tokens);
                cut = cut_of_list<kMass>(s, weigher, tally.tokens, target);
            }
            return Stretch::said(row.exchange(cut), 0);
        }
        if (tally.top == tally.bottom) {
            const uint64_t each = kMass ? weigher.mass(key_value(tally.top)) : 1;
            const uint32_t token = token_of_key(row, weigher.cut, tally.top, (target + each - 1) / each);
            return {tally.top, token};
        }
        uint32_t shift = 0;
        while ((tally.top - tally.bottom) >> shift >= kBins) ++shift;
        bins = {0.0f, 0.0f, 0.0f, tally.top, tally.bottom, shift, true};
    }
}
