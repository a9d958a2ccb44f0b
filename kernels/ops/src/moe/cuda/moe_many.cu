// Both products of experts of many tokens in one launch, with experts that all rows take beside them.
//
// Units of work are tiles of rows by `kLines` lines of weights: all of gate and up first, then all of
// down. Blocks fetch them one by one, in an order in which a unit waits only for units that were fetched
// before it, so that the launch ends however few blocks run. A part of down waits until all of gate and
// up of its rows is there. Sums of an output run over whole units, in one block: they do not depend on
// what else there is. Rows are laid by sorted pair before (moe_lay.cu).
//
// Roles of a block: two warpgroups that compute, of half the lines each; for each a warp that reads its
// weights, and one that says that its part of gate and up is there; a warp that reads rows; one that
// fetches the next unit while this one is read. Rows are in one ring that both warpgroups read, weights in
// a ring for each: so one may be some steps ahead of the other, and what it stores at the end of a unit is
// hidden behind products of the other. That others may read it is said by a warp that has time to wait
// until it is there.
#include "cuda/wgmma.cuh"
#include "linear/cuda/linear.cuh"
#include "linear/cuda/wide.cuh"
#include "moe/cuda/columns.cuh"

namespace many {

using wide::TensorMap;

// As wide as the driver's maps are on the host.
struct alignas(128) Product {
    TensorMap w;      // boxes of `kGroupLines` lines by 64 along k
    TensorMap x;      // boxes of `kRowBox` rows by 64 along k
    bf16* out;
    uint64_t out_stride;
    uint32_t lines;   // of weights of an expert
    uint32_t steps;   // of 64 along k
    uint32_t expert;  // from one expert to the next, in the last coordinate of the map of w
    uint32_t reused;  // whether several tiles read the same weights
};
// Gate and up, down; the same of experts that all rows take.
enum Which : uint32_t { kUp, kDown, kAlwaysUp, kAlwaysDown };

struct Params {
    Product product[4];
    const uint32_t* totals;  // tiles
    const uint32_t* count;   // of real rows
    const RowTile* tiles;
    uint32_t* progress;      // units fetched; then parts of gate and up that are there, of every tile
    uint32_t rows;
    uint32_t always;         // whether there are experts that all rows take
};

// Warpgroups that compute, of `kSlabs` times 64 lines each, and two that read; tiles of up to `kRows`
// rows.
constexpr uint32_t kGroups = 2, kSlabs = 2, kRows = 200, kThreads = 128 * (kGroups + 2);
constexpr uint32_t kGroupLines = 64 * kSlabs, kLines = kGroups * kGroupLines;
constexpr uint32_t kRowBox = 16, kLine = 128, kRowBoxBytes = kRowBox * kLine;
constexpr uint32_t kRowsRead = (kRows + kRowBox - 1) / kRowBox * kRowBox;
constexpr uint32_t kXBytes = kRowsRead * kLine, kXStages = 5, kWBytes = kGroupLines * kLine, kWStages = 3;
constexpr uint32_t kSlots = 2;  // units that are known at once
constexpr uint32_t kAhead = 8;  // steps before its end at which a unit's successor is fetched
constexpr uint32_t kPatience = 1u << 28;

struct Unit {
    uint32_t which, expert, row, rows, tile, line, any, unused;
};

struct Memory {
    uint32_t base;
    __device__ uint32_t x(uint32_t s) const { return base + s * kXBytes; }
    __device__ uint32_t w(uint32_t group, uint32_t s) const { return base + kXStages * kXBytes + (group * kWStages + s) * kWBytes; }
    __device__ uint32_t bars() const { return w(kGroups, 0); }
    __device__ uint32_t full_x(uint32_t s) const { return bars() + 16 * s; }
    __device__ uint32_t empty_x(uint32_t s) const { return full_x(s) + 8; }
    __device__ uint32_t full_w(uint32_t group, uint32_t s) const { return full_x(kXStages + group * kWStages + s); }
    __device__ uint32_t empty_w(uint32_t group, uint32_t s) const { return full_w(group, s) + 8; }
    __device__ uint32_t given(uint32_t i) const { return full_w(kGroups, i); }
    __device__ uint32_t taken(uint32_t i) const { return given(i) + 8; }
    __device__ uint32_t wanted() const { return given(kSlots); }
    __device__ uint32_t stored(uint32_t group, uint32_t i) const { return given(kSlots + 1 + i) + 8 * group; }
    __device__ uint32_t slot(uint32_t i) const { return given(2 * kSlots + 1 + 2 * i); }
};
static_assert(kGroups == 2, "what groups have stored of a slot lies in 16 bytes");
constexpr uint32_t kBytes = kXStages * kXBytes + kGroups * kWStages * kWBytes + 16 * (kXStages + kGroups * kWStages + 4 * kSlots + 1);
static_assert(kBytes <= 227 * 1024, "what a block may have");

__device__ __forceinline__ Unit read_unit(uint32_t at) {
    Unit u;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(u.which), "=r"(u.expert), "=r"(u.row), "=r"(u.rows) : "r"(at) : "memory");
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(u.tile), "=r"(u.line), "=r"(u.any), "=r"(u.unused) : "r"(at + 16) : "memory");
    return u;
}
__device__ __forceinline__ void write_unit(uint32_t at, const Unit& u) {
    asm volatile("st.shared.v4.u32 [%4], {%0, %1, %2, %3};\n" ::"r"(u.which), "r"(u.expert), "r"(u.row), "r"(u.rows), "r"(at) : "memory");
    asm volatile("st.shared.v4.u32 [%4], {%0, %1, %2, %3};\n" ::"r"(u.tile), "r"(u.line), "r"(u.any), "r"(u.unused), "r"(at + 16) : "memory");
}

