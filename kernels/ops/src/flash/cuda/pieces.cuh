// Pieces of equal work that the keys of decoding rows are cut into on the host (cut.rs).
#pragma once
#include "cuda/tensor_map.cuh"

// Keys of one row, for the query heads of a line. Block b begins with piece b; the others of a block
// follow each other.
struct alignas(16) Piece {
    uint64_t at[2];    // element offsets of the first two cache blocks; 0 for one that is not needed
    uint32_t row;      // of the batch
    uint32_t table;    // index in `tables` of the sequence's first block
    uint32_t begin;    // first key; a multiple of 16
    uint32_t end;      // past the last key; nothing where that is not above `begin`
    uint32_t settled;  // keys below are older than this step
    uint32_t slot;     // of the partial result; kWhole: the result itself
    uint32_t next;     // index of the block's next piece; 0: none
    uint32_t head;     // first of its query heads
    uint32_t first;    // slot of the row's first piece
    uint32_t count;    // pieces of the row
    uint32_t lines;    // query heads
    uint32_t kv_head;  // whose keys these are
};
constexpr uint32_t kWhole = 0xffffffff;
