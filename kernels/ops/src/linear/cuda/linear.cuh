// What the products `out = x W^T + b` share: parameters, and which rows a block works on.
//
// Two ways to give rows. Plain: rows 0.. of `x`, `batch` times with strides (attention projects head
// by head so). Grouped: tiles of rows that share an expert, whose rows of `x` may be gathered. All
// numbers of rows are read on the device.
#pragma once

#include "cuda/common.cuh"

struct RowTile {
    uint32_t expert;
    uint32_t start;  // first sorted pair
    uint32_t rows;
};

struct LinearParams {
    const void* x;
    const void* w;            // [n, k] for each batch item or expert
    const float* bias;        // [n], or null
    void* out;
    const uint32_t* count;    // plain: real rows. grouped: real tiles
    const RowTile* tiles;     // null: plain
    const uint32_t* gather;   // grouped: sorted pair to pair; row of x is pair / gather_by. null: the pair
    uint64_t x_stride, out_stride;           // elements from row to row
    uint64_t x_batch, w_batch, out_batch;    // elements from one batch item (or expert, for w) to the next
    uint32_t rows, n, k, gather_by;
};

// The rows of one block.
struct Rows {
    uint32_t start;  // in the output, and in x where nothing is gathered
    uint32_t count;  // 0: nothing to do
    uint64_t expert;
};

__device__ __forceinline__ Rows rows_of_block(const LinearParams& p, uint32_t tile, uint32_t tile_rows) {
    if (p.tiles != nullptr) {
        if (tile >= *p.count) return {0, 0, 0};
        const RowTile t = p.tiles[tile];
        return {t.start, t.rows, t.expert};
    }
    const uint32_t start = tile * tile_rows, all = real_rows(p.count, p.rows);
    return {start, start < all ? min(tile_rows, all - start) : 0, blockIdx.z};
}

// Row `i` of the block's rows, in x.
__device__ __forceinline__ uint64_t x_row(const LinearParams& p, const Rows& rows, uint32_t i) {
    const uint32_t row = rows.start + i;
    return p.gather == nullptr ? row : p.gather[row] / p.gather_by;
}
