// The experts of up to eight tokens, and beside them experts that every token takes: the products with
// gate and up, then the one with down as a single sum over all experts of a token; see
// linear/cuda/stream.cuh. Experts that every token takes are known before the router has chosen, so
// their weights come first. Where the router is a simple one every block of the first kernel chooses by
// itself, and the second reads choices, and weights of experts, before the first has ended.
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
    bf16* out;                   // [tokens, hidden]
    const uint32_t* count;
    uint32_t tokens, hidden, inner, always;
    uint32_t top_k, first, held, add;
    stream::Ring ring;
    uint32_t pad;
    RouteParams route;           // its logits are null where the choice is made already
};

constexpr uint32_t kMostHeld = 512, kMostPairs = 128, kTokens = stream::kTokens;

// The experts that are touched, in order of their numbers, so that a token's sum is the same whatever
// the others choose.
struct Touched {
    uint32_t count;
    uint32_t chosen[kMostPairs];
    float weights[kMostPairs];
    uint32_t flag[kMostHeld];
    uint32_t expert[kMostPairs];
    uint32_t mask[kMostPairs];
    uint8_t pair[kMostPairs][kTokens];
    float weight[kMostPairs][kTokens];
};

struct MoeShared {
    stream::Shared common;
    alignas(128) Touched touched;
};
static_assert(sizeof(MoeShared) == 13952, "as stream.rs says");

struct Experts {
    const MoeStreamParams& p;
    Touched& t;
    uint32_t tokens;
    __device__ Experts(const MoeStreamParams& params, Touched& touched)
        : p(params), t(touched), tokens(min(real_rows(p.count, p.tokens), kTokens)) {
        for (uint32_t i = threadIdx.x; i < p.held; i += stream::kThreads) t.flag[i] = 0;
        __syncthreads();
    }
    __device__ uint32_t every_token() const { return (1u << tokens) - 1; }
    __device__ void take(uint32_t pair, uint32_t number, float weight) {
        const uint32_t expert = number - p.first;
        t.chosen[pair] = expert;
        t.weights[pair] = weight;
        if (expert < p.held) t.flag[expert] = 1;
    }
    // The choices that are made.
    __device__ void read() {
        for (uint32_t i = threadIdx.x; i < tokens * p.top_k; i += stream::kThreads) take(i, __ldcg(p.chosen + i), __ldcg(p.weights + i));
    }
    // By all threads, which all wait for each other at its end.
    __device__ void list() {
        const uint32_t lane = threadIdx.x % 32;
        __syncthreads();
        if (threadIdx.x < 32) {
            uint32_t count = 0;
            for (uint32_t begin = 0; begin < p.held; begin += 32) {
                const bool touched = begin + lane < p.held && t.flag[begin + lane] != 0;
                const uint32_t all = __ballot_sync(0xffffffff, touched);
                if (touched) t.expert[count + __popc(all & ((1u << lane) - 1))] = begin + lane;
                count += __popc(all);
            }
            if (lane == 0) t.count = count;
        }
        __syncthreads();
        const uint32_t all = t.count * kTokens;
        for (uint32_t i = threadIdx.x; i < (all + 31) / 32 * 32; i += stream::kThreads) {
            const uint32_t place = i / kTokens, token = i % kTokens;
            bool there = false;
            float weight = 0;
            uint32_t pair = 0;
            if (i < all && token < tokens) {
                const uint32_t expert = t.expert[place];
                for (uint32_t j = 0; j < p.top_k; j++) {
                    if (t.chosen[token * p.top_k + j] == expert) {
                        if (!there) pair = j;
                        there = true;
                        weight += t.weights[token * p.top_k + j];
                    }
                }
            }
            const uint32_t mask = __ballot_sync(0xffffffff, there);
            if (i < all) {
                t.pair[place][token] = pair;
                t.weight[place][token] = weight;
                if (token == 0) t.mask[place] = mask >> (lane / kTokens * kTokens) & 0xff;
            }
        }
        __syncthreads();
    }
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
    __device__ void learn() {
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (p.route.logits == nullptr) {
            read();
        } else if (warp < tokens) {
            const Choice mine = choose<float>(p.route, warp, lane);
            const uint32_t pair = warp * p.top_k + lane;
            if (lane < p.top_k) take(pair, mine.expert, mine.weight);
            if (lane < p.top_k && blockIdx.x == 0) {
                p.chosen[pair] = mine.expert;
                p.weights[pair] = mine.weight;
                __threadfence();
            }
        }
        list();
        // The second kernel may look at choices from here on.
        allow_next();
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
    // Choices were made when the kernel in front let this one begin.
    __device__ void learn() {
        read();
        list();
        allow_next();
    }
    __device__ uint32_t tiles() const { return (last - first + stream::kTile - 1) / stream::kTile; }
    __device__ uint32_t groups() const { return always + t.count; }
    __device__ uint32_t early_tiles() const { return tiles(); }
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
