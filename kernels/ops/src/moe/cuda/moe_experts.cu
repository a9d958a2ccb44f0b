// Around the products of experts: pairs of (token, choice) sorted by expert before, the weighted sum
// after. Everything stays on the device. Which place a pair gets inside its expert is left to chance;
// no result depends on it, since the products treat rows alike and the sum runs by choice.
#include "cuda/async.cuh"
#include "linear/cuda/linear.cuh"
#include "moe/cuda/front.cuh"

struct GroupParams {
    const uint32_t* chosen;   // [rows, top_k]
    const uint32_t* count;
    uint32_t* pairs;          // sorted place to pair
    uint32_t* places;         // pair to sorted place; all ones where the expert lives elsewhere
    RowTile* tiles;
    uint32_t* totals;         // tiles, pairs
    uint32_t rows, top_k, first, held, tile_rows;
};

// One block; `held` counters and as many cursors in shared memory.
extern "C" __global__ void __launch_bounds__(1024) group_pairs(const __grid_constant__ GroupParams p) {
    extern __shared__ uint32_t counters[];
    uint32_t* cursors = counters + p.held;
    const uint32_t all = real_rows(p.count, p.rows) * p.top_k;
    for (uint32_t e = threadIdx.x; e < p.held; e += blockDim.x) counters[e] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < all; i += blockDim.x) {
        const uint32_t e = p.chosen[i] - p.first;
        if (e < p.held) atomicAdd(&counters[e], 1);
    }
    __syncthreads();
    // One expert per thread; there are at most 1024.
    const uint32_t mine = threadIdx.x < p.held ? counters[threadIdx.x] : 0;
    const uint32_t my_tiles = (mine + p.tile_rows - 1) / p.tile_rows;
    const Front front = front_of<32>(mine, my_tiles);
    const uint32_t start = front.pairs, tile = front.tiles;
    if (threadIdx.x < p.held) cursors[threadIdx.x] = start;
    for (uint32_t i = 0; i < my_tiles; ++i) {
        const uint32_t first = i * p.tile_rows;
        p.tiles[tile + i] = {threadIdx.x, start + first, min(p.tile_rows, mine - first)};
    }
    if (threadIdx.x == blockDim.x - 1) {
        p.totals[0] = tile + my_tiles;
        p.totals[1] = start + mine;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < all; i += blockDim.x) {
        const uint32_t e = p.chosen[i] - p.first;
        const uint32_t place = e < p.held ? atomicAdd(&cursors[e], 1) : 0xffffffff;
        p.places[i] = place;
        if (e < p.held) p.pairs[place] = i;
    }
}

struct CombineParams {
    const void* y;            // [pairs, width], sorted
    const uint32_t* places;   // [rows, top_k]
    const float* weights;     // [rows, top_k]
    void* out;                // [rows, width]
    const void* beside;       // [rows, width] that is added, or null
    void* residual;           // [rows, width]; null where the sum itself is wanted, not the norm
    const float* norm;        // [width]
    const uint32_t* count;
    uint32_t rows, top_k, width;
    float eps;
};

constexpr uint32_t kChoices = 8;  // reads under way

// Columns `i * N ..` of a row's sum over experts, as stored.
template <typename T, int N> __device__ Vec<T, N> chosen_sum(const CombineParams& p, uint32_t row, uint32_t i) {
    using V = Vec<T, N>;
    const V* y = static_cast<const V*>(p.y);
    const uint32_t vectors = p.width / N;
    float sums[N] = {};
    for (uint32_t first = 0; first < p.top_k; first += kChoices) {
        V value[kChoices];
        float weight[kChoices];
        bool there[kChoices];
#pragma unroll
        for (uint32_t j = 0; j < kChoices; ++j) {
            const uint32_t at = row * p.top_k + min(first + j, p.top_k - 1), place = p.places[at];
            there[j] = first + j < p.top_k && place != 0xffffffff;
            weight[j] = p.weights[at];
            if (there[j]) value[j] = y[uint64_t(place) * vectors + i];
        }
#pragma unroll
        for (uint32_t j = 0; j < kChoices; ++j) {
            if (!there[j]) continue;
#pragma unroll
            for (int e = 0; e < N; ++e) sums[e] += weight[j] * widen(value[j].at[e]);
        }
    }
    V result;
#pragma unroll
    for (int e = 0; e < N; ++e) result.at[e] = narrow<T>(sums[e]);
    return result;
}

template <typename T, int N> __device__ void add_to(Vec<T, N>& value, const void* from, uint64_t at) {
    const Vec<T, N> other = static_cast<const Vec<T, N>*>(from)[at];
#pragma unroll
    for (int e = 0; e < N; ++e) value.at[e] = narrow<T>(widen(other.at[e]) + widen(value.at[e]));
}

template <typename T, int N> __device__ void combine_row(const CombineParams& p, uint32_t row) {
    const uint32_t vectors = p.width / N;
    Vec<T, N>* out = static_cast<Vec<T, N>*>(p.out) + uint64_t(row) * vectors;
    for (uint32_t i = blockIdx.y * blockDim.x + threadIdx.x; i < vectors; i += gridDim.y * blockDim.x) {
        out[i] = chosen_sum<T, N>(p, row, i);
    }
}

