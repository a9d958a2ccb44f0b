// The experts of up to eight tokens, and beside them experts that every token takes: the products with
// gate and up, then the one with down as a single sum over all experts of a token; see
// linear/cuda/stream.cuh. Experts that every token takes are known before the router has chosen, so
// their weights come first. Where the router is a simple one every block of the first kernel chooses by
// itself; and the second reads what is chosen, and weights of it, before the first has ended.
#include "linear/cuda/stream.cuh"
#include "moe/cuda/route.cuh"

struct MoeStreamParams {
    const bf16* x;               // [tokens, hidden]
    const bf16* gate_up;         // [held, 2 * inner, hidden]
    const bf16* down;            // [held, hidden, inner]
    const bf16* always_gate_up;  // [2 * always, hidden] or null
    const bf16* always_down;     // [hidden, always] or null
    bf16* h;                     // [tokens * top_k, inner]
    bf16* always_h;              // [tokens, always]
    uint32_t* chosen;            // [tokens, top_k]
    float* weights;              // [tokens, top_k]
    TouchedList* list;           // by the first kernel, for the second
    bf16* out;                   // [tokens, hidden]
    const uint32_t* count;
    uint32_t tokens, hidden, inner, always;
    uint32_t top_k, first, held, add;
    stream::Ring ring;
    RouteParams route;           // its logits are null where the choice is made already
};

constexpr uint32_t kTokens = stream::kTokens;
static_assert(kTokens == kFewTokens, "of one list");

struct Touched {
    uint32_t count;
    uint32_t held[kMostHeld / 32];  // a bit for every expert
    uint32_t expert[kMostPairs];
    uint32_t mask[kMostPairs];
    alignas(16) uint8_t pair[kMostPairs][kTokens];
    alignas(16) float weight[kMostPairs][kTokens];
};

struct MoeShared {
    stream::Shared common;
    alignas(128) Touched touched;
};
static_assert(sizeof(MoeShared) == 10880 && sizeof(TouchedList) == 6160, "as stream.rs says");

struct Experts {
    const MoeStreamParams& p;
    Touched& t;
    uint32_t tokens;
    __device__ Experts(const MoeStreamParams& params, Touched& touched)
        : p(params), t(touched), tokens(min(real_rows(p.count, p.tokens), kTokens)) {}
    __device__ uint32_t every_token() const { return (1u << tokens) - 1; }
};

