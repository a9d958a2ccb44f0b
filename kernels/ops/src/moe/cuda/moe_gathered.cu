// As moe_many.cu, both products of experts of many tokens in one launch, for fewer tokens of an expert:
// other tiles, and rows that are not laid before.
//
// Units of work are tiles of rows by `kLines` lines of weights: all of gate and up first, then all of
// down. Blocks fetch them one by one, in an order in which a unit waits only for units that were fetched
// before it, so that the launch ends however few blocks run. A part of down waits until all of gate and
// up of its rows is there. Sums of an output run over whole units, in one block: they do not depend on
// what else there is.
//
// Roles of a block: two warpgroups that compute, of half the lines each; for each a warp that reads its
// weights; warps that read rows; one that fetches the next unit while this one is read. Rows of tokens
// are gathered where they lie. Rows are in one ring that both warpgroups read, weights in a ring for
// each: so one may be some steps ahead of the other, and what it stores at the end of a unit is hidden
// behind products of the other.
#include "moe/cuda/columns.cuh"
#include "moe/cuda/many.cuh"

namespace gathered {

using namespace many;

// Warpgroups that compute, of `kSlabs` times 64 lines each, and two that read; tiles of up to `kRows`
// rows.
constexpr uint32_t kGroups = 2, kSlabs = 2, kRows = 200, kThreads = 128 * (kGroups + 2);
constexpr uint32_t kReaders = 5;  // warps that read rows: one alone has too few copies under way
constexpr uint32_t kGroupLines = 64 * kSlabs, kLines = kGroups * kGroupLines;
constexpr uint32_t kRowBox = 16, kLine = 128, kRowBoxBytes = kRowBox * kLine;
constexpr uint32_t kRowsRead = (kRows + kRowBox - 1) / kRowBox * kRowBox;
constexpr uint32_t kXBytes = kRowsRead * kLine, kXStages = 5, kWBytes = kGroupLines * kLine, kWStages = 3;
constexpr uint32_t kSlots = 2;  // units that are known at once
constexpr uint32_t kAhead = 8;  // steps before its end at which a unit's successor is fetched

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
    __device__ uint32_t slot(uint32_t i) const { return given(kSlots + 1 + 2 * i); }
    __device__ uint32_t table() const { return slot(kSlots); }  // u16 for every row of a tile
};
constexpr uint32_t kBytes = kXStages * kXBytes + kGroups * kWStages * kWBytes + 16 * (kXStages + kGroups * kWStages + kSlots + 1 + 2 * kSlots) + 2 * kRowsRead;
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

// Rows of tokens of a tile, by all readers, in boxes as the copy engine leaves them.
struct Gather {
    const char* from;  // sixteen bytes of the first row
    uint32_t table;
    uint32_t to;       // of a stage
    uint32_t swizzle;
    uint32_t column, width, boxes, first;

    // Lanes 8 i .. 8 i + 7 of a reader copy rows 16 a + 4 i + b of every `kReaders`-th a.
    __device__ Gather(const Params& p, const Memory& m, const Unit& unit, uint32_t reader) {
        const uint32_t lane = threadIdx.x % 32, four = lane / 8, sixteen = lane % 8;
        boxes = (unit.rows + kRowBox - 1) / kRowBox;
        // Each reader has the numbers of its own rows in its own part of the table.
        __syncwarp();
        for (uint32_t a = reader + lane / kRowBox * kReaders; a < boxes; a += 2 * kReaders) {
            const uint32_t r = a * kRowBox + lane % kRowBox, row = __ldcg(p.row_of + unit.row + min(r, unit.rows - 1));
            asm volatile("st.shared.u16 [%0], %1;\n" ::"r"(m.table() + 2 * r), "h"(uint16_t(row)) : "memory");
        }
        __syncwarp();
        first = reader;
        from = reinterpret_cast<const char*>(p.x) + 16 * sixteen;
        table = m.table() + 8 * four;
        to = four * 4 * kLine;
        swizzle = sixteen ^ 4 * (four & 1);
        column = 8 * sixteen;
        width = p.width;
    }
    // Columns from `k` on; what is behind the last one is zero.
    __device__ __forceinline__ void read(uint32_t stage, uint32_t k, uint32_t bar) const {
        const bool there = k + column < width;
        const char* at = from + (there ? 2 * k : 0);
#pragma unroll
        for (uint32_t i = 0; i < (kRowsRead / kRowBox + kReaders - 1) / kReaders; i++) {
            const uint32_t a = first + i * kReaders;
            if (a >= boxes) break;
            uint32_t rows[2];
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(rows[0]), "=r"(rows[1]) : "r"(table + 2 * kRowBox * a) : "memory");
#pragma unroll
            for (uint32_t b = 0; b < 4; b++) {
                const uint32_t row = b % 2 == 0 ? rows[b / 2] & 0xffff : rows[b / 2] >> 16;
                copy_async(stage + to + a * kRowBoxBytes + b * kLine + (swizzle ^ b) * 16, at + uint64_t(row) * (2 * width), there);
            }
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(bar) : "memory");
    }
};

