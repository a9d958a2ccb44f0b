// All of latent attention between the projections around it, for few rows of short contexts in one
// launch: a cluster of eight blocks to a head, each with an eighth of every row's keys, an eighth of the
// head's way into latent space and of its way back. Blocks tell each other by stores that a barrier of
// the block that is told counts, which takes one way where a barrier of the cluster takes two.
//
// A warp more for each row rotates its query and makes its new key meanwhile, which takes as long as the
// way into latent space. Weights and the keys of earlier steps are on their way before the kernel in front
// has ended. Every head reads all keys, which lie in the second-level cache by then; long contexts take
// mla_decode.cu.
#include "cuda/cluster.cuh"
#include "mla/cuda/turn.cuh"

namespace mla_near {

using namespace mla;

constexpr int kBlocks = 8;  // of a head
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;  // behind them a warp to a row
constexpr uint32_t kRows = 2;
constexpr int kSlice = kLatent / kBlocks;   // of latent space
constexpr int kOutputs = kValue / kBlocks;  // of the results
constexpr int kPitch = kWidth + 8;
constexpr int kMerged = kSlice + 8;
constexpr uint32_t kMostBoxes = 32;  // of a block
constexpr uint32_t kChunk = 2;       // boxes at once: a key to a lane
constexpr uint32_t kBoxBytes = kBox * kWidth * 2;
constexpr int kSplits = kWarps / kChunk;  // warps that share a box
constexpr int kGroups = kWidth / kLine;
static_assert(kSplits * 16 == kLine, "a split has a part of every line");

struct Params {
    TensorMap cache;       // the arena as lines of 64 elements, in boxes of 16 keys
    const bf16* q;         // [rows, heads, 128 + 64], q_row apart
    const bf16* kv;        // [rows, 512 + 64], kv_row apart
    const bf16* absorbed;  // [heads, 512, 128]
    const bf16* kv_b;      // [heads, 128 + 128, 512]
    bf16* out;             // [rows, heads, 128]
    const float* norm;     // [512]
    const float* inv_freq;
    bf16* arena;
    const uint32_t* positions;
    const uint32_t* row_tables;  // index in `tables` of the first block of the row's sequence
    const uint64_t* tables;      // element offsets of blocks
    const uint32_t* count;
    uint64_t arena_elements, layer_offset, q_row, kv_row;
    uint32_t rows, heads, stages;
    float eps, factor, scale;
    uint32_t interleaved;
    uint32_t pad;
};

// A row's keys in this block, by units of 16.
struct Own {
    uint32_t first, count;  // units
    uint32_t box;           // which of the block's boxes they begin with
    uint32_t keys;          // of the row, in all blocks
    // Keys from a unit of these on.
    __device__ uint32_t left(uint32_t unit) const { return keys - min((first + unit) * kBox, keys); }
    __device__ bool has_last() const { return count > 0 && left(0) <= count * kBox; }
};

struct alignas(16) Shared {
    float score[2][kSplits][kChunk * kBox];
    float stage[kWarps][kSlice];
    Own own[kRows];
    int line[kMostBoxes];  // of the cache, where a box begins
    uint64_t full[2], told[3], ready;  // ready: queries are rotated, new keys are made
};
// Behind it, of every row: what blocks send.
struct Row {
    float part[kBlocks][kSlice];   // sums over every block's keys
    float last[kBlocks][kOutputs];
    float2 lse[kBlocks];           // maximum (base 2) and mass
    bf16 q[kPitch];                // in latent space, then the rotated part
    bf16 fresh[kWidth];            // this step's key
    bf16 merged[kMerged];
};
static_assert(sizeof(Row) == 5088 && sizeof(Shared) == 3280, "as near.rs says");

__device__ __forceinline__ void multipliers_meet() { asm volatile("bar.sync 1, %0;\n" ::"n"(kThreads) : "memory"); }

enum Told { kQuery, kParts, kLast };

// The row's keys are dealt out by units of 16.
__device__ __forceinline__ Own own_of(uint32_t keys, uint32_t rank) {
    const uint32_t units = (keys + kBox - 1) / kBox, first = units * rank / kBlocks;
    return {first, units * (rank + 1) / kBlocks - first, 0, keys};
}

// By the first warp: where rows and boxes lie.
__device__ __forceinline__ void lay_out(const Params& p, Shared& s, uint32_t rank, uint32_t real) {
    const uint32_t lane = threadIdx.x % 32;
    Own own = {};
    uint32_t table = 0;
    if (lane < real) {
        table = p.row_tables[lane];
        own = own_of(p.positions[lane] + 1, rank);
    }
    uint32_t end = own.count;
#pragma unroll
    for (uint32_t step = 1; step < kRows; step *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffff, end, step);
        if (lane >= step) end += before;
    }
    own.box = min(end - own.count, kMostBoxes);
    own.count = min(own.count, kMostBoxes - own.box);
    if (lane < kRows) s.own[lane] = own;
    uint32_t row = 0;
    for (uint32_t i = 1; i < real; i++) {
        if (__shfl_sync(0xffffffff, own.box, i) <= lane) row = i;
    }
    table = __shfl_sync(0xffffffff, table, row);
    __syncwarp();
    const Own mine = s.own[row];
    if (lane - mine.box < mine.count) {
        const uint32_t unit = mine.first + lane - mine.box;
        const uint64_t block = inside(p.tables[table + unit * kBox / kTokens], p.layer_offset, p.arena_elements);
        s.line[lane] = int((block + p.layer_offset) / kLine) + int(unit * kBox % kTokens) * kGroups;
    }
    __syncwarp();
}