// silu(gate x) * up x of every expert that is touched.
struct Up : Experts {
    static constexpr bool kStaged = false, kAhead = false;
    static constexpr uint32_t kOut = stream::kTile / 2;
    uint32_t always_first, always_tiles, first = 0, routed = 0;
    __device__ Up(const MoeStreamParams& params, Touched& touched) : Experts(params, touched) {
        const uint64_t all = p.always / kOut;
        always_first = uint32_t(all * blockIdx.x / gridDim.x);
        always_tiles = uint32_t(all * (blockIdx.x + 1) / gridDim.x) - always_first;
    }
    // A warp has a token. All of it runs twice, first on what lies there before the kernel in front has
    // ended: otherwise everybody would wait for instructions to be fetched.
    template <class Wait> __device__ void learn(Wait wait) {
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
        for (uint32_t pass = 0; pass < 2; pass++) {
            if (threadIdx.x < kMostHeld / 32) t.held[threadIdx.x] = 0;
            if (threadIdx.x < kMostPairs) t.mask[threadIdx.x] = 0;
            stream::multipliers_meet();
            if (pass == 1) wait();
            Choice mine = {};
            const uint32_t pair = warp * p.top_k + lane;
            const bool chooses = warp < tokens && lane < p.top_k;
            if (p.route.logits != nullptr) {
                if (warp < tokens) mine = choose<float>(p.route, warp, lane);
            } else if (chooses) {
                mine = {__ldcg(p.chosen + pair), __ldcg(p.weights + pair)};
            }
            const uint32_t own = chooses ? mine.expert - p.first : kNone;
            if (own < p.held) atomicOr(&t.held[own / 32], 1u << own % 32);
            stream::multipliers_meet();
            // An expert for each lane, in the order of their numbers.
            uint32_t count = 0;
            for (uint32_t word = 0; word < (p.held + 31) / 32; word++) {
                const uint32_t bits = t.held[word], expert = word * 32 + lane;
                const uint32_t place = count + __popc(bits & ((1u << lane) - 1));
                count += __popc(bits);
                float weight = 0;
                uint32_t which = kNone;
                for (uint32_t j = 0; j < p.top_k; j++) {
                    const uint32_t other = __shfl_sync(0xffffffff, own, j);
                    const float more = __shfl_sync(0xffffffff, mine.weight, j);
                    if (other != expert) continue;
                    if (which == kNone) which = j;
                    weight += more;
                }
                if (!(bits >> lane & 1)) continue;
                if (warp == 0) t.expert[place] = expert;
                t.pair[place][warp] = which;
                t.weight[place][warp] = weight;
                if (which != kNone) atomicOr(&t.mask[place], 1u << warp);
            }
            if (threadIdx.x == 0) t.count = count;
            stream::multipliers_meet();
            if (pass == 1 && blockIdx.x == 0) tell_next(mine, pair, chooses);
        }
    }
    __device__ void tell_next(Choice mine, uint32_t pair, bool chooses) {
        const uint32_t i = threadIdx.x;
        if (chooses && p.route.logits != nullptr) {
            p.chosen[pair] = mine.expert;
            p.weights[pair] = mine.weight;
        }
        if (i == 0) p.list->count = t.count;
        if (i < t.count) {
            p.list->expert[i] = t.expert[i];
            p.list->mask[i] = t.mask[i];
            *reinterpret_cast<uint2*>(p.list->pair[i]) = *reinterpret_cast<const uint2*>(t.pair[i]);
            const float4* from = reinterpret_cast<const float4*>(t.weight[i]);
            float4* to = reinterpret_cast<float4*>(p.list->weight[i]);
            to[0] = from[0], to[1] = from[1];
        }
        __threadfence();
        stream::multipliers_meet();
    }
    // Of the tiles of all touched experts, those of this block.
    __device__ void settle() {
        const uint64_t all = uint64_t(t.count) * (p.inner / kOut);
        first = uint32_t(all * blockIdx.x / gridDim.x);
        routed = uint32_t(all * (blockIdx.x + 1) / gridDim.x) - first;
    }
    __device__ uint32_t tiles() const { return always_tiles + routed; }
    __device__ uint32_t groups() const { return 1; }
    __device__ uint32_t early_tiles() const { return always_tiles; }
    __device__ uint32_t x_columns() const { return p.hidden; }
    __device__ uint32_t place(uint32_t tile) const { return (first + tile - always_tiles) / (p.inner / kOut); }
    __device__ uint32_t output(uint32_t tile) const {
        return tile < always_tiles ? (always_first + tile) * kOut : (first + tile - always_tiles) % (p.inner / kOut) * kOut;
    }
    __device__ stream::Rows rows(uint32_t tile, uint32_t) const {
        const uint64_t at = uint64_t(output(tile)) * p.hidden;
        if (tile < always_tiles) return {p.always_gate_up + at, uint64_t(p.always) * p.hidden, 1, stream::kTile, p.hidden};
        const uint64_t up = uint64_t(p.inner) * p.hidden;
        return {p.gate_up + 2 * up * t.expert[place(tile)] + at, up, 1, stream::kTile, p.hidden};
    }
    __device__ uint32_t tokens_of(uint32_t, uint32_t) const { return every_token(); }
    __device__ const bf16* x_row(uint32_t, uint32_t, uint32_t token) const { return p.x + uint64_t(token) * p.hidden; }
    __device__ float weight(uint32_t, uint32_t, uint32_t) const { return 1.0f; }
    __device__ void finish(uint32_t tile, uint32_t token, uint32_t row, float sum) const {
        const float up = __shfl_xor_sync(0xffffffff, sum, 1);
        if (row & 1 || token >= tokens) return;
        const bf16 h = narrow<bf16>(sum / (1.0f + expf(-sum)) * up);
        const uint32_t at = output(tile) + row / 2;
        if (tile < always_tiles) {
            p.always_h[uint64_t(token) * p.always + at] = h;
            return;
        }
        const uint32_t place = this->place(tile);
        if (t.mask[place] >> token & 1) p.h[(uint64_t(token) * p.top_k + t.pair[place][token]) * p.inner + at] = h;
    }
};