// Several warps; what the copy engine reads the first one asks for.
__device__ void read_rows(const Params& p, const Memory& m, uint32_t reader) {
    Place<kXStages> at;
    const uint32_t lane = threadIdx.x % 32;
    wait_for_previous();
    for (uint32_t i = 0;; i++) {
        const Unit unit = next_unit(m, i);
        __syncwarp();
        if (lane == 0) barrier_arrive(m.taken(i % kSlots));
        if (!unit.any) break;
        const Product& of = p.product[unit.which];
        const uint32_t boxes = (unit.rows + kRowBox - 1) / kRowBox, steps = of.steps;
        if (unit.which == kUp) {
            const Gather gather(p, m, unit, reader);
            for (uint32_t k = 0; k < steps; k++, at.next()) {
                barrier_wait(m.empty_x(at.stage), at.parity ^ 1);
                gather.read(m.x(at.stage), k * 64, m.full_x(at.stage));
            }
            continue;
        }
        if (unit.which % 2 == 1 && reader == 0) {
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
            if (lane != 0 || reader != 0) {
                barrier_arrive(bar);
            } else {
                barrier_expect(bar, boxes * kRowBoxBytes);
                uint32_t to = m.x(at.stage), row = unit.row;
#pragma unroll 4
                for (uint32_t b = 0; b < boxes; b++, to += kRowBoxBytes, row += kRowBox) wide::load_x(to, of.x, k * 64, row, bar);
            }
            __syncwarp();
        }
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
        // Gathered rows were not written by the copy engine.
        fence_async();
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
        const Unit unit = read_unit(slot);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(m.taken(i % kSlots));
        if (unit.which % 2 == 0) {
            // Stored here, read by the copy engine of other blocks.
            asm volatile("fence.proxy.async;\n" ::: "memory");
            wide::group_sync(group);
            if (threadIdx.x % 128 == 0) {
                __threadfence();
                asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(p.progress + 1 + unit.tile) : "memory");
            }
        }
    }
}

}  // namespace gathered

extern "C" __global__ void __launch_bounds__(gathered::kThreads, 1) experts_gathered(const __grid_constant__ many::Params p) {
    using namespace gathered;
    extern __shared__ __align__(1024) uint8_t memory[];
    const Memory m = {shared_address(memory)};
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < kXStages; i++) {
            barrier_init(m.full_x(i), 32 * kReaders);
            barrier_init(m.empty_x(i), 4 * kGroups);
        }
        for (uint32_t i = 0; i < kGroups * kWStages; i++) {
            barrier_init(m.full_w(0, i), 1);
            barrier_init(m.empty_w(0, i), 4);
        }
        for (uint32_t i = 0; i < kSlots; i++) {
            barrier_init(m.given(i), 1);
            barrier_init(m.taken(i), 4 * kGroups + kGroups + kReaders);
        }
        barrier_init(m.wanted(), 1);
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
        if (role < kReaders) {
            read_rows(p, m, role);
        } else if (threadIdx.x % 32 == 0) {
            if (role < kReaders + kGroups) read_weights(p, m, role - kReaders);
            if (role == kReaders + kGroups) fetch_units(p, m);
        }
    }
}
