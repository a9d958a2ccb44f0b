// Latents of sequences out of the cache, one after the other, as products take them.
#include "cuda/async.cuh"

namespace mla_latents {

struct Segment {
    uint32_t start, len;
    uint32_t context;  // tokens
    uint32_t row;      // where the first one goes
};
// Segments of a pass, whose rows lie one behind the other from 0 on.
struct Pass {
    uint32_t segments, segments_end;
    uint32_t tiles, tile_count;
};
struct Params {
    const bf16* arena;
    bf16* out;                // [rows, kWidth]
    const Pass* pass;
    const Segment* segments;  // of all passes
    const uint32_t* firsts;   // of each segment, the index in `tables` of its first block
    const uint64_t* tables;   // element offsets of blocks
    uint64_t arena_elements, layer_offset;
};

constexpr uint32_t kBlock = 64, kWidth = 576, kUnits = kWidth / 8;
constexpr uint32_t kRows = 16, kThreads = 288;  // of a block of threads: four units a thread, all at once

// Tokens that lie one behind the other, there and here.
__device__ __forceinline__ void copy(const bf16* source, bf16* target, uint32_t tokens) {
    const uint4* from = reinterpret_cast<const uint4*>(source);
    uint4* to = reinterpret_cast<uint4*>(target);
    const uint32_t units = tokens * kUnits;
    constexpr int kAtOnce = kRows * kUnits / kThreads;
    for (uint32_t i = threadIdx.x; i < units; i += kAtOnce * kThreads) {
        uint4 v[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            if (i + j * kThreads < units) v[j] = from[i + j * kThreads];
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            if (i + j * kThreads < units) to[i + j * kThreads] = v[j];
        }
    }
}

}  // namespace mla_latents

// By rows of the result: how many there are, the device alone knows.
extern "C" __global__ void __launch_bounds__(mla_latents::kThreads) mla_gather(const __grid_constant__ mla_latents::Params p) {
    using namespace mla_latents;
    wait_for_previous();
    allow_next();
    const Pass pass = *p.pass;
    uint32_t row = blockIdx.x * kRows;
    const uint32_t end = row + kRows;
    // The last segment that begins at the first row or in front of it.
    uint32_t at = pass.segments, above = pass.segments_end;
    while (at + 1 < above) {
        const uint32_t middle = (at + above) / 2;
        if (p.segments[middle].row <= row) at = middle; else above = middle;
    }
    for (; at < pass.segments_end && row < end; at++) {
        const Segment s = p.segments[at];
        const uint32_t last = min(end, s.row + s.context);
        while (row < last) {
            const uint32_t token = row - s.row, tokens = min(last - row, kBlock - token % kBlock);
            uint64_t block = p.tables[p.firsts[at] + token / kBlock];
            // A dead entry reads the arena's beginning instead of foreign memory.
            const uint64_t bytes = p.layer_offset + uint64_t(kBlock) * kWidth;
            if (block > p.arena_elements || bytes > p.arena_elements - block) block = 0;
            const bf16* from = p.arena + block + p.layer_offset + uint64_t(token % kBlock) * kWidth;
            copy(from, p.out + uint64_t(row) * kWidth, tokens);
            row += tokens;
        }
    }
}
