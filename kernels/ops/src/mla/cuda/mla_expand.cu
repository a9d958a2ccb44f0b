// Latent attention in the expanded form, for prompts whose every token is in the step: keys and values of
// all heads lie by row, projected up before. Tensor cores over tiles of 128 rows and 64 keys; copies of
// the next keys run beside the products.
#include "cuda/async.cuh"

namespace mla_expand {

struct Segment {
    uint32_t start, len, context, table;
};
struct Tile {
    uint32_t segment, line;
};
struct Params {
    const bf16* q;        // [rows, heads, 192]: part without position, part with
    const bf16* up;       // [rows, heads, 256]: keys without position, values
    const bf16* kv;       // [rows, 576]: latents, then keys with position
    bf16* out;            // [rows, heads, 128]
    const Segment* segments;
    const Tile* tiles;
    const uint32_t* tile_count;
    uint32_t heads;
    float scale;          // times log2 of e
};

constexpr int kWarps = 8, kThreads = kWarps * 32, kRows = 16 * kWarps, kKeys = 64;
constexpr int kNope = 128, kRope = 64, kQk = kNope + kRope, kV = 128, kLatent = 512, kUp = kNope + kV;
// Odd numbers of 16 bytes, so that rows that are read together lie in different banks.
constexpr int kKeyPitch = kQk + 8, kValuePitch = kV + 8;

struct Stage {
    bf16 keys[kKeys][kKeyPitch];
    bf16 values[kKeys][kValuePitch];
};
static_assert(sizeof(Stage) * 2 == 86016, "as expand.rs says");

__device__ __forceinline__ void fetch(const Params& p, Stage& to, const Segment& s, uint32_t head, uint32_t first) {
    constexpr int kKeyParts = kQk / 8, kParts = kKeyParts + kV / 8;
    for (uint32_t i = threadIdx.x; i < kKeys * kParts; i += kThreads) {
        const uint32_t key = i / kParts, part = i % kParts;
        const bool there = first + key < s.len;
        const uint64_t row = s.start + (there ? first + key : 0);
        const bf16* up = p.up + (row * p.heads + head) * kUp;
        const bf16* from = part < kNope / 8   ? up + part * 8
                           : part < kKeyParts ? p.kv + row * (kLatent + kRope) + kLatent + (part - kNope / 8) * 8
                                              : up + kNope + (part - kKeyParts) * 8;
        const void* at = part < kKeyParts ? &to.keys[key][part * 8] : &to.values[key][(part - kKeyParts) * 8];
        copy_async(shared_address(at), from, there);
    }
    commit_copies();
}

__device__ void attend(const Params& p, Stage* stages, const Segment& s, uint32_t line, uint32_t head) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t last = min(line + kRows, s.len), blocks = (last + kKeys - 1) / kKeys;
    fetch(p, stages[0], s, head, 0);
    // This thread's rows, and those of its warp.
    const uint32_t rows[2] = {line + warp * 16 + g, line + warp * 16 + g + 8};
    uint32_t q[kQk / 16][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const bool there = rows[half] < s.len;
        const bf16* from = p.q + (uint64_t(s.start + (there ? rows[half] : 0)) * p.heads + head) * kQk + t * 2;
#pragma unroll
        for (int k = 0; k < kQk / 16; k++) {
            q[k][half] = there ? *reinterpret_cast<const uint32_t*>(from + k * 16) : 0;
            q[k][half + 2] = there ? *reinterpret_cast<const uint32_t*>(from + k * 16 + 8) : 0;
        }
    }
    float sums[kV / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, mass[2] = {};
    for (uint32_t block = 0; block < blocks; block++) {
        const uint32_t first = block * kKeys;
        Stage& here = stages[block % 2];
        if (block + 1 < blocks) {
            fetch(p, stages[(block + 1) % 2], s, head, first + kKeys);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        float scores[kKeys / 8][4] = {};
#pragma unroll
        for (int k = 0; k < kQk / 16; k++) {
#pragma unroll
            for (int n = 0; n < kKeys / 16; n++) {
                uint32_t b[4];
                load_matrix(b, shared_address(&here.keys[n * 16 + lane % 8 + lane / 16 * 8][k * 16 + lane / 8 % 2 * 8]));
                mma_16816(scores[2 * n], q[k][0], q[k][1], q[k][2], q[k][3], b[0], b[1]);
                mma_16816(scores[2 * n + 1], q[k][0], q[k][1], q[k][2], q[k][3], b[2], b[3]);
            }
        }
        // Only the last blocks reach beyond a row's own key.
        if (first + kKeys > line + warp * 16 + 1) {
#pragma unroll
            for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (first + n * 8 + t * 2 + i % 2 > rows[i / 2]) scores[n][i] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float high = top[half];
#pragma unroll
            for (int n = 0; n < kKeys / 8; n++) high = fmaxf(high, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
            high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, 1));
            high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, 2));
            const float floor = high == -INFINITY ? 0.0f : high * p.scale;
            const float shrink = exp2f(top[half] * p.scale - floor);
            top[half] = high;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& score = scores[n][half * 2 + i];
                    score = exp2f(score * p.scale - floor);
                    sum += score;
                }
            }
            mass[half] = mass[half] * shrink + sum;
#pragma unroll
            for (int n = 0; n < kV / 8; n++) {
                sums[n][half * 2] *= shrink;
                sums[n][half * 2 + 1] *= shrink;
            }
        }
#pragma unroll
        for (int k = 0; k < kKeys / 16; k++) {
            const uint32_t a[4] = {pack_bf16(scores[2 * k][0], scores[2 * k][1]), pack_bf16(scores[2 * k][2], scores[2 * k][3]),
                                   pack_bf16(scores[2 * k + 1][0], scores[2 * k + 1][1]), pack_bf16(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
            for (int n = 0; n < kV / 16; n++) {
                uint32_t b[4];
                load_matrix_transposed(b, shared_address(&here.values[k * 16 + lane % 8 + lane / 8 % 2 * 8][n * 16 + lane / 16 * 8]));
                mma_16816(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_16816(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = mass[half];
        all += __shfl_xor_sync(0xffffffff, all, 1);
        all += __shfl_xor_sync(0xffffffff, all, 2);
        if (rows[half] >= s.len) continue;
        const float by = 1.0f / all;
        bf16* to = p.out + (uint64_t(s.start + rows[half]) * p.heads + head) * kV + t * 2;
#pragma unroll
        for (int n = 0; n < kV / 8; n++) *reinterpret_cast<uint32_t*>(to + n * 8) = pack_bf16(sums[n][half * 2] * by, sums[n][half * 2 + 1] * by);
    }
}

}  // namespace mla_expand

// Blocks by tile and head; the last tiles of a prompt have the most keys, so they come first.
extern "C" __global__ void __launch_bounds__(mla_expand::kThreads, 1) mla_expanded(const __grid_constant__ mla_expand::Params p) {
    extern __shared__ __align__(16) uint8_t memory[];
    wait_for_previous();
    allow_next();
    const uint32_t count = *p.tile_count;
    if (blockIdx.y >= count) return;
    const mla_expand::Tile tile = p.tiles[count - 1 - blockIdx.y];
    mla_expand::attend(p, reinterpret_cast<mla_expand::Stage*>(memory), p.segments[tile.segment], tile.line, blockIdx.x);
}
