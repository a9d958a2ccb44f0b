// What surrounds the pieces of decoding rows, for heads of 128 + 64 and 128: before them rotation, the
// latent's norm, its way into the cache and queries into latent space; after them the merge of partial
// results and values out of latent space. Weights are on their way before the kernel in front has ended.
#include "cuda/async.cuh"
#include "mla/cuda/heads.cuh"
#include "mla/cuda/merge.cuh"

namespace mla_block {

using mla_decode::kLatent;
using mla_decode::kLines;
using mla_decode::Merged;

constexpr int kNope = 128;
constexpr int kValue = 128;
constexpr int kRope = 64;
constexpr int kPairs = kRope / 2;
constexpr int kWidth = kLatent + kRope;
constexpr uint32_t kTokens = 64;  // of a cache block
constexpr int kTile = 16;         // rows that tensor cores take at once

// Products take the elements k of 32 in another order, the same for both operands: lane t of a quad has
// 8 t to 8 t + 7, so that all come by 16 bytes. Outputs of a warp are permuted too: column c of tile j
// is output 4 (c / 2) + 2 j + c % 2, so that a lane has four neighbours, 4 t to 4 t + 3.
__device__ __forceinline__ int output_of(int j, int lane) { return lane / 8 * 4 + 2 * j + lane / 4 % 2; }

// d[j] += x w[j] over 32 elements of k.
__device__ __forceinline__ void mma_32(float (&d)[4], uint4 low, uint4 high, uint4 w) {
    mma_16816(d, low.x, high.x, low.y, high.y, w.x, w.y);
    mma_16816(d, low.z, high.z, low.w, high.w, w.z, w.w);
}

struct PrepareParams {
    bf16* q;               // [rows, heads, 128 + 64], q_row apart; rotated in place
    const bf16* kv;        // [rows, 512 + 64], kv_row apart
    const bf16* absorbed;  // [heads, 512, 128]
    const bf16* kv_b;      // [heads, 128 + 128, 512]
    bf16* latents;         // [rows, heads, 512]
    const float* norm;     // [512]
    const float* inv_freq;
    bf16* arena;
    const uint32_t* positions;
    const uint32_t* row_tables;  // index in `tables` of the first block of the row's sequence
    const uint64_t* tables;      // element offsets of blocks
    const uint32_t* count;
    uint64_t arena_elements, layer_offset, q_row, kv_row;
    uint32_t rows, heads, tiles;
    float eps, factor;
    uint32_t interleaved;
};

constexpr int kPrepareThreads = 128;
constexpr int kParts = 8;  // blocks of a head
constexpr int kPartOutputs = kLatent / kParts;

struct Turn {
    float cosine, sine;
};
// The two elements of a pair, which are neighbours or half a head apart.
struct Pair {
    int a, b;
    __device__ Pair(int pair, bool interleaved)
        : a(interleaved ? 2 * pair : pair), b(interleaved ? 2 * pair + 1 : pair + kPairs) {}
    __device__ float2 load(const bf16* x) const { return {widen(x[a]), widen(x[b])}; }
    __device__ void store(bf16* x, float2 v, Turn turn) const {
        x[a] = narrow<bf16>(v.x * turn.cosine - v.y * turn.sine);
        x[b] = narrow<bf16>(v.y * turn.cosine + v.x * turn.sine);
    }
};

// One row: its latent and its rotated key into the cache, the rotation of its queries.
__device__ void prepare_row(const PrepareParams& p, uint32_t row) {
    constexpr int kAtOnce = 4, kStep = kPrepareThreads / kPairs;
    const int thread = threadIdx.x;
    const Pair pair(thread % kPairs, p.interleaved != 0);
    if (row >= real_rows(p.count, p.rows)) {
        wait_for_previous();
        return;
    }
    const uint32_t position = p.positions[row];
    const uint64_t block = p.tables[p.row_tables[row] + position / kTokens];
    const uint64_t at = p.layer_offset + uint64_t(position % kTokens) * kWidth;
    const bool inside = block <= p.arena_elements && at + kWidth <= p.arena_elements - block;
    const float4 weight = *reinterpret_cast<const float4*>(p.norm + thread * 4);
    Turn turn;
    sincosf(__fmul_rn(static_cast<float>(position), p.inv_freq[thread % kPairs]), &turn.sine, &turn.cosine);
    turn.cosine *= p.factor, turn.sine *= p.factor;
    wait_for_previous();

    const bf16* kv = p.kv + row * p.kv_row;
    const Vec<bf16, 4> latent = *reinterpret_cast<const Vec<bf16, 4>*>(kv + thread * 4);
    float2 key = {};
    if (thread < kPairs) key = pair.load(kv + kLatent);
    bf16* q = p.q + row * p.q_row + kNope;
    for (uint32_t head = thread / kPairs; head < p.heads; head += kStep * kAtOnce) {
        float2 x[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            if (head + i * kStep < p.heads) x[i] = pair.load(q + (head + i * kStep) * (kNope + kRope));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            if (head + i * kStep < p.heads) pair.store(q + (head + i * kStep) * (kNope + kRope), x[i], turn);
        }
    }
    float x[4], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] = widen(latent.at[i]);
        sum += x[i] * x[i];
    }
    const float scale = rsqrtf(block_sum(sum) / kLatent + p.eps);
    if (!inside) return;
    bf16* to = p.arena + block + at;
    const float by[4] = {weight.x, weight.y, weight.z, weight.w};
    Vec<bf16, 4> normed;
