// What the attention kernels share: parameters, and which lines and keys a block works on.
//
// A line is a query row of one head. The lines of a segment that share keys (all heads of a KV head)
// are numbered row by row, `group` to a row, and cut into tiles; so neither the number of heads nor
// that of rows needs to divide anything. Keys are cut into `splits` stretches of whole blocks; where
// that is one the result is written, else a partial one with its maximum and mass, to be merged.
#pragma once

#include "cuda/common.cuh"

constexpr uint32_t kBlock = 64;

struct Segment {
    uint32_t start;    // first row of the batch
    uint32_t len;      // rows
    uint32_t context;  // tokens with KV, the rows included
    uint32_t table;    // index in `tables` of its first block
};

struct Tile {
    uint32_t segment;
    uint32_t line;  // first of the segment's lines
};

struct AttentionParams {
    const void* q;          // the first q_width elements of every line
    const void* q_rest;     // the others
    const void* arena;
    void* out;
    float* partial;         // [splits, rows * heads, v_width]
    float* partial_lse;     // [splits, rows * heads, 2]: maximum and mass
    const Segment* segments;
    const Tile* tiles;
    const uint32_t* tile_count;
    const uint64_t* tables;
    uint64_t arena_elements, layer_offset;
    uint64_t q_row, q_head, rest_row, rest_head;  // strides in elements
    uint32_t rows;          // padded rows of the batch
    uint32_t heads, group;  // query heads, and how many of them share a KV head
    uint32_t q_width, rest_width, v_width;
    uint32_t kv_row;        // elements of a token in the cache
    uint32_t key_stride;    // from one KV head's keys to the next one's
    uint32_t value_offset, value_stride;
    uint32_t splits;
    uint32_t window;        // tokens seen, the newest included; 0: all
    float scale;
};

struct Work {
    Segment segment;
    uint32_t line, lines;  // of the segment, in this tile
    uint32_t begin, end;   // keys of this split, begin on a block
    bool any;
};

// The keys that row `i` of a segment sees.
__device__ __forceinline__ uint32_t seen_from(const AttentionParams& p, uint32_t position) {
    return p.window > 0 && position + 1 > p.window ? position + 1 - p.window : 0;
}

// blockIdx: tile, KV head, split.
__device__ __forceinline__ Work work_of_block(const AttentionParams& p, uint32_t tile_lines) {
    Work w = {};
    if (blockIdx.x >= *p.tile_count) return w;
    const Tile tile = p.tiles[blockIdx.x];
    w.segment = p.segments[tile.segment];
    w.line = tile.line;
    w.lines = min(tile_lines, w.segment.len * p.group - tile.line);
    const uint32_t before = w.segment.context - w.segment.len;
    const uint32_t first = before + tile.line / p.group, last = before + (tile.line + w.lines - 1) / p.group;
    const uint32_t begin = seen_from(p, first) / kBlock, end = last / kBlock + 1;
    const uint32_t per_split = (end - begin + p.splits - 1) / p.splits;
    const uint32_t from = min(begin + blockIdx.z * per_split, end), to = min(from + per_split, end);
    w.begin = from * kBlock;
    w.end = min(to * kBlock, last + 1);
    w.any = true;
    return w;
}

// Where a line's query lies, and its place among all lines.
struct Line {
    uint32_t row, head, position;
};
__device__ __forceinline__ Line line_at(const AttentionParams& p, const Work& w, uint32_t i) {
    const uint32_t line = w.line + i;
    return {w.segment.start + line / p.group, blockIdx.y * p.group + line % p.group,
            w.segment.context - w.segment.len + line / p.group};
}

// The first element of a block of the layer; the table's promise was checked when it was filled, and
// a dead entry reads the arena's beginning instead of foreign memory.
__device__ __forceinline__ uint64_t block_at(const AttentionParams& p, const Segment& s, uint32_t block) {
    const uint64_t at = p.tables[s.table + block];
    const uint64_t bytes = p.layer_offset + uint64_t(kBlock) * p.kv_row;
    return at <= p.arena_elements && bytes <= p.arena_elements - at ? at + p.layer_offset : p.layer_offset;
}
