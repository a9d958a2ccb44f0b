// Log-probabilities of raw rows, one block per row: of a given token, and of the likeliest with ranks.
#include "sample/cuda/row.cuh"

struct TokenLogprob {
    uint32_t token;
    float logprob;
    uint32_t rank;
};

struct LogprobParams {
    const float* logits;     // [rows, vocab]
    const uint32_t* chosen;  // [rows]
    const uint32_t* wanted;  // [rows]: how many of the likeliest, at most `most`; or all ones for no row
    const uint32_t* count;
    TokenLogprob* out;       // [rows, 1 + most]: the chosen one, then the likeliest
    uint32_t rows, vocab, most;
};

constexpr uint32_t kMost = 64;

extern "C" __global__ void __launch_bounds__(kRowThreads) logprobs(const __grid_constant__ LogprobParams p) {
    __shared__ RowShared s;
    __shared__ double sums[kWarps];
    __shared__ uint32_t top[kMost], listed;
    const uint32_t index = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (index >= real_rows(p.count, p.rows) || p.wanted[index] == kLast) return;
    const float* logits = p.logits + uint64_t(index) * p.vocab;
    TokenLogprob* out = p.out + uint64_t(index) * (1 + p.most);

    float best = -INFINITY;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += kRowThreads) best = fmaxf(best, logits[i]);
    best = warp_max(best);
    if (lane == 0) s.floats[warp] = best;
    __syncthreads();
    best = warp_max(s.floats[lane]);

    // Sums go by thread, then by warp: always the same. NaN stays NaN.
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += kRowThreads) sum += double(exact_exp(logits[i] - best));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    sum = sums[lane];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    const double log_sum = log(sum);
    auto logprob = [&](float logit) { return float(double(logit) - double(best) - log_sum); };

    const uint32_t chosen = p.chosen[index];
    if (chosen < p.vocab) {
        const float logit = logits[chosen];
        uint64_t likelier = 0;
        for (uint32_t i = threadIdx.x; i < p.vocab; i += kRowThreads) likelier += logits[i] > logit;
        const uint64_t rank = block_total(s, likelier) + 1;
        if (threadIdx.x == 0) out[0] = {chosen, logprob(logit), uint32_t(rank)};
    }

    const uint32_t n = min(min(p.wanted[index], min(p.most, kMost)), p.vocab);
    if (n == 0) return;
    __syncthreads();
    Row row = {logits, p.vocab, best, 1.0f, 0.0f, {0, kLast}};
    row.cut = select(s, row, n, false);
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < p.vocab; i += kRowThreads) {
        if (!row.cut.keeps(order_key(logits[i]), i)) continue;
        const uint32_t place = atomicAdd(&listed, 1);
        if (place < kMost) top[place] = i;
    }
    __syncthreads();
    // Each of the few finds its own place.
    const uint32_t found = min(listed, n);
    if (threadIdx.x < found) {
        const uint32_t token = top[threadIdx.x], key = order_key(logits[token]);
        uint32_t place = 0, likelier = 0;
        for (uint32_t i = 0; i < found; ++i) {
            const uint32_t other = order_key(logits[top[i]]);
            place += other > key || (other == key && top[i] < token);
            likelier += other > key;
        }
        out[1 + place] = {token, logprob(logits[token]), likelier + 1};
    }
}
