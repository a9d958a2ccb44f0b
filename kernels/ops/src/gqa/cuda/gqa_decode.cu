// Grouped-query attention of decoding rows over the paged cache, heads of 64 and 128, up to eight query
// heads of a KV head at once.
//
// A block works through its pieces: some keys of one row and KV head, for its query heads (lines). Its
// warps take tiles of 16 keys in turn, each by itself: it asks the copy engine for its tiles, a ring
// ahead, and keeps a running maximum, mass and sum, in which lines are columns and keys or elements rows.
// At a piece's end the warps' sums are added; of a row in several pieces the block that comes last adds
// what all have left, in the order of the pieces. Two blocks share a multiprocessor, so that one reads
// while the other begins or ends a piece. The host cuts the pieces (cut.rs), so that blocks have equal
// work whatever the contexts are.
//
// Fused, the queries, the new key and the new value come as they were projected: they are normed and
// rotated here, with the roundings of the ops, and the block that has the row's last key writes it. Then
// nothing that is read of the cache is written by a kernel of this step.
#include "cuda/async.cuh"
#include "flash/cuda/pieces.cuh"

namespace gqa_decode {

constexpr int kTokens = 64;  // of a cache block
constexpr int kTile = 16;    // keys that a warp takes at once
constexpr int kLine = 64;    // elements that are swizzled together
constexpr int kLines = 8;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRing = 3 * 32768;  // bytes of a block's rings
constexpr int kQueries = kLines / kWarps;  // that a warp prepares

struct Params {
    TensorMap cache;   // the arena as lines of 64 elements, tokens, lines of a token; 16 tokens of a head to a box
    const bf16* q;     // [rows, heads, D], q_row apart
    const bf16* kv;    // fused: [rows, 2, KV heads, D], kv_row apart, keys and values as projected
    bf16* arena;       // fused: where they go
    bf16* out;         // [rows, heads, D]
    float4* partial;   // [slots, D / 16, 32]: a thread's share of sums
    float2* partial_lse;  // [slots, 8]: maximum (base 2), mass
    uint32_t* arrived;    // [slots], at the first slot of a row; zero between launches
    const Piece* pieces;
    const uint64_t* tables;
    const float* q_norm;    // fused: [D] each; null without norms
    const float* k_norm;
    const float* inv_freq;  // fused: [D / 2]
    uint64_t arena_elements, layer_offset, q_row, kv_row;
    uint32_t row;      // elements of a token in the cache: keys, then values
    uint32_t heads;
    float scale, q_eps, k_eps, factor;
};

template <int kDim> struct Shared {
    static constexpr int kSpans = kDim / kLine;
    static constexpr int kStages = kRing / (kWarps * 2 * kTile * kDim * 2);
    bf16 ring[kWarps][kStages][2][kSpans][kTile][kLine];  // 16-byte units swizzled within 128 bytes
    float4 sums[kWarps / 2][kDim / 16][32];
    bf16 q[kLines][kDim + 8];
    float2 lse[kWarps][kLines];
    uint64_t full[kWarps][kStages];
    uint32_t last;
};
static_assert(sizeof(Shared<64>) == 104016 && sizeof(Shared<128>) == 109040, "as decode.rs says");

// A warp's tiles of its block's pieces in order, and where they lie.
struct Ahead {
    uint32_t table, begin, end, next, settled, kv_head;
    uint32_t tile;  // of the piece
    uint32_t from;  // the tile whose place lane 0 knows
    int place;      // lane i: of tile `from + i * kWarps`, in tokens of the arena
    bool any;

