// Log-probabilities of raw rows, one cluster per row: of a given token, and of the likeliest with ranks.
//
// A row is read once, through registers: every thread keeps the highest of its own logits and what they
// weigh beside that. Of the threads that reach a bound, few, each looks at its own again and lists what
// reaches it too.
#include "sample/cuda/list.cuh"

struct TokenLogprob {
    uint32_t token;
    float logprob;
    uint32_t rank;
};

struct LogprobParams {
    const float* logits;     // [rows, vocab]
    const uint32_t* chosen;  // [rows]
    const uint32_t* given;   // [rows]: described instead where it is not all ones; or null
    const uint32_t* wanted;  // [rows]: how many of the likeliest, at most `most`; or all ones for no row
    const uint32_t* count;
    TokenLogprob* out;       // [rows, 1 + most]: the chosen one, then the likeliest
    uint32_t rows, vocab, most;
};

constexpr uint32_t kMost = 64;

// An order key and its token, to be sorted: of equal keys the first token is highest.
__device__ __forceinline__ unsigned long long item_of(float x, uint32_t token) {
    return uint64_t(order_key(x)) << 32 | ~token;
}

// What a block says of its logits.
struct Said {
    Tops tops;
    float bound;        // that as many of its threads reach as are wanted of it
    uint32_t likelier;  // than the chosen one
    double weight;      // beside its highest
};

// Sums over the block, always in the same order.
__device__ __forceinline__ void block_sums(Shared& s, double& weight, uint32_t& likelier) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto fold = [](double y) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) y += __shfl_xor_sync(0xffffffff, y, step);
        return y;
    };
    weight = fold(weight);
    likelier = __reduce_add_sync(0xffffffff, likelier);
    __syncthreads();
    if (lane == 0) {
        s.parts[warp] = __double_as_longlong(weight);
        s.words[2][warp] = likelier;
    }
    __syncthreads();
    weight = fold(lane < kWarps ? __longlong_as_double(s.parts[lane]) : 0.0);
    likelier = __reduce_add_sync(0xffffffff, lane < kWarps ? s.words[2][lane] : 0);
}