#pragma unroll
    for (int i = 0; i < 4; i++) normed.at[i] = narrow<bf16>(x[i] * scale * by[i]);
    *reinterpret_cast<Vec<bf16, 4>*>(to + thread * 4) = normed;
    if (thread < kPairs) pair.store(to + kLatent, key, turn);
}

// Queries of one head into latent space: 64 of its outputs, 16 a warp, `tiles` times 16 rows.
__device__ void prepare_queries(const PrepareParams& p, uint32_t item) {
    const uint32_t part = item % kParts, head = item / kParts % p.heads, first = item / kParts / p.heads * p.tiles * kTile;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t output = part * kPartOutputs + warp * 16;
    uint4 w[2][kNope / 32];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const bf16* from = p.absorbed + (uint64_t(head) * kLatent + output + output_of(j, lane)) * kNope + t * 8;
#pragma unroll
        for (int c = 0; c < kNope / 32; c++) w[j][c] = load_ahead(from + c * 32);
    }
    if (first == 0) {
        // The last kernel's weights come nearer meanwhile: 16 lines of 1024 bytes of each block.
        const bf16* values = p.kv_b + (uint64_t(head) * (kNope + kValue) + kNope + part * (kValue / kParts)) * kLatent;
        static_assert(kValue / kParts * kLatent * sizeof(bf16) == kPrepareThreads * 128, "128 bytes a thread");
        prefetch_line(values + threadIdx.x * 64);
    }
    const uint32_t real = real_rows(p.count, p.rows);
    wait_for_previous();
    for (uint32_t tile = 0; tile < p.tiles; tile++) {
        const uint32_t row = first + tile * kTile;
        if (row >= real) return;
        uint4 x[2][kNope / 32] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t mine = row + g + half * 8;
            const bf16* from = p.q + mine * p.q_row + head * (kNope + kRope) + t * 8;
            if (mine < real) {
#pragma unroll
                for (int c = 0; c < kNope / 32; c++) x[half][c] = *reinterpret_cast<const uint4*>(from + c * 32);
            }
        }
        float d[2][4] = {};
#pragma unroll
        for (int c = 0; c < kNope / 32; c++) {
            mma_32(d[0], x[0][c], x[1][c], w[0][c]);
            mma_32(d[1], x[0][c], x[1][c], w[1][c]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t mine = row + g + half * 8;
            bf16* to = p.latents + (uint64_t(mine) * p.heads + head) * kLatent + output + t * 4;
            const uint2 packed = {pack_bf16(d[0][half * 2], d[0][half * 2 + 1]), pack_bf16(d[1][half * 2], d[1][half * 2 + 1])};
            if (mine < real) *reinterpret_cast<uint2*>(to) = packed;
        }
    }
}

