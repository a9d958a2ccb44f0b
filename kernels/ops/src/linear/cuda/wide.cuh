// Products whose time is the reading of weights: the weights are the left operand of the tensor cores,
// 64 outputs at a time, the rows of x the right one, as few as there are.
//
// One producer thread keeps a ring of stages full by the copy engine, whatever tile they belong to, so
// that reading never pauses between tiles; warpgroups consume. What is read of the weights does not
// depend on the kernel before, so the ring is filled before waiting for it.
//
// Two walks over tiles. `Grouped`: tiles of sorted pairs that share an expert, whole tiles, block by
// block: the sum of an output never depends on what else there is. `Balanced`: all steps of all tiles
// are dealt out evenly; a tile that several blocks share is summed by the one that has its first step,
// in the order of blocks, which depends on the shape alone. Tiles of two products of the same rows may
// follow each other there.
#pragma once

#include <type_traits>

#include "cuda/wgmma.cuh"
#include "linear/cuda/linear.cuh"

namespace wide {

// A CUtensorMap, without the driver's header.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

struct Params {
    TensorMap w;           // lines of weights, boxes of 64 along k
    TensorMap x;           // [rows, k], boxes of 64 along k
    const float* bias;     // [outputs], or null
    void* out;
    float* partial;        // balanced: a tile of sums for every block
    uint32_t* flags;       // balanced: one for every warpgroup of every block; zero between launches
    const uint32_t* count; // balanced: real rows, or null. grouped: real tiles
    const RowTile* tiles;  // grouped
    uint64_t out_stride;   // elements from row to row of out
    uint32_t rows;         // balanced: rows, padded
    uint32_t outputs;      // lines of weights of a product or expert
    uint32_t k;
};

constexpr int kLine = 128;                  // bytes of 64 elements along k
constexpr uint32_t kMemory = 227 * 1024;    // of the blocks of a multiprocessor
constexpr int kMostStages = 24;

// `kGroups` warpgroups of `kSlabs` times 64 outputs, up to `kRows` rows loaded `kRowBox` at a time,
// `kBoxes` boxes along k in a stage; memory such that `kShare` blocks fit a multiprocessor.
template <int kGroups_, int kSlabs_, int kRows_, int kRowBox_, int kBoxes_, int kShare_ = 1> struct Shape {
    static constexpr int kGroups = kGroups_, kSlabs = kSlabs_, kRows = kRows_, kRowBox = kRowBox_, kBoxes = kBoxes_, kShare = kShare_;
    static constexpr int kTile = 64 * kGroups * kSlabs;
    static constexpr int kThreads = 128 * kGroups + 32;
    static constexpr uint32_t kW = kTile * kLine, kX = kRows * kLine, kRowBytes = kRowBox * kLine;
    static constexpr uint32_t kStage = kBoxes * (kW + kX);
    static constexpr int kFit = (kMemory / kShare - 1024) / kStage;
    static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
    static_assert(kStages >= 3, "a ring");
};

// A part of a tile along k, in stages.
struct Segment {
    uint32_t expert;  // balanced: 0
    uint32_t output;  // first line of weights
    uint32_t row;     // first
    uint32_t rows;    // that are stored
    uint32_t begin, end, whole;
};

template <class S> __device__ __forceinline__ uint32_t steps_of(const Params& p) {
    return (p.k + 64 * S::kBoxes - 1) / (64 * S::kBoxes);
}

template <class S> struct Grouped {
    uint32_t unit, units, per_tile, steps;
    static constexpr bool reused = S::kRows > 64;
    __device__ explicit Grouped(const Params& p) {
        per_tile = (p.outputs + S::kTile - 1) / S::kTile;
        units = __ldcg(p.count) * per_tile;
        unit = blockIdx.x;
        steps = steps_of<S>(p);
    }
    __device__ bool any() const { return unit < units; }
    __device__ void next() { unit += gridDim.x; }
    __device__ Segment get(const Params& p) const {
        const uint32_t* tile = reinterpret_cast<const uint32_t*>(p.tiles + unit / per_tile);
        return {__ldcg(tile), unit % per_tile * S::kTile, __ldcg(tile + 1), __ldcg(tile + 2), 0, steps, steps};
    }
};

template <class S> struct Balanced {
    uint32_t at, end, steps, row_tiles, real;
    uint32_t all;  // times blocks it fits, which the host sees to
    bool reused;
    __device__ explicit Balanced(const Params& p) {
        steps = steps_of<S>(p);
        row_tiles = (p.rows + S::kRows - 1) / S::kRows;
        all = (p.outputs + S::kTile - 1) / S::kTile * row_tiles * steps;
        at = start(number());
        end = start(number() + 1);
        real = real_rows(p.count, p.rows);
        reused = row_tiles > 1;
    }
    // Blocks wait for those of higher number, which were dispatched before them: so they end even where
    // another kernel keeps some multiprocessors.
    __device__ static uint32_t number() { return gridDim.x - 1 - blockIdx.x; }
    // Of the steps of a block.
    __device__ uint32_t start(uint32_t block) const { return all * block / gridDim.x; }
    __device__ bool any() const { return at < end; }
    __device__ void next() { at = min(end, (at / steps + 1) * steps); }
    __device__ Segment get(const Params&) const {
        const uint32_t tile = at / steps, begin = at % steps, row = tile % row_tiles * S::kRows;
        const uint32_t rows = row < real ? min(uint32_t(S::kRows), real - row) : 0;
        return {0, tile / row_tiles * S::kTile, row, rows, begin, min(steps, begin + (end - at)), steps};
    }
};

// Which results leave.
enum class Out { kBf16, kF32, kInner };

__device__ __forceinline__ void group_sync(uint32_t group) {
    if (group == 0) {
        asm volatile("bar.sync 1, 128;\n" ::: "memory");
    } else {
        asm volatile("bar.sync 2, 128;\n" ::: "memory");
    }
}
// Weights that are read once leave the cache first.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull, kEvictNormal = 0x1000000000000000ull;

__device__ __forceinline__ void load_x(uint32_t to, const TensorMap& map, uint32_t k, uint32_t row, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(to),
        "l"(&map), "r"(k), "r"(row), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void load_lines(uint32_t to, const TensorMap& map, uint32_t k, uint32_t line, uint32_t expert, uint64_t keep, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;\n" ::"r"(to),
        "l"(&map), "r"(k), "r"(line), "r"(expert), "r"(bar), "l"(keep)
        : "memory");
}
// Eight lines of gate, the same eight of up, and so on.
__device__ __forceinline__ void load_pairs(uint32_t to, const TensorMap& map, uint32_t k, uint32_t eight, uint32_t expert, uint64_t keep, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %3, %4, %5}], [%6], %7;\n" ::"r"(to),
        "l"(&map), "r"(k), "r"(0), "r"(eight), "r"(expert), "r"(bar), "l"(keep)
        : "memory");
}

