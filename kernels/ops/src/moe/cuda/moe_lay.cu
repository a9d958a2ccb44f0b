// Rows of x laid by sorted pair of (token, choice), so that products of experts read whole boxes, and the
// tiles that these work on.
//
// Pairs are sorted by expert and then by number: a pair's place depends on the choices alone. They are
// cut into chunks of whole rows. Every block sorts one chunk and lays its share of the chunk's rows; the
// first block writes what the other kernels need to know. Of several chunks the pairs of every expert
// are counted before.
#include "cuda/async.cuh"
#include "linear/cuda/linear.cuh"
#include "moe/cuda/front.cuh"

// Pairs of a chunk and experts, at most, fit 48 KiB with the counters of all warps.
constexpr uint32_t kSorted = 2048, kLayThreads = 512, kLayWarps = kLayThreads / 32;
constexpr uint32_t kElsewhere = 0xffffffff;
constexpr uint32_t kAtOnce = 4;  // vectors of a row that a lane copies at once, at most

struct LayParams {
    const uint4* x;          // [rows, vectors]
    const uint32_t* chosen;  // [rows, top_k]
    const uint32_t* count;
    uint4* out;              // [pairs, vectors]
    uint32_t* counts;        // [chunks, held]; not looked at where there is one chunk
    uint32_t* places;        // pair to sorted place; all ones where the expert lives elsewhere
    RowTile* tiles;
    uint32_t* totals;        // tiles, pairs
    uint32_t* progress;      // [progresses] that is zero when this has ended
    uint32_t rows, top_k, first, held, tile_rows, vectors;
    uint32_t chunk_rows, chunks, progresses;
    uint32_t at_once;        // vectors of a row that a lane copies at once: few where rows are few
};

// One block a chunk.
extern "C" __global__ void __launch_bounds__(kLayThreads) count_pairs(const __grid_constant__ LayParams p) {
    extern __shared__ uint32_t counts[];  // [held]
    for (uint32_t e = threadIdx.x; e < p.held; e += kLayThreads) counts[e] = 0;
    wait_for_previous();
    allow_next();
    const uint32_t real = real_rows(p.count, p.rows), row = min(real, blockIdx.x * p.chunk_rows);
    const uint32_t* chosen = p.chosen + row * p.top_k;
    const uint32_t all = min(p.chunk_rows, real - row) * p.top_k;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < all; i += kLayThreads) {
        const uint32_t e = chosen[i] - p.first;
        if (e < p.held) atomicAdd(&counts[e], 1);
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < p.held; e += kLayThreads) p.counts[blockIdx.x * p.held + e] = counts[e];
}

// Some blocks a chunk.
extern "C" __global__ void __launch_bounds__(kLayThreads) lay_pairs(const __grid_constant__ LayParams p) {
    // Of pairs, [warps, held], then pairs in front; of all chunks, [held]; of those in front, [held].
    extern __shared__ uint32_t counts[];
    uint32_t* const totals = counts + kLayWarps * p.held;
    uint32_t* const fronts = totals + p.held;
    __shared__ uint32_t at[kSorted];  // place of every pair
    constexpr uint32_t kRounds = kSorted / kLayThreads;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t i = threadIdx.x; i < (kLayWarps + 2) * p.held; i += kLayThreads) counts[i] = 0;
    wait_for_previous();
    const uint32_t chunk = blockIdx.x % p.chunks, share = blockIdx.x / p.chunks, shares = gridDim.x / p.chunks;
    const uint32_t real = real_rows(p.count, p.rows), row_before = min(real, chunk * p.chunk_rows);
    const uint32_t rows = min(p.chunk_rows, real - row_before), all = rows * p.top_k;
    const uint32_t* chosen = p.chosen + row_before * p.top_k;
    // A warp has consecutive pairs, 32 a round.
    const uint32_t rounds = (all + kLayThreads - 1) / kLayThreads, begin = warp * rounds * 32 + lane;
    uint32_t expert[kRounds], rank[kRounds];
