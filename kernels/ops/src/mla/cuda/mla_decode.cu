// Latent attention of decoding rows in the absorbed form, latent 512 and rope 64, for any heads.
//
// A block works through its pieces: some keys of one row, for 16 heads of it. Keys come in tiles of up
// to 64, by the copy engine, two tiles ahead; queries stay in registers. A row in several pieces leaves
// partial sums, which `mla_decode_merge` merges. The host cuts the pieces (decode.rs), so that blocks
// have equal work whatever the contexts are.
#include "mla/cuda/decode.cuh"
#include "mla/cuda/merge.cuh"

namespace mla_decode {

using namespace mla;
using Params = DecodeParams;

constexpr int kBlock = kTokens;  // keys of a tile
constexpr int kPitch = 584;      // of a query in shared memory: an odd number of 16-byte units
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kBound = 288;  // registers as if for more threads, so that other blocks fit beside
constexpr int kStages = 2;
constexpr int kSteps = kWidth / 16;
// Steps whose queries stay in registers; with all of them no block of the kernel in front fits beside.
constexpr int kHeld = 18;
constexpr int kProbPitch = 72;

// Tiles of a block's pieces in order; a tile lies in one cache block.
struct Cursor {
    Piece at;
    uint32_t begin;
    bool any;
    __device__ void open(const Params& p, uint32_t piece) {
        at = p.pieces[piece];
        begin = at.begin;
        any = at.end > at.begin;
    }
    __device__ uint32_t end() const { return min(at.end, (begin / kBlock + 1) * kBlock); }
    __device__ void next(const Params& p) {
        begin = end();
        if (begin < at.end) {
            at.at[0] = p.tables[at.table + begin / kBlock];
        } else if (at.next != 0) {
            open(p, at.next);
        } else {
            any = false;
        }
    }
};

struct Shared {
    bf16 kv[kStages][kBlock][kWidth];  // 16-byte units swizzled within 128 bytes
    bf16 q[kLines][kPitch];
    bf16 prob[kLines][kProbPitch];
    float top[kWarps][kLines];
    uint64_t full[kStages];
    Cursor ahead;  // of the thread that starts copies
};
static_assert(sizeof(Shared) == 169056, "as decode.rs says");

// Boxes of a tile, and the line where it begins.
struct Boxes {
    uint32_t count;
    int line;
    __device__ int from(uint32_t i) const { return line + int(i) * kBox * (kWidth / kLine); }
};
__device__ __forceinline__ Boxes boxes_of(const Params& p, const Cursor& c) {
    const uint64_t at = inside(c.at.at[0], p.layer_offset, p.arena_elements);
    const int line = int((at + p.layer_offset) / kLine) + int(c.begin % kBlock) * (kWidth / kLine);
    return {(c.end() - c.begin + kBox - 1) / kBox, line};
}

// One thread starts the copy of a tile.
__device__ __forceinline__ void load_tile(const Params& p, Shared& s, int stage, const Cursor& c) {
    const Boxes boxes = boxes_of(p, c);
    const uint32_t bar = shared_address(&s.full[stage]);
    fence_async();
    barrier_expect(bar, boxes.count * kBox * kWidth * 2);
    for (uint32_t i = 0; i < boxes.count; i++) {
        tensor_load_2d(shared_address(&s.kv[stage][i * kBox][0]), &p.cache, 0, boxes.from(i), bar);
    }
}

__device__ void decode(const Params& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(shared_address(&s.full[i]), 1);
        fence_barrier_init();
    }
    __syncthreads();
    Cursor now;
    now.open(p, blockIdx.x);
    // Room for the next kernel. One block stays, so that this kernel ends after the one in front.
    if (!now.any && blockIdx.x != 0) return;
    Cursor& ahead = s.ahead;
    int loaded = 0;
    if (threadIdx.x == 0) {
        ahead = now;
        // What earlier steps wrote need not wait for the kernel before.
        while (loaded < kStages && ahead.any && ahead.end() <= ahead.at.settled) {
            load_tile(p, s, loaded++, ahead);
            ahead.next(p);
        }
        // Of a tile with keys of this step the others can come nearer.
        if (loaded < kStages && ahead.any) {
            const Boxes boxes = boxes_of(p, ahead);
            for (uint32_t i = 0; i < boxes.count; i++) tensor_prefetch_2d(&p.cache, 0, boxes.from(i));
        }
    }
    allow_next();
    wait_for_previous();
    if (threadIdx.x == 0) {
        while (loaded < kStages && ahead.any) {
            load_tile(p, s, loaded++, ahead);
            ahead.next(p);
        }
    }
    const float scale = p.scale * 1.44269504f;
    int tile = 0;
    while (now.any) {
        const Piece piece = now.at;
        // All at once: one after the other would wait behind the keys of all blocks each time.
        for (int i = threadIdx.x; i < kLines * kWidth / 8; i += kThreads) {
            const int line = i / (kWidth / 8), at = i % (kWidth / 8) * 8;
            const bool there = piece.head + line < p.heads;
            const uint32_t head = there ? piece.head + line : 0;
            const bf16* from = at < kLatent ? p.q + piece.row * p.q_row + head * p.q_head + at
                                            : p.q_rest + piece.row * p.rest_row + head * p.rest_head + at - kLatent;
            copy_async(shared_address(&s.q[line][at]), from, there);
        }
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        const auto query_at = [&](int k) { return shared_address(&s.q[lane % 16][k * 16 + lane / 16 * 8]); };
        uint32_t q[kHeld][4];
#pragma unroll
        for (int k = 0; k < kHeld; k++) load_matrix(q[k], query_at(k));

        float top[2] = {-INFINITY, -INFINITY}, mass[2] = {};
        float acc[8][4] = {};
        for (;; tile++) {
            const int stage = tile % kStages;
            const uint32_t keys = now.end() - now.begin;
            const int padded = (keys + 15) / 16 * 16;
            barrier_wait(shared_address(&s.full[stage]), tile / kStages & 1);
            if (keys % 16 != 0) {
                // What lies beyond may be anything, and nothing times infinity is not nothing.
                uint4* rest = reinterpret_cast<uint4*>(&s.kv[stage][keys][0]);
                for (int i = threadIdx.x; i < (padded - int(keys)) * (kWidth / 8); i += kThreads) rest[i] = uint4{};
                __syncthreads();
            }
            float d[4][4] = {};
            const uint32_t keys_at = shared_address(&s.kv[stage][0][0]);
            const bool active = warp * 8 < padded;
            if (active) {
#pragma unroll
                for (int k = 0; k < kSteps; k += 2) {
                    uint32_t b[4];
                    load_matrix(b, key_unit(keys_at, warp * 8 + lane % 8, k / 4, k % 4 * 2 + lane / 8));
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        uint32_t loaded[4];
                        if (k + i >= kHeld) load_matrix(loaded, query_at(k + i));
                        const uint32_t(&a)[4] = k + i < kHeld ? q[(k + i) % kHeld] : loaded;
                        mma_16816(d[k % 4 + i], a[0], a[1], a[2], a[3], b[2 * i], b[2 * i + 1]);
                    }
                }
            }
            float score[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool seen = active && warp * 8 + t * 2 + i % 2 < keys;
                score[i] = seen ? (d[0][i] + d[1][i] + (d[2][i] + d[3][i])) * scale : -INFINITY;
            }
            float high[2] = {fmaxf(score[0], score[1]), fmaxf(score[2], score[3])};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                high[i] = fmaxf(high[i], __shfl_xor_sync(0xffffffff, high[i], 1));
                high[i] = fmaxf(high[i], __shfl_xor_sync(0xffffffff, high[i], 2));
                if (t == 0) s.top[warp][g + i * 8] = high[i];
            }
            __syncthreads();
            float shrink[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float all = top[i];
#pragma unroll
                for (int w = 0; w < kWarps; w++) all = fmaxf(all, s.top[w][g + i * 8]);
                // Where every score is minus infinity or not a number nothing is subtracted.
                const float base = all == -INFINITY ? 0.0f : all;
                shrink[i] = exp2f(top[i] - base);
                top[i] = all;
                const float a = exp2f(score[2 * i] - base), b = exp2f(score[2 * i + 1] - base);
                mass[i] = mass[i] * shrink[i] + a + b;
                *reinterpret_cast<uint32_t*>(&s.prob[g + i * 8][warp * 8 + t * 2]) = pack_bf16(a, b);
            }
            __syncthreads();
#pragma unroll
            for (int n = 0; n < 8; n++) {
                acc[n][0] *= shrink[0], acc[n][1] *= shrink[0];
                acc[n][2] *= shrink[1], acc[n][3] *= shrink[1];
            }
#pragma unroll
            for (int k = 0; k < kBlock; k += 16) {
                if (k < padded) {
                    uint32_t a[4];
                    load_matrix(a, shared_address(&s.prob[lane % 16][k + lane / 16 * 8]));
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        uint32_t b[4];
                        load_matrix_transposed(b, key_unit(keys_at, k + lane % 16, warp, n * 2 + lane / 16));
                        mma_16816(acc[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                        mma_16816(acc[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                    }
                }
            }
            __syncthreads();
            if (threadIdx.x == 0 && ahead.any) {
                load_tile(p, s, stage, ahead);
                ahead.next(p);
            }
            now.next(p);
            if (!now.any || now.begin == now.at.begin) break;
        }
        tile++;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            mass[i] += __shfl_xor_sync(0xffffffff, mass[i], 1);
            mass[i] += __shfl_xor_sync(0xffffffff, mass[i], 2);
            if (t == 0) s.top[warp][g + i * 8] = mass[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float all = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; w++) all += s.top[w][g + i * 8];
            mass[i] = all;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t line = g + i * 8;
            if (piece.head + line >= p.heads) continue;
            if (piece.slot == kWhole) {
                const float by = 1.0f / mass[i];
                bf16* to = p.out + (uint64_t(piece.row) * p.heads + piece.head + line) * kLatent + warp * 64 + t * 2;
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    *reinterpret_cast<uint32_t*>(to + n * 8) = pack_bf16(acc[n][2 * i] * by, acc[n][2 * i + 1] * by);
                }
            } else {
                const uint64_t place = uint64_t(piece.slot) * kLines + line;
                float* to = p.partial + place * kLatent + warp * 64 + t * 2;
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    *reinterpret_cast<float2*>(to + n * 8) = {acc[n][2 * i], acc[n][2 * i + 1]};
                }
                if (warp == 0 && t == 0) p.partial_lse[place] = {top[i], mass[i]};
            }
        }
    }
}