// One block. Sums are rounded where ops one by one store them.
template <typename T, int N> __device__ void combine_norm_row(const CombineParams& p, uint32_t row) {
    using V = Vec<T, N>;
    const uint32_t vectors = p.width / N;
    const uint64_t begin = uint64_t(row) * vectors;
    V* residual = static_cast<V*>(p.residual) + begin;
    V* out = static_cast<V*>(p.out) + begin;
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        V value = chosen_sum<T, N>(p, row, i);
        if (p.beside != nullptr) add_to<T, N>(value, p.beside, begin + i);
        add_to<T, N>(value, p.residual, begin + i);
        residual[i] = value;
#pragma unroll
        for (int e = 0; e < N; ++e) squares += widen(value.at[e]) * widen(value.at[e]);
    }
    const float scale = rsqrtf(block_sum(squares) / p.width + p.eps);
    // Each thread reads back what it wrote itself.
    for (uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
        V value = residual[i];
#pragma unroll
        for (int e = 0; e < N; ++e) value.at[e] = narrow<T>(widen(value.at[e]) * scale * p.norm[i * N + e]);
        out[i] = value;
    }
}

// As `combine_norm_row`, to the bit, for rows of a vector a thread and up to `kChoices` choices: everything
// is asked for at once, and nothing is read back.
__device__ __forceinline__ void combine_norm_short_row(const CombineParams& p, uint32_t row) {
    using V = Vec<bf16, 8>;
    const uint32_t vectors = p.width / 8, i = threadIdx.x;
    const uint64_t at = uint64_t(row) * vectors + i;
    const bool there = i < vectors;
    V value;
    float squares = 0.0f;
    if (there) {
        uint32_t place[kChoices];
        float weight[kChoices];
#pragma unroll
        for (uint32_t j = 0; j < kChoices; ++j) {
            const uint32_t choice = row * p.top_k + min(j, p.top_k - 1);
            place[j] = j < p.top_k ? p.places[choice] : 0xffffffff;
            weight[j] = p.weights[choice];
        }
        const V left = static_cast<const V*>(p.residual)[at];
        V other, of_choice[kChoices];
        if (p.beside != nullptr) other = static_cast<const V*>(p.beside)[at];
#pragma unroll
        for (uint32_t j = 0; j < kChoices; ++j) {
            if (place[j] != 0xffffffff) of_choice[j] = static_cast<const V*>(p.y)[uint64_t(place[j]) * vectors + i];
        }
        float sums[8] = {};
#pragma unroll
        for (uint32_t j = 0; j < kChoices; ++j) {
            if (place[j] == 0xffffffff) continue;
#pragma unroll
            for (int e = 0; e < 8; ++e) sums[e] += weight[j] * widen(of_choice[j].at[e]);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            value.at[e] = narrow<bf16>(sums[e]);
            if (p.beside != nullptr) value.at[e] = narrow<bf16>(widen(other.at[e]) + widen(value.at[e]));
            value.at[e] = narrow<bf16>(widen(left.at[e]) + widen(value.at[e]));
            squares += widen(value.at[e]) * widen(value.at[e]);
        }
        static_cast<V*>(p.residual)[at] = value;
    }
    const float scale = rsqrtf(block_sum(squares) / p.width + p.eps);
    if (!there) return;
#pragma unroll
    for (int e = 0; e < 8; ++e) value.at[e] = narrow<bf16>(widen(value.at[e]) * scale * p.norm[i * 8 + e]);
    static_cast<V*>(p.out)[at] = value;
}

template <typename T> __device__ void combine(const CombineParams& p) {
    wait_for_previous();
    allow_next();
    const uint32_t row = blockIdx.x;
    if (row >= real_rows(p.count, p.rows)) return;
    if (p.width % kWide<T> == 0 && aligned16(p.y) && aligned16(p.out)) {
        combine_row<T, kWide<T>>(p, row);
    } else {
        combine_row<T, 1>(p, row);
    }
}

template <typename T> __device__ void combine_norm(const CombineParams& p) {
    wait_for_previous();
    allow_next();
    const uint32_t row = blockIdx.x;
    if (row >= real_rows(p.count, p.rows)) return;
    if (p.width % kWide<T> == 0 && aligned16(p.y) && aligned16(p.out) && aligned16(p.beside) && aligned16(p.residual)) {
        combine_norm_row<T, kWide<T>>(p, row);
    } else {
        combine_norm_row<T, 1>(p, row);
    }
}

extern "C" __global__ void __launch_bounds__(256) combine_f32(const __grid_constant__ CombineParams p) {
    combine<float>(p);
}
extern "C" __global__ void __launch_bounds__(256) combine_bf16(const __grid_constant__ CombineParams p) {
    combine<bf16>(p);
}
extern "C" __global__ void __launch_bounds__(256) combine_norm_f32(const __grid_constant__ CombineParams p) {
    combine_norm<float>(p);
}
extern "C" __global__ void __launch_bounds__(256) combine_norm_bf16(const __grid_constant__ CombineParams p) {
    combine_norm<bf16>(p);
}
// Of short aligned rows, by a kernel of its own: with fewer registers more blocks read at once.
extern "C" __global__ void __launch_bounds__(256, 4) combine_norm_short(const __grid_constant__ CombineParams p) {
    wait_for_previous();
    allow_next();
    if (blockIdx.x < real_rows(p.count, p.rows)) combine_norm_short_row(p, blockIdx.x);
}