    __device__ __forceinline__ uint32_t key() const { return begin + tile * kTile; }
    // The first token of the tile at `key`, in a cache block at `at`.
    __device__ static int place_of(const Params& p, uint64_t at, uint32_t key) {
        const uint64_t bytes = p.layer_offset + uint64_t(kTokens) * p.row;
        if (at > p.arena_elements || bytes > p.arena_elements - at) at = 0;
        return int(uint32_t((at + p.layer_offset) / kLine) / (p.row / kLine)) + int(key % kTokens);
    }
    __device__ __forceinline__ void look(const Params& p, int lane) {
        from = tile;
        const uint32_t mine = begin + (tile + lane * kWarps) * kTile;
        place = mine < end ? place_of(p, p.tables[table + mine / kTokens], mine) : 0;
    }
    __device__ void open(const Params& p, uint32_t piece, int warp, int lane) {
        const Piece* at = p.pieces + piece;
        while (true) {
            table = at->table, begin = at->begin, end = at->end, next = at->next, settled = at->settled, kv_head = at->kv_head;
            tile = warp;
            any = key() < end;
            if (any) break;
            if (next == 0) return;
            at = p.pieces + next;
        }
        // The first tile need not wait for the tables.
        from = tile - kWarps * 32;
        const uint32_t block = key() / kTokens - begin / kTokens;
        place = block < 2 ? place_of(p, at->at[block], key()) : place_of(p, p.tables[table + key() / kTokens], key());
    }
    __device__ __forceinline__ void advance(const Params& p, int warp, int lane) {
        tile += kWarps;
        if (key() < end) {
            if (tile - from >= kWarps * 32) look(p, lane);
        } else if (next != 0) {
            open(p, next, warp, lane);
        } else {
            any = false;
        }
    }
    // Of the tile at hand.
    __device__ __forceinline__ int here() const {
        const uint32_t lane = (tile - from) / kWarps;
        return __shfl_sync(0xffffffff, place, lane < 32 ? lane : 0);
    }
};

template <int kDim> __device__ __forceinline__ void load_tile(const Params& p, Shared<kDim>& s, int warp, int lane, int stage, const Ahead& a) {
    constexpr int kSpans = kDim / kLine;
    const int token = a.here();
    if (lane == 0) {
        const uint32_t bar = shared_address(&s.full[warp][stage]);
        const int line = int(a.kv_head) * kSpans, values = int(p.row / kLine / 2);
        fence_async();
        barrier_expect(bar, 2 * kTile * kDim * 2);
        tensor_load_3d(shared_address(&s.ring[warp][stage][0]), &p.cache, 0, token, line, bar);
        tensor_load_3d(shared_address(&s.ring[warp][stage][1]), &p.cache, 0, token, line + values, bar);
    }
}

// Byte offset of 16 bytes of a token in a stage's keys or values.
template <int kDim> __device__ __forceinline__ uint32_t unit_at(int token, int unit) {
    return (unit / 8 * kTile + token) * (kLine * 2) + ((unit ^ token) & 7) * 16;
}

__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
    return y;
}

// Nothing is subtracted where the maximum is minus infinity.
__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.0f : top; }

// Over the lanes that hold other rows of the same columns.
__device__ __forceinline__ float rows_max(float x) {
#pragma unroll
    for (int i = 4; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, i));
    return x;
}
__device__ __forceinline__ float rows_sum(float x) {
#pragma unroll
    for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(0xffffffff, x, i);
    return x;
}

// A head's elements lane, lane + 32, ..: normed and rotated as the ops do it, each with its rounding.
template <int kDim> struct Head {
    static constexpr int kEach = kDim / 32, kPairs = kEach / 2;
    bf16 x[kEach];
    __device__ __forceinline__ void load(const bf16* from, int lane) {
#pragma unroll
        for (int i = 0; i < kEach; i++) x[i] = from[lane + 32 * i];
    }
    __device__ __forceinline__ void norm(const float (&weight)[kEach], float eps) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kEach; i++) sum += widen(x[i]) * widen(x[i]);
        const float scale = rsqrtf(warp_sum(sum) / kDim + eps);
#pragma unroll
        for (int i = 0; i < kEach; i++) x[i] = narrow<bf16>(widen(x[i]) * scale * weight[i]);
    }
    __device__ __forceinline__ void rotate(const float2 (&turn)[kPairs]) {
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            const float2 by = turned(widen(x[i]), widen(x[i + kPairs]), turn[i].x, turn[i].y);
            x[i] = narrow<bf16>(by.x), x[i + kPairs] = narrow<bf16>(by.y);
        }
    }
};