// Walks the stages of keys.
struct Place {
    uint32_t stage = 0, parity = 0;
    __device__ void next(uint32_t stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// By one thread: copies of chunks, in order.
struct Copies {
    uint32_t row = 0, unit = 0;
    Place place;
    __device__ void next(const Params& p, Shared& s, uint32_t kv_at, uint32_t real) {
        while (row < real && unit >= s.own[row].count) row++, unit = 0;
        if (row >= real) return;
        const uint32_t boxes = min(s.own[row].count - unit, kChunk), bar = shared_address(&s.full[place.stage]);
        fence_async();
        barrier_expect(bar, boxes * kBoxBytes);
        for (uint32_t i = 0; i < boxes; i++) {
            tensor_load_2d(kv_at + (place.stage * kChunk + i) * kBoxBytes, &p.cache, 0, s.line[s.own[row].box + unit + i], bar);
        }
        unit += boxes;
        place.next(p.stages);
    }
};

// One warp: the row's new key, normed and rotated; into the cache too, by one head.
__device__ __forceinline__ void new_key(const Params& p, const float4 (&norm)[4], Row& r, const Vec<bf16, 4> (&latent)[4], float2 key, Pair pair, Turn turn, bf16* cache) {
    const uint32_t lane = threadIdx.x % 32;
    float sums[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) sum += widen(latent[j].at[i]) * widen(latent[j].at[i]);
        sums[j] = warp_sum(sum);
    }
    const float scale = rsqrtf(((sums[0] + sums[2]) + (sums[1] + sums[3])) / kLatent + p.eps);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const uint32_t at = (lane + 32 * j) * 4;
        const float4 by = norm[j];
        Vec<bf16, 4> normed;
        normed.at[0] = narrow<bf16>(widen(latent[j].at[0]) * scale * by.x);
        normed.at[1] = narrow<bf16>(widen(latent[j].at[1]) * scale * by.y);
        normed.at[2] = narrow<bf16>(widen(latent[j].at[2]) * scale * by.z);
        normed.at[3] = narrow<bf16>(widen(latent[j].at[3]) * scale * by.w);
        *reinterpret_cast<Vec<bf16, 4>*>(&r.fresh[at]) = normed;
        if (cache != nullptr) *reinterpret_cast<Vec<bf16, 4>*>(cache + at) = normed;
    }
    pair.store(r.fresh + kLatent, key, turn);
    if (cache != nullptr) pair.store(cache + kLatent, key, turn);
}

// The new key in its place, the last of `keys`, and nothing behind it; what the copy brought there may be
// anything.
__device__ __forceinline__ void patch(const Row& r, uint32_t kv_at, uint32_t keys, uint32_t boxes) {
    constexpr uint32_t kUnits = kWidth / 8;
    for (uint32_t i = threadIdx.x; i < (boxes * kBox - (keys - 1)) * kUnits; i += kThreads) {
        const uint32_t key = keys - 1 + i / kUnits, unit = i % kUnits;
        const uint4 v = key == keys - 1 ? *reinterpret_cast<const uint4*>(&r.fresh[unit * 8]) : uint4{};
        store_shared16(key_unit(kv_at, key, unit / 8, unit % 8), v);
    }
    multipliers_meet();
}

