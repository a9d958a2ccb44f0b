// From a row of logits to a token, one cluster per row, nothing sorted but short lists. The order of
// steps is the contract's: penalties, bias, bans, temperature, top-k, top-p, min-p, draw.
//
// Logits stay as they are: what is added and banned changes the copy in shared memory.
#include "sample/cuda/list.cuh"

struct SampleRow {
    uint64_t seed;
    float temperature, top_p, min_p;
    float repetition, frequency, presence;
    uint32_t top_k, choice, position;
    uint32_t slot;  // row of `seen`
    uint32_t bias_start, bias_count, banned_start, banned_count;

    __device__ __forceinline__ bool filters_by_rank(uint32_t vocab) const { return top_k > 0 && top_k < vocab; }
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

// Where a row's result goes.
struct Result {
    uint32_t *token, *fault;
    uint32_t* seen;  // the slot's counts, or null

    __device__ __forceinline__ void drawn(uint32_t drawn) const {
        *token = drawn;
        *fault = 0;
        if (seen != nullptr) seen[drawn] = (seen[drawn] + 1) | kSeen;
    }
    __device__ __forceinline__ void failed(uint32_t highest) const {
        *token = 0;
        *fault = highest >= kBadKey ? 1 : 2;
    }
};

// Lowers what was seen before. Counts are on their way while the logits still are.
__device__ __forceinline__ void penalise(const Stretch& row, const Source& source, const uint32_t* seen, const SampleRow& how) {
    constexpr uint32_t kAhead = 4;
    const bool wide = source.wide && aligned16(seen);
    for (uint32_t base = 0; base < row.padded; base += kAhead * 4 * kThreads) {
        uint4 counts[kAhead];
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
            const uint32_t at = base + 4 * (i * kThreads + threadIdx.x);
            auto one = [&](uint32_t j) { return j < row.len ? seen[j] : 0u; };
            if (at >= row.padded) {
                counts[i] = {0, 0, 0, 0};
            } else if (wide) {
                counts[i] = *reinterpret_cast<const uint4*>(seen + at);
            } else {
                counts[i] = {one(at), one(at + 1), one(at + 2), one(at + 3)};
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < kAhead; ++i) {
            const uint32_t from = base + 4 * i * kThreads, at = from + 4 * threadIdx.x;
            if (from < row.padded) source.wait(row.s, from);
            const uint4 n = counts[i];
            if ((n.x | n.y | n.z | n.w) == 0) continue;
            row.logits[at] = penalised(row.logits[at], n.x, how);
            row.logits[at + 1] = penalised(row.logits[at + 1], n.y, how);
            row.logits[at + 2] = penalised(row.logits[at + 2], n.z, how);
            row.logits[at + 3] = penalised(row.logits[at + 3], n.w, how);
        }
    }
}

// Adds biases and takes bans away. A list of biases names no token twice.
__device__ __forceinline__ void apply_lists(const Stretch& row, const Source& source, const SampleParams& p, const SampleRow& how) {
    for (uint32_t from = 0; from < row.padded; from += kChunk) source.wait(row.s, from);
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
template <bool kCut>
__device__ __forceinline__ void draw_from_row(Stretch& row, const Weigher& weigher, const SampleRow& how, const Result& result) {
    const uint32_t run = row.run(), from = threadIdx.x * run, to = min(from + run, row.len), lane = threadIdx.x % 32;
    const float min_p = how.min_p;
    auto mass = [&](uint32_t at) -> uint64_t {
        const float x = row.logits[at], weight = weigher.weight(x);
        const bool kept = weight >= min_p && (!kCut || weigher.keeps(x, row.first + at));
        return kept ? static_cast<uint64_t>(weight * kPoint) : 0;
    };
    uint64_t sum = 0;
#pragma unroll 4
    for (uint32_t at = from; at < to; ++at) sum += mass(at);
    const Prefix prefix = block_prefix(row.s, sum);
    const uint64_t* all = row.exchange(prefix.whole);
    uint64_t below = 0, whole = 0;
    for (uint32_t block = 0; block < row.blocks; ++block) {
        if (block == row.rank) below = whole;
        whole += Stretch::said(all, block);
    }
    const uint64_t target = drawn_mass(how, whole), until = below + prefix.until;
    const uint32_t reached = __ballot_sync(0xffffffff, until >= target && until - sum < target);
    if (reached == 0) return;
    // The whole warp walks the run of the thread that reaches it.
    const uint32_t thread = __ffs(reached) - 1, end = __shfl_sync(0xffffffff, to, thread);
    uint64_t before = __shfl_sync(0xffffffff, until - sum, thread);
    for (uint32_t at = __shfl_sync(0xffffffff, from, thread) + lane;; at += 32) {
        const uint64_t here = warp_prefix(at < end ? mass(at) : 0) + before;
        const uint32_t lanes = __ballot_sync(0xffffffff, here >= target);
        if (lanes != 0) {
            if (lane == __ffs(lanes) - 1) result.drawn(row.first + at);
            return;
        }
        before = __shfl_sync(0xffffffff, here, 31);
    }
}

// Up to here a filter by rank is served from one list; few rows have more that reach the bound.
constexpr uint32_t kFew = 800;
// Tokens that a list holds where a filter by mass says nothing of their number.
constexpr uint32_t kSome = 600;
// By how much a bound on logits is lowered against rounding, in natural logs of weights.
constexpr float kMargin = 0.01f;

// What the leader draws from.
struct Draw {
    bool listed;
    uint32_t tokens, limit;
    uint64_t target;
};

// Tries to list everything that filters keep, by a guess that is checked.
__device__ __forceinline__ Draw guess_list(Stretch& row, const Weigher& weigher, const SampleRow& how, uint32_t vocab, const Highest& highest) {
    const float least = weigher.highest - kReach / weigher.scale;
    const bool some_k = how.filters_by_rank(vocab), some_p = how.top_p < 1.0f;
    Draw draw = {false, 0, some_k ? how.top_k : kLast, 0};
    if ((some_k && how.top_k > kFew) || !(some_k || some_p || how.min_p > 0.0f)) return draw;
    float bound = weigher.highest + (logf(how.min_p) - kMargin) / weigher.scale;
    if (some_k || some_p) {
        // Where the highest of threads lie far apart, everything that has mass.
        bound = highest.bound <= key_value(highest.tops.lowest) ? least : fmaxf(highest.bound, least);
    }
    auto reaches = [&](float x, uint32_t) { return x >= bound; };
    const bool by_mass = some_p && !some_k;
    const Listed listed = by_mass ? list_where<true>(row, weigher, reaches) : list_where<false>(row, weigher, reaches);
    if (listed.tokens > kList) return draw;
    if (some_k && listed.tokens < how.top_k && bound > least) return draw;
    if (by_mass) {
        draw.target = max(uint64_t(1), static_cast<uint64_t>(ceil(double(how.top_p) * double(listed.whole))));
        if (listed.mass < draw.target) return draw;
    }
    send_list(row, listed.lower);
    draw.listed = true;
    draw.tokens = listed.tokens;
    return draw;
}

// Cuts by rank, then by mass, wherever the cuts lie, and draws. Out of line, since few rows come here;
// by value, so that the caller keeps its own in registers.
__device__ __noinline__ void cut_and_draw(Stretch row, Weigher weigher, const SampleRow& how, uint32_t vocab, Result result) {
    float lowest = INFINITY;
    row.each([&](uint32_t, float x) { lowest = fminf(lowest, x == -INFINITY ? INFINITY : x); });
    lowest = key_value(row_tops(row, block_tops(row.s, order_key(lowest))).lowest);
    // What has no mass is never drawn, and no cut depends on it.
    const Bins bins = bins_between(weigher.highest, fmaxf(lowest, weigher.highest - kReach / weigher.scale));
    if (how.top_k > 0 && how.top_k < vocab) weigher.cut = select<false>(row, weigher, bins, how.top_k, 0.0f, vocab);
    if (how.top_p < 1.0f) weigher.cut = select<true>(row, weigher, bins, 0, how.top_p, vocab);
    draw_from_row<true>(row, weigher, how, result);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) sample(const __grid_constant__ SampleParams p) {
    extern __shared__ float4 held[];
    __shared__ Shared s;
    const uint32_t index = blockIdx.y;
    if (index >= real_rows(p.count, p.rows)) return;
    // Others write here only once this block runs.
    auto started = Stretch::cluster().barrier_arrive();
    Stretch row = stretch_of(s, reinterpret_cast<float*>(held), p.vocab);
    const Source source = {p.logits + uint64_t(index) * p.vocab + row.first, p.vocab % 4 == 0 && aligned16(p.logits)};
    start_reading(row, source);
    const SampleRow& how = p.how[index];
    const bool greedy = how.temperature == 0.0f;
    const bool has_penalties = p.seen != nullptr && (how.repetition != 1.0f || how.frequency != 0.0f || how.presence != 0.0f);
    uint32_t* seen = has_penalties ? p.seen + uint64_t(how.slot) * p.vocab : nullptr;
    if (has_penalties) penalise(row, source, seen + row.first, how);
    if (how.bias_count > 0 || how.banned_count > 0) apply_lists(row, source, p, how);
    const float own = look(row, source);
    const Tops here = block_tops(s, order_key(own));
    Stretch::cluster().barrier_wait(std::move(started));

    const Result result = {p.tokens + index, p.faults + index, seen};
    if (greedy) {
        const uint32_t first = first_of(row, here.highest, order_key(own) == here.highest);
        const uint2* all = row.tell_leader(uint2{here.highest, first});
        if (all == nullptr || threadIdx.x != 0) return;
        uint2 best = {0, 0};
        for (uint32_t block = 0; block < row.blocks; ++block) {
            // Blocks are in the order of tokens: of equal ones the first stays.
            if (Stretch::said(all, block).x > best.x) best = Stretch::said(all, block);
        }
        return best.x >= kBadKey || best.x == kNothingKey ? result.failed(best.x) : result.drawn(best.y);
    }
    const uint32_t wanted = how.filters_by_rank(p.vocab) ? (how.top_k > kFew ? 0 : how.top_k) : how.top_p < 1.0f ? kSome : 0;
    const Highest highest = row_highest(row, here, own, wanted);
    const Tops& tops = highest.tops;
    if (tops.highest >= kBadKey || tops.highest == kNothingKey) {
        if (row.leads() && threadIdx.x == 0) result.failed(tops.highest);
        return;
    }

    const Weigher weigher = {key_value(tops.highest), fminf(__fdiv_rn(1.0f, how.temperature), 3.402823466e38f), kKeepAll};
    const Draw draw = guess_list(row, weigher, how, p.vocab, highest);
    if (!draw.listed) {
        const bool cuts = (how.top_k > 0 && how.top_k < p.vocab) || how.top_p < 1.0f;
        if (cuts) return cut_and_draw(row, weigher, how, p.vocab, result);
        return draw_from_row<false>(row, weigher, how, result);
    }
    if (!row.leave_to_leader()) return;
    const uint32_t token = draw_from_list(s, weigher, how, draw.tokens, draw.limit, draw.target);
    if (threadIdx.x == 0) result.drawn(token);
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
