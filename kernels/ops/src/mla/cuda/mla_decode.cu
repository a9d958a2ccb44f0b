// Latent attention of decoding rows in the absorbed form, latent 512 and rope 64, for up to 16 heads.
//
// A block works through its pieces: some keys of one row. Keys come by the copy engine in units of 16
// through a ring, tiles of up to 64 are worked on at once; one warp runs ahead of the others over the
// borders of pieces and brings the next row's queries as well, so that memory is read without a pause
// whatever the contexts are. Of the products of queries and keys each warp takes a quarter of the width
// for half the keys, so its queries stay in registers; of those with values, 64 columns. A row in several
// pieces leaves partial sums, which `mla_decode_merge` merges. The host cuts the pieces (decode.rs), so
// that blocks have equal work.
#include "cuda/wgmma.cuh"
#include "mla/cuda/decode.cuh"
#include "mla/cuda/merge.cuh"

namespace mla_decode {

using namespace mla;
using Params = DecodeParams;

constexpr int kBlock = kTokens;  // keys of a tile
constexpr int kPitch = 584;      // of a query in shared memory: an odd number of 16-byte units
constexpr int kWarps = 8;        // that compute
constexpr int kComputing = kWarps * 32;
constexpr int kBound = 512;      // registers as if for more threads, so that a block of the merge fits beside
constexpr uint32_t kUnits = 8;   // of keys, in the ring
constexpr int kParts = 4;        // of the width
constexpr int kSteps = kWidth / 16 / kParts;
constexpr int kScorePitch = kBlock + 8;
constexpr int kProbPitch = kBlock + 8;
constexpr uint32_t kUnitBytes = kBox * kWidth * 2;

// What those that compute know of a piece.
struct Work {
    uint32_t row, begin, end, slot, head;
    bool last;
};

struct Shared {
    bf16 kv[kUnits][kBox][kWidth];  // 16-byte units swizzled within 128 bytes
    bf16 q[kLines][kPitch];
    float scores[kParts][kLines][kScorePitch];
    bf16 prob[kLines][kProbPitch];
    float shrink[kLines], mass[kLines];
    uint64_t full[kUnits];   // of tiles in turn: there are not more than units
    uint64_t empty[kUnits];
    uint64_t asked, taken;  // queries and `work`: there; in registers
    Work work;
};
static_assert(sizeof(Shared) == 187176, "as decode.rs says");

// A word of a piece in each thread of a warp.
__device__ __forceinline__ uint32_t words_of(const Params& p, uint32_t piece) {
    constexpr uint32_t kWords = sizeof(Piece) / 4;
    return reinterpret_cast<const uint32_t*>(p.pieces)[piece * kWords + threadIdx.x % kWords];
}
__device__ __forceinline__ uint32_t word_of(uint32_t words, size_t offset) { return __shfl_sync(0xffffffff, words, offset / 4); }

__device__ __forceinline__ void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory"); }

// A box of keys, which nobody reads again in this step: queries and results stay in the second-level cache.
__device__ __forceinline__ void load_once(uint32_t to, const TensorMap* map, int line, uint32_t bar) {
    constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(to),
        "l"(map), "r"(0), "r"(line), "r"(bar), "l"(kEvictFirst)
        : "memory");
}

