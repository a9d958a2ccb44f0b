// Latent attention of decoding rows in the absorbed form for many heads, latent 512 and rope 64.
//
// A block has 64 heads of a row and works through its pieces of the keys, which begin on cache blocks, a tile
// at a time. Two warpgroups take the scores of 32 keys of it each and sum 256 columns of the values each;
// weights go from one to the other through shared memory. One warp copies, a tile ahead. Blocks with other
// heads of a row run beside this one, so that the second-level cache has what they read. A row in several
// pieces leaves partial sums as `mla_decode_16` does, in slots of 16 heads, so that the same kernels merge
// them.
#include "cuda/wgmma_register.cuh"
#include "mla/cuda/decode.cuh"

namespace mla_wide {

using namespace mla;
using Params = DecodeParams;

constexpr int kHeads = 64;  // of a block
constexpr int kKeys = kTokens;
constexpr int kColumns = kWidth / kLine;
constexpr int kStages = 2;
constexpr int kComputing = 256;
constexpr int kThreads = kComputing + 128;  // registers are given out by warpgroups
constexpr int kSums = kLatent / 2;            // columns of a warpgroup
constexpr uint32_t kColumn = kKeys * 128;     // bytes from 64 columns to the next ones
constexpr uint32_t kMerged = 16;              // heads of a slot
constexpr uint32_t kTileBytes = kKeys * kWidth * 2;
// By how much, in powers of two, scores may exceed what is subtracted from them: so that sums are seldom
// scaled again.
constexpr float kSlack = 8.0f;

struct Shared {
    bf16 kv[kStages][kColumns][kKeys][kLine];
    bf16 q[kColumns][kHeads][kLine];
    bf16 prob[kHeads][kKeys];
    float top[2][kHeads];
    uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Shared) == 229920, "as decode.rs says");

// One warp; its first thread starts the copies. What earlier steps wrote need not wait for the kernel before.
__device__ __forceinline__ void produce(const Params& p, Shared& s, uint32_t index) {
    const uint32_t lane = threadIdx.x % 32;
    bool waited = false;
    for (uint32_t tile = 0;;) {
        const Piece piece = p.pieces[index];
        uint64_t entry = 0;
        for (uint32_t begin = piece.begin, i = 0; begin < piece.end; begin += kKeys, i++, tile++) {
            if (i % 32 == 0) {
                const uint32_t block = begin / kKeys + lane;
                entry = block * kKeys < piece.end ? p.tables[piece.table + block] : 0;
            }
            const uint64_t at = inside(__shfl_sync(0xffffffff, entry, i % 32), p.layer_offset, p.arena_elements);
            const int line = int((at + p.layer_offset) / kLine);
            if (!waited && min(begin + kKeys, piece.end) > piece.settled) {
                wait_for_previous();
                waited = true;
            }
            if (lane != 0) continue;
            const uint32_t stage = tile % kStages, bar = shared_address(&s.full[stage]);
            barrier_wait(shared_address(&s.empty[stage]), (tile / kStages & 1) ^ 1);
            barrier_expect(bar, kTileBytes);
#pragma unroll
            for (int c = 0; c < kColumns; c++) {
                tensor_load_3d(shared_address(&s.kv[stage][c][0][0]), &p.cache, 0, 0, line + c, bar);
            }
        }
        if (piece.next == 0) return;
        index = piece.next;
    }
}

// All computing threads.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;\n" ::"n"(kComputing) : "memory"); }