// By the warp of a row, which is real: its query's rotated part, and in the block that has the row's last
// key that one.
__device__ void turn_row(const Params& p, Shared& s, Row& r, uint32_t row, uint32_t rank, uint32_t head) {
    const uint32_t lane = threadIdx.x % 32, position = p.positions[row];
    const bool owner = own_of(position + 1, rank).has_last();
    const Turn turn = turn_of(position, p.inv_freq[lane], p.factor);
    const Pair pair(lane, p.interleaved != 0);
    float4 norm[4];
#pragma unroll
    for (int j = 0; j < 4; j++) norm[j] = *reinterpret_cast<const float4*>(p.norm + (lane + 32 * j) * 4);
    bf16* cache = nullptr;
    if (head == 0 && owner) {
        const uint64_t block = p.tables[p.row_tables[row] + position / kTokens], to = p.layer_offset + uint64_t(position % kTokens) * kWidth;
        if (block <= p.arena_elements && to + kWidth <= p.arena_elements - block) cache = p.arena + block + to;
    }
    wait_for_previous();
    // All at once, also where nobody wants the key.
    const bf16* from = p.kv + row * p.kv_row;
    Vec<bf16, 4> latent[4];
#pragma unroll
    for (int j = 0; j < 4; j++) latent[j] = *reinterpret_cast<const Vec<bf16, 4>*>(from + (lane + 32 * j) * 4);
    const float2 query = pair.load(p.q + row * p.q_row + head * (kNope + kRope) + kNope), key = pair.load(from + kLatent);
    pair.store(r.q + kLatent, query, turn);
    if (owner) new_key(p, norm, r, latent, key, pair, turn, cache);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.ready));
}

// Scores of one box, a part of every line by each of its warps.
__device__ __forceinline__ void scores(float* to, const bf16* q, uint32_t kv_at, uint32_t split) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t at = kv_at + lane % 16 * (kWidth * 2), unit = split * 2 + lane / 16;
    q += split * 16 + t * 2;
    float d[3][4] = {};
#pragma unroll
    for (int i = 0; i < kGroups; i++) {
        uint32_t a[4], b[2] = {};
        load_matrix(a, at + i * 128 + ((unit ^ (lane + i)) & 7) * 16);
        if (g == 0) {
            b[0] = *reinterpret_cast<const uint32_t*>(q + i * kLine);
            b[1] = *reinterpret_cast<const uint32_t*>(q + i * kLine + 8);
        }
        mma_16816(d[i % 3], a[0], a[1], a[2], a[3], b[0], b[1]);
    }
    if (t == 0) {
        to[g] = d[0][0] + d[1][0] + d[2][0];
        to[g + 8] = d[0][2] + d[1][2] + d[2][2];
    }
}

// A bit pattern that grows with the number.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float highest(float x) {
    const uint32_t bits = __reduce_max_sync(0xffffffff, ordered(x));
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// What a warp has of a row: 64 columns of the sum over its keys so far, all of their maximum and mass.
struct Sum {
    float top = -INFINITY, mass = 0.0f;  // a lane's part of the mass
    float d[kSlice / 16][4] = {};