// The ring; a stage is its boxes of weights, then its boxes of x.
template <class S> struct Ring {
    uint32_t memory, bars;
    __device__ uint32_t stage(uint32_t i) const { return memory + i * S::kStage; }
    __device__ uint32_t full(uint32_t i) const { return bars + i * 16; }
    __device__ uint32_t empty(uint32_t i) const { return bars + i * 16 + 8; }
};

struct Place {
    uint32_t stage = 0, parity = 0;
    template <class S> __device__ __forceinline__ void next() {
        if (++stage == S::kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Stages in the order of a block's segments.
template <class S, class Walk> struct Steps {
    Walk walk;
    Segment segment;
    uint32_t k;
    bool any;
    __device__ explicit Steps(const Params& p) : walk(p) { open(p); }
    __device__ void open(const Params& p) {
        any = walk.any();
        if (any) {
            segment = walk.get(p);
            k = segment.begin;
        }
    }
    __device__ void next(const Params& p) {
        if (++k == segment.end) {
            walk.next();
            open(p);
        }
    }
    __device__ uint32_t row_boxes() const { return (max(segment.rows, 1u) + S::kRowBox - 1) / S::kRowBox; }
};

template <class S, class Walk, Out kOut> __device__ __forceinline__ void load_w(const Params& p, const Ring<S>& ring, uint32_t stage, const Steps<S, Walk>& s) {
    const uint32_t bar = ring.full(stage);
    const uint64_t keep = s.walk.reused ? kEvictNormal : kEvictFirst;
    barrier_expect(bar, S::kBoxes * (S::kW + s.row_boxes() * S::kRowBytes));
#pragma unroll
    for (uint32_t b = 0; b < S::kBoxes; b++) {
        const uint32_t k = (s.k * S::kBoxes + b) * 64, to = ring.stage(stage) + b * S::kW;
        if constexpr (kOut == Out::kInner) {
            load_pairs(to, p.w, k, s.segment.output / 16, s.segment.expert, keep, bar);
        } else {
            load_lines(to, p.w, k, s.segment.output, s.segment.expert, keep, bar);
        }
    }
}

template <class S, class Walk> __device__ __forceinline__ void load_rows(const Params& p, const Ring<S>& ring, uint32_t stage, const Steps<S, Walk>& s) {
#pragma unroll
    for (uint32_t b = 0; b < S::kBoxes; b++) {
        const uint32_t k = (s.k * S::kBoxes + b) * 64, to = ring.stage(stage) + S::kBoxes * S::kW + b * S::kX;
        for (uint32_t i = 0; i < s.row_boxes(); i++) {
            load_x(to + i * S::kRowBytes, p.x, k, s.segment.row + i * S::kRowBox, ring.full(stage));
        }
    }
}

template <class S, class Walk, Out kOut> __device__ void produce(const Params& p, const Ring<S>& ring) {
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(&p.w) : "memory");
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(&p.x) : "memory");
    Steps<S, Walk> ahead(p);
    const Steps<S, Walk> first = ahead;
    uint32_t early = 0;
    for (; early < S::kStages && ahead.any; early++, ahead.next(p)) load_w<S, Walk, kOut>(p, ring, early, ahead);
    wait_for_previous();
    Steps<S, Walk> now = first;
    for (uint32_t i = 0; i < early; i++, now.next(p)) load_rows(p, ring, i, now);
    Place at;
    for (; now.any; now.next(p), at.next<S>()) {
        barrier_wait(ring.empty(at.stage), at.parity);
        load_w<S, Walk, kOut>(p, ring, at.stage, now);
        load_rows(p, ring, at.stage, now);
    }
}

__device__ __forceinline__ uint32_t transposed(uint32_t tile) {
    uint32_t to;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(to) : "r"(tile));
    return to;
}