__device__ __forceinline__ void consume(const Params& p, Shared& s, uint32_t index) {
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32, t = lane % 4;
    const int line = threadIdx.x / 32 % 4 * 16 + lane / 4;  // of this thread, and 8 below
    const uint64_t q = operand(shared_address(&s.q[0][0][0])), prob = operand(shared_address(&s.prob[0][0]));
    const float scale = p.scale * 1.44269504f;
    float acc[kSums / 2], scores[16];
    auto release = [&](uint32_t tile) {
        if (lane == 0) barrier_arrive(shared_address(&s.empty[tile % kStages]));
    };
    auto start_scores = [&](uint32_t tile) {
        const uint32_t stage = tile % kStages;
        barrier_wait(shared_address(&s.full[stage]), tile / kStages & 1);
        const uint64_t keys = operand(shared_address(&s.kv[stage][0][group * 32][0]));
        products_begin();
#pragma unroll
        for (int k = 0; k < kWidth / 16; k++) {
            const uint64_t at = k / 4 * (kColumn / 16) + k % 4 * kStep16;
            if (k == 0) {
                product_anew(scores, q + at, keys + at);
            } else {
                product<32>(scores, q + at, keys + at);
            }
        }
        products_commit();
    };
    wait_for_previous();
    for (uint32_t tile = 0;;) {
        const Piece piece = p.pieces[index];
        const uint32_t first = piece.head;
        for (int i = threadIdx.x; i < kHeads * kWidth / 8; i += kComputing) {
            const int of = i / (kWidth / 8), unit = i % (kWidth / 8), at = unit * 8;
            const bool there = first + of < p.heads;
            const uint32_t head = there ? first + of : 0;
            const bf16* from = at < kLatent ? p.q + piece.row * p.q_row + head * p.q_head + at
                                            : p.q_rest + piece.row * p.rest_row + head * p.rest_head + at - kLatent;
            copy_async(shared_address(&s.q[unit / 8][of][((unit ^ of) & 7) * 8]), from, there);
        }
        commit_copies();
        wait_copies<0>();
        fence_async();
        meet();

        float top[2] = {-INFINITY, -INFINITY}, mass[2] = {};
#pragma unroll
        for (int i = 0; i < kSums / 2; i++) acc[i] = 0.0f;
        // Scores of a tile become weights, and these are summed with the values; nothing is waited for.
        auto take = [&](uint32_t stage, uint32_t keys) {
            if (keys < kKeys) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    if (group * 32 + i / 4 * 8 + t * 2 + i % 2 >= keys) scores[i] = -INFINITY;
                }
            }
            float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int j = 0; j < 4; j++) high[h] = fmaxf(high[h], fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
                high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffff, high[h], 1));
                high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffff, high[h], 2));
                if (t == 0) s.top[group][line + h * 8] = high[h];
            }
            meet();
            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int of = line + h * 8;
                const float all = fmaxf(s.top[0][of], s.top[1][of]) * scale;
                shrink[h] = 1.0f;
                if (all > top[h] + kSlack) {
                    shrink[h] = exp2_of(top[h] - all);
                    top[h] = all;
                }
                // Where every score is minus infinity or not a number nothing is subtracted.
                const float base = top[h] == -INFINITY ? 0.0f : top[h];
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float a = exp2_of(scores[4 * j + 2 * h] * scale - base), b = exp2_of(scores[4 * j + 2 * h + 1] * scale - base);
                    sum += a + b;
                    *reinterpret_cast<uint32_t*>(&s.prob[of][((group * 4 + j) ^ (of & 7)) * 8 + t * 2]) = pack_bf16(a, b);
                }
                mass[h] = mass[h] * shrink[h] + sum;
            }
            if (keys < kKeys) {
                // What lies beyond may be anything, and nothing times NaN is NaN.
                for (uint32_t i = threadIdx.x % 128; i < (kKeys - keys) * 8; i += 128) {
#pragma unroll
                    for (int c = 0; c < 4; c++) *reinterpret_cast<uint4*>(&s.kv[stage][group * 4 + c][keys + i / 8][i % 8 * 8]) = make_uint4(0, 0, 0, 0);
                }
            }
            fence_async();
            meet();
#pragma unroll
            for (int i = 0; i < kSums / 2; i++) acc[i] *= shrink[i / 2 % 2];
            const uint64_t values = operand_of_rows<kColumn>(shared_address(&s.kv[stage][group * 4][0][0]));
            products_begin();
#pragma unroll
            for (int k = 0; k < kKeys / 16; k++) product_of_rows(acc, prob + k * kStep16, values + k * kRows16);
            products_commit();
        };
        start_scores(tile);
        products_wait<0>();
        const uint32_t last = tile + (piece.end - piece.begin - 1) / kKeys;
        for (; tile < last; tile++) {
            take(tile % kStages, kKeys);
            start_scores(tile + 1);
            products_wait<1>();
            release(tile);
            products_wait<0>();
        }
        take(tile % kStages, (piece.end - piece.begin - 1) % kKeys + 1);
        products_wait<0>();
        release(tile);
        tile++;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            mass[h] += __shfl_xor_sync(0xffffffff, mass[h], 1);
            mass[h] += __shfl_xor_sync(0xffffffff, mass[h], 2);
            if (t == 0) s.top[group][line + h * 8] = mass[h];
        }
        meet();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int of = line + h * 8;
            if (first + of >= p.heads) continue;
            const float all = s.top[0][of] + s.top[1][of];
            if (piece.slot == kWhole) {
                const float by = 1.0f / all;
                bf16* to = p.out + (uint64_t(piece.row) * p.heads + first + of) * kLatent + group * kSums + t * 2;
#pragma unroll
                for (int j = 0; j < kSums / 8; j++) {
                    *reinterpret_cast<uint32_t*>(to + j * 8) = pack_bf16(acc[4 * j + 2 * h] * by, acc[4 * j + 2 * h + 1] * by);
                }
            } else {
                // Slots of a row's 16 heads follow each other.
                const uint32_t slot = piece.first * (kHeads / kMerged) + of / kMerged * piece.count + (piece.slot - piece.first);
                const uint64_t place = uint64_t(slot) * kMerged + of % kMerged;
                float* to = p.partial + place * kLatent + group * kSums + t * 2;
#pragma unroll
                for (int j = 0; j < kSums / 8; j++) {
                    *reinterpret_cast<float2*>(to + j * 8) = {acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]};
                }
                if (group == 0 && t == 0) p.partial_lse[place] = {top[h], all};
            }
        }
        __syncwarp();
        if (piece.next == 0) return;
        index = piece.next;
    }
}

__device__ __forceinline__ void decode(const Params& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const uint32_t index = blockIdx.x;
    // Room for the next kernel. One stays, so that this kernel ends after the one in front.
    if (p.pieces[index].end <= p.pieces[index].begin) {
        if (index == 0) wait_for_previous();
        return;
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(shared_address(&s.full[i]), 1);
            barrier_init(shared_address(&s.empty[i]), kComputing / 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    allow_next();
    if (threadIdx.x < kComputing) {
        more_registers<240>();
        consume(p, s, index);
    } else {
        fewer_registers<24>();
        if (threadIdx.x < kComputing + 32) produce(p, s, index);
    }
}

}  // namespace mla_wide

extern "C" __global__ void __launch_bounds__(mla_wide::kThreads, 1) mla_decode_64(const __grid_constant__ mla_wide::Params p) {
    mla_wide::decode(p);
}