struct MergeParams {
    const float* partial;
    const float2* partial_lse;
    const uint2* slots;  // [rows, groups of 16 heads]: first slot and how many; 0: it is done
    bf16* out;
    uint32_t rows, heads;
};

constexpr int kMergeThreads = 256;
constexpr int kMergeParts = 8;      // of the latent, where a row has many pieces
constexpr uint32_t kMergeMany = 16; // pieces
// Pieces of a row with which it is cut into parts even where these are more than run at once.
constexpr uint32_t kMergeMost = 64;

// One row and head, `kQuads * 4` columns: every way merges its pieces, then the ways are merged.
template <int kQuads, int kAtOnce> __device__ void merge_columns(const MergeParams& p, uint2 mine, uint32_t row, uint32_t head, uint32_t from) {
    constexpr int kWays = kMergeThreads / kQuads;
    __shared__ float4 sums[kWays][kQuads];
    __shared__ float2 lse[kWays];
    const uint32_t way = threadIdx.x / kQuads, quad = threadIdx.x % kQuads, column = from + quad * 4;
    const Merged part = merge_pieces<kAtOnce>({p.partial, p.partial_lse}, mine, head % kLines, column, way, kWays);
    sums[way][quad] = part.sum;
    if (quad == 0) lse[way] = {part.top, part.mass};
    __syncthreads();
    if (way == 0) {
        const Merged all = merge_ways(lse, &sums[0][quad], kQuads, kWays);
        *reinterpret_cast<uint2*>(p.out + (uint64_t(row) * p.heads + head) * kLatent + column) = all.result();
    }
    __syncthreads();
}