#pragma unroll
    for (uint32_t r = 0; r < kRounds; r++) {
        const uint32_t i = begin + r * 32;
        const uint32_t e = r < rounds && i < all ? chosen[i] - p.first : kElsewhere;
        expert[r] = e < p.held ? e : kElsewhere;
    }
    __syncthreads();
    if (p.chunks > 1) {
        for (uint32_t i = threadIdx.x; i < p.chunks * p.held; i += kLayThreads) {
            const uint32_t n = __ldcg(p.counts + i);
            if (n == 0) continue;
            atomicAdd(&totals[i % p.held], n);
            if (i / p.held < chunk) atomicAdd(&fronts[i % p.held], n);
        }
    }
    uint32_t* mine = counts + warp * p.held;
#pragma unroll
    for (uint32_t r = 0; r < kRounds; r++) {
        if (r >= rounds) break;
        const uint32_t same = __match_any_sync(0xffffffff, expert[r]);
        const uint32_t nearer = __popc(same & ((1u << lane) - 1));
        const bool here = expert[r] != kElsewhere;
        rank[r] = here ? mine[expert[r]] + nearer : 0;
        __syncwarp();
        if (here && nearer == 0) mine[expert[r]] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    // One expert per thread.
    uint32_t total = 0, in_front = 0;
    if (threadIdx.x < p.held) {
#pragma unroll
        for (uint32_t w = 0; w < kLayWarps; w++) {
            const uint32_t n = counts[w * p.held + threadIdx.x];
            counts[w * p.held + threadIdx.x] = total;
            total += n;
        }
        if (p.chunks > 1) total = totals[threadIdx.x], in_front = fronts[threadIdx.x];
    }
    const uint32_t my_tiles = (total + p.tile_rows - 1) / p.tile_rows;
    const Front front = front_of<kLayWarps>(total, my_tiles);
    const uint32_t start = front.pairs, tile = front.tiles;
    if (threadIdx.x < p.held) {
#pragma unroll
        for (uint32_t w = 0; w < kLayWarps; w++) counts[w * p.held + threadIdx.x] += start + in_front;
    }
    if (blockIdx.x == 0) {
        // As even as multiples of 8 are, which leave no tile empty: all but one of `tile_rows`, a multiple
        // of 8 too, would not hold what there is.
        const uint32_t height = my_tiles == 0 ? 0 : ((total + my_tiles - 1) / my_tiles + 7) / 8 * 8;
        for (uint32_t i = 0; i < my_tiles; i++) {
            const uint32_t first = i * height;
            p.tiles[tile + i] = {threadIdx.x, start + first, min(height, total - first)};
        }
        if (threadIdx.x == kLayThreads - 1) {
            p.totals[0] = tile + my_tiles;
            p.totals[1] = start + total;
        }
        for (uint32_t i = threadIdx.x; i < p.progresses; i += kLayThreads) p.progress[i] = 0;
        __threadfence();
    }
    __syncthreads();
    // Who comes next reads the tiles without waiting: they are there by now.
    allow_next();
#pragma unroll
    for (uint32_t r = 0; r < kRounds; r++) {
        const uint32_t i = begin + r * 32;
        if (r >= rounds || i >= all) break;
        const uint32_t place = expert[r] == kElsewhere ? kElsewhere : mine[expert[r]] + rank[r];
        at[i] = place;
        if (share == 0) p.places[row_before * p.top_k + i] = place;
    }
    __syncthreads();
    const uint4* x = p.x + uint64_t(row_before) * p.vectors;
    const uint32_t piece = 32 * p.at_once, parts = (p.vectors + piece - 1) / piece;
    for (uint32_t i = warp * shares + share; i < rows * parts; i += shares * kLayWarps) {
        const uint32_t row = i / parts, column = i % parts * piece + lane;
        uint4 value[kAtOnce];
#pragma unroll
        for (uint32_t v = 0; v < kAtOnce; v++) {
            if (v < p.at_once && column + 32 * v < p.vectors) value[v] = x[uint64_t(row) * p.vectors + column + 32 * v];
        }
        for (uint32_t j = 0; j < p.top_k; j++) {
            const uint32_t place = at[row * p.top_k + j];
            if (place == kElsewhere) continue;
            uint4* to = p.out + uint64_t(place) * p.vectors + column;
#pragma unroll
            for (uint32_t v = 0; v < kAtOnce; v++) {
                if (v < p.at_once && column + 32 * v < p.vectors) to[32 * v] = value[v];
            }
        }
    }
}