// One warp starts all copies. What earlier steps wrote need not wait for the kernel before.
__device__ __forceinline__ void produce(const Params& p, Shared& s, uint32_t words) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t unit = 0, tile = 0;
    bool waited = false;
    for (uint32_t n = 0;; n++) {
        const auto word = [&](size_t offset) { return word_of(words, offset); };
        const auto long_word = [&](size_t offset) { return word(offset) | uint64_t(word(offset + 4)) << 32; };
        const uint64_t first[2] = {long_word(offsetof(Piece, at)), long_word(offsetof(Piece, at) + 8)};
        const uint32_t table = word(offsetof(Piece, table)), settled = word(offsetof(Piece, settled));
        const uint32_t next = word(offsetof(Piece, next));
        const Work work = {word(offsetof(Piece, row)), word(offsetof(Piece, begin)), word(offsetof(Piece, end)),
                           word(offsetof(Piece, slot)), word(offsetof(Piece, head)), next == 0};
        // It is here when this piece is done.
        if (next != 0) words = words_of(p, next);
        bool asked = false;
        const auto ask = [&] {
            const uint32_t bar = shared_address(&s.asked), lines = min(uint32_t(kLines), p.heads - work.head);
            if (lane == 0) {
                barrier_wait(shared_address(&s.taken), (n & 1) ^ 1);
                s.work = work;
                barrier_expect(bar, lines * kWidth * 2);
            }
            __syncwarp();
            const uint32_t line = lane % kLines, head = work.head + line;
            if (line < lines) {
                if (lane < kLines) {
                    bulk_load(shared_address(&s.q[line][0]), p.q + work.row * p.q_row + head * p.q_head, kLatent * 2, bar);
                } else {
                    bulk_load(shared_address(&s.q[line][kLatent]), p.q_rest + work.row * p.rest_row + head * p.rest_head, kRope * 2, bar);
                }
            }
            asked = true;
        };
        // Of the first piece they come behind keys that need not wait.
        if (waited) ask();
        uint64_t entry = 0;
        const uint32_t block = work.begin / kBlock;
        uint32_t begin = work.begin;
        for (uint32_t i = 0; begin < work.end; i++) {
            const uint32_t end = min(work.end, (block + i + 1) * kBlock), units = (end - begin + kBox - 1) / kBox;
            if (i % 32 == 0) {
                const uint32_t of = block + i + lane;
                entry = i + lane >= 2 && of * kBlock < work.end ? p.tables[table + of] : 0;
            }
            uint64_t listed = i == 0 ? first[0] : first[1];
            if (i >= 2) listed = __shfl_sync(0xffffffff, entry, i % 32);
            const uint64_t at = inside(listed, p.layer_offset, p.arena_elements);
            const int line = int((at + p.layer_offset) / kLine) + int(begin % kBlock + lane * kBox) * (kWidth / kLine);
            if (!waited && (end > settled || unit + units > kUnits)) {
                // What has keys of this step can come nearer.
                if (end > settled && lane < units) tensor_prefetch_2d(&p.cache, 0, line);
                wait_for_previous();
                waited = true;
                ask();
            }
            const uint32_t place = (unit + lane) % kUnits, bar = shared_address(&s.full[tile % kUnits]);
            if (lane < units) barrier_wait(shared_address(&s.empty[place]), ((unit + lane) / kUnits & 1) ^ 1);
            __syncwarp();
            if (lane == 0) barrier_expect(bar, units * kUnitBytes);
            __syncwarp();
            if (lane < units) load_once(shared_address(&s.kv[place][0][0]), &p.cache, line, bar);
            tile++;
            unit += units;
            begin = end;
        }
        if (!waited) {
            wait_for_previous();
            waited = true;
            ask();
        }
        if (next == 0) return;
    }
}

// All threads that compute.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;\n" ::"n"(kComputing) : "memory"); }

// Words i of four threads become all words of thread i.
__device__ __forceinline__ uint4 gathered(uint32_t (&v)[4], int t) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = t & step;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & step) continue;
            const uint32_t got = __shfl_xor_sync(0xffffffff, upper ? v[i] : v[i + step], step);
            (upper ? v[i] : v[i + step]) = got;
        }
    }
    return {v[0], v[1], v[2], v[3]};
}