// Tiles of the pairs that were sorted, and of all rows, as even as multiples of 8 are.
struct Tiles {
    uint32_t sorted, rows, of_rows, height;
    __device__ explicit Tiles(const Params& p) {
        sorted = __ldcg(p.totals);
        rows = p.always ? real_rows(p.count, p.rows) : 0;
        of_rows = (rows + kRows - 1) / kRows;
        height = of_rows == 0 ? 8 : ((rows + of_rows - 1) / of_rows + 7) / 8 * 8;
    }
};

__device__ __forceinline__ uint32_t units_of(const Product& of) { return (of.lines + kLines - 1) / kLines; }

// Both gates and ups, then both downs.
__device__ Unit unit_of(const Params& p, const Tiles& tiles, uint32_t number) {
    Unit unit = {};
#pragma unroll 1
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t which = (i < 2 ? kUp : kDown) + (i % 2 == 0 ? 2 : 0);
        const bool all_rows = which >= kAlwaysUp;
        const uint32_t each = units_of(p.product[which]), units = (all_rows ? tiles.of_rows : tiles.sorted) * each;
        if (number >= units) {
            number -= units;
            continue;
        }
        const uint32_t tile = number / each;
        unit.any = 1;
        unit.which = which;
        unit.line = number % each * kLines;
        if (all_rows) {
            unit.tile = tile;
            unit.row = tile * tiles.height;
            unit.rows = min(tiles.height, tiles.rows - unit.row);
        } else {
            const uint32_t* sorted = reinterpret_cast<const uint32_t*>(p.tiles + tile);
            unit.tile = tiles.of_rows + tile;
            unit.expert = __ldcg(sorted);
            unit.row = __ldcg(sorted + 1);
            unit.rows = __ldcg(sorted + 2);
        }
        break;
    }
    return unit;
}