__device__ __forceinline__ float gated(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// Where results go.
struct Target {
    void* out;
    uint64_t stride;
    uint32_t outputs;
    const float* bias;
};

// The results of 64 lines of weights, from `line` on.
template <int N, Out kOut> __device__ __forceinline__ void store(const Target& p, const Segment& s, uint32_t line, float (&d)[N / 2]) {
    const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if constexpr (kOut == Out::kInner) {
        const uint32_t inner = line / 2 + warp * 8;
        const bool there = inner < p.outputs / 2;
        bf16* out = static_cast<bf16*>(p.out) + (s.row + g) * p.stride + inner + 2 * t;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            const float* v = &d[4 * j];
            const uint32_t both = transposed(pack_bf16(gated(v[0], v[2]), gated(v[1], v[3])));
            if (there && 8 * j + g < s.rows) *reinterpret_cast<uint32_t*>(out + 8 * j * p.stride) = both;
        }
        return;
    }
    const uint32_t output = line + warp * 16;
    const bool low = output < p.outputs, high = output + 8 < p.outputs;
    float bias[2] = {};
    if (p.bias != nullptr) {
        if (low) bias[0] = p.bias[output + g];
        if (high) bias[1] = p.bias[output + 8 + g];
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) d[i] += bias[i / 2 % 2];
    if constexpr (kOut == Out::kBf16) {
        bf16* out = static_cast<bf16*>(p.out) + (s.row + g) * p.stride + output + 2 * t;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            const uint32_t a = transposed(pack_bf16(d[4 * j], d[4 * j + 1])), b = transposed(pack_bf16(d[4 * j + 2], d[4 * j + 3]));
            if (8 * j + g < s.rows) {
                uint32_t* to = reinterpret_cast<uint32_t*>(out + 8 * j * p.stride);
                if (low) to[0] = a;
                if (high) to[4] = b;
            }
        }
    } else {
        float* out = static_cast<float*>(p.out) + (s.row + 2 * t) * p.stride + output + g;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const uint32_t row = i / 4 * 8 + i % 2;
            if (2 * t + row < s.rows && (i & 2 ? high : low)) out[row * p.stride + (i & 2) * 4] = d[i];
        }
    }
}

// Sums of a tile that other blocks hold a part of. The flag of a block is raised when its part is
// there, and lowered by the one block that waits for it. No block has an empty share, and one that is
// waited for waits for none: its part comes first.
constexpr uint32_t kPatience = 1u << 28;

template <class S, int N> __device__ __forceinline__ float4* part(const Params& p, uint32_t block, uint32_t group) {
    constexpr uint32_t kPart = S::kSlabs * N / 8 * 128;
    return reinterpret_cast<float4*>(p.partial) + (block * S::kGroups + group) * kPart + threadIdx.x % 128;
}

template <class S, int N> __device__ __forceinline__ void leave(const Params& p, uint32_t group, float (&d)[S::kSlabs][N / 2]) {
    const uint32_t number = Balanced<S>::number();
    float4* to = part<S, N>(p, number, group);
#pragma unroll
    for (int i = 0; i < S::kSlabs * N / 8; i++) {
        const float* v = &d[i / (N / 8)][i % (N / 8) * 4];
        __stcg(to + i * 128, make_float4(v[0], v[1], v[2], v[3]));
    }
    group_sync(group);
    if (threadIdx.x % 128 == 0) {
        asm volatile("st.release.gpu.global.u32 [%0], 1;\n" ::"l"(p.flags + number * S::kGroups + group) : "memory");
    }
}