struct ValuesParams {
    const bf16* results;  // [rows, heads, 512], of rows in one piece
    const float* partial;
    const float2* partial_lse;
    const uint2* slots;  // [rows, groups of 16 heads]: first slot and how many; 0: see results
    const bf16* kv_b;    // [heads, 128 + 128, 512]
    bf16* out;           // [rows, heads, 128]
    const uint32_t* count;
    uint32_t rows, heads, tiles;
};

constexpr int kValuesThreads = 512;
constexpr int kShares = 4;  // blocks of a head
constexpr int kShare = kValue / kShares;
constexpr int kQuads = kLatent / 4;
constexpr int kTeams = kValuesThreads / kQuads;  // each has all columns of a row
constexpr int kAtOnce = 8;
constexpr uint32_t kAlone = 16;  // pieces that a team merges by itself, if others are as busy
constexpr int kSlices = kValuesThreads / 32 / (kShare / 16);
constexpr int kSlice = kLatent / kSlices;  // columns that a warp multiplies
constexpr int kPitch = kLatent + 8;

struct Shared {
    uint4 w[2][kSlice / 32][kValuesThreads];  // weights, each thread's own
    union {
        float part[kSlices][kTile][kShare];  // products over some columns
        struct {
            float4 sums[kTeams][kQuads];
            float2 lse[kTeams];
        };
    };
    bf16 x[kTile][kPitch];
    uint2 slots[kTile];
};
static_assert(sizeof(Shared) == 65920, "as block.rs says");

// Results of a tile's rows into `s.x`. Teams share the pieces of one or two rows, take turns with more,
// and come together for a row of many pieces among few such.
__device__ __forceinline__ void merge_tile(const ValuesParams& p, Shared& s, uint32_t first, uint32_t real, uint32_t head, bool many) {
    const mla_decode::Slots slots = {p.partial, p.partial_lse};
    const uint32_t team = threadIdx.x / kQuads, quad = threadIdx.x % kQuads, column = quad * 4, line = head % kLines;
    const uint32_t rows = min(real - first, uint32_t(kTile));
    const uint32_t manies = __syncthreads_count(many);
    const uint32_t limit = rows <= 2 ? 0 : kAlone * max(manies, 1u);
    for (uint32_t r = team; r < kTile; r += kTeams) {
        const uint2 of = s.slots[r];
        uint2 v = {};
        if (of.y > limit) continue;
        if (r < rows && of.y == 0) {
            v = *reinterpret_cast<const uint2*>(p.results + (uint64_t(first + r) * p.heads + head) * kLatent + column);
        } else if (of.y > 0) {
            v = mla_decode::merge_pieces<kAtOnce>(slots, of, line, column, 0, 1).result();
        }
        *reinterpret_cast<uint2*>(&s.x[r][column]) = v;
    }
    if (rows <= 2 || manies > 0) {
        for (uint32_t r = 0; r < rows; r++) {
            const uint2 of = s.slots[r];
            if (of.y <= limit) continue;
            const Merged m = mla_decode::merge_pieces<kAtOnce>(slots, of, line, column, team, kTeams);
            s.sums[team][quad] = m.sum;
            if (quad == 0) s.lse[team] = {m.top, m.mass};
            __syncthreads();
            if (team == 0) {
                const Merged all = mla_decode::merge_ways<kTeams>(s.lse, &s.sums[0][quad], kQuads);
                *reinterpret_cast<uint2*>(&s.x[r][column]) = all.result();
            }
            __syncthreads();
        }
    }
    __syncthreads();
}

