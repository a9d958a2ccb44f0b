// Both products of experts of many tokens in one launch, with experts that all rows take beside them.
//
// Units of work are tiles of rows by up to `kGroups` slabs of 64 lines of weights: all of gate and up first,
// then all of down. Blocks fetch them one by one, in an order in which a unit waits only for units that
// were fetched before it, so that the launch ends however few blocks run. A part of down waits until
// all of gate and up of its rows is there. Sums of an output run over whole units, in one block: they
// do not depend on what else there is.
//
// Roles of a block: warpgroups that compute; a warp that reads weights, one that reads rows, one that
// fetches the next unit while this one is read.
#include "moe/cuda/many.cuh"

namespace many {

constexpr uint32_t kRowBox = 32, kSlabBytes = 64 * 128, kRowBoxBytes = kRowBox * 128, kSlots = 2;
constexpr uint32_t kAhead = 8;  // steps before its end at which a unit's successor is fetched

// Warpgroups that compute, of a slab each; tiles of up to `kRows` rows.
constexpr uint32_t kGroups = 3, kRows = 256, kThreads = 128 * (kGroups + 1);
constexpr uint32_t kW = kGroups * kSlabBytes, kStage = kW + kRows / kRowBox * kRowBoxBytes, kOwn = 512;
constexpr uint32_t kStages = (227 * 1024 - kOwn) / kStage;
// Columns of one product: more would not fit the registers that a thread has at launch.
constexpr int kColumns = 200;

struct Unit {
    uint32_t which, expert, row, rows, tile, slab, slabs, any;
};

struct Memory {
    uint32_t base;
    __device__ uint32_t bars() const { return base + kStages * kStage; }
    __device__ uint32_t w(uint32_t s) const { return base + s * kStage; }
    __device__ uint32_t x(uint32_t s) const { return base + s * kStage + kW; }
    __device__ uint32_t full(uint32_t s) const { return bars() + 16 * s; }
    __device__ uint32_t empty(uint32_t s) const { return bars() + 16 * s + 8; }
    __device__ uint32_t given(uint32_t i) const { return bars() + 16 * (kStages + i); }
    __device__ uint32_t taken(uint32_t i) const { return bars() + 16 * (kStages + i) + 8; }
    __device__ uint32_t wanted() const { return bars() + 16 * (kStages + kSlots); }
    __device__ uint32_t slot(uint32_t i) const { return bars() + 16 * (kStages + kSlots + 1 + 2 * i); }
};

__device__ __forceinline__ Unit read_unit(uint32_t at) {
    Unit u;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(u.which), "=r"(u.expert), "=r"(u.row), "=r"(u.rows) : "r"(at) : "memory");
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(u.tile), "=r"(u.slab), "=r"(u.slabs), "=r"(u.any) : "r"(at + 16) : "memory");
    return u;
}
__device__ __forceinline__ void write_unit(uint32_t at, const Unit& u) {
    asm volatile("st.shared.v4.u32 [%4], {%0, %1, %2, %3};\n" ::"r"(u.which), "r"(u.expert), "r"(u.row), "r"(u.rows), "r"(at) : "memory");
    asm volatile("st.shared.v4.u32 [%4], {%0, %1, %2, %3};\n" ::"r"(u.tile), "r"(u.slab), "r"(u.slabs), "r"(u.any), "r"(at + 16) : "memory");
}

// Tiles of the pairs that were laid, and of all rows, as even as multiples of 8 are.
struct Tiles {
    uint32_t sorted, rows, of_rows, height;
    __device__ explicit Tiles(const Params& p) {
        sorted = __ldcg(p.totals);
        rows = p.always ? real_rows(p.count, p.rows) : 0;
        of_rows = (rows + kRows - 1) / kRows;
        height = of_rows == 0 ? 8 : ((rows + of_rows - 1) / of_rows + 7) / 8 * 8;
    }
};