    // A key to a lane; minus infinity where there is none.
    __device__ __forceinline__ void add(float x, uint32_t kv_at, uint32_t boxes) {
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const float high = fmaxf(top, highest(x));
        // Where every score is minus infinity or not a number nothing is subtracted.
        const float base = high == -INFINITY ? 0.0f : high, shrink = exp2f(top - base), y = exp2f(x - base);
        top = high;
        mass = mass * shrink + y;
        const uint32_t both = pack_bf16(y, __shfl_down_sync(0xffffffff, y, 1));
#pragma unroll
        for (int m = 0; m < kSlice / 16; m++) d[m][0] *= shrink, d[m][2] *= shrink;
#pragma unroll
        for (uint32_t box = 0; box < kChunk; box++) {
            uint32_t b[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t pair = __shfl_sync(0xffffffff, both, box * kBox + i * 8 + t * 2);
                b[i] = g == 0 ? pair : 0;
            }
            if (box >= boxes) break;
            const uint32_t key = box * kBox + lane / 16 * 8 + lane % 8, at = kv_at + key * (kWidth * 2) + warp * 128;
#pragma unroll
            for (int m = 0; m < kSlice / 16; m++) {
                uint32_t a[4];
                load_matrix_transposed(a, at + (((m * 2 + lane / 8 % 2) ^ (key + warp)) & 7) * 16);
                mma_16816(d[m], a[0], a[1], a[2], a[3], b[0], b[1]);
            }
        }
    }
    // To the block that merges these columns; maximum and mass to all.
    __device__ __forceinline__ void send(Shared& s, Row& r, uint32_t rank) {
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const uint32_t bar = shared_address(&s.told[kParts]);
        float* stage = s.stage[warp];
        __syncwarp();
        if (t == 0) {
#pragma unroll
            for (int m = 0; m < kSlice / 16; m++) stage[m * 16 + g] = d[m][0], stage[m * 16 + 8 + g] = d[m][2];
        }
        __syncwarp();
        if (lane < kSlice / 4) {
            const float4 four = *reinterpret_cast<const float4*>(&stage[lane * 4]);
            tell16(remote_address(shared_address(&r.part[rank][lane * 4]), warp), four, remote_address(bar, warp));
        }
        if (warp == 0) {
            const float all = warp_sum(mass);
            if (lane < kBlocks) tell8(remote_address(shared_address(&r.lse[rank]), lane), {top, all}, remote_address(bar, lane));
        }
    }
};

// What all blocks have of this block's columns.
__device__ __forceinline__ void merge(Row& r, uint32_t column) {
    float high = -INFINITY;
#pragma unroll
    for (int b = 0; b < kBlocks; b++) high = fmaxf(high, r.lse[b].x);
    if (high == -INFINITY) high = 0.0f;
    float mass = 0.0f, sum = 0.0f;
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
        const float by = exp2f(r.lse[b].x - high);
        mass += r.lse[b].y * by;
        sum += r.part[b][column] * by;
    }
    r.merged[column] = narrow<bf16>(sum * (1.0f / mass));
}

__device__ void attend(const Params& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory + p.stages * kChunk * kBoxBytes);
    Row* const rows = reinterpret_cast<Row*>(&s + 1);
    const uint32_t rank = cluster_rank(), head = blockIdx.x / kBlocks;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t kv_at = shared_address(memory);
    const uint32_t real = min(real_rows(p.count, p.rows), kRows);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < 2; i++) barrier_init(shared_address(&s.full[i]), 1);
        const uint32_t bytes[3] = {kLatent * 2, kBlocks * (kSlice * 4 + 8), kValue * 4};
        for (uint32_t i = 0; i < 3; i++) barrier_init(shared_address(&s.told[i]), 1);
        barrier_init(shared_address(&s.ready), max(real, 1u));
        fence_barrier_init();
        for (uint32_t i = 0; i < 3; i++) barrier_expect(shared_address(&s.told[i]), real * bytes[i]);
    }
    __syncwarp();
    if (warp >= kWarps) {
        cluster_arrive();
        __syncthreads();
        const uint32_t row = warp - kWarps;
        if (row < real) turn_row(p, s, rows[row], row, rank, head);
        cluster_wait();
        return;
    }
    Copies copies;
    if (warp == 0) {
        lay_out(p, s, rank, real);
        if (lane == 0) {
            for (uint32_t i = 0; i < p.stages; i++) copies.next(p, s, kv_at, real);
        }
        __syncwarp();
    }
    uint4 into[kNope / 32], back[2][kSlice / 32];
    const bf16* absorbed = p.absorbed + (uint64_t(head) * kLatent + rank * kSlice + warp * 8 + g) * kNope + t * 8;
#pragma unroll
    for (int c = 0; c < kNope / 32; c++) into[c] = load_ahead(absorbed + c * 32);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const uint32_t output = head * (kNope + kValue) + kNope + warp * kOutputs + output_of(j, lane);
        const bf16* from = p.kv_b + uint64_t(output) * kLatent + rank * kSlice + t * 8;