// What a warp prepares of a piece: some of its queries, and the row's new key and value if its last tile
// is this warp's.
template <int kDim, bool kFused> struct Prepared {
    Head<kDim> query[kQueries], key, value;

    __device__ static uint32_t tiles(const Piece& piece) { return (piece.end - piece.begin + kTile - 1) / kTile; }
    __device__ static bool newest(const Piece& piece, int warp) {
        return kFused && piece.end == piece.settled + 1 && (tiles(piece) - 1) % kWarps == uint32_t(warp);
    }
    __device__ __forceinline__ void load(const Params& p, const Piece& piece, int warp, int lane) {
#pragma unroll
        for (int i = 0; i < kQueries; i++) {
            const uint32_t line = warp + i * kWarps;
            query[i] = {};
            if (line < piece.lines) query[i].load(p.q + piece.row * p.q_row + (piece.head + line) * kDim, lane);
        }
        if (newest(piece, warp)) {
            const bf16* from = p.kv + piece.row * p.kv_row + piece.kv_head * kDim;
            key.load(from, lane);
            value.load(from + p.row / 2, lane);
        }
    }
};

template <int kDim> __device__ __forceinline__ void finish(const Params& p, Shared<kDim>& s, const Piece& piece, const float (&top)[2], const float (&mass)[2]);

