// Log-probabilities of raw rows, one cluster per row: of a given token, and of the likeliest with ranks.
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

// The sum over the block, always in the same order.
__device__ __forceinline__ double block_sum(Shared& s, double x) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto fold = [](double y) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) y += __shfl_xor_sync(0xffffffff, y, step);
        return y;
    };
    x = fold(x);
    __syncthreads();
    if (lane == 0) s.parts[warp] = __double_as_longlong(x);
    __syncthreads();
    return fold(lane < kWarps ? __longlong_as_double(s.parts[lane]) : 0.0);
}

// Lists just the `n` likeliest, whatever the row looks like; the last to exchange anything. Out of line,
// since few rows come here; by value, so that the caller keeps its stretch in registers.
__device__ __noinline__ Listed list_by_cut(Stretch row, Weigher weigher, uint32_t highest, uint32_t n) {
    uint32_t shift = 0;
    while ((highest - kNothingKey) >> shift >= kBins) ++shift;
    const Bins all = {0.0f, 0.0f, 0.0f, highest, kNothingKey, shift, true};
    weigher.cut = select<false>(row, weigher, all, n, 0.0f, kLast);
    return list_where<false>(row, weigher, [&](float x, uint32_t at) { return weigher.keeps(x, row.first + at); });
}

// Lists the `n` likeliest, and perhaps others; says how many are listed.
__device__ __forceinline__ uint32_t list_likeliest(Stretch& row, const Weigher& weigher, const Highest& highest, uint32_t n) {
    Listed listed = list_where<false>(row, weigher, [&](float x, uint32_t) { return x >= highest.bound; });
    if (listed.tokens < n || listed.tokens > kList) {
        listed = list_by_cut(row, weigher, highest.tops.highest, n);
    }
    send_list(row, listed.lower);
    return listed.tokens;
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) logprobs(const __grid_constant__ LogprobParams p) {
    extern __shared__ float4 held[];
    __shared__ Shared s;
    const uint32_t index = blockIdx.y;
    if (index >= real_rows(p.count, p.rows) || p.wanted[index] == kLast) return;
    // Others write here only once this block runs.
    auto started = Stretch::cluster().barrier_arrive();
    Stretch row = stretch_of(s, reinterpret_cast<float*>(held), p.vocab);
    const float* logits = p.logits + uint64_t(index) * p.vocab;
    const Source source = {logits + row.first, p.vocab % 4 == 0 && aligned16(p.logits)};
    start_reading(row, source);
    TokenLogprob* out = p.out + uint64_t(index) * (1 + p.most);
    const uint32_t given = p.given == nullptr ? kLast : p.given[index];
    const uint32_t chosen = given == kLast ? p.chosen[index] : given, n = min(min(p.wanted[index], min(p.most, kMost)), p.vocab);
    const float own = look(row, source);
    const Tops here = block_tops(s, order_key(own));
    Stretch::cluster().barrier_wait(std::move(started));
    const Highest highest = row_highest(row, here, own, n);
    const Tops& tops = highest.tops;
    if (tops.highest >= kBadKey || tops.highest == kNothingKey) {
        // No distribution; ranks mean nothing.
        const float nan = __uint_as_float(0x7fffffffu);
        if (row.leads() && threadIdx.x == 0 && chosen < p.vocab) out[0] = {chosen, nan, 1};
        if (row.leads() && threadIdx.x < n) out[1 + threadIdx.x] = {threadIdx.x, nan, 1};
        return;
    }
    const Weigher weigher = {key_value(tops.highest), 1.0f, kKeepAll};
    const float logit = chosen < p.vocab ? logits[chosen] : INFINITY;

    double sum = 0.0;
    uint64_t likelier = 0;
    row.each([&](uint32_t, float x) {
        sum += double(weigher.weight(x));
        likelier += x > logit;
    });
    struct Sums {
        double weight;
        uint64_t likelier;
    };
    const double weight = block_sum(s, sum);
    const Sums* all = row.exchange(Sums{weight, block_prefix(s, likelier).whole});
    Sums whole = {0.0, 0};
    for (uint32_t block = 0; block < row.blocks; ++block) {
        whole.weight += Stretch::said(all, block).weight;
        whole.likelier += Stretch::said(all, block).likelier;
    }
    const double log_sum = log(whole.weight);
    auto logprob = [&](float x) { return float(double(x) - double(weigher.highest) - log_sum); };
    if (row.leads() && threadIdx.x == 0 && chosen < p.vocab) out[0] = {chosen, logprob(logit), uint32_t(whole.likelier) + 1};
    if (n == 0) return;
    const uint32_t listed = list_likeliest(row, weigher, highest, n);
    if (!row.leave_to_leader()) return;
    sort_list(s, listed);
    const uint32_t i = threadIdx.x;
    if (i >= n) return;
    const uint32_t key = uint32_t(s.list[i] >> 32);
    uint32_t rank = i + 1;
    while (rank > 1 && uint32_t(s.list[rank - 2] >> 32) == key) --rank;
    out[1 + i] = {~uint32_t(s.list[i]), logprob(key_value(key)), rank};
}
