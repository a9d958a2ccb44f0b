// From a row of logits to a token, one cluster per row, nothing sorted but short lists. The order of
// steps is the contract's: penalties, bias, bans, temperature, top-k, top-p, min-p, draw.
//
// Logits stay as they are: what is added and banned changes the copy in shared memory.
#include <utility>

#include "sample/cuda/select.cuh"

struct SampleRow {
    uint64_t seed;
    float temperature, top_p, min_p;
    float repetition, frequency, presence;
    uint32_t top_k, choice, position;
    uint32_t slot;  // row of `seen`
    uint32_t bias_start, bias_count, banned_start, banned_count;
};

struct SampleParams {
    const float* logits;       // [rows, vocab]
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

// The mass at which the draw ends; the likeliest is always kept, so the whole is at least one.
__device__ __forceinline__ uint64_t drawn_mass(const SampleRow& how, uint64_t whole) {
    const uint64_t target = static_cast<uint64_t>(ceil(uniform(how) * double(whole)));
    return min(max(uint64_t(1), target), whole);
}

__device__ __forceinline__ float penalised(float logit, uint32_t seen, const SampleRow& how) {
    if (seen == 0) return logit;
    logit = logit > 0.0f ? __fdiv_rn(logit, how.repetition) : __fmul_rn(logit, how.repetition);
    const uint32_t output = seen & ~kSeen;
    if (output == 0) return logit;
    return __fsub_rn(logit, __fadd_rn(__fmul_rn(how.frequency, float(output)), how.presence));
}

// Reads the stretch once: penalises it, looks at it, and keeps it where `keep`.
template <bool kPenalised>
__device__ __forceinline__ Look load(const Stretch& row, const float* from, const uint32_t* seen, const SampleRow& how, bool wide, bool keep) {
    constexpr uint32_t kAhead = 4;
    Look look;
    for (uint32_t base = 4 * threadIdx.x; base < row.padded; base += kAhead * 4 * kThreads) {
        float4 x[kAhead];
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
            const uint32_t at = base + i * 4 * kThreads;
            x[i] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
            if (at < row.padded) x[i] = load4(from, at, row.len, wide);
        }
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
            const uint32_t at = base + i * 4 * kThreads;
            if (kPenalised && at < row.padded) {
                auto one = [&](uint32_t j) { return j < row.len ? seen[j] : 0u; };
                const uint4 n = wide ? *reinterpret_cast<const uint4*>(seen + at) : uint4{one(at), one(at + 1), one(at + 2), one(at + 3)};
                if ((n.x | n.y | n.z | n.w) != 0) {
                    x[i].x = penalised(x[i].x, n.x, how);
                    x[i].y = penalised(x[i].y, n.y, how);
                    x[i].z = penalised(x[i].z, n.z, how);
                    x[i].w = penalised(x[i].w, n.w, how);
                }
            }
            if (keep && at < row.padded) *reinterpret_cast<float4*>(row.logits + at) = x[i];
            look.see(at, x[i].x);
            look.see(at + 1, x[i].y);
            look.see(at + 2, x[i].z);
            look.see(at + 3, x[i].w);
        }
    }
    return look;
}

// Adds biases and takes bans away, and looks again. A list names no token twice.
__device__ __forceinline__ Look apply_lists(const Stretch& row, const SampleParams& p, const SampleRow& how) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < how.bias_count; i += kThreads) {
        const uint32_t at = p.bias_tokens[how.bias_start + i] - row.first;
        if (at < row.len) row.logits[at] = __fadd_rn(row.logits[at], p.bias_values[how.bias_start + i]);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < how.banned_count; i += kThreads) {
        const uint32_t at = p.banned[how.banned_start + i] - row.first;
        if (at < row.len) row.logits[at] = -INFINITY;
    }
    __syncthreads();
    Look look;
    row.each([&](uint32_t at, float x) { look.see(at, x); });
    return look;
}

// Filters and draws from the leader's list, of which the first `limit` by the order may be kept, up
// to the mass `target`, or `top_p` of theirs where there is no target yet.
__device__ __forceinline__ uint32_t draw_from_list(Shared& s, const Weigher& weigher, const SampleRow& how, uint32_t count, uint32_t limit, uint64_t target) {
    sort_list(s, count);
    const uint32_t i = 2 * threadIdx.x;
    unsigned long long items[2];
    uint64_t masses[2];
    auto weigh = [&](int j) {
        items[j] = i + j < count ? s.list[i + j] : 0;
        masses[j] = i + j < min(count, limit) ? weigher.mass(key_value(uint32_t(items[j] >> 32))) : 0;
    };
    weigh(0);
    weigh(1);
    Prefix prefix = block_prefix(s, masses[0] + masses[1]);
    if (target == 0 && how.top_p < 1.0f) {
        target = max(uint64_t(1), static_cast<uint64_t>(ceil(double(how.top_p) * double(prefix.whole))));
    }
    uint64_t before = prefix.until - masses[0] - masses[1];
    uint32_t left = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const uint64_t mass = masses[j];
        const float weight = weigher.weight(key_value(uint32_t(items[j] >> 32)));
        const bool kept = mass > 0 && (target == 0 || before < target) && weight >= how.min_p;
        before += mass;
        // Now by token: inverted, so that the first is the highest.
        items[j] = kept ? items[j] << 32 | items[j] >> 32 : 0;
        masses[j] = kept ? mass : 0;
        left += kept;
    }
    const uint64_t drawn = drawn_mass(how, block_prefix(s, masses[0] + masses[1]).whole);
    // What is kept is a beginning of the list, so nothing behind it needs sorting.
    left = static_cast<uint32_t>(block_prefix(s, left).whole);
    if (i < count) s.list[i] = items[0];
    if (i + 1 < count) s.list[i + 1] = items[1];
    __syncthreads();
    sort_list(s, left);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        items[j] = i + j < left ? s.list[i + j] : 0;
        masses[j] = i + j < left ? weigher.mass(key_value(uint32_t(items[j]))) : 0;
    }
    prefix = block_prefix(s, masses[0] + masses[1]);
    before = prefix.until - masses[0] - masses[1];
    if (before < drawn && prefix.until >= drawn) {
        s.found = ~uint32_t((before + masses[0] >= drawn ? items[0] : items[1]) >> 32);
    }
    __syncthreads();
    return s.found;
}