// Whole units of both gates and ups, what is left of their lines, the same of both downs: small units
// come last.
__device__ Unit unit_of(const Params& p, const Tiles& tiles, uint32_t number) {
    Unit unit = {};
#pragma unroll 1
    for (uint32_t i = 0; i < 8; i++) {
        const uint32_t which = (i < 4 ? kUp : kDown) + (i % 2 == 0 ? 2 : 0);
        const bool all_rows = which >= kAlwaysUp, rest = i % 4 >= 2;
        const uint32_t slabs = (p.product[which].lines + 63) / 64, whole = slabs / kGroups, left = slabs % kGroups;
        const uint32_t each = rest ? left != 0 : whole;
        const uint32_t units = (all_rows ? tiles.of_rows : tiles.sorted) * each;
        if (number >= units) {
            number -= units;
            continue;
        }
        const uint32_t tile = number / each;
        unit.any = 1;
        unit.which = which;
        unit.slab = rest ? whole * kGroups : number % each * kGroups;
        unit.slabs = rest ? left : kGroups;
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

// Parts of a tile: every warpgroup's of every unit.
__device__ __forceinline__ uint32_t parts_of(const Product& of) {
    return ((of.lines + 63) / 64 + kGroups - 1) / kGroups * kGroups;
}

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

// The `i`-th unit of this block; one thread of those who read it says so.
__device__ __forceinline__ Unit next_unit(const Memory& m, uint32_t i) {
    const uint32_t slot = i % kSlots;
    barrier_wait(m.given(slot), i / kSlots & 1);
    return read_unit(m.slot(slot));
}

__device__ void read_weights(const Params& p, const Memory& m) {
    Place<kStages> at;
    for (uint32_t i = 0;; i++) {
        const Unit unit = next_unit(m, i);
        barrier_arrive(m.taken(i % kSlots));
        if (!unit.any) break;
        const Product& of = p.product[unit.which];
        const uint64_t keep = of.reused ? wide::kEvictNormal : wide::kEvictFirst;
        const uint32_t steps = of.steps, ask = steps > kAhead ? steps - kAhead : 0;
        // Of gate and up the last coordinate is the expert, of down sixteen lines of all experts.
        const bool up = unit.which % 2 == 0;
        const uint32_t c3 = up ? unit.slab * 4 : 0, c4 = unit.expert * of.expert + (up ? 0 : unit.slab * 4);
        if (unit.slabs == kGroups) {
            for (uint32_t k = 0; k < steps; k++, at.next()) {
                barrier_wait(m.empty(at.stage), at.parity ^ 1);
                barrier_expect(m.full(at.stage), kW);
                load_five(m.w(at.stage), of.w, k * 64, c3, c4, keep, m.full(at.stage));
                if (k == ask) barrier_arrive(m.wanted());
            }
        } else {
            for (uint32_t k = 0; k < steps; k++, at.next()) {
                barrier_wait(m.empty(at.stage), at.parity ^ 1);
                barrier_expect(m.full(at.stage), unit.slabs * kSlabBytes);
                for (uint32_t s = 0; s < unit.slabs; s++) {
                    load_five(m.w(at.stage) + s * kSlabBytes, of.w_slab, k * 64, up ? c3 + 4 * s : 0, up ? c4 : c4 + 4 * s, keep, m.full(at.stage));
                }
                if (k == ask) barrier_arrive(m.wanted());
            }
        }
    }
}

__device__ void read_rows(const Params& p, const Memory& m) {
    Place<kStages> at;
    for (uint32_t i = 0;; i++) {
        const Unit unit = next_unit(m, i);
        barrier_arrive(m.taken(i % kSlots));
        if (!unit.any) break;
        const Product& of = p.product[unit.which];
        const uint32_t boxes = (unit.rows + kRowBox - 1) / kRowBox, steps = of.steps;
        if (unit.which % 2 == 1) {
            const uint32_t parts = parts_of(p.product[unit.which - 1]);
            uint32_t done = 0;
            for (uint32_t spin = 0; done < parts; spin++) {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(done) : "l"(p.progress + 1 + unit.tile) : "memory");
                if (spin == kPatience) __trap();
            }
            // What other blocks stored is read by the copy engine.
            asm volatile("fence.proxy.async;\n" ::: "memory");
        }
        for (uint32_t k = 0; k < steps; k++, at.next()) {
            barrier_wait(m.empty(at.stage), at.parity ^ 1);
            const uint32_t bar = m.full(at.stage);
            barrier_expect(bar, boxes * kRowBoxBytes);
            uint32_t to = m.x(at.stage), row = unit.row;
#pragma unroll 4
            for (uint32_t b = 0; b < boxes; b++, to += kRowBoxBytes, row += kRowBox) wide::load_x(to, of.x, k * 64, row, bar);
        }
    }
}

__device__ __forceinline__ void release(const Memory& m, uint32_t stage) {
    if (threadIdx.x % 32 == 0) barrier_arrive(m.empty(stage));
}

// The slab of this warpgroup, `N` rows or fewer.
template <int N> __device__ __forceinline__ void compute(const Params& p, const Memory& m, Place<kStages>& at, const Unit& unit, uint32_t group) {
    constexpr int kParts = N > kColumns ? 2 : 1, kPart = N / kParts;
    const Product& of = p.product[unit.which];
    const uint32_t steps = of.steps;
    float d[kParts][kPart / 2] = {};
    uint32_t before = 0;
    for (uint32_t k = 0; k < steps; k++) {
        barrier_wait(m.full(at.stage), at.parity);
        const uint64_t w = operand(m.w(at.stage) + group * kSlabBytes), x = operand(m.x(at.stage));
        products_begin();
#pragma unroll
        for (int step = 0; step < 4; step++) {
#pragma unroll
            for (int part = 0; part < kParts; part++) {
                product<kPart>(d[part], w + step * kStep16, x + part * kPart * 128 / 16 + step * kStep16);
            }
        }
        products_commit();
        // The products of the stage before have ended; those of this one may still run.
        products_wait<1>();
        if (k != 0) release(m, before);
        before = at.stage;
        at.next();
    }
    products_wait<0>();
    release(m, before);
    const uint32_t line = (unit.slab + group) * 64;
#pragma unroll
    for (int part = 0; part < kParts; part++) {
        const int row = part * kPart;
        if (unit.which % 2 == 0) {
            store_inner<kPart>(of, unit.row + row, int(unit.rows) - row, line, d[part]);
        } else {
            store_down<kPart>(of, unit.row + row, int(unit.rows) - row, line, d[part]);
        }
    }
}

// As many columns as the rows need.
constexpr int next_columns(int n) { return n < 32 ? 32 : n < 128 ? n + 32 : n + 16; }
template <int N> __device__ __forceinline__ void fit(const Params& p, const Memory& m, Place<kStages>& at, const Unit& unit, uint32_t group) {
    if constexpr (N < int(kRows)) {
        if (unit.rows > N) return fit<next_columns(N)>(p, m, at, unit, group);
    }
    compute<N>(p, m, at, unit, group);
}

__device__ __forceinline__ void group_sync(uint32_t group) {
    if (group == 0) asm volatile("bar.sync 1, 128;\n" ::: "memory");
    if (group == 1) asm volatile("bar.sync 2, 128;\n" ::: "memory");
    if (group == 2) asm volatile("bar.sync 3, 128;\n" ::: "memory");
}

__device__ __forceinline__ void compute_all(const Params& p, const Memory& m) {
    const uint32_t group = threadIdx.x / 128;
    Place<kStages> at;
    for (uint32_t i = 0;; i++) {
        const Unit unit = next_unit(m, i);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(m.taken(i % kSlots));
        if (!unit.any) break;
        if (group < unit.slabs) {
            fit<32>(p, m, at, unit, group);
        } else {
            const uint32_t steps = p.product[unit.which].steps;
            for (uint32_t k = 0; k < steps; k++, at.next()) {
                barrier_wait(m.full(at.stage), at.parity);
                release(m, at.stage);
            }
        }
        if (unit.which % 2 == 0) {
            // Stored here, read by the copy engine of other blocks.
            asm volatile("fence.proxy.async;\n" ::: "memory");
            group_sync(group);
            if (threadIdx.x % 128 == 0) {
                __threadfence();
                asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(p.progress + 1 + unit.tile) : "memory");
            }
        }
    }
}

}  // namespace many

extern "C" __global__ void __launch_bounds__(many::kThreads, 1) experts_many(const __grid_constant__ many::Params p) {
    using namespace many;
    extern __shared__ __align__(1024) uint8_t memory[];
    const Memory m = {shared_address(memory)};
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < kStages; i++) {
            barrier_init(m.full(i), 2);
            barrier_init(m.empty(i), 4 * kGroups);
        }
        for (uint32_t i = 0; i < kSlots; i++) {
            barrier_init(m.given(i), 1);
            barrier_init(m.taken(i), 4 * kGroups + 2);
        }
        barrier_init(m.wanted(), 1);
        fence_barrier_init();
    }
    __syncthreads();
    allow_next();
    wait_for_previous();
    const uint32_t warp = threadIdx.x / 32;
    if (warp < 4 * kGroups) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 160;\n");
        compute_all(p, m);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;\n");
        if (threadIdx.x % 32 == 0) {
            if (warp == 4 * kGroups) read_weights(p, m);
            if (warp == 4 * kGroups + 1) read_rows(p, m);
            if (warp == 4 * kGroups + 2) fetch_units(p, m);
        }
    }
}