template <int kDim, bool kFused> __device__ void decode(const Params& p) {
    using S = Shared<kDim>;
    constexpr int kStages = S::kStages, kSteps = kDim / 16, kEach = Head<kDim>::kEach, kPairs = Head<kDim>::kPairs;
    extern __shared__ __align__(1024) uint8_t memory[];
    S& s = *reinterpret_cast<S*>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Piece piece = p.pieces[blockIdx.x];
    const bool none = piece.end <= piece.begin;
    // Room for the next kernel. One block stays, so that this kernel ends after the one in front.
    if (none && blockIdx.x != 0) return;
    if (lane == 0) {
        for (int i = 0; i < kStages; i++) barrier_init(shared_address(&s.full[warp][i]), 1);
        fence_barrier_init();
    }
    __syncwarp();
    Ahead ahead = {};
    int loaded = 0;
    if (!none) {
        ahead.open(p, blockIdx.x, warp, lane);
        // What earlier steps wrote need not wait for the kernel in front.
        while (loaded < kStages && ahead.any && (kFused || ahead.key() + kTile <= ahead.settled)) {
            load_tile<kDim>(p, s, warp, lane, loaded++, ahead);
            ahead.advance(p, warp, lane);
        }
    }
    allow_next();
    float q_weight[kEach], k_weight[kEach];
    float2 turn[kPairs];
    uint32_t turned = ~0u;
    if (kFused) {
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            q_weight[i] = p.q_norm == nullptr ? 1.0f : p.q_norm[lane + 32 * i];
            k_weight[i] = p.k_norm == nullptr ? 1.0f : p.k_norm[lane + 32 * i];
        }
    }
    const auto turn_to = [&](uint32_t position) {
        if (turned == position) return;
        turned = position;
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            sincosf(__fmul_rn(static_cast<float>(position), p.inv_freq[lane + 32 * i]), &turn[i].y, &turn[i].x);
            turn[i].x *= p.factor, turn[i].y *= p.factor;
        }
    };
    if (kFused && !none) turn_to(piece.settled);
    wait_for_previous();
    if (none) return;
    while (loaded < kStages && ahead.any) {
        load_tile<kDim>(p, s, warp, lane, loaded++, ahead);
        ahead.advance(p, warp, lane);
    }
    const float scale = p.scale * 1.44269504f;
    int count = 0;
    Prepared<kDim, kFused> mine = {};
    mine.load(p, piece, warp, lane);
    while (true) {
        const uint32_t tiles = mine.tiles(piece);
        const bool newest = mine.newest(piece, warp);
        if (kFused) {
            turn_to(piece.settled);
#pragma unroll
            for (int i = 0; i < kQueries; i++) {
                if (warp + i * kWarps >= piece.lines) break;
                if (p.q_norm != nullptr) mine.query[i].norm(q_weight, p.q_eps);
                mine.query[i].rotate(turn);
            }
            if (newest) {
                if (p.k_norm != nullptr) mine.key.norm(k_weight, p.k_eps);
                mine.key.rotate(turn);
            }
        }
#pragma unroll
        for (int i = 0; i < kQueries * kEach; i++) s.q[warp + i / kEach * kWarps][lane + 32 * (i % kEach)] = mine.query[i / kEach].x[i % kEach];
        const Head<kDim> key = mine.key, value = mine.value;
        __syncthreads();
        uint32_t q[kSteps][2];
#pragma unroll
        for (int k = 0; k < kSteps; k += 2) {
            uint32_t b[4];
            load_matrix(b, shared_address(&s.q[lane % 8][k * 16 + lane / 8 * 8]));
            q[k][0] = b[0], q[k][1] = b[1], q[k + 1][0] = b[2], q[k + 1][1] = b[3];
        }
        Piece next = {};
        if (piece.next != 0) {
            // What the next piece begins with is on its way meanwhile.
            next = p.pieces[piece.next];
            mine.load(p, next, warp, lane);
        }
        float top[2] = {-INFINITY, -INFINITY}, mass[2] = {};
        float acc[kSteps][4] = {};
        for (uint32_t tile = warp; tile < tiles; tile += kWarps, count++) {
            const int stage = count % kStages;
            const uint32_t first = piece.begin + tile * kTile, left = piece.end - first;
            barrier_wait(shared_address(&s.full[warp][stage]), count / kStages & 1);
            auto& keys = s.ring[warp][stage][0];
            auto& values = s.ring[warp][stage][1];
            if (left <= kTile) {
                // What lies beyond may be anything, and nothing times infinity is not nothing.
                for (int i = left * (kDim / 8) + lane; i < kTile * (kDim / 8); i += 32) {
                    const int token = i / (kDim / 8), unit = i % (kDim / 8);
                    *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(&values) + unit_at<kDim>(token, unit)) = uint4{};
                }
                if (newest) {
                    const uint32_t token = left - 1;
                    const uint64_t at = uint64_t(Ahead::place_of(p, p.tables[piece.table + piece.settled / kTokens], piece.settled)) * p.row;
                    bf16* to = p.arena + at + piece.kv_head * kDim;
#pragma unroll
                    for (int i = 0; i < kEach; i++) {
                        const int element = lane + 32 * i;
                        const uint32_t here = unit_at<kDim>(token, element / 8) / 2 + element % 8;
                        (&keys[0][0][0])[here] = key.x[i], (&values[0][0][0])[here] = value.x[i];
                        to[element] = key.x[i], to[element + p.row / 2] = value.x[i];
                    }
                }
                fence_async();
                __syncwarp();
            }
            const uint32_t keys_at = shared_address(&keys), values_at = shared_address(&values);
            float d[2][4] = {};
#pragma unroll
            for (int k = 0; k < kSteps; k++) {
                uint32_t a[4];
                load_matrix(a, keys_at + unit_at<kDim>(lane % 16, k * 2 + lane / 16));
                mma_16816(d[k % 2], a[0], a[1], a[2], a[3], q[k][0], q[k][1]);
            }
            // Of key g + i / 2 * 8 and line 2 t + i % 2.
            float score[4];
#pragma unroll
            for (int i = 0; i < 4; i++) score[i] = uint32_t(g + i / 2 * 8) < left ? (d[0][i] + d[1][i]) * scale : -INFINITY;
            float shrink[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float high = fmaxf(top[j], rows_max(fmaxf(score[j], score[j + 2])));
                const float base = base_of(high);
                shrink[j] = exp2f(top[j] - base);
                top[j] = high;
                score[j] = exp2f(score[j] - base), score[j + 2] = exp2f(score[j + 2] - base);
                mass[j] = mass[j] * shrink[j] + score[j] + score[j + 2];
            }
            const uint32_t b0 = transpose(pack_bf16(score[0], score[1])), b1 = transpose(pack_bf16(score[2], score[3]));
            if (__any_sync(0xffffffff, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (int m = 0; m < kSteps; m++) {
                    acc[m][0] *= shrink[0], acc[m][1] *= shrink[1];
                    acc[m][2] *= shrink[0], acc[m][3] *= shrink[1];
                }
            }
#pragma unroll
            for (int m = 0; m < kSteps; m++) {
                uint32_t a[4];
                load_matrix_transposed(a, values_at + unit_at<kDim>(lane % 8 + lane / 16 * 8, m * 2 + lane / 8 % 2));
                mma_16816(acc[m], a[0], a[1], a[2], a[3], b0, b1);
            }
            __syncwarp();
            if (ahead.any) {
                load_tile<kDim>(p, s, warp, lane, stage, ahead);
                ahead.advance(p, warp, lane);
            }
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            mass[j] = rows_sum(mass[j]);
            if (g == 0) s.lse[warp][2 * t + j] = {top[j], mass[j]};
        }
        __syncthreads();
        float by[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float all = -INFINITY, sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; w++) all = fmaxf(all, s.lse[w][2 * t + j].x);
            const float base = base_of(all);
#pragma unroll
            for (int w = 0; w < kWarps; w++) {
                const float2 of = s.lse[w][2 * t + j];
                sum += of.y * exp2f(of.x - base);
            }
            by[j] = exp2f(top[j] - base);
            top[j] = all, mass[j] = sum;
        }
        if (warp >= kWarps / 2) {
#pragma unroll
            for (int m = 0; m < kSteps; m++) {
                s.sums[warp - kWarps / 2][m][lane] = {acc[m][0] * by[0], acc[m][1] * by[1], acc[m][2] * by[0], acc[m][3] * by[1]};
            }
        }
        __syncthreads();
        if (warp < kWarps / 2) {
#pragma unroll
            for (int m = 0; m < kSteps; m++) {
                float4& sum = s.sums[warp][m][lane];
                const float4 v = sum;
                sum = {v.x + acc[m][0] * by[0], v.y + acc[m][1] * by[1], v.z + acc[m][2] * by[0], v.w + acc[m][3] * by[1]};
            }
        }
        __syncthreads();
        finish<kDim>(p, s, piece, top, mass);
        if (piece.next == 0) return;
        piece = next;
    }
}

