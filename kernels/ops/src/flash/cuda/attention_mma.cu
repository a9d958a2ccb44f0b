// Attention on the tensor cores for bf16, with widths that are multiples of 16.
//
// A block takes a tile of lines through its keys, 64 at a time, two stages of copies in flight.
// Scores: the warps share the 64 keys. Softmax: the warps share the lines. Sums: the warps share the
// columns of the values. Where values lie inside keys (a latent cache) they are loaded once. The
// cache's rows, layers and blocks begin on 16 bytes.
#include "cuda/mma.cuh"
#include "flash/cuda/attention.cuh"

constexpr uint32_t kPad = 8;                // elements, so that rows fall into different banks
constexpr uint32_t kScoreRow = kBlock + 4;  // floats
constexpr uint32_t kWeightRow = kBlock + kPad;
constexpr float kLog2e = 1.4426950408889634f;

// `M` 16-line tiles, `Warps` warps of `N` 8-column tiles of the values each.
template <int M, int Warps, int N> __device__ void attention_mma(const AttentionParams& p) {
    extern __shared__ __align__(128) uint8_t memory[];
    constexpr uint32_t kLines = M * 16, kThreads = Warps * 32;
    const Work w = work_of_block(p, kLines);
    if (!w.any) return;
    const uint32_t key_width = p.q_width + p.rest_width, key_row = key_width + kPad;
    const bool shared_values = p.value_offset == 0;
    const uint32_t value_row = shared_values ? key_row : p.v_width + kPad;
    bf16* q = reinterpret_cast<bf16*>(memory);
    bf16* keys = q + kLines * key_row;
    bf16* values = shared_values ? keys : keys + 2 * kBlock * key_row;
    const uint32_t key_stage = kBlock * key_row, value_stage = kBlock * value_row;
    float* scores = reinterpret_cast<float*>(values + 2 * value_stage);
    bf16* weights = reinterpret_cast<bf16*>(scores + kLines * kScoreRow);
    float* maxima = reinterpret_cast<float*>(weights + kLines * kWeightRow);
    float* masses = maxima + kLines;
    float* factors = masses + kLines;

    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t blocks = w.end > w.begin ? (w.end - w.begin + kBlock - 1) / kBlock : 0;
    auto fetch = [&](uint32_t i) {
        const uint32_t base = w.begin + i * kBlock;
        const bf16* rows = static_cast<const bf16*>(p.arena) + block_at(p, w.segment, base / kBlock);
        const bf16* from = rows + blockIdx.y * p.key_stride;
        const uint32_t to = shared_address(keys + i % 2 * key_stage), pieces = key_width / 8;
        for (uint32_t item = threadIdx.x; item < kBlock * pieces; item += kThreads) {
            const uint32_t key = item / pieces, piece = item % pieces;
            copy_async(to + (key * key_row + piece * 8) * 2, from + uint64_t(key) * p.kv_row + piece * 8, base + key < w.end);
        }
        if (shared_values) return;
        const bf16* from_v = rows + p.value_offset + blockIdx.y * p.value_stride;
        const uint32_t to_v = shared_address(values + i % 2 * value_stage), pieces_v = p.v_width / 8;
        for (uint32_t item = threadIdx.x; item < kBlock * pieces_v; item += kThreads) {
            const uint32_t key = item / pieces_v, piece = item % pieces_v;
            copy_async(to_v + (key * value_row + piece * 8) * 2, from_v + uint64_t(key) * p.kv_row + piece * 8, base + key < w.end);
        }
    };
    if (blocks > 0) fetch(0);
    commit_copies();

    // Queries; lines that do not exist are zero.
    for (uint32_t i = warp; i < kLines; i += Warps) {
        const Line line = line_at(p, w, min(i, w.lines - 1));
        const bf16* first = static_cast<const bf16*>(p.q) + line.row * p.q_row + line.head * p.q_head;
        const bf16* rest = static_cast<const bf16*>(p.q_rest) + line.row * p.rest_row + line.head * p.rest_head;
        for (uint32_t d = lane * 2; d < key_width; d += 64) {
            const bf16* from = d < p.q_width ? first + d : rest + (d - p.q_width);
            *reinterpret_cast<uint32_t*>(q + i * key_row + d) = i < w.lines ? *reinterpret_cast<const uint32_t*>(from) : 0;
        }
    }
    for (uint32_t i = threadIdx.x; i < kLines; i += kThreads) {
        maxima[i] = -INFINITY;
        masses[i] = 0.0f;
    }

    const uint32_t q_address = shared_address(q), weight_address = shared_address(weights);
    const uint32_t column0 = warp * N * 8;
    float sums[M][N][4] = {};
    for (uint32_t block = 0; block < blocks; ++block) {
        if (block + 1 < blocks) fetch(block + 1);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        const uint32_t base = w.begin + block * kBlock;

        // Scores of this warp's keys: 16 of them with four warps, 8 with eight.
        {
            constexpr int kTiles = 8 / Warps;
            const uint32_t key0 = warp * kTiles * 8;
            const uint32_t stage = shared_address(keys + block % 2 * key_stage);
            float s[M][kTiles][4] = {};
            // A matrix load brings 32 elements of 8 keys, or 16 of 16 keys.
            constexpr uint32_t kStep = kTiles == 1 ? 32 : 16;
            const uint32_t b_row = kTiles == 1 ? lane % 8 : lane / 16 * 8 + lane % 8;
            const uint32_t b_column = kTiles == 1 ? lane / 8 * 8 : lane / 8 % 2 * 8;
            for (uint32_t k = 0; k < key_width; k += kStep) {
                uint32_t b[4];
                load_matrix(b, stage + ((key0 + b_row) * key_row + k + b_column) * 2);
#pragma unroll
                for (int half = 0; half < (kTiles == 1 ? 2 : 1); ++half) {
                    if (k + half * 16 >= key_width) break;
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        uint32_t a[4];
                        load_matrix(a, q_address + ((m * 16 + lane % 16) * key_row + k + half * 16 + lane / 16 * 8) * 2);
#pragma unroll
                        for (int j = 0; j < kTiles; ++j)
                            mma_16816(s[m][j], a[0], a[1], a[2], a[3], b[half * 2 + j * 2], b[half * 2 + j * 2 + 1]);
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int j = 0; j < kTiles; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        scores[(m * 16 + lane / 4 + e / 2 * 8) * kScoreRow + key0 + j * 8 + lane % 4 * 2 + e % 2] = s[m][j][e];
        }
        __syncthreads();

        // Each warp its lines: new maximum, weights, and what the old sums shrink by.
        for (uint32_t i = warp; i < kLines; i += Warps) {
            const uint32_t position = i < w.lines ? line_at(p, w, i).position : 0;
            const uint32_t from = seen_from(p, position);
            float x[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t key = base + lane * 2 + h;
                const bool seen = i < w.lines && key <= position && key >= from && key < w.end;
                x[h] = seen ? scores[i * kScoreRow + lane * 2 + h] * p.scale : -INFINITY;
            }
            const float old = maxima[i];
            const float top = fmaxf(warp_max(fmaxf(x[0], x[1])), old);
            const float shift = top == -INFINITY ? 0.0f : top;
            const float w0 = exp2f((x[0] - shift) * kLog2e), w1 = exp2f((x[1] - shift) * kLog2e);
            const float mass = warp_sum(w0 + w1), factor = exp2f((old - shift) * kLog2e);
            *reinterpret_cast<uint32_t*>(weights + i * kWeightRow + lane * 2) = pack_bf16(w0, w1);
            // All lanes have read the old maximum.
            __syncwarp();
            if (lane == 0) {
                factors[i] = factor;
                masses[i] = masses[i] * factor + mass;
                maxima[i] = top;
            }
        }
        __syncthreads();

        // Sums of this warp's columns.
        if (column0 < p.v_width) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const float low = factors[m * 16 + lane / 4], high = factors[m * 16 + lane / 4 + 8];
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    sums[m][j][0] *= low;
                    sums[m][j][1] *= low;
                    sums[m][j][2] *= high;
                    sums[m][j][3] *= high;
                }
            }
            const uint32_t stage = shared_address(values + block % 2 * value_stage);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                uint32_t a[M][4];
#pragma unroll
                for (int m = 0; m < M; ++m)
                    load_matrix(a[m], weight_address + ((m * 16 + lane % 16) * kWeightRow + k * 16 + lane / 16 * 8) * 2);
#pragma unroll
                for (int j = 0; j < N; j += 2) {
                    const uint32_t column = column0 + j * 8;
                    if (column >= p.v_width) break;
                    uint32_t b[4];
                    load_matrix_transposed(b, stage + ((k * 16 + lane % 16) * value_row + column + lane / 16 * 8) * 2);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        mma_16816(sums[m][j], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                        mma_16816(sums[m][j + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
                    }
                }
            }
        }
        __syncthreads();
    }
    wait_copies<0>();
    __syncthreads();

    const uint64_t all = uint64_t(p.rows) * p.heads;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t i = m * 16 + lane / 4 + half * 8;
            if (i >= w.lines) continue;
            const Line line = line_at(p, w, i);
            const uint64_t at = uint64_t(line.row) * p.heads + line.head;
            const float mass = masses[i];
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const uint32_t column = column0 + j * 8 + lane % 4 * 2;
                if (column >= p.v_width) break;
                const float x = sums[m][j][half * 2], y = sums[m][j][half * 2 + 1];
                if (p.splits == 1) {
                    bf16* out = static_cast<bf16*>(p.out) + at * p.v_width + column;
                    *reinterpret_cast<uint32_t*>(out) = pack_bf16(x / mass, y / mass);
                } else {
                    float* out = p.partial + (blockIdx.z * all + at) * p.v_width + column;
                    *reinterpret_cast<float2*>(out) = make_float2(x, y);
                }
            }
            if (p.splits > 1 && warp == 0 && lane % 4 == 0) {
                p.partial_lse[(blockIdx.z * all + at) * 2] = maxima[i];
                p.partial_lse[(blockIdx.z * all + at) * 2 + 1] = mass;
            }
        }
}

// Named by lines of a tile and the widest values.
#define ATTENTION(name, M, Warps, N)                                                                             \
    extern "C" __global__ void __launch_bounds__(Warps * 32) name(const __grid_constant__ AttentionParams p) {   \
        attention_mma<M, Warps, N>(p);                                                                           \
    }
ATTENTION(attention_mma_16_64, 1, 4, 2)
ATTENTION(attention_mma_16_128, 1, 4, 4)
ATTENTION(attention_mma_16_256, 1, 4, 8)
ATTENTION(attention_mma_16_512, 1, 4, 16)
ATTENTION(attention_mma_64_128, 4, 8, 2)
ATTENTION(attention_mma_64_256, 4, 8, 4)
ATTENTION(attention_mma_32_512, 2, 8, 8)
