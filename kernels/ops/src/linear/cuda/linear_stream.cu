// out = x w^T + bias, or silu(gate) * up of it, for up to eight tokens, added to what lies in `out` where
// asked, and a second product of the same tokens; see stream.cuh.
#include "linear/cuda/stream.cuh"

struct StreamParams {
    const bf16* x;
    const bf16* w;      // [outputs, columns]; in pairs as many gates, then ups
    const float* bias;  // [outputs] or null
    void* out;
    const uint32_t* count;
    uint64_t x_stride, out_stride;
    const bf16* second_w;  // of the outputs from `split` on
    void* second_out;
    uint64_t second_stride;
    uint32_t tokens, columns, outputs, split;
    uint32_t pairs, add, out_f32;
    stream::Ring ring;
    uint32_t pad;
};

static_assert(sizeof(stream::Shared) == 4608, "as stream.rs says");

template <bool Staged> struct Product {
    static constexpr bool kStaged = Staged, kAhead = true;
    const StreamParams& p;
    uint32_t first, last, per, tokens;
    __device__ explicit Product(const StreamParams& params)
        : p(params),
          first(uint32_t(uint64_t(p.outputs) * blockIdx.x / gridDim.x)),
          last(uint32_t(uint64_t(p.outputs) * (blockIdx.x + 1) / gridDim.x)),
          per(stream::kTile >> p.pairs),
          tokens(min(real_rows(p.count, p.tokens), uint32_t(stream::kTokens))) {}
    template <class Wait> __device__ void learn(Wait) {}
    __device__ void settle() {}
    __device__ uint32_t tiles() const { return (last - first + per - 1) / per; }
    __device__ uint32_t groups() const { return 1; }
    __device__ uint32_t early_tiles() const { return 0; }
    __device__ uint32_t at_once() const { return 1; }
    __device__ uint32_t x_columns() const { return p.columns; }
    __device__ stream::Rows rows(uint32_t tile, uint32_t) const {
        const uint32_t at = first + tile * per, count = min(last - at, per) << p.pairs;
        if (at >= p.split) return {p.second_w + uint64_t(at - p.split) * p.columns, 0, 0, count, p.columns};
        const uint64_t up = uint64_t(p.outputs) * p.columns;
        return {p.w + uint64_t(at) * p.columns, up, p.pairs, count, p.columns, (p.split - at) << p.pairs, p.second_w};
    }
    __device__ uint32_t tokens_of(uint32_t, uint32_t) const { return (1u << tokens) - 1; }
    __device__ const bf16* x_row(uint32_t, uint32_t, uint32_t token) const { return p.x + token * p.x_stride; }
    __device__ float weight(uint32_t, uint32_t, uint32_t) const { return 1.0f; }
    __device__ void finish(uint32_t tile, uint32_t token, uint32_t row, float sum) const {
        const uint32_t at = first + tile * per + (row >> p.pairs);
        if (p.pairs) {
            const float up = __shfl_xor_sync(0xffffffff, sum, 1);
            // Rounded where the ops one by one store it.
            const float gate = widen(narrow<bf16>(sum));
            sum = gate / (1.0f + expf(-gate)) * widen(narrow<bf16>(up));
            if (row & 1) return;
        }
        if (token >= tokens || at >= last) return;
        if (at >= p.split) {
            static_cast<bf16*>(p.second_out)[token * p.second_stride + at - p.split] = narrow<bf16>(sum);
            return;
        }
        if (p.bias != nullptr) sum += p.bias[at];
        const uint64_t to = token * p.out_stride + at;
        if (p.out_f32) {
            static_cast<float*>(p.out)[to] = sum;
        } else {
            bf16* out = static_cast<bf16*>(p.out) + to;
            *out = narrow<bf16>(p.add ? widen(narrow<bf16>(sum)) + widen(*out) : sum);
        }
    }
};

template <bool Staged> __device__ void product(const StreamParams& p) {
    extern __shared__ __align__(128) uint8_t memory[];
    stream::Shared& s = *reinterpret_cast<stream::Shared*>(memory);
    Product<Staged> job(p);
    const uint32_t x_at = shared_address(memory) + sizeof(stream::Shared);
    stream::run(job, s, p.ring, x_at, x_at + (Staged ? 0 : (p.tokens * p.ring.x_pitch + 127) / 128 * 128));
}

extern "C" __global__ void __launch_bounds__(stream::kThreads, 2) linear_stream(const __grid_constant__ StreamParams p) { product<false>(p); }
extern "C" __global__ void __launch_bounds__(stream::kThreads, 2) linear_stream_staged(const __grid_constant__ StreamParams p) { product<true>(p); }
