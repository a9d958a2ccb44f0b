// out = x w^T + bias, or silu(gate) * up of it, for up to eight tokens, added to what lies in `out` where
// asked; see stream.cuh.
#include "linear/cuda/stream.cuh"

struct StreamParams {
    const bf16* x;
    const bf16* w;      // [outputs, columns]; in pairs as many gates, then ups
    const float* bias;  // [outputs] or null
    void* out;
    const uint32_t* count;
    uint64_t x_stride, out_stride;
    uint32_t tokens, columns, outputs;
    uint32_t pairs, add, out_f32;
    stream::Ring ring;
    float eps;
    const float* norm;  // [columns] or null: of the tokens, which are normed first
    bf16* normed;       // [tokens, columns] where they are stored then
};

static_assert(sizeof(stream::Shared) == 4608, "as stream.rs says");

__device__ __forceinline__ float2 widened(uint32_t pair) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair)); }
// `sum` and the squares of eight elements.
__device__ __forceinline__ float squares(uint4 v, float sum) {
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = widened(pairs[i]);
        sum += x.x * x.x;
        sum += x.y * x.y;
    }
    return sum;
}
__device__ __forceinline__ uint4 scaled(uint4 v, float scale, const float4 (&by)[2]) {
    const float2 a = widened(v.x), b = widened(v.y), c = widened(v.z), d = widened(v.w);
    return {pack_bf16(a.x * scale * by[0].x, a.y * scale * by[0].y), pack_bf16(b.x * scale * by[0].z, b.y * scale * by[0].w),
            pack_bf16(c.x * scale * by[1].x, c.y * scale * by[1].y), pack_bf16(d.x * scale * by[1].z, d.y * scale * by[1].w)};
}