// Where somebody is in a ring.
template <uint32_t kStages> struct Place {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

__device__ void fetch_units(const Params& p, const Memory& m) {
    const Tiles tiles(p);
    for (uint32_t i = 0;; i++) {
        const uint32_t slot = i % kSlots;
        if (i > 0) barrier_wait(m.wanted(), (i - 1) & 1);
        const Unit unit = unit_of(p, tiles, atomicAdd(p.progress, 1));
        barrier_wait(m.taken(slot), (i / kSlots & 1) ^ 1);
        write_unit(m.slot(slot), unit);
        barrier_arrive(m.given(slot));
        if (!unit.any) break;
    }
}

// The `i`-th unit of this block; one thread of every warp that reads it says so.
__device__ __forceinline__ Unit next_unit(const Memory& m, uint32_t i) {
    const uint32_t slot = i % kSlots;
    barrier_wait(m.given(slot), i / kSlots & 1);
    return read_unit(m.slot(slot));
}

__device__ __forceinline__ void load_five(uint32_t to, const TensorMap& map, uint32_t k, uint32_t c3, uint32_t c4, uint64_t keep, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %3, %4, %5}], [%6], %7;\n" ::"r"(to),
        "l"(&map), "r"(k), "r"(0), "r"(c3), "r"(c4), "r"(bar), "l"(keep)
        : "memory");
}

// One thread, for one warpgroup. Weights and units do not hang on what the kernel before leaves last.
__device__ void read_weights(const Params& p, const Memory& m, uint32_t group) {
    Place<kWStages> at;
    for (uint32_t i = 0;; i++) {
        const Unit unit = next_unit(m, i);
        barrier_arrive(m.taken(i % kSlots));
        if (!unit.any) break;
        const Product& of = p.product[unit.which];
        const uint64_t keep = of.reused ? wide::kEvictNormal : wide::kEvictFirst;
        const uint32_t steps = of.steps, ask = steps > kAhead ? steps - kAhead : 0, line = unit.line + group * kGroupLines;
        const bool there = line < of.lines;
        // Of gate and up the last coordinate is the expert, of down sixteen lines of all experts.
        const bool up = unit.which % 2 == 0;
        const uint32_t c3 = up ? line / 16 : 0, c4 = unit.expert * of.expert + (up ? 0 : line / 16);
        for (uint32_t k = 0; k < steps; k++) {
            if (there) {
                const uint32_t bar = m.full_w(group, at.stage);
                barrier_wait(m.empty_w(group, at.stage), at.parity ^ 1);
                barrier_expect(bar, kWBytes);
                load_five(m.w(group, at.stage), of.w, k * 64, c3, c4, keep, bar);
                at.next();
            }
            if (group == 0 && k == ask) barrier_arrive(m.wanted());
        }
    }
}

// One thread.
__device__ void read_rows(const Params& p, const Memory& m) {
    Place<kXStages> at;
    wait_for_previous();
    for (uint32_t i = 0;; i++) {
        const Unit unit = next_unit(m, i);
        barrier_arrive(m.taken(i % kSlots));
        if (!unit.any) break;
        const Product& of = p.product[unit.which];
        const uint32_t boxes = (unit.rows + kRowBox - 1) / kRowBox, steps = of.steps;
        if (unit.which % 2 == 1) {
            const uint32_t parts = units_of(p.product[unit.which - 1]) * kGroups;
            uint32_t done = 0;
            for (uint32_t spin = 0; done < parts; spin++) {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(done) : "l"(p.progress + 1 + unit.tile) : "memory");
                if (spin == kPatience) __trap();
            }
            // What other blocks stored is read by the copy engine.
            asm volatile("fence.proxy.async;\n" ::: "memory");
        }
        for (uint32_t k = 0; k < steps; k++, at.next()) {
            barrier_wait(m.empty_x(at.stage), at.parity ^ 1);
            const uint32_t bar = m.full_x(at.stage);
            barrier_expect(bar, boxes * kRowBoxBytes);
            uint32_t to = m.x(at.stage), row = unit.row;
#pragma unroll 4
            for (uint32_t b = 0; b < boxes; b++, to += kRowBoxBytes, row += kRowBox) wide::load_x(to, of.x, k * 64, row, bar);
        }
    }
}

