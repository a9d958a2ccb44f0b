// Keys of latent attention as the copy engine brings them: boxes of 16, lines of 64 elements swizzled.
#pragma once
#include "cuda/async.cuh"
#include "cuda/tensor_map.cuh"

namespace mla {

constexpr int kLatent = 512;
constexpr int kRope = 64;
constexpr int kWidth = kLatent + kRope;
constexpr uint32_t kTokens = 64;  // of a cache block
constexpr int kBox = 16;          // keys of one copy
constexpr int kLine = 64;         // elements that are swizzled together

// The element offset of a cache block; that of the first where it would not lie inside.
__device__ __forceinline__ uint64_t inside(uint64_t block, uint64_t layer_offset, uint64_t elements) {
    const uint64_t end = layer_offset + uint64_t(kTokens) * kWidth;
    return block > elements || end > elements - block ? 0 : block;
}

// Address of 16 bytes of a key; boxes follow each other from `base` on.
__device__ __forceinline__ uint32_t key_unit(uint32_t base, int key, int group, int unit) {
    return base + key * (kWidth * 2) + group * 128 + ((unit ^ (key + group)) & 7) * 16;
}

}  // namespace mla
