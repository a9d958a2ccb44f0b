// Latents of sequences out of the cache, one after the other, as products take them.
#include "cuda/async.cuh"

namespace mla_latents {

struct Segment {
    uint32_t start, len;
    uint32_t context;  // tokens
    uint32_t row;      // where the first one goes
};
struct Params {
    const bf16* arena;
    bf16* out;                // [rows, kWidth]
    const Segment* segments;
    const uint32_t* firsts;   // of each segment, the index in `tables` of its first block
    const uint64_t* tables;   // element offsets of blocks
    uint64_t arena_elements, layer_offset;
};

constexpr uint32_t kBlock = 64, kWidth = 576, kUnits = kWidth / 8, kThreads = 256;

}  // namespace mla_latents

// By block of the cache and segment. Tokens of a block lie one behind the other, there and here.
extern "C" __global__ void __launch_bounds__(mla_latents::kThreads) mla_gather(const __grid_constant__ mla_latents::Params p) {
    using namespace mla_latents;
    wait_for_previous();
    allow_next();
    const Segment s = p.segments[blockIdx.y];
    const uint32_t first = blockIdx.x * kBlock;
    if (first >= s.context) return;
    uint64_t at = p.tables[p.firsts[blockIdx.y] + blockIdx.x];
    // A dead entry reads the arena's beginning instead of foreign memory.
    const uint64_t bytes = p.layer_offset + uint64_t(kBlock) * kWidth;
    if (at > p.arena_elements || bytes > p.arena_elements - at) at = 0;
    const uint4* from = reinterpret_cast<const uint4*>(p.arena + at + p.layer_offset);
    uint4* to = reinterpret_cast<uint4*>(p.out + uint64_t(s.row + first) * kWidth);
    const uint32_t units = min(kBlock, s.context - first) * kUnits;
    constexpr int kAtOnce = 6;
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