__device__ __forceinline__ void compute(const Params& p, Shared& s) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int part = warp % kParts, half = warp / kParts;
    const float scale = p.scale * 1.44269504f;
    // Of the scores this warp weighs two lines, 16 threads each.
    const int line = warp * 2 + lane / 16, column = lane % 16 * 4;
    // Of each 128 bytes of a key this warp multiplies 32: where a thread finds them in a unit.
    const int key = lane / 16 * 8 + lane % 8;
    uint32_t unit = 0, tile = 0;
    wait_for_previous();
    for (uint32_t n = 0;; n++) {
        barrier_wait(shared_address(&s.asked), n & 1);
        const Work work = s.work;
        uint32_t q[kSteps][4];
#pragma unroll
        for (int k = 0; k < kSteps; k++) load_matrix(q[k], shared_address(&s.q[lane % 16][k * kLine + part * 16 + lane / 16 * 8]));
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&s.taken));

        float top = -INFINITY, mass = 0.0f;
        float acc[8][4] = {};
        for (uint32_t begin = work.begin; begin < work.end;) {
            const uint32_t end = min(work.end, (begin / kBlock + 1) * kBlock), keys = end - begin, units = (keys + kBox - 1) / kBox;
            const auto place = [&](uint32_t i) { return (unit + i) % kUnits; };
            barrier_wait(shared_address(&s.full[tile % kUnits]), tile / kUnits & 1);
            tile++;
            // Units of this warp. All of one is under way to registers before it is multiplied.
            const uint32_t mine = half * 2, count = units > mine ? min(units - mine, 2u) : 0;
            uint32_t b[kSteps][4];
            const auto fetch = [&](uint32_t i, int k) { load_matrix(b[k], key_unit(shared_address(&s.kv[place(mine + i)][0][0]), key, k, part * 2 + lane / 8 % 2)); };
            float d[2][2][4];
            const auto multiply = [&](int k) {
                mma_16816(d[k % 2][0], q[k][0], q[k][1], q[k][2], q[k][3], b[k][0], b[k][1]);
                mma_16816(d[k % 2][1], q[k][0], q[k][1], q[k][2], q[k][3], b[k][2], b[k][3]);
            };
            const auto clear = [&] {
#pragma unroll
                for (int i = 0; i < 16; i++) d[i / 8][i / 4 % 2][i % 4] = 0.0f;
            };
            const auto store = [&](uint32_t i) {
#pragma unroll
                for (int h = 0; h < 4; h++) {
                    const int n = h / 2, at = h % 2 * 2;
                    *reinterpret_cast<float2*>(&s.scores[part][g + h % 2 * 8][(mine + i) * kBox + n * 8 + t * 2]) = {
                        d[0][n][at] + d[1][n][at], d[0][n][at + 1] + d[1][n][at + 1]};
                }
            };
            if (count > 0) {
                clear();
#pragma unroll
                for (int k = 0; k < kSteps; k++) fetch(0, k);
                if (count > 1) {
#pragma unroll
                    for (int k = 0; k < kSteps; k++) {
                        multiply(k);
                        fetch(1, k);
                    }
                    store(0);
                    clear();
                }
#pragma unroll
                for (int k = 0; k < kSteps; k++) multiply(k);
                store(count - 1);
            }
            meet();
            float score[4] = {};
#pragma unroll
            for (int of = 0; of < kParts; of++) {
                const float4 v = *reinterpret_cast<const float4*>(&s.scores[of][line][column]);
                score[0] += v.x, score[1] += v.y, score[2] += v.z, score[3] += v.w;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) score[i] = column + i < keys ? score[i] * scale : -INFINITY;
            float all = fmaxf(top, fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3])));
#pragma unroll
            for (int step = 1; step < 16; step *= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffff, all, step));
            // Where every score is minus infinity or not a number nothing is subtracted.
            const float base = all == -INFINITY ? 0.0f : all;
            const float shrink = exp2_of(top - base);
            top = all;