#pragma unroll
        for (int c = 0; c < kSlice / 32; c++) back[j][c] = load_ahead(from + c * 32);
    }
    cluster_arrive();
    __syncthreads();
    wait_for_previous();
    allow_next();

    uint4 x[kNope / 32] = {};
    if (g < real) {
        const bf16* from = p.q + g * p.q_row + head * (kNope + kRope) + t * 8;
#pragma unroll
        for (int c = 0; c < kNope / 32; c++) x[c] = *reinterpret_cast<const uint4*>(from + c * 32);
    }
    const uint4 none = {};
    {
        float d[2][4] = {};
#pragma unroll
        for (int c = 0; c < kNope / 32; c++) mma_32(d[c % 2], x[c], none, into[c]);
        // The eight outputs of a row lie in a quad, which sends them to two blocks a lane.
        const uint32_t mine = pack_bf16(d[0][0] + d[1][0], d[0][1] + d[1][1]);
        uint32_t all[4];
#pragma unroll
        for (int i = 0; i < 4; i++) all[i] = __shfl_sync(0xffffffff, mine, i, 4);
        const float4 four = {__uint_as_float(all[0]), __uint_as_float(all[1]), __uint_as_float(all[2]), __uint_as_float(all[3])};
        cluster_wait();
        if (g < real) {
            const uint32_t to = shared_address(&rows[g].q[rank * kSlice + warp * 8]), bar = shared_address(&s.told[kQuery]);
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) tell16(remote_address(to, t * 2 + i), four, remote_address(bar, t * 2 + i));
        }
    }
    if (real > 0) barrier_wait(shared_address(&s.ready), 0);
    barrier_wait(shared_address(&s.told[kQuery]), 0);
    const float scale = p.scale * 1.44269504f;
    Place place;
    uint32_t turns = 0;
    for (uint32_t row = 0; row < real; row++) {
        const Own own = s.own[row];
        Sum sum;
        for (uint32_t unit = 0; unit < own.count; unit += kChunk) {
            const uint32_t at = kv_at + place.stage * kChunk * kBoxBytes;
            const uint32_t boxes = min(own.count - unit, kChunk), keys = own.left(unit);
            barrier_wait(shared_address(&s.full[place.stage]), place.parity);
            place.next(p.stages);
            if (keys <= boxes * kBox) patch(rows[row], at, keys, boxes);
            float(&score)[kSplits][kChunk * kBox] = s.score[turns++ % 2];
            const uint32_t box = warp / kSplits, split = warp % kSplits;
            if (box < boxes) scores(&score[split][box * kBox], rows[row].q, at + box * kBoxBytes, split);
            multipliers_meet();
            float y = 0.0f;
#pragma unroll
            for (int i = 0; i < kSplits; i++) y += score[i][lane];
            jitter();
            sum.add(lane < min(keys, boxes * kBox) ? y * scale : -INFINITY, at, boxes);
            multipliers_meet();
            if (threadIdx.x == 0) copies.next(p, s, kv_at, real);
        }
        sum.send(s, rows[row], rank);
    }
    barrier_wait(shared_address(&s.told[kParts]), 0);
    for (uint32_t i = threadIdx.x; i < real * kSlice; i += kThreads) merge(rows[i / kSlice], i % kSlice);
    multipliers_meet();
    float e[2][4] = {};
    const Row& mine = rows[min(g, real - 1)];
#pragma unroll
    for (int c = 0; c < kSlice / 32; c++) {
        const uint4 low = real > 0 ? *reinterpret_cast<const uint4*>(&mine.merged[c * 32 + t * 8]) : none;
        mma_32(e[0], low, none, back[0][c]);
        mma_32(e[1], low, none, back[1][c]);
    }
    if (g < real) {
        const float4 four = {e[0][0], e[0][1], e[1][0], e[1][1]};
        tell16(remote_address(shared_address(&rows[g].last[rank][t * 4]), warp), four, remote_address(shared_address(&s.told[kLast]), warp));
    }
    barrier_wait(shared_address(&s.told[kLast]), 0);
    if (threadIdx.x < real * kOutputs) {
        const uint32_t row = threadIdx.x / kOutputs, output = threadIdx.x % kOutputs;
        float sum = 0.0f;
#pragma unroll
        for (int b = 0; b < kBlocks; b++) sum += rows[row].last[b][output];
        p.out[(uint64_t(row) * p.heads + head) * kValue + rank * kOutputs + output] = narrow<bf16>(sum);
    }
}

}  // namespace mla_near

extern "C" __global__ void __launch_bounds__(mla_near::kThreads + 32 * mla_near::kRows, 2) mla_near_8(const __grid_constant__ mla_near::Params p) {
    mla_near::attend(p);
}