// One thread, for one warpgroup: what this has stored is made visible to the copy engine of other blocks
// and counted. A slot is given again when what its unit stored has been seen here, so that no barrier is
// ever a phase further than this waits for.
__device__ void announce(const Params& p, const Memory& m, uint32_t group) {
    uint32_t parity = 0;  // a bit for every slot
    for (uint32_t i = 0;; i++) {
        const Unit unit = next_unit(m, i);
        const uint32_t slot = i % kSlots;
        const bool up = unit.any && unit.which % 2 == 0;
        if (up) {
            barrier_wait(m.stored(group, slot), parity >> slot & 1);
            parity ^= 1u << slot;
        }
        barrier_arrive(m.taken(slot));
        if (!unit.any) break;
        if (!up) continue;
        asm volatile("fence.proxy.async;\n" ::: "memory");
        __threadfence();
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(p.progress + 1 + unit.tile) : "memory");
    }
}

// Results of 64 lines of weights, from `line` on, for `N` rows.
template <int N> __device__ __forceinline__ void store_inner(const Product& of, uint32_t row, int rows, uint32_t line, float (&d)[N / 2]) {
    const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t inner = line / 2 + warp * 8;
    const bool there = inner < of.lines / 2;
    bf16* out = of.out + (row + g) * of.out_stride + inner + 2 * t;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float* v = &d[4 * j];
        const uint32_t both = wide::transposed(pack_bf16(wide::gated(v[0], v[2]), wide::gated(v[1], v[3])));
        if (there && int(8 * j + g) < rows) *reinterpret_cast<uint32_t*>(out + 8 * j * of.out_stride) = both;
    }
}
// Of each sixteen lines 2t and 2t + 1, then 8 + 2t and 8 + 2t + 1 are next to each other in the output.
template <int N> __device__ __forceinline__ void store_down(const Product& of, uint32_t row, int rows, uint32_t line, float (&d)[N / 2]) {
    const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t output = line + warp * 16;
    const bool there = output < of.lines;
    bf16* out = of.out + (row + g) * of.out_stride + output + 4 * t;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const uint2 four = {wide::transposed(pack_bf16(d[4 * j], d[4 * j + 1])), wide::transposed(pack_bf16(d[4 * j + 2], d[4 * j + 3]))};
        if (there && int(8 * j + g) < rows) *reinterpret_cast<uint2*>(out + 8 * j * of.out_stride) = four;
    }
}

// Where a warpgroup is in both rings.
struct At {
    Place<kXStages> x;
    Place<kWStages> w;
    __device__ __forceinline__ void next() { x.next(), w.next(); }
};

// The stage in front of where it is.
__device__ __forceinline__ void release(const Memory& m, uint32_t group, const At& at) {
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(m.empty_w(group, at.w.stage == 0 ? kWStages - 1 : at.w.stage - 1));
        barrier_arrive(m.empty_x(at.x.stage == 0 ? kXStages - 1 : at.x.stage - 1));
    }
}

// The lines of this warpgroup, `N` rows or fewer. Sums need nearly all registers: the unit is read again
// behind them.
template <int N> __device__ __forceinline__ void compute(const Params& p, const Memory& m, At& at, uint32_t slot, uint32_t steps, uint32_t group) {
    float d[kSlabs][N / 2] = {};
    for (uint32_t k = 0; k < steps; k++) {
        barrier_wait(m.full_w(group, at.w.stage), at.w.parity);
        barrier_wait(m.full_x(at.x.stage), at.x.parity);
        const uint64_t w = operand(m.w(group, at.w.stage)), x = operand(m.x(at.x.stage));
        products_begin();
#pragma unroll
        for (int step = 0; step < 4; step++) {
#pragma unroll
            for (int slab = 0; slab < int(kSlabs); slab++) product<N>(d[slab], w + slab * (64 * kLine / 16) + step * kStep16, x + step * kStep16);
        }
        products_commit();
        // The products of the stage before have ended; those of this one may still run.
        products_wait<1>();
        if (k != 0) release(m, group, at);
        at.next();
    }
    products_wait<0>();
    release(m, group, at);
    const Unit unit = read_unit(slot);
    const Product& of = p.product[unit.which];
#pragma unroll
    for (int slab = 0; slab < int(kSlabs); slab++) {
        const uint32_t line = unit.line + group * kGroupLines + slab * 64;
        if (unit.which % 2 == 0) {
            store_inner<N>(of, unit.row, int(unit.rows), line, d[slab]);
        } else {
            store_down<N>(of, unit.row, int(unit.rows), line, d[slab]);
        }
    }
}