// Any number of blocks. Rows of many pieces are cut into parts; parts come last, so that blocks skip
// them together where there are none. A block looks at as many items at once as it has threads: in
// steps of prompts hardly any has work.
__device__ void merge(const MergeParams& p) {
    wait_for_previous();
    allow_next();
    const uint32_t lines = p.rows * p.heads, all = lines * kMergeParts;
    __shared__ uint32_t found[kMergeThreads];
    __shared__ uint32_t count;
    const uint32_t many = all <= gridDim.x ? kMergeMany : kMergeMost;
    for (uint32_t base = blockIdx.x; base < all; base += gridDim.x * kMergeThreads) {
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        const uint32_t mine = base + threadIdx.x * gridDim.x;
        if (mine < all) {
            const uint32_t part = mine / lines, row = mine % lines / p.heads, head = mine % p.heads;
            const uint32_t pieces = p.slots[row * ((p.heads + kLines - 1) / kLines) + head / kLines].y;
            // The order of items changes no result: each has its own place.
            if (pieces > 0 && (part == 0 || pieces >= many)) found[atomicAdd(&count, 1)] = mine;
        }
        __syncthreads();
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t item = found[i], part = item / lines, line = item % lines, row = line / p.heads, head = line % p.heads;
            const uint2 pieces = p.slots[row * ((p.heads + kLines - 1) / kLines) + head / kLines];
            if (pieces.y >= many) {
                merge_columns<kLatent / kMergeParts / 4, 8>(p, pieces, row, head, part * (kLatent / kMergeParts));
            } else {
                merge_columns<kLatent / 4, 4>(p, pieces, row, head, 0);
            }
        }
        __syncthreads();
    }
}

}  // namespace mla_decode

extern "C" __global__ void __launch_bounds__(mla_decode::kBound, 1) mla_decode_16(const __grid_constant__ mla_decode::Params p) {
    mla_decode::decode(p);
}
extern "C" __global__ void __launch_bounds__(mla_decode::kMergeThreads) mla_decode_merge(const __grid_constant__ mla_decode::MergeParams p) {
    mla_decode::merge(p);
}
