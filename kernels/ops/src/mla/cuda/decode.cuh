// What kernels of latent attention over pieces of the keys are given, as decode.rs fills it.
#pragma once
#include "flash/cuda/pieces.cuh"
#include "mla/cuda/keys.cuh"

namespace mla {

struct DecodeParams {
    TensorMap cache;      // as each kernel reads it: boxes of 16 keys, or whole cache blocks by column
    const bf16* q;        // latent part of every line
    const bf16* q_rest;   // rotated part
    bf16* out;            // [rows, heads, 512]
    float* partial;       // [slots, 16, 512]
    float2* partial_lse;  // [slots, 16]: maximum (base 2), mass
    const Piece* pieces;
    const uint64_t* tables;
    uint64_t arena_elements, layer_offset;
    uint64_t q_row, q_head, rest_row, rest_head;
    uint32_t heads;
    float scale;
};

}  // namespace mla