// The sum over a token's experts of weight * down h.
struct Down : Experts {
    static constexpr bool kStaged = true, kAhead = true;
    uint32_t first, last, always;
    __device__ Down(const MoeStreamParams& params, Touched& touched)
        : Experts(params, touched),
          first(uint32_t(uint64_t(p.hidden) * blockIdx.x / gridDim.x)),
          last(uint32_t(uint64_t(p.hidden) * (blockIdx.x + 1) / gridDim.x)),
          always(p.always != 0) {}
    // The list was there when the kernel in front let this one begin.
    template <class Wait> __device__ void learn(Wait) {
        const uint32_t i = threadIdx.x;
        if (i == 0) t.count = __ldcg(&p.list->count);
        // As much as there can be of it at once.
        if (i < tokens * p.top_k) {
            const uint2 pair = __ldcg(reinterpret_cast<const uint2*>(p.list->pair[i]));
            const float4* from = reinterpret_cast<const float4*>(p.list->weight[i]);
            const float4 low = __ldcg(from), high = __ldcg(from + 1);
            t.expert[i] = __ldcg(&p.list->expert[i]);
            t.mask[i] = __ldcg(&p.list->mask[i]);
            *reinterpret_cast<uint2*>(t.pair[i]) = pair;
            reinterpret_cast<float4*>(t.weight[i])[0] = low;
            reinterpret_cast<float4*>(t.weight[i])[1] = high;
        }
        stream::multipliers_meet();
    }
    __device__ void settle() {}
    __device__ uint32_t tiles() const { return (last - first + stream::kTile - 1) / stream::kTile; }
    __device__ uint32_t groups() const { return always + t.count; }
    __device__ uint32_t at_once() const { return always; }
    __device__ uint32_t x_columns() const { return 0; }
    __device__ stream::Rows rows(uint32_t tile, uint32_t group) const {
        const uint32_t at = first + tile * stream::kTile, count = min(last - at, uint32_t(stream::kTile));
        if (group < always) return {p.always_down + uint64_t(at) * p.always, 0, 0, count, p.always};
        return {p.down + (uint64_t(t.expert[group - always]) * p.hidden + at) * p.inner, 0, 0, count, p.inner};
    }
    __device__ uint32_t tokens_of(uint32_t, uint32_t group) const { return group < always ? every_token() : t.mask[group - always]; }
    __device__ const bf16* x_row(uint32_t, uint32_t group, uint32_t token) const {
        if (group < always) return p.always_h + uint64_t(token) * p.always;
        return p.h + (uint64_t(token) * p.top_k + t.pair[group - always][token]) * p.inner;
    }
    __device__ float weight(uint32_t, uint32_t group, uint32_t token) const { return group < always ? 1.0f : t.weight[group - always][token]; }
    __device__ void finish(uint32_t tile, uint32_t token, uint32_t row, float sum) const {
        const uint32_t at = first + tile * stream::kTile + row;
        if (token >= tokens || at >= last) return;
        bf16* out = p.out + uint64_t(token) * p.hidden + at;
        *out = narrow<bf16>(p.add ? sum + widen(*out) : sum);
    }
};

template <class Job> __device__ void experts(const MoeStreamParams& p) {
    extern __shared__ __align__(128) uint8_t memory[];
    MoeShared& s = *reinterpret_cast<MoeShared*>(memory);
    Job job(p, s.touched);
    const uint32_t x_at = shared_address(memory) + sizeof(MoeShared);
    stream::run(job, s.common, p.ring, x_at, x_at + (Job::kStaged ? 0 : (p.tokens * p.ring.x_pitch + 127) / 128 * 128));
}

extern "C" __global__ void __launch_bounds__(stream::kThreads, 2) moe_stream_up(const __grid_constant__ MoeStreamParams p) { experts<Up>(p); }
extern "C" __global__ void __launch_bounds__(stream::kThreads, 2) moe_stream_down(const __grid_constant__ MoeStreamParams p) { experts<Down>(p); }