// As many columns as the rows need.
constexpr int next_columns(int n) { return n < 96 ? n + 32 : n < 128 ? n + 8 : n < 160 ? n + 16 : n + 8; }
template <int N> __device__ __forceinline__ void fit(const Params& p, const Memory& m, At& at, uint32_t slot, uint32_t rows, uint32_t steps, uint32_t group) {
    if constexpr (N < int(kRows)) {
        if (rows > N) return fit<next_columns(N)>(p, m, at, slot, rows, steps, group);
    }
    compute<N>(p, m, at, slot, steps, group);
}

__device__ __forceinline__ void compute_all(const Params& p, const Memory& m) {
    const uint32_t group = threadIdx.x / 128;
    At at;
    for (uint32_t i = 0;; i++) {
        const uint32_t slot = m.slot(i % kSlots);
        {
            const Unit unit = next_unit(m, i);
            __syncwarp();
            if (!unit.any) break;
            const uint32_t steps = p.product[unit.which].steps;
            if (unit.line + group * kGroupLines < p.product[unit.which].lines) {
                fit<32>(p, m, at, slot, unit.rows, steps, group);
            } else {
                for (uint32_t k = 0; k < steps; k++, at.x.next()) {
                    barrier_wait(m.full_x(at.x.stage), at.x.parity);
                    if (threadIdx.x % 32 == 0) barrier_arrive(m.empty_x(at.x.stage));
                }
            }
        }
        const bool up = read_unit(slot).which % 2 == 0;
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            barrier_arrive(m.taken(i % kSlots));
            if (up) barrier_arrive(m.stored(group, i % kSlots));
        }
    }
}

}  // namespace many

extern "C" __global__ void __launch_bounds__(many::kThreads, 1) experts_many(const __grid_constant__ many::Params p) {
    using namespace many;
    extern __shared__ __align__(1024) uint8_t memory[];
    const Memory m = {shared_address(memory)};
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < kXStages; i++) {
            barrier_init(m.full_x(i), 1);
            barrier_init(m.empty_x(i), 4 * kGroups);
        }
        for (uint32_t i = 0; i < kGroups * kWStages; i++) {
            barrier_init(m.full_w(0, i), 1);
            barrier_init(m.empty_w(0, i), 4);
        }
        for (uint32_t i = 0; i < kSlots; i++) {
            barrier_init(m.given(i), 1);
            barrier_init(m.taken(i), 4 * kGroups + 2 * kGroups + 1);
        }
        barrier_init(m.wanted(), 1);
        for (uint32_t i = 0; i < kGroups * kSlots; i++) barrier_init(m.stored(i % kGroups, i / kGroups), 4);
        fence_barrier_init();
    }
    __syncthreads();
    allow_next();
    const uint32_t warp = threadIdx.x / 32;
    if (warp < 4 * kGroups) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;\n");
        compute_all(p, m);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;\n");
        const uint32_t role = warp - 4 * kGroups;
        if (threadIdx.x % 32 == 0) {
            if (role < kGroups) read_weights(p, m, role);
            if (role >= kGroups && role < 2 * kGroups) announce(p, m, role - kGroups);
            if (role == 2 * kGroups) read_rows(p, m);
            if (role == 2 * kGroups + 1) fetch_units(p, m);
        }
    }
}