// Lists just the `n` likeliest, one after the other, whatever the row looks like: for rows that are flat,
// or shorter than a block has threads.
__device__ __noinline__ void list_one_by_one(Shared& s, const float* logits, uint32_t vocab, uint32_t n) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned long long below = ~0ull;
    for (uint32_t i = 0; i < n; ++i) {
        unsigned long long best = 0;
#pragma unroll 8
        for (uint32_t at = threadIdx.x; at < vocab; at += kThreads) {
            const unsigned long long item = item_of(__ldg(logits + at), at);
            if (item < below && item > best) best = item;
        }
        auto fold = [](unsigned long long x) {
#pragma unroll
            for (int step = 16; step > 0; step /= 2) {
                const unsigned long long other = __shfl_xor_sync(0xffffffff, x, step);
                x = other > x ? other : x;
            }
            return x;
        };
        best = fold(best);
        if (lane == 0) s.parts[warp] = best;
        __syncthreads();
        below = fold(s.parts[lane % kWarps]);
        if (threadIdx.x == 0) s.list[i] = below;
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 4) logprobs(const __grid_constant__ LogprobParams p) {
    constexpr uint32_t kAhead = 4;
    __shared__ Shared s;
    const uint32_t index = blockIdx.y;
    if (index >= p.rows) return;
    // All at once: one after the other each would be waited for.
    const uint32_t wanted = p.wanted[index], drawn = p.chosen[index], given = p.given == nullptr ? kLast : p.given[index];
    if (index >= real_rows(p.count, p.rows) || wanted == kLast) return;
    // Others write here only once this block runs.
    auto started = Stretch::cluster().barrier_arrive();
    Stretch row = stretch_of(s, nullptr, p.vocab);
    const float* logits = p.logits + uint64_t(index) * p.vocab;
    const float* from = logits + row.first;
    const bool wide = p.vocab % 4 == 0 && aligned16(p.logits);
    auto four = [&](uint32_t at) -> float4 {
        if (wide && at < row.len) return __ldg(reinterpret_cast<const float4*>(from + at));
        auto one = [&](uint32_t i) { return i < row.len ? __ldg(from + i) : -INFINITY; };
        return {one(at), one(at + 1), one(at + 2), one(at + 3)};
    };
    // Visits all logits of this thread, some on their way at once.
    auto each = [&](auto visit) {
        for (uint32_t base = 4 * threadIdx.x; base < row.padded; base += kAhead * 4 * kThreads) {
            float4 x[kAhead];
#pragma unroll
            for (uint32_t i = 0; i < kAhead; ++i) x[i] = four(base + 4 * i * kThreads);
            visit(x, base);
        }
    };
    const uint32_t chosen = given == kLast ? drawn : given, n = min(min(wanted, min(p.most, kMost)), p.vocab);
    const float logit = chosen < p.vocab ? __ldg(logits + chosen) : INFINITY;

    // What this thread's logits weigh beside the highest of them.
    float best = -INFINITY, sum = 0.0f;
    uint32_t likelier = 0;
    bool bad = false;
    each([&](const float4 (&x)[kAhead], uint32_t) {
        float top = larger(x[0]);
#pragma unroll
        for (uint32_t i = 1; i < kAhead; ++i) top = larger(top, larger(x[i]));
        bad |= !(top < INFINITY);
        if (top > best) {
            sum *= exp2_of((best - top) * 1.44269504f);
            best = top;
        }
        // Where all are minus infinity nothing is subtracted.
        const float high = best == -INFINITY ? 0.0f : best;
        auto add = [&](float y) {
            sum += exp2_of((y - high) * 1.44269504f);
            likelier += y > logit;
        };
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
            add(x[i].x);
            add(x[i].y);
            add(x[i].z);
            add(x[i].w);
        }
    });
    Said mine;
    mine.tops = block_tops(s, bad ? kLast : order_key(best));
    mine.weight = mine.tops.highest == kNothingKey ? 0.0 : double(sum) * exact_exp(best - key_value(mine.tops.highest));
    mine.likelier = likelier;
    block_sums(s, mine.weight, mine.likelier);
    mine.bound = n == 0 ? 0.0f : reached_here(s, mine.tops, best, (n + row.blocks - 1) / row.blocks);
    if (threadIdx.x == 0) s.count = 0;
    Stretch::cluster().barrier_wait(std::move(started));
    const Said* said = row.exchange(mine);
    Tops tops = mine.tops;
    float bound = mine.bound;
    for (uint32_t block = 0; block < row.blocks; ++block) {
        tops.highest = max(tops.highest, Stretch::said(said, block).tops.highest);
        bound = fminf(bound, Stretch::said(said, block).bound);
    }
    TokenLogprob* out = p.out + uint64_t(index) * (1 + p.most);
    if (tops.highest >= kBadKey || tops.highest == kNothingKey) {
        // No distribution; ranks mean nothing.
        const float nan = __uint_as_float(0x7fffffffu);
        if (row.leads() && threadIdx.x == 0 && chosen < p.vocab) out[0] = {chosen, nan, 1};
        if (row.leads() && threadIdx.x < n) out[1 + threadIdx.x] = {threadIdx.x, nan, 1};
        return;
    }
    if (n > 0 && best >= bound) {
        // Straight into the leader's list, whose bins are over; it is sorted, so any order will do.
        Shared* leader = Stretch::cluster().map_shared_rank(&s, 0);
        auto list = [&](float y, uint32_t at) {
            if (y < bound || at >= row.len) return;
            const uint32_t place = atomicAdd(&leader->count, 1);
            if (place < kList) leader->list[place] = item_of(y, row.first + at);
        };
        each([&](const float4 (&x)[kAhead], uint32_t base) {
#pragma unroll
            for (uint32_t i = 0; i < kAhead; ++i) {
                const uint32_t at = base + 4 * i * kThreads;
                if (larger(x[i]) < bound) continue;
                list(x[i].x, at);
                list(x[i].y, at + 1);
                list(x[i].z, at + 2);
                list(x[i].w, at + 3);
            }
        });
    }
    __syncwarp();
    if (!row.leave_to_leader()) return;
    const float highest = key_value(tops.highest);
    double whole = 0.0;
    uint32_t before = 0;
    for (uint32_t block = 0; block < row.blocks; ++block) {
        const Said& other = Stretch::said(said, block);
        whole += other.weight * exact_exp(key_value(other.tops.highest) - highest);
        before += other.likelier;
    }
    const double log_sum = log(whole);
    auto logprob = [&](float x) { return float(double(x) - double(highest) - log_sum); };
    if (threadIdx.x == 0 && chosen < p.vocab) out[0] = {chosen, logprob(logit), before + 1};
    if (n == 0) return;
    const uint32_t listed = s.count;
    if (listed < n || listed > kList) {
        list_one_by_one(s, logits, p.vocab, n);
    } else {
        sort_list(s, listed);
    }
    const uint32_t i = threadIdx.x;
    if (i >= n) return;
    const uint32_t key = uint32_t(s.list[i] >> 32);
    uint32_t rank = i + 1;
    while (rank > 1 && uint32_t(s.list[rank - 2] >> 32) == key) --rank;
    out[1 + i] = {~uint32_t(s.list[i]), logprob(key_value(key)), rank};
}
