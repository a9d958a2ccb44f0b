// Token ids to rows of a table; ids outside of the part held here give zeros.
#include "cuda/common.cuh"

struct EmbedParams {
    const uint32_t* ids;
    const void* table;
    void* out;
    const uint32_t* count;
    uint32_t rows, width, table_rows, first_row;
};

template <typename T, int N> __device__ void embed_row(const EmbedParams& p, uint32_t row) {
    using V = Vec<T, N>;
    const uint32_t index = p.ids[row] - p.first_row;
    const uint32_t vectors = p.width / N;
    const V* from = static_cast<const V*>(p.table) + uint64_t(index) * vectors;
    V* to = static_cast<V*>(p.out) + uint64_t(row) * vectors;
    for (uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        V value;
        if (index < p.table_rows) {
            value = from[i];
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j) value.at[j] = narrow<T>(0.0f);
        }
        to[i] = value;
    }
}

template <typename T> __device__ void embed(const EmbedParams& p) {
    const uint32_t row = blockIdx.x;
    if (row >= real_rows(p.count, p.rows)) return;
    if (p.width % kWide<T> == 0 && aligned16(p.table) && aligned16(p.out)) {
        embed_row<T, kWide<T>>(p, row);
    } else {
        embed_row<T, 1>(p, row);
    }
}

extern "C" __global__ void __launch_bounds__(256) embed_f32(const __grid_constant__ EmbedParams p) {
    embed<float>(p);
}
extern "C" __global__ void __launch_bounds__(256) embed_bf16(const __grid_constant__ EmbedParams p) {
    embed<bf16>(p);
}
