// Rows of weights in runs that lie next to each other in memory and in shared memory too, which
// multiprocessors that are dealt tiles next to each other read faster than row by row. Two rows that are
// read at once may lie in the same banks then, which costs less than telling odd rows from even ones. With
// the warps, barriers and tiles of linear/cuda/stream.cuh.
#pragma once
#include "linear/cuda/stream.cuh"

namespace runs {

using stream::kTile;
using stream::kWarps;
using stream::Shared;

// How the ring lies in shared memory, as the host found it fits. After the rows of weights of a stage
// come those of tokens, where they come with every stage.
struct Ring {
    uint32_t stages, stage_bytes;
    uint32_t step;       // columns of a stage
    uint32_t pitch;      // bytes from row to row of weights: as in memory where a stage has whole rows
    uint32_t x_pitch;    // from token to token: an odd number of half banks
    uint32_t under_way;  // stages of weights at once, early
};

// Up to eight rows of weights that are multiplied by the same tokens, in two runs of rows that lie next
// to each other; the other one's place among the rows of a stage is `second`.
struct Rows {
    const bf16 *w, *other;
    uint32_t count, others, second, columns;
    __device__ uint32_t all() const { return count + others; }
    // Asks for some columns of them, by a warp: runs as a whole where rows are.
    __device__ __forceinline__ void ask(const Ring& ring, uint32_t to, uint32_t column, uint32_t step, uint32_t bar) const {
        const uint32_t lane = threadIdx.x % 32;
        const bool whole = ring.pitch == 2 * columns, behind = whole ? lane == 1 : lane >= second;
        const uint32_t row = whole ? 0 : behind ? lane - second : lane, of = behind ? others : count;
        if (lane < (whole ? 2 : kTile) && row < of) {
            const uint32_t place = (behind ? second : 0) + row;
            bulk_load(to + place * ring.pitch, (behind ? other : w) + uint64_t(row) * columns + column, whole ? of * ring.pitch : step * 2, bar);
        }
        __syncwarp();
    }
};

// Sums of the warps that multiply, in their order: calls `finish(token, row, sum)` on two warps at a time,
// in turn.
template <class Finish> __device__ __forceinline__ void gather(Shared& s, uint32_t round, const float (&total)[2], Finish finish) {
    const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    *reinterpret_cast<float2*>(&s.sums[round % 2][warp][g][t * 2]) = {total[0], total[1]};
    stream::multipliers_meet();
    if (warp / 2 != round % (kWarps / 2)) return;
    const uint32_t token = threadIdx.x % 64 / kTile, row = threadIdx.x % kTile;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += s.sums[round % 2][w][token][row];
    finish(token, row, sum);
}

}  // namespace runs