#pragma unroll
            for (int i = 0; i < 4; i++) score[i] = exp2_of(score[i] - base);
            mass = mass * shrink + (score[0] + score[1] + (score[2] + score[3]));
            *reinterpret_cast<uint2*>(&s.prob[line][column]) = {pack_bf16(score[0], score[1]), pack_bf16(score[2], score[3])};
            if (column == 0) s.shrink[line] = shrink;
            if (end == work.end) {
#pragma unroll
                for (int step = 1; step < 16; step *= 2) mass += __shfl_xor_sync(0xffffffff, mass, step);
                if (column == 0) {
                    s.mass[line] = mass;
                    if (work.slot != kWhole) p.partial_lse[uint64_t(work.slot) * kLines + line] = {top, mass};
                }
            }
            if (keys % kBox != 0) {
                // What lies beyond may be anything, and nothing times infinity is not nothing.
                uint4* rest = reinterpret_cast<uint4*>(&s.kv[place(units - 1)][keys % kBox][0]);
                for (int i = threadIdx.x; i < int(kBox - keys % kBox) * (kWidth / 8); i += kComputing) rest[i] = uint4{};
                fence_async();
            }
            meet();
            const float by[2] = {s.shrink[g], s.shrink[g + 8]};
#pragma unroll
            for (int n = 0; n < 8; n++) {
                acc[n][0] *= by[0], acc[n][1] *= by[0];
                acc[n][2] *= by[1], acc[n][3] *= by[1];
            }
            uint32_t a[2][4], v[2][4][4];
            const auto take = [&](uint32_t u) {
                const uint32_t keys_at = shared_address(&s.kv[place(u)][0][0]);
                load_matrix(a[u % 2], shared_address(&s.prob[lane % 16][u * kBox + lane / 16 * 8]));
#pragma unroll
                for (int n = 0; n < 4; n++) load_matrix_transposed(v[u % 2][n], key_unit(keys_at, lane % 16, warp, n * 2 + lane / 16));
            };
            take(0);
#pragma unroll
            for (uint32_t u = 0; u < kBlock / kBox; u++) {
                if (u >= units) break;
                if (u + 1 < units) take(u + 1);
                const uint32_t(&w)[4] = a[u % 2];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const uint32_t(&of)[4] = v[u % 2][n];
                    mma_16816(acc[2 * n], w[0], w[1], w[2], w[3], of[0], of[1]);
                    mma_16816(acc[2 * n + 1], w[0], w[1], w[2], w[3], of[2], of[3]);
                }
            }
            __syncwarp();
            if (lane < units) barrier_arrive(shared_address(&s.empty[place(lane)]));
            unit += units;
            begin = end;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t of = g + i * 8;
            if (work.slot == kWhole) {
                const float by = 1.0f / s.mass[of];
                bf16* to = p.out + (uint64_t(work.row) * p.heads + work.head + of) * kLatent + warp * 64 + t * 8;
#pragma unroll
                for (int n = 0; n < 8; n += 4) {
                    uint32_t v[4];
#pragma unroll
                    for (int m = 0; m < 4; m++) v[m] = pack_bf16(acc[n + m][2 * i] * by, acc[n + m][2 * i + 1] * by);
                    const uint4 all = gathered(v, t);
                    if (work.head + of < p.heads) *reinterpret_cast<uint4*>(to + n * 8) = all;
                }
            } else if (work.head + of < p.heads) {
                float* to = p.partial + (uint64_t(work.slot) * kLines + of) * kLatent + warp * 64 + t * 2;
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    *reinterpret_cast<float2*>(to + n * 8) = {acc[n][2 * i], acc[n][2 * i + 1]};
                }
            }
        }
        if (work.last) return;
    }
}