// Draws by token from everything that is kept; one thread of the cluster finds it and says so.
template <typename Found> __device__ __forceinline__ void draw_from_row(Stretch& row, const Weigher& weigher, const SampleRow& how, Found found) {
    const uint32_t from = threadIdx.x * row.run(), to = min(from + row.run(), row.len);
    auto mass = [&](uint32_t at) -> uint64_t {
        const float x = row.logits[at];
        if (!weigher.keeps(x, row.first + at)) return 0;
        const float weight = weigher.weight(x);
        return weight >= how.min_p ? static_cast<uint64_t>(weight * kPoint) : 0;
    };
    uint64_t sum = 0;
    for (uint32_t at = from; at < to; ++at) sum += mass(at);
    const Prefix prefix = block_prefix(row.s, sum);
    const uint64_t* all = row.exchange(prefix.whole);
    uint64_t below = 0, whole = 0;
    for (uint32_t block = 0; block < row.blocks; ++block) {
        if (block == row.rank) below = whole;
        whole += Stretch::said(all, block);
    }
    uint64_t until = below + prefix.until - sum;
    const uint64_t target = drawn_mass(how, whole);
    if (until >= target || until + sum < target) return;
#pragma unroll 1
    for (uint32_t at = from; at < to; ++at) {
        until += mass(at);
        if (until >= target) {
            found(row.first + at);
            return;
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) sample(const __grid_constant__ SampleParams p) {
    extern __shared__ float4 held[];
    __shared__ Shared s;
    const uint32_t index = blockIdx.y;
    if (index >= real_rows(p.count, p.rows)) return;
    // Others write here only once this block runs.
    auto started = Stretch::cluster().barrier_arrive();
    Stretch row = stretch_of(s, reinterpret_cast<float*>(held), p.vocab);
    const SampleRow& how = p.how[index];
    const float* from = p.logits + uint64_t(index) * p.vocab + row.first;
    const bool wide = p.vocab % 4 == 0 && aligned16(p.logits) && aligned16(p.seen);

    const bool has_penalties = p.seen != nullptr && (how.repetition != 1.0f || how.frequency != 0.0f || how.presence != 0.0f);
    const bool has_lists = how.bias_count > 0 || how.banned_count > 0, greedy = how.temperature == 0.0f;
    uint32_t* seen = has_penalties ? p.seen + uint64_t(how.slot) * p.vocab : nullptr;
    const bool keep = has_lists || !greedy;
    Look look = has_penalties ? load<true>(row, from, seen + row.first, how, wide, keep) : load<false>(row, from, nullptr, how, wide, keep);
    if (has_lists) look = apply_lists(row, p, how);
    Stretch::cluster().barrier_wait(std::move(started));
    const Summary summary = summarise(row, look);

    auto found = [&](uint32_t token) {
        p.tokens[index] = token;
        p.faults[index] = 0;
        if (has_penalties) seen[token] = (seen[token] + 1) | kSeen;
    };
    const bool nothing = summary.at == kLast;
    if (summary.bad || nothing || greedy) {
        if (!row.leads() || threadIdx.x != 0) return;
        if (!summary.bad && !nothing) return found(summary.at);
        p.tokens[index] = 0;
        p.faults[index] = summary.bad ? 1 : 2;
        return;
    }

    Weigher weigher = {key_value(summary.best), fminf(__fdiv_rn(1.0f, how.temperature), 3.402823466e38f), kKeepAll};
    // What has no mass is never drawn, and no filter's cut depends on it.
    const float lowest = fmaxf(key_value(summary.lowest), weigher.highest - kReach / weigher.scale);
    const Bins bins = bins_between(weigher.highest, lowest, false);
    const bool some_k = how.top_k > 0 && how.top_k < p.vocab, some_p = how.top_p < 1.0f;
    Selected selected = {Selected::kAll, kKeepAll, 0, 0};
    uint32_t limit = kLast;
    uint64_t target = 0;
    if (some_k) {
        selected = select<false>(row, weigher, bins, how.top_k, 0.0f, p.vocab);
        weigher.cut = selected.cut;
        limit = how.top_k;
    }
    if (some_p && selected.kind != Selected::kListed) {
        selected = select<true>(row, weigher, bins, 0, how.top_p, p.vocab);
        weigher.cut = selected.cut;
        limit = kLast;
        target = selected.target;
    }
    if (selected.kind != Selected::kListed) return draw_from_row(row, weigher, how, found);
    auto sent = Stretch::cluster().barrier_arrive();
    if (!row.leads()) return;
    Stretch::cluster().barrier_wait(std::move(sent));
    const uint32_t token = draw_from_list(s, weigher, how, selected.listed, limit, target);
    if (threadIdx.x == 0) found(token);
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
