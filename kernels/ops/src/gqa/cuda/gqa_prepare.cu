// Queries and keys of grouped-query attention normed and rotated, queries in place, keys with their values
// into the paged cache; heads of 64 and 128. A block takes a row, a warp eight heads at once, four lanes to
// a head: a lane has every fourth 16 bytes of it, and with them both elements of every pair. Sums and
// roundings are those of the ops one by one, in their order. A table entry outside of the arena is passed
// over: wrong values at worst, never foreign memory.
#include "cuda/async.cuh"

namespace gqa_prepare {

constexpr int kThreads = 96;
constexpr int kTokens = 64;  // of a cache block
constexpr int kLanes = 4;    // of a head
constexpr int kAtOnce = 32 / kLanes;
constexpr int kEach = 8;  // elements of 16 bytes
using Unit = Vec<bf16, kEach>;

struct Params {
    bf16* q;         // [rows, heads, D], q_row apart
    const bf16* kv;  // [rows, 2, KV heads, D], kv_row apart: keys, then values
    bf16* arena;
    const uint32_t* positions;
    const uint32_t* row_tables;  // index in `tables` of the first block of the row's sequence
    const uint64_t* tables;      // element offsets of blocks
    const uint32_t* count;
    const float* q_norm;  // [D] each; null without norms
    const float* k_norm;
    const float* inv_freq;  // [D / 2]
    uint64_t arena_elements, layer_offset, q_row, kv_row;
    uint32_t rows, heads, kv_heads;
    float q_eps, k_eps, factor;
};

// A lane's share of a head.
template <int kDim> struct Share {
    static constexpr int kUnits = kDim / (kLanes * kEach);
    Unit x[kUnits];

    __device__ static int first(int i, int lane) { return (lane % kLanes + kLanes * i) * kEach; }
    __device__ __forceinline__ void load(const bf16* from, int lane) {
#pragma unroll
        for (int i = 0; i < kUnits; i++) x[i] = *reinterpret_cast<const Unit*>(from + first(i, lane));
    }
    __device__ __forceinline__ void store(bf16* to, int lane) const {
#pragma unroll
        for (int i = 0; i < kUnits; i++) *reinterpret_cast<Unit*>(to + first(i, lane)) = x[i];
    }
    // The op has a lane for each of 32 elements, sums those that are 32 apart and then over lanes, the most
    // distant first.
    __device__ __forceinline__ void norm(const float* weight, float eps, int lane) {
        float sum[kEach];
#pragma unroll
        for (int j = 0; j < kEach; j++) {
            sum[j] = 0.0f;
#pragma unroll
            for (int i = 0; i < kUnits; i++) sum[j] += widen(x[i].at[j]) * widen(x[i].at[j]);
        }
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma unroll
            for (int j = 0; j < kEach; j++) sum[j] += __shfl_xor_sync(0xffffffff, sum[j], step);
        }
#pragma unroll
        for (int step = kEach / 2; step > 0; step /= 2) {
#pragma unroll
            for (int j = 0; j < step; j++) sum[j] += sum[j + step];
        }
        const float scale = rsqrtf(sum[0] / kDim + eps);
#pragma unroll
        for (int i = 0; i < kUnits; i++) {
            const float4* by = reinterpret_cast<const float4*>(weight + first(i, lane));
            const float4 low = by[0], high = by[1];
            const float w[kEach] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < kEach; j++) x[i].at[j] = narrow<bf16>(widen(x[i].at[j]) * scale * w[j]);
        }
    }
    __device__ __forceinline__ void rotate(const float2* turn, int lane) {
#pragma unroll
        for (int i = 0; i < kUnits / 2; i++) {
#pragma unroll
            for (int j = 0; j < kEach; j++) {
                const float2 angle = turn[first(i, lane) + j];
                bf16 &a = x[i].at[j], &b = x[i + kUnits / 2].at[j];
                const float2 by = turned(widen(a), widen(b), angle.x, angle.y);
                a = narrow<bf16>(by.x), b = narrow<bf16>(by.y);
            }
        }
    }
};

template <int kDim> __device__ __forceinline__ void prepare(const Params& p) {
    constexpr int kPairs = kDim / 2;
    __shared__ float2 turn[kPairs];
    wait_for_previous();
    allow_next();
    const uint32_t row = blockIdx.x;
    if (row >= real_rows(p.count, p.rows)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t q_tasks = (p.heads + kAtOnce - 1) / kAtOnce, kv_tasks = (p.kv_heads + kAtOnce - 1) / kAtOnce;
    bf16* const q = p.q + row * p.q_row;
    const bf16* const kv = p.kv + row * p.kv_row;
    const uint32_t position = p.positions[row], width = 2 * p.kv_heads * kDim;
    const uint64_t block = p.tables[p.row_tables[row] + position / kTokens];
    const uint64_t at = p.layer_offset + uint64_t(position % kTokens) * width;
    const bool writes = block % kEach == 0 && block <= p.arena_elements && at + width <= p.arena_elements - block;
    for (int i = threadIdx.x; i < kPairs; i += kThreads) {
        float sine, cosine;
        sincosf(__fmul_rn(static_cast<float>(position), p.inv_freq[i]), &sine, &cosine);
        turn[i] = {cosine * p.factor, sine * p.factor};
    }
    bool turned = false;
    for (uint32_t task = warp; task < q_tasks + 2 * kv_tasks; task += kThreads / 32) {
        const bool is_q = task < q_tasks, is_value = task >= q_tasks + kv_tasks;
        const uint32_t head = (is_q ? task : is_value ? task - q_tasks - kv_tasks : task - q_tasks) * kAtOnce + lane / kLanes;
        const uint32_t begin = (head + (is_value ? p.kv_heads : 0)) * kDim;
        const bool here = head < (is_q ? p.heads : p.kv_heads);
        Share<kDim> share = {};
        if (here) share.load((is_q ? q : kv) + begin, lane);
        if (!turned) __syncthreads();
        turned = true;
        if (!is_value) {
            const float* weight = is_q ? p.q_norm : p.k_norm;
            if (weight != nullptr) share.norm(weight, is_q ? p.q_eps : p.k_eps, lane);
            share.rotate(turn, lane);
        }
        if (here && (is_q || writes)) share.store((is_q ? q : p.arena + block + at) + begin, lane);
    }
    if (!turned) __syncthreads();
}

}  // namespace gqa_prepare

extern "C" __global__ void __launch_bounds__(gqa_prepare::kThreads, 10) gqa_prepare_64(const __grid_constant__ gqa_prepare::Params p) {
    gqa_prepare::prepare<64>(p);
}
extern "C" __global__ void __launch_bounds__(gqa_prepare::kThreads, 10) gqa_prepare_128(const __grid_constant__ gqa_prepare::Params p) {
    gqa_prepare::prepare<128>(p);
}