__device__ __forceinline__ void decode(const Params& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const uint32_t words = words_of(p, blockIdx.x);
    if (threadIdx.x == kComputing) prefetch_map(&p.cache);
    const bool any = word_of(words, offsetof(Piece, end)) > word_of(words, offsetof(Piece, begin));
    // Room for the next kernel. One block stays, so that this kernel ends after the one in front.
    if (!any) {
        if (blockIdx.x == 0) wait_for_previous();
        return;
    }
    if (threadIdx.x < kUnits) {
        barrier_init(shared_address(&s.full[threadIdx.x]), 1);
        barrier_init(shared_address(&s.empty[threadIdx.x]), kWarps);
    } else if (threadIdx.x == kUnits) {
        barrier_init(shared_address(&s.asked), 1);
        barrier_init(shared_address(&s.taken), kWarps);
    }
    if (threadIdx.x <= kUnits) fence_barrier_init();
    __syncthreads();
    allow_next();
    if (threadIdx.x < kComputing) {
        // Warpgroups: two that compute and a third for one warp of it. Together they have what was launched.
        more_registers<168>();
        compute(p, s);
    } else {
        fewer_registers<48>();
        if (threadIdx.x < kComputing + 32) produce(p, s, words);
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
constexpr uint32_t kMergeFew = 4;   // pieces that a warp merges by itself, if others are as busy
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

// The same by one warp, where pieces are few.
__device__ __forceinline__ void merge_line(const MergeParams& p, uint2 mine, uint32_t row, uint32_t head) {
    Merged all[kLatent / 128];
#pragma unroll
    for (int i = 0; i < kLatent / 128; i++) {
        all[i] = merge_pieces<2>({p.partial, p.partial_lse}, mine, head % kLines, i * 128 + threadIdx.x % 32 * 4, 0, 1);
    }
#pragma unroll
    for (int i = 0; i < kLatent / 128; i++) {
        const uint32_t column = i * 128 + threadIdx.x % 32 * 4;
        *reinterpret_cast<uint2*>(p.out + (uint64_t(row) * p.heads + head) * kLatent + column) = all[i].result();
    }
}

// Any number of blocks, which look for work before the kernel in front has ended: mostly there is none.
// Rows of many pieces are cut into parts; parts come last, so that blocks skip them together where there
// are none. A block looks at as many items at once as it has threads. With a block to each item all of it
// is at one, otherwise a warp is at one of few pieces.
__device__ void merge(const MergeParams& p) {
    allow_next();
    const uint32_t lines = p.rows * p.heads, all = lines * kMergeParts;
    __shared__ uint32_t found[kMergeThreads];  // those of a warp from the front, those of the block from the back
    __shared__ uint32_t few, many;
    const bool roomy = all <= gridDim.x;
    const uint32_t most = roomy ? kMergeMany : kMergeMost;
    const auto pieces_of = [&](uint32_t row, uint32_t head) { return p.slots[row * ((p.heads + kLines - 1) / kLines) + head / kLines]; };
    bool waited = false;
    for (uint32_t base = blockIdx.x; base < all; base += gridDim.x * kMergeThreads) {
        if (threadIdx.x == 0) few = many = 0;
        __syncthreads();
        const uint32_t mine = base + threadIdx.x * gridDim.x;
        if (mine < all) {
            const uint32_t part = mine / lines, row = mine % lines / p.heads, head = mine % p.heads;
            const uint32_t pieces = pieces_of(row, head).y;
            // The order of items changes no result: each has its own place.
            if (pieces > 0 && (part == 0 || pieces >= most)) {
                const bool alone = !roomy && pieces <= kMergeFew;
                found[alone ? atomicAdd(&few, 1) : kMergeThreads - 1 - atomicAdd(&many, 1)] = mine;
            }
        }
        if (!waited) wait_for_previous();
        waited = true;
        __syncthreads();
        for (uint32_t i = threadIdx.x / 32; i < few; i += kMergeThreads / 32) {
            const uint32_t line = found[i], row = line / p.heads, head = line % p.heads;
            merge_line(p, pieces_of(row, head), row, head);
        }
        for (uint32_t i = 0; i < many; i++) {
            const uint32_t item = found[kMergeThreads - 1 - i], part = item / lines, line = item % lines, row = line / p.heads, head = line % p.heads;
            const uint2 pieces = pieces_of(row, head);
            if (pieces.y >= most) {
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