template <class S, int N> __device__ __forceinline__ void collect(const Params& p, uint32_t group, const Balanced<S>& walk, uint32_t tile_end, float (&d)[S::kSlabs][N / 2]) {
    const uint32_t first = Balanced<S>::number() + 1;
    uint32_t end = first;
    while (end < gridDim.x && walk.start(end) < tile_end) end++;
    if (threadIdx.x % 128 < 32) {
        for (uint32_t block = first + threadIdx.x % 32; block < end; block += 32) {
            uint32_t* flag = p.flags + block * S::kGroups + group;
            uint32_t raised = 0;
            for (uint32_t i = 0; raised == 0; i++) {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(raised) : "l"(flag) : "memory");
                if (i == kPatience) __trap();
            }
            *flag = 0;
        }
    }
    group_sync(group);
#pragma unroll(S::kSlabs * N > 64 ? 1 : 4)
    for (uint32_t block = first; block < end; block++) {
        const float4* from = part<S, N>(p, block, group);
#pragma unroll
        for (int i = 0; i < S::kSlabs * N / 8; i++) {
            const float4 v = __ldcg(from + i * 128);
            float* to = &d[i / (N / 8)][i % (N / 8) * 4];
            to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
        }
    }
}

// One warp says that it has read a stage.
template <class S> __device__ __forceinline__ void release(const Ring<S>& ring, uint32_t stage) {
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(stage));
}

// One segment of `N` rows or fewer.
template <class S, class Walk, Out kOut, int N>
__device__ __forceinline__ void consume(const Params& p, const Ring<S>& ring, Place& at, const Walk& walk, const Segment& s, uint32_t group) {
    float d[S::kSlabs][N / 2] = {};
    uint32_t before = 0;
    for (uint32_t i = s.begin; i < s.end; i++) {
        barrier_wait(ring.full(at.stage), at.parity);
        const uint64_t w = operand(ring.stage(at.stage) + group * (S::kSlabs * 64 * kLine));
        const uint64_t x = operand(ring.stage(at.stage) + S::kBoxes * S::kW);
        products_begin();
#pragma unroll
        for (int b = 0; b < S::kBoxes; b++) {
#pragma unroll
            for (int step = 0; step < 4; step++) {
#pragma unroll
                for (int slab = 0; slab < S::kSlabs; slab++) {
                    product<N>(d[slab], w + (b * S::kW + slab * 64 * kLine) / 16 + step * kStep16, x + b * S::kX / 16 + step * kStep16);
                }
            }
        }
        products_commit();
        // The products of the stage before have ended; those of this one may still run.
        products_wait<1>();
        if (i != s.begin) release(ring, before);
        before = at.stage;
        at.next<S>();
    }
    products_wait<0>();
    release(ring, before);
    if constexpr (std::is_same_v<Walk, Balanced<S>>) {
        if (s.begin != 0) {
            leave<S, N>(p, group, d);
            return;
        }
        if (s.end != s.whole) collect<S, N>(p, group, walk, walk.at + s.whole, d);
    }
    const Target to = {p.out, p.out_stride, p.outputs, p.bias};
#pragma unroll
    for (int slab = 0; slab < S::kSlabs; slab++) store<N, kOut>(to, s, s.output + (group * S::kSlabs + slab) * 64, d[slab]);
}

// As many columns as the rows of a segment need.
template <class S, class Walk, Out kOut, int N>
__device__ __forceinline__ void fit(const Params& p, const Ring<S>& ring, Place& at, const Walk& walk, const Segment& s, uint32_t group) {
    if constexpr (N < S::kRows) {
        constexpr int kNext = S::kRows > 64 ? N + 32 : N < 32 ? N + 8 : N + 16;
        if (s.rows > N) return fit<S, Walk, kOut, kNext>(p, ring, at, walk, s, group);
    }
    consume<S, Walk, kOut, N>(p, ring, at, walk, s, group);
}

template <class S, class Walk, Out kOut> __device__ __forceinline__ void consume_all(const Params& p, const Ring<S>& ring) {
    constexpr int kLeast = std::is_same_v<Walk, Balanced<S>> ? S::kRows : S::kRows > 64 ? 32 : 8;
    Place at;
    for (Walk walk(p); walk.any(); walk.next()) fit<S, Walk, kOut, kLeast>(p, ring, at, walk, walk.get(p), threadIdx.x / 128);
}

template <class S, class Walk, Out kOut> __device__ __forceinline__ void run(const Params& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const Ring<S> ring = {shared_address(memory), shared_address(memory) + S::kStages * S::kStage};
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < S::kStages; i++) {
            barrier_init(ring.full(i), 1);
            barrier_init(ring.empty(i), 4 * S::kGroups);
        }
        fence_barrier_init();
    }
    __syncthreads();
    allow_next();
    if (threadIdx.x < 128 * S::kGroups) {
        consume_all<S, Walk, kOut>(p, ring);
    } else if (threadIdx.x == 128 * S::kGroups) {
        produce<S, Walk, kOut>(p, ring);
    }
}

}  // namespace wide