// Four blocks to a head: each merges all columns of its rows and multiplies them by a fourth of the
// outputs, a warp some columns by 16 of them.
__device__ void values(const ValuesParams& p) {
    extern __shared__ __align__(16) uint8_t memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const uint32_t share = blockIdx.x % kShares, head = blockIdx.x / kShares % p.heads;
    const uint32_t first = blockIdx.x / kShares / p.heads * p.tiles * kTile;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int slice = warp % kSlices, outputs = warp / kSlices * 16;
    allow_next();
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const uint32_t output = head * (kNope + kValue) + kNope + share * kShare + outputs + output_of(j, lane);
        const bf16* from = p.kv_b + uint64_t(output) * kLatent + slice * kSlice + t * 8;
#pragma unroll
        for (int c = 0; c < kSlice / 32; c++) copy_async(shared_address(&s.w[j][c][threadIdx.x]), from + c * 32, true);
    }
    commit_copies();
    const uint32_t real = real_rows(p.count, p.rows), groups = (p.heads + kLines - 1) / kLines;
    for (uint32_t tile = 0; tile < p.tiles; tile++) {
        const uint32_t row = first + tile * kTile;
        uint2 mine = {};
        if (threadIdx.x < kTile) {
            if (row + threadIdx.x < real) mine = p.slots[(row + threadIdx.x) * groups + head / kLines];
            s.slots[threadIdx.x] = mine;
        }
        if (tile == 0) {
            wait_for_previous();
            wait_copies<0>();
        }
        if (row >= real) return;
        merge_tile(p, s, row, real, head, mine.y > kAlone);
        float d[2][4] = {};
#pragma unroll
        for (int c = 0; c < kSlice / 32; c++) {
            const int at = slice * kSlice + c * 32 + t * 8;
            const uint4 low = *reinterpret_cast<const uint4*>(&s.x[g][at]);
            const uint4 high = *reinterpret_cast<const uint4*>(&s.x[g + 8][at]);
            mma_32(d[0], low, high, s.w[0][c][threadIdx.x]);
            mma_32(d[1], low, high, s.w[1][c][threadIdx.x]);
        }
        float* to = &s.part[slice][g][outputs + t * 4];
        *reinterpret_cast<float4*>(to) = {d[0][0], d[0][1], d[1][0], d[1][1]};
        *reinterpret_cast<float4*>(to + 8 * kShare) = {d[0][2], d[0][3], d[1][2], d[1][3]};
        __syncthreads();
        const uint32_t mine_row = threadIdx.x / kShare, output = threadIdx.x % kShare;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kSlices; i++) sum += s.part[i][mine_row][output];
        if (row + mine_row < real) {
            p.out[(uint64_t(row + mine_row) * p.heads + head) * kValue + share * kShare + output] = narrow<bf16>(sum);
        }
        __syncthreads();
    }
}

struct alignas(128) PrepareManyParams {
    mla_heads::Params product;
    PrepareParams rows;
};
static_assert(kPrepareThreads == mla_heads::kThreads, "either kind of block");

}  // namespace mla_block

extern "C" __global__ void __launch_bounds__(mla_block::kPrepareThreads) mla_prepare(const __grid_constant__ mla_block::PrepareParams p) {
    allow_next();
    if (blockIdx.x < p.rows) {
        mla_block::prepare_row(p, blockIdx.x);
    } else {
        mla_block::prepare_queries(p, blockIdx.x - p.rows);
    }
}
extern "C" __global__ void __launch_bounds__(mla_block::kValuesThreads, 2) mla_values(const __grid_constant__ mla_block::ValuesParams p) {
    mla_block::values(p);
}
// As mla_prepare, for many rows.
extern "C" __global__ void __launch_bounds__(mla_block::kPrepareThreads) mla_prepare_many(const __grid_constant__ mla_block::PrepareManyParams p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    allow_next();
    if (blockIdx.x < p.rows.rows) {
        mla_block::prepare_row(p.rows, blockIdx.x);
    } else {
        mla_heads::product_of<mla_heads::ToLatent>(p.product, blockIdx.x - p.rows.rows, shared_address(memory));
    }
}
