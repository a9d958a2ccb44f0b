// What surrounds the pieces of decoding rows, for heads of 128 + 64 and 128: before them rotation, the
// latent's norm, its way into the cache and queries into latent space; after them the merge of partial
// results and values out of latent space. Weights are on their way before the kernel in front has ended.
#include "cuda/cluster.cuh"
#include "mla/cuda/heads.cuh"
#include "mla/cuda/merge.cuh"
#include "mla/cuda/turn.cuh"

namespace mla_block {

using mla_decode::kLines;
using mla_decode::Merged;

using namespace mla;

constexpr int kTile = 16;  // rows that tensor cores take at once

struct PrepareParams {
    bf16* q;               // [rows, heads, 128 + 64], q_row apart; rotated in place
    const bf16* kv;        // [rows, 512 + 64], kv_row apart
    const bf16* absorbed;  // [heads, 512, 128]
    const bf16* kv_b;      // [heads, 128 + 128, 512]
    bf16* latents;         // [rows, heads, 512]
    bf16* kept;            // as kv, and may be that: what the cache gets; or none
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

// One row: its latent and its rotated key into the cache, the rotation of its queries. What a thread keeps
// lies where it alone has read.
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
    const Turn turn = turn_of(position, p.inv_freq[thread % kPairs], p.factor);
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
    const float by[4] = {weight.x, weight.y, weight.z, weight.w};
    Vec<bf16, 4> normed;
#pragma unroll
    for (int i = 0; i < 4; i++) normed.at[i] = narrow<bf16>(x[i] * scale * by[i]);
    if (p.kept != nullptr) {
        bf16* kept = p.kept + row * p.kv_row;
        *reinterpret_cast<Vec<bf16, 4>*>(kept + thread * 4) = normed;
        if (thread < kPairs) pair.store(kept + kLatent, key, turn);
    }
    if (!inside) return;
    bf16* to = p.arena + block + at;
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
    __device__ mla_decode::Slots all() const { return {partial, partial_lse}; }
    // Of a row, which is real.
    __device__ uint2 of(uint32_t row, uint32_t head) const { return slots[row * ((heads + kLines - 1) / kLines) + head / kLines]; }
    __device__ const bf16* result(uint32_t row, uint32_t head) const { return results + (uint64_t(row) * heads + head) * kLatent; }
    __device__ bf16* to(uint32_t row, uint32_t head) const { return out + (uint64_t(row) * heads + head) * kValue; }
};

constexpr int kValuesThreads = 256;
constexpr int kValuesWarps = kValuesThreads / 32;
constexpr int kShares = 8;                  // blocks of a head, a cluster
constexpr int kSlice = kLatent / kShares;   // columns that a block merges and multiplies
constexpr int kOutputs = kValue / kShares;  // outputs that it sums up
constexpr int kQuads = kSlice / 4;
constexpr int kTeams = kValuesThreads / kQuads;  // each has all columns of a row
constexpr int kAtOnce = 8;
constexpr uint32_t kAlone = 16;  // pieces that a thread merges by itself, if others are as busy
static_assert(kTeams == kTile, "a team to a row");
static_assert(kShares == kValuesWarps, "a warp multiplies what one block sums up");

struct Shared {
    float last[2][kShares][kTile][kOutputs];  // of every block's columns; in turn
    float4 sums[kTeams][kQuads];
    float2 lse[kTeams];
    bf16 x[kTile][kSlice + 8];
    uint2 slots[kTile];
};

// Results of a tile's rows into `s.x`. Teams share the pieces of few rows; all come together for a row of
// many pieces among few such. Nobody looks at rows beyond the last.
__device__ __forceinline__ void merge_tile(const ValuesParams& p, Shared& s, uint32_t first, uint32_t rows, uint32_t head, uint32_t columns) {
    const mla_decode::Slots slots = p.all();
    const uint32_t team = threadIdx.x / kQuads, quad = threadIdx.x % kQuads, column = columns + quad * 4, line = head % kLines;
    const uint32_t ways = rows <= 1 ? 16 : rows <= 2 ? 8 : rows <= 4 ? 4 : rows <= 8 ? 2 : 1;
    const uint32_t row = team / ways, way = team % ways;
    const uint32_t manies = __syncthreads_count(threadIdx.x < rows && s.slots[threadIdx.x % kTile].y > kAlone * ways);
    const uint32_t limit = kAlone * ways * max(manies, 1u);
    const uint2 of = row < rows ? s.slots[row] : uint2{};
    const auto store = [&](uint32_t at, uint2 v) { *reinterpret_cast<uint2*>(&s.x[at][quad * 4]) = v; };
    const bool here = of.y > 0 && of.y <= limit;
    Merged m;
    if (here) m = mla_decode::merge_pieces<kAtOnce>(slots, of, line, column, way, ways);
    if (of.y == 0 && way == 0 && row < rows) store(row, *reinterpret_cast<const uint2*>(p.result(first + row, head) + column));
    if (ways > 1) {
        s.sums[team][quad] = m.sum;
        if (quad == 0) s.lse[team] = {m.top, m.mass};
        __syncthreads();
        if (here && way == 0) m = mla_decode::merge_ways(&s.lse[team], &s.sums[team][quad], kQuads, ways);
    }
    if (here && way == 0) store(row, m.result());
    for (uint32_t r = 0; r < rows && manies > 0; r++) {
        const uint2 many = s.slots[r];
        if (many.y <= limit) continue;
        m = mla_decode::merge_pieces<kAtOnce>(slots, many, line, column, team, kTeams);
        __syncthreads();
        s.sums[team][quad] = m.sum;
        if (quad == 0) s.lse[team] = {m.top, m.mass};
        __syncthreads();
        if (team == 0) store(r, mla_decode::merge_ways(s.lse, &s.sums[0][quad], kQuads, kTeams).result());
    }
    __syncthreads();
}

// A cluster to a head: each block merges an eighth of the columns of its rows and multiplies it by the
// weights of those; a block sums up what all have of its outputs.
__device__ void values(const ValuesParams& p) {
    __shared__ Shared s;
    const uint32_t share = cluster_rank(), head = blockIdx.x / kShares % p.heads;
    const uint32_t first = blockIdx.x / kShares / p.heads * p.tiles * kTile;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4 w[2][kSlice / 32];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const uint32_t output = head * (kNope + kValue) + kNope + warp * kOutputs + output_of(j, lane);
        const bf16* from = p.kv_b + uint64_t(output) * kLatent + share * kSlice + t * 8;
#pragma unroll
        for (int c = 0; c < kSlice / 32; c++) w[j][c] = load_ahead(from + c * 32);
    }
    const uint32_t real = real_rows(p.count, p.rows);
    cluster_arrive();
    for (uint32_t tile = 0; tile < p.tiles; tile++) {
        const uint32_t row = first + tile * kTile;
        if (threadIdx.x < kTile) s.slots[threadIdx.x] = row + threadIdx.x < real ? p.of(row + threadIdx.x, head) : uint2{};
        __syncthreads();
        if (tile == 0) {
            wait_for_previous();
            // Not before: the next kernel's weights would delay what is read here.
            allow_next();
            cluster_wait();
        }
        // All blocks of the cluster leave together.
        if (row >= real) return;
        const uint32_t rows = min(real - row, uint32_t(kTile));
        merge_tile(p, s, row, rows, head, share * kSlice);
        float d[2][4] = {};
#pragma unroll
        for (int c = 0; c < kSlice / 32; c++) {
            const uint4 low = *reinterpret_cast<const uint4*>(&s.x[g][c * 32 + t * 8]);
            const uint4 high = *reinterpret_cast<const uint4*>(&s.x[g + 8][c * 32 + t * 8]);
            mma_32(d[0], low, high, w[0][c]);
            mma_32(d[1], low, high, w[1][c]);
        }
        float(&last)[kShares][kTile][kOutputs] = s.last[tile % 2];
        const uint32_t to = remote_address(shared_address(&last[share][g][t * 4]), warp);
        if (g < rows) store_remote16(to, {d[0][0], d[0][1], d[1][0], d[1][1]});
        if (g + 8 < rows) store_remote16(to + 8 * kOutputs * 4, {d[0][2], d[0][3], d[1][2], d[1][3]});
        cluster_arrive();
        cluster_wait();
        const uint32_t mine = threadIdx.x / kOutputs, output = threadIdx.x % kOutputs;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kShares; i++) sum += last[i][mine][output];
        if (mine < rows) p.to(row + mine, head)[share * kOutputs + output] = narrow<bf16>(sum);
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
extern "C" __global__ void __launch_bounds__(mla_block::kValuesThreads, 3) mla_values(const __grid_constant__ mla_block::ValuesParams p) {
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