template <bool Staged> struct Product {
    static constexpr bool kStaged = Staged;
    const StreamParams& p;
    uint32_t first, last, per, real;
    __device__ explicit Product(const StreamParams& params)
        : p(params),
          first(uint32_t(uint64_t(p.outputs) * blockIdx.x / gridDim.x)),
          last(uint32_t(uint64_t(p.outputs) * (blockIdx.x + 1) / gridDim.x)),
          per(stream::kTile >> p.pairs),
          real(min(real_rows(p.count, p.tokens), uint32_t(stream::kTokens))) {}
    // Weights of the norm, if they are few, come before the tokens.
    static constexpr int kHeld = 2, kVector = 8;
    float4 norm[kHeld][2];
    __device__ void begin() {
        if (p.norm == nullptr) return;
#pragma unroll
        for (int i = 0; i < kHeld; i++) load_norm(norm[i], threadIdx.x + i * stream::kWarps * 32);
    }
    __device__ void load_norm(float4 (&to)[2], uint32_t vector) const {
        if (vector * kVector >= p.columns) return;
        const float4* from = reinterpret_cast<const float4*>(p.norm + vector * kVector);
        to[0] = __ldg(from), to[1] = __ldg(from + 1);
    }
    // Norms the tokens where they lie, with sums in the order of norm.cu.
    __device__ void arrived(stream::Shared& s, uint32_t x_at, const stream::Ring& ring) {
        if (p.norm == nullptr) return;
        if (real <= 2) {
            norm_few(s, x_at, ring);
        } else {
            norm_many(s, x_at, ring);
        }
    }
    // In short code: its instructions are fetched while everybody waits for them.
    __device__ void norm_few(stream::Shared& s, uint32_t x_at, const stream::Ring& ring) const {
        constexpr uint32_t kThreads = stream::kWarps * 32;
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = p.columns / kVector;
        float* parts = &s.sums[0][0][0][0];  // [tokens][warps]
#pragma unroll 1
        for (uint32_t token = 0; token < real; token++) {
            float sum = 0;
#pragma unroll 1
            for (uint32_t i = threadIdx.x; i < vectors; i += kThreads) sum = squares(stream::load_shared16(x_at + token * ring.x_pitch + i * 16), sum);
            sum = warp_sum(sum);
            if (lane == 0) parts[token * stream::kWarps + warp] = sum;
        }
        stream::multipliers_meet();
#pragma unroll 1
        for (uint32_t token = 0; token < real; token++) {
            const float scale = rsqrtf(warp_sum(lane < stream::kWarps ? parts[token * stream::kWarps + lane] : 0.0f) / p.columns + p.eps);
#pragma unroll 1
            for (uint32_t i = threadIdx.x, n = 0; i < vectors; i += kThreads, n++) put(x_at + token * ring.x_pitch + i * 16, token, i, n, scale);
        }
        stream::multipliers_meet();
    }
    // As far as 8 x 8 partial sums go, all tokens at once.
    __device__ void norm_many(stream::Shared& s, uint32_t x_at, const stream::Ring& ring) const {
        constexpr uint32_t kThreads = stream::kWarps * 32;
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = p.columns / kVector;
        float* parts = &s.sums[0][0][0][0];  // [tokens][warps]
        float sums[stream::kTokens] = {};
        for (uint32_t i = threadIdx.x; i < vectors; i += kThreads) {
#pragma unroll
            for (uint32_t token = 0; token < stream::kTokens; token++) {
                if (token < real) sums[token] = squares(stream::load_shared16(x_at + token * ring.x_pitch + i * 16), sums[token]);
            }
        }
#pragma unroll
        for (uint32_t token = 0; token < stream::kTokens; token++) {
            if (token >= real) break;
            sums[token] = warp_sum(sums[token]);
            if (lane == 0) parts[token * stream::kWarps + warp] = sums[token];
        }
        stream::multipliers_meet();
        // Four tokens at once, eight lanes each.
        float scales[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = parts[half * 32 + lane];
#pragma unroll
            for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
            scales[half] = rsqrtf(sum / p.columns + p.eps);
        }
#pragma unroll
        for (uint32_t token = 0; token < stream::kTokens; token++) sums[token] = __shfl_sync(0xffffffff, scales[token / 4], token % 4 * 8);
        for (uint32_t i = threadIdx.x, n = 0; i < vectors; i += kThreads, n++) {
#pragma unroll
            for (uint32_t token = 0; token < stream::kTokens; token++) {
                if (token >= real) break;
                put(x_at + token * ring.x_pitch + i * 16, token, i, n, sums[token]);
            }
        }
        stream::multipliers_meet();
    }
    __device__ __forceinline__ void put(uint32_t at, uint32_t token, uint32_t vector, uint32_t n, float scale) const {
        float4 by[2] = {norm[0][0], norm[0][1]};
        if (n == 1) by[0] = norm[1][0], by[1] = norm[1][1];
        if (n > 1) load_norm(by, vector);
        const uint4 v = scaled(stream::load_shared16(at), scale, by);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
        if (blockIdx.x == 0) *reinterpret_cast<uint4*>(p.normed + uint64_t(token) * p.columns + vector * kVector) = v;
    }
    __device__ uint32_t tiles() const { return (last - first + per - 1) / per; }
    __device__ uint32_t columns() const { return p.columns; }
    __device__ uint32_t tokens() const { return real; }
    __device__ const bf16* x_row(uint32_t token) const { return p.x + token * p.x_stride; }
    __device__ stream::Rows rows(uint32_t tile) const {
        const uint32_t at = first + tile * per, count = min(last - at, per) << p.pairs;
        const uint64_t up = uint64_t(p.outputs) * p.columns;
        return {p.w + uint64_t(at) * p.columns, up, p.pairs, count, p.columns};
    }
    __device__ void finish(uint32_t tile, uint32_t token, uint32_t row, float sum) const {
        const uint32_t at = first + tile * per + (row >> p.pairs);
        if (p.pairs) {
            const float up = __shfl_xor_sync(0xffffffff, sum, 1);
            // Rounded where the ops one by one store it.
            const float gate = widen(narrow<bf16>(sum));
            sum = gate / (1.0f + expf(-gate)) * widen(narrow<bf16>(up));
            if (row & 1) return;
        }
        if (token >= real || at >= last) return;
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
