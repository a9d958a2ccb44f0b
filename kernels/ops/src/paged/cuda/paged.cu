// Rows into the paged cache, and whole blocks copied and zeroed. A table entry outside of the arena
// (a block that was given up) is passed over: wrong values at worst, never foreign memory.
#include "cuda/common.cuh"

constexpr uint32_t kBlock = 64;

struct WriteKvParams {
    const void* rows_in;
    void* arena;
    const uint32_t* positions;   // of each row
    const uint32_t* row_tables;  // index in `tables` of the first block of the row's sequence
    const uint64_t* tables;      // element offsets of blocks
    const uint32_t* count;
    uint64_t arena_elements, layer_offset, stride;  // from row to row of `rows_in`
    uint32_t rows, width;
};

template <typename T, int N> __device__ void write_row(const WriteKvParams& p, uint32_t row) {
    using V = Vec<T, N>;
    const uint32_t position = p.positions[row];
    const uint64_t block = p.tables[p.row_tables[row] + position / kBlock];
    const uint64_t at = p.layer_offset + uint64_t(position % kBlock) * p.width;
    if (block > p.arena_elements || at + p.width > p.arena_elements - block) return;
    const V* from = reinterpret_cast<const V*>(static_cast<const T*>(p.rows_in) + row * p.stride);
    V* to = reinterpret_cast<V*>(static_cast<T*>(p.arena) + block + at);
    for (uint32_t i = threadIdx.x; i < p.width / N; i += blockDim.x) to[i] = from[i];
}

template <typename T> __device__ void write_kv(const WriteKvParams& p) {
    const uint32_t row = blockIdx.x;
    if (row >= real_rows(p.count, p.rows)) return;
    const uint64_t block = p.tables[p.row_tables[row] + p.positions[row] / kBlock];
    const bool wide = p.width % kWide<T> == 0 && p.stride % kWide<T> == 0 && p.layer_offset % kWide<T> == 0 && block % kWide<T> == 0 &&
                      aligned16(p.rows_in) && aligned16(p.arena);
    if (wide) {
        write_row<T, kWide<T>>(p, row);
    } else {
        write_row<T, 1>(p, row);
    }
}

extern "C" __global__ void __launch_bounds__(128) write_kv_f32(const __grid_constant__ WriteKvParams p) {
    write_kv<float>(p);
}
extern "C" __global__ void __launch_bounds__(128) write_kv_bf16(const __grid_constant__ WriteKvParams p) {
    write_kv<bf16>(p);
}

struct BlocksParams {
    uint8_t* arena;
    const uint64_t* from;  // element offsets; null to zero
    const uint64_t* to;
    const uint32_t* count;
    uint64_t arena_bytes;
    uint64_t block_bytes;  // a multiple of 16
    uint32_t blocks, element_bytes;
};

extern "C" __global__ void __launch_bounds__(256) move_blocks(const __grid_constant__ BlocksParams p) {
    if (blockIdx.y >= real_rows(p.count, p.blocks)) return;
    const uint64_t last = p.arena_bytes - p.block_bytes;
    const uint64_t to = p.to[blockIdx.y] * p.element_bytes;
    const uint64_t from = p.from == nullptr ? 0 : p.from[blockIdx.y] * p.element_bytes;
    if (to > last || from > last) return;
    uint4* target = reinterpret_cast<uint4*>(p.arena + to);
    const uint4* source = reinterpret_cast<const uint4*>(p.arena + from);
    const uint64_t vectors = p.block_bytes / 16, step = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < vectors; i += step) {
        target[i] = p.from == nullptr ? make_uint4(0, 0, 0, 0) : source[i];
    }
}
