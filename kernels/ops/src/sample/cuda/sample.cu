// From a row of logits to a token, one block per row, nothing sorted. The order of steps is the
// contract's: penalties, bias, bans, temperature, top-k, top-p, min-p, draw.
#include "sample/cuda/row.cuh"

struct SampleRow {
    uint64_t seed;
    float temperature, top_p, min_p;
    float repetition, frequency, presence;
    uint32_t top_k, choice, position;
    uint32_t slot;  // row of `seen`
    uint32_t bias_start, bias_count, banned_start, banned_count;
};

struct SampleParams {
    float* logits;             // [rows, vocab], changed
    const SampleRow* how;      // [rows]
    const uint32_t* count;
    uint32_t* seen;            // [slots, vocab]: occurrences in the output, top bit: seen at all; or null
    const uint32_t* bias_tokens;
    const float* bias_values;
    const uint32_t* banned;
    uint32_t* tokens;          // [rows]
    uint32_t* faults;          // [rows]: 0 none, 1 not a number, 2 nothing allowed
    uint32_t rows, vocab;
};

constexpr uint32_t kSeen = 0x80000000u;

__device__ void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        const uint32_t n0 = uint32_t(b >> 32) ^ c[1] ^ k0, n2 = uint32_t(a >> 32) ^ c[3] ^ k1;
        c[1] = uint32_t(b);
        c[3] = uint32_t(a);
        c[0] = n0;
        c[2] = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

__device__ double uniform(const SampleRow& how) {
    uint32_t c[4] = {how.position, how.choice, 0, 0};
    philox(c, uint32_t(how.seed), uint32_t(how.seed >> 32));
    const uint64_t bits = (uint64_t(c[0]) << 32 | c[1]) >> 12;
    return (double(bits) + 0.5) / 4503599627370496.0;
}

extern "C" __global__ void __launch_bounds__(kRowThreads) sample(const __grid_constant__ SampleParams p) {
    __shared__ RowShared s;
    const uint32_t index = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (index >= real_rows(p.count, p.rows)) return;
    const SampleRow how = p.how[index];
    float* logits = p.logits + uint64_t(index) * p.vocab;

    const bool penalised = p.seen != nullptr && (how.repetition != 1.0f || how.frequency != 0.0f || how.presence != 0.0f);
    uint32_t* seen = penalised ? p.seen + uint64_t(how.slot) * p.vocab : nullptr;
    if (penalised) {
        for (uint32_t i = threadIdx.x; i < p.vocab; i += kRowThreads) {
            const uint32_t n = seen[i];
            if (n == 0) continue;
            float logit = logits[i];
            logit = logit > 0.0f ? __fdiv_rn(logit, how.repetition) : __fmul_rn(logit, how.repetition);
            const uint32_t output = n & ~kSeen;
            if (output > 0) logit = __fsub_rn(logit, __fadd_rn(__fmul_rn(how.frequency, float(output)), how.presence));
            logits[i] = logit;
        }
        __syncthreads();
    }
    // A token may be listed twice; one thread keeps the order of the list.
    if (how.bias_count > 0) {
        if (threadIdx.x == 0) {
            for (uint32_t i = how.bias_start; i < how.bias_start + how.bias_count; ++i) {
                if (p.bias_tokens[i] < p.vocab) logits[p.bias_tokens[i]] += p.bias_values[i];
            }
        }
        __syncthreads();
    }
    if (how.banned_count > 0) {
        for (uint32_t i = threadIdx.x; i < how.banned_count; i += kRowThreads) {
            const uint32_t token = p.banned[how.banned_start + i];
            if (token < p.vocab) logits[token] = -INFINITY;
        }
        __syncthreads();
    }

    // The first of the highest.
    float best = -INFINITY;
    uint32_t at = kLast;
    bool bad = false;
    for (uint32_t i = threadIdx.x; i < p.vocab; i += kRowThreads) {
        const float x = logits[i];
        bad |= !(x < INFINITY);
        if (x > best) {
            best = x;
            at = i;
        }
    }
    auto better = [&](float other, uint32_t other_at) {
        if (other > best || (other == best && other_at < at)) {
            best = other;
            at = other_at;
        }
    };
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, best, step);
        better(other, __shfl_xor_sync(0xffffffff, at, step));
    }
    if (lane == 0) {
        s.floats[warp] = best;
        s.tokens[warp] = at;
    }
    const bool any_bad = __syncthreads_or(bad);
    best = s.floats[lane];
    at = s.tokens[lane];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffff, best, step);
        better(other, __shfl_xor_sync(0xffffffff, at, step));
    }
    if (any_bad || best == -INFINITY) {
        if (threadIdx.x == 0) {
            p.tokens[index] = 0;
            p.faults[index] = any_bad ? 1 : 2;
        }
        return;
    }

    uint32_t token = at;
    if (how.temperature != 0.0f) {
        Row row = {logits, p.vocab, best, fminf(__fdiv_rn(1.0f, how.temperature), 3.402823466e38f), how.min_p, {0, kLast}};
        if (how.top_k > 0 && how.top_k < p.vocab) row.cut = select(s, row, how.top_k, false);
        if (how.top_p < 1.0f) {
            uint64_t sum = 0;
            for (uint32_t i = threadIdx.x; i < p.vocab; i += kRowThreads) {
                const float logit = logits[i];
                if (row.cut.keeps(order_key(logit), i)) sum += row.mass(logit);
            }
            const uint64_t whole = block_total(s, sum);
            const double target = ceil(double(how.top_p) * double(whole));
            row.cut = select(s, row, max(uint64_t(1), uint64_t(target)), true);
        }
        uint64_t sum = 0;
        for (uint32_t i = threadIdx.x; i < p.vocab; i += kRowThreads) sum += row.kept_mass(i);
        const uint64_t whole = block_total(s, sum);
        // The likeliest is always kept, so the whole is at least one.
        const double target = ceil(uniform(how) * double(whole));
        const uint64_t bounded = min(max(uint64_t(1), uint64_t(target)), whole);
        __syncthreads();
        token = walk(s, p.vocab, bounded, [&](uint32_t i) { return row.kept_mass(i); });
    }
    if (threadIdx.x == 0) {
        p.tokens[index] = token;
        p.faults[index] = 0;
        if (penalised) seen[token] = (seen[token] + 1) | kSeen;
    }
}

// Counts tokens of one slot, when a request comes in or comes back: prompt tokens are only marked.
struct CountParams {
    const uint32_t* tokens;
    uint32_t* seen;  // the slot's row
    uint32_t prompt, count, vocab;
};

extern "C" __global__ void __launch_bounds__(256) count_tokens(const __grid_constant__ CountParams p) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count || p.tokens[i] >= p.vocab) return;
    uint32_t* at = p.seen + p.tokens[i];
    atomicOr(at, kSeen);
    if (i >= p.prompt) atomicAdd(at, 1);
}