// A warp's share of a piece's sums, elements m * 16 + g and 8 above of lines 2 t and 2 t + 1 for some m:
// the result, or a part that waits for the others.
template <int kDim>
__device__ __forceinline__ void finish(const Params& p, Shared<kDim>& s, const Piece& piece, const float (&top)[2], const float (&mass)[2]) {
    constexpr int kSteps = kDim / 16, kShare = kSteps / kWarps, kAtOnce = 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bool mine = uint32_t(2 * t) < piece.lines;
    float4 sum[kShare] = {};
    float mass_of[2] = {mass[0], mass[1]};
#pragma unroll
    for (int j = 0; j < kShare; j++) {
#pragma unroll
        for (int w = 0; w < kWarps / 2; w++) {
            const float4 v = s.sums[w][warp + j * kWarps][lane];
            sum[j].x += v.x, sum[j].y += v.y, sum[j].z += v.z, sum[j].w += v.w;
        }
    }
    if (piece.slot != kWhole) {
        const auto place = [&](uint32_t slot, int j, int of) { return p.partial + (uint64_t(slot) * kSteps + warp + j * kWarps) * 32 + of; };
        const auto lse = [&](uint32_t slot, int pair) { return reinterpret_cast<float4*>(p.partial_lse + uint64_t(slot) * kLines + 2 * pair); };
#pragma unroll
        for (int j = 0; j < kShare; j++) {
            if (mine) *place(piece.slot, j, lane) = sum[j];
        }
        if (warp == 0 && g == 0) *lse(piece.slot, t) = {top[0], mass[0], top[1], mass[1]};
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            s.last = atomicAdd(&p.arrived[piece.first], 1) == piece.count - 1;
            __threadfence();
        }
        __syncthreads();
        if (s.last == 0) return;
        if (threadIdx.x == 0) p.arrived[piece.first] = 0;
        // Where half of the lanes have no lines they take every other piece.
        const bool halves = piece.lines <= kLines / 2;
        const int pair = halves ? t % 2 : t, from_lane = g * 4 + pair, step = halves ? 2 : 1;
        const uint32_t count = uint32_t(2 * pair) < piece.lines ? piece.count : 0;
        float high[2] = {-INFINITY, -INFINITY};
        mass_of[0] = mass_of[1] = 0.0f;
#pragma unroll
        for (int j = 0; j < kShare; j++) sum[j] = {};
        const auto rise = [&](float a, float b) {
            const float by[2] = {exp2f(high[0] - base_of(a)), exp2f(high[1] - base_of(b))};
            high[0] = a, high[1] = b, mass_of[0] *= by[0], mass_of[1] *= by[1];
#pragma unroll
            for (int j = 0; j < kShare; j++) sum[j] = {sum[j].x * by[0], sum[j].y * by[1], sum[j].z * by[0], sum[j].w * by[1]};
        };
        for (uint32_t from = halves ? t / 2 : 0; from < count; from += kAtOnce * step) {
            float4 v[kAtOnce][kShare], of[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const uint32_t slot = piece.first + min(from + i * step, count - 1);
                of[i] = __ldcg(lse(slot, pair));
#pragma unroll
                for (int j = 0; j < kShare; j++) v[i][j] = __ldcg(place(slot, j, from_lane));
            }
            float top_of[2] = {high[0], high[1]};
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) top_of[0] = fmaxf(top_of[0], of[i].x), top_of[1] = fmaxf(top_of[1], of[i].z);
            rise(top_of[0], top_of[1]);
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                if (from + i * step >= count) break;
                const float a = exp2f(of[i].x - base_of(high[0])), b = exp2f(of[i].z - base_of(high[1]));
                mass_of[0] += of[i].y * a, mass_of[1] += of[i].w * b;
#pragma unroll
                for (int j = 0; j < kShare; j++) sum[j].x += v[i][j].x * a, sum[j].y += v[i][j].y * b, sum[j].z += v[i][j].z * a, sum[j].w += v[i][j].w * b;
            }
        }
        if (halves) {
            const auto other = [](float x) { return __shfl_xor_sync(0xffffffff, x, 2); };
            rise(fmaxf(high[0], other(high[0])), fmaxf(high[1], other(high[1])));
            mass_of[0] += other(mass_of[0]), mass_of[1] += other(mass_of[1]);
#pragma unroll
            for (int j = 0; j < kShare; j++) sum[j].x += other(sum[j].x), sum[j].y += other(sum[j].y), sum[j].z += other(sum[j].z), sum[j].w += other(sum[j].w);
        }
    }
    if (!mine) return;
    const float a = 1.0f / mass_of[0], b = 1.0f / mass_of[1];
#pragma unroll
    for (int j = 0; j < kShare; j++) {
        bf16* to = p.out + (uint64_t(piece.row) * p.heads + piece.head + 2 * t) * kDim + (warp + j * kWarps) * 16 + g;
        to[0] = narrow<bf16>(sum[j].x * a), to[8] = narrow<bf16>(sum[j].z * a);
        if (uint32_t(2 * t + 1) < piece.lines) to[kDim] = narrow<bf16>(sum[j].y * b), to[kDim + 8] = narrow<bf16>(sum[j].w * b);
    }
}

}  // namespace gqa_decode

#define GQA_DECODE(name, dim, fused)                                                                                       \
    extern "C" __global__ void __launch_bounds__(gqa_decode::kThreads, 2) name(const __grid_constant__ gqa_decode::Params p) { \
        gqa_decode::decode<dim, fused>(p);                                                                                 \
    }
GQA_DECODE(gqa_decode_64, 64, false)
GQA_DECODE(gqa_decode_128, 128, false)
GQA_DECODE(gqa_decode_fused_64, 64, true)
GQA_DECODE(gqa_decode_fused_128, 128, true)
