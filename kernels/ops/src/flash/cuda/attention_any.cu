// Attention for any widths, f32 or bf16: ordinary arithmetic, lines in turn. And the merge of splits.
#include "flash/cuda/attention.cuh"

constexpr uint32_t kLines = 4, kThreads = 128;

template <typename T> __device__ void attention_any(const AttentionParams& p) {
    extern __shared__ float memory[];
    __shared__ float weights[kLines][kBlock], maxima[kLines], masses[kLines], factors[kLines];
    const Work w = work_of_block(p, kLines);
    if (!w.any) return;
    const uint32_t key_width = p.q_width + p.rest_width;
    float* q = memory;                         // [kLines, key_width]
    float* sums = memory + kLines * key_width; // [kLines, v_width]
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t i = 0; i < w.lines; ++i) {
        const Line line = line_at(p, w, i);
        const T* first = static_cast<const T*>(p.q) + line.row * p.q_row + line.head * p.q_head;
        const T* rest = static_cast<const T*>(p.q_rest) + line.row * p.rest_row + line.head * p.rest_head;
        for (uint32_t d = threadIdx.x; d < key_width; d += kThreads)
            q[i * key_width + d] = d < p.q_width ? widen(first[d]) : widen(rest[d - p.q_width]);
    }
    for (uint32_t d = threadIdx.x; d < kLines * p.v_width; d += kThreads) sums[d] = 0.0f;
    if (threadIdx.x < kLines) {
        maxima[threadIdx.x] = -INFINITY;
        masses[threadIdx.x] = 0.0f;
    }
    __syncthreads();
    for (uint32_t base = w.begin; base < w.end; base += kBlock) {
        const T* rows = static_cast<const T*>(p.arena) + block_at(p, w.segment, base / kBlock);
        const T* keys = rows + blockIdx.y * p.key_stride;
        const T* values = rows + p.value_offset + blockIdx.y * p.value_stride;
        const uint32_t count = min(kBlock, w.end - base);
        for (uint32_t item = warp; item < w.lines * kBlock; item += kThreads / 32) {
            const uint32_t i = item / kBlock, key = item % kBlock, position = line_at(p, w, i).position;
            const bool seen = key < count && base + key <= position && base + key >= seen_from(p, position);
            float score = 0.0f;
            if (seen) {
                for (uint32_t d = lane; d < key_width; d += 32) score += q[i * key_width + d] * widen(keys[uint64_t(key) * p.kv_row + d]);
                score = warp_sum(score) * p.scale;
            }
            if (lane == 0) weights[i][key] = seen ? score : -INFINITY;
        }
        __syncthreads();
        // One warp per line: the new maximum, weights, and what the old sums shrink by.
        if (warp < w.lines) {
            const float a = weights[warp][lane], b = weights[warp][lane + 32], old = maxima[warp];
            // NaN vanishes in the maximum and comes back in its own weight, so in the mass.
            const float top = fmaxf(warp_max(fmaxf(a, b)), old);
            const float shift = top == -INFINITY ? 0.0f : top;
            const float wa = expf(a - shift), wb = expf(b - shift);
            const float mass = warp_sum(wa + wb);
            const float factor = expf(old - shift);
            weights[warp][lane] = wa;
            weights[warp][lane + 32] = wb;
            // All lanes have read the old maximum.
            __syncwarp();
            if (lane == 0) {
                factors[warp] = factor;
                masses[warp] = masses[warp] * factor + mass;
                maxima[warp] = top;
            }
        }
        __syncthreads();
        for (uint32_t d = threadIdx.x; d < p.v_width; d += kThreads) {
            float more[kLines] = {};
            for (uint32_t key = 0; key < count; ++key) {
                const float value = widen(values[uint64_t(key) * p.kv_row + d]);
                // A key that a line does not see has weight zero; its value may still be NaN.
#pragma unroll
                for (uint32_t i = 0; i < kLines; ++i)
                    if (i < w.lines && weights[i][key] != 0.0f) more[i] += weights[i][key] * value;
            }
            for (uint32_t i = 0; i < w.lines; ++i) sums[i * p.v_width + d] = sums[i * p.v_width + d] * factors[i] + more[i];
        }
        __syncthreads();
    }
    const uint64_t all = uint64_t(p.rows) * p.heads;
    for (uint32_t i = 0; i < w.lines; ++i) {
        const Line line = line_at(p, w, i);
        const uint64_t at = uint64_t(line.row) * p.heads + line.head;
        if (p.splits == 1) {
            T* out = static_cast<T*>(p.out) + at * p.v_width;
            for (uint32_t d = threadIdx.x; d < p.v_width; d += kThreads) out[d] = narrow<T>(sums[i * p.v_width + d] / masses[i]);
            continue;
        }
        float* out = p.partial + (blockIdx.z * all + at) * p.v_width;
        for (uint32_t d = threadIdx.x; d < p.v_width; d += kThreads) out[d] = sums[i * p.v_width + d];
        if (threadIdx.x == 0) {
            p.partial_lse[(blockIdx.z * all + at) * 2] = maxima[i];
            p.partial_lse[(blockIdx.z * all + at) * 2 + 1] = masses[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(128) attention_any_f32(const __grid_constant__ AttentionParams p) {
    attention_any<float>(p);
}
extern "C" __global__ void __launch_bounds__(128) attention_any_bf16(const __grid_constant__ AttentionParams p) {
    attention_any<bf16>(p);
}

struct MergeParams {
    const float* partial;
    const float* partial_lse;
    void* out;
    const uint32_t* count;
    uint32_t rows, heads, v_width, splits;
};

// blockIdx: row, head. Splits are merged in order.
template <typename T> __device__ void merge(const MergeParams& p) {
    if (blockIdx.x >= real_rows(p.count, p.rows)) return;
    const uint64_t all = uint64_t(p.rows) * p.heads, at = uint64_t(blockIdx.x) * p.heads + blockIdx.y;
    float top = -INFINITY;
    for (uint32_t s = 0; s < p.splits; ++s) top = fmaxf(top, p.partial_lse[(s * all + at) * 2]);
    float mass = 0.0f;
    for (uint32_t s = 0; s < p.splits; ++s) {
        const float* lse = p.partial_lse + (s * all + at) * 2;
        // A split without a key has mass zero; one of NaN has a mass of NaN, whatever its maximum.
        if (lse[1] != 0.0f) mass += expf(lse[0] - (top == -INFINITY ? lse[0] : top)) * lse[1];
    }
    T* out = static_cast<T*>(p.out) + at * p.v_width;
    for (uint32_t d = threadIdx.x; d < p.v_width; d += blockDim.x) {
        float sum = 0.0f;
        for (uint32_t s = 0; s < p.splits; ++s) {
            const float* lse = p.partial_lse + (s * all + at) * 2;
            if (lse[1] != 0.0f) sum += expf(lse[0] - (top == -INFINITY ? lse[0] : top)) * p.partial[(s * all + at) * p.v_width + d];
        }
        out[d] = narrow<T>(sum / mass);
    }
}

extern "C" __global__ void __launch_bounds__(128) merge_splits_f32(const __grid_constant__ MergeParams p) {
    merge<float>(p);
}
extern "C" __global__ void __launch_bounds__(128) merge_splits_bf16(const __grid_constant__ MergeParams p) {
    merge<bf16>(p);
}
