// Attention of prompts: tiles of query lines against all keys up to each line's own.
//
// Lines of a tile are whole rows of the heads that share keys. One warp brings queries, keys and values by
// the copy engine, 128 keys at a time, two steps ahead; each computing warpgroup has 64 lines, whose
// scores, weights and sums stay in registers. The scores of a step are multiplied while the sums of the
// step before are, and its softmax is taken while the other warpgroup multiplies. Blocks stay and take
// tiles one by one, so that the long ones may come first; the last one to ask resets the ticket. Where
// there are fewer tiles than blocks, several share the keys of one, and the last to be done merges.
#pragma once

#include "cuda/wgmma_register.cuh"


namespace prompt {

// A CUtensorMap, without the driver's header.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
struct Segment {
    uint32_t start;    // first row of the batch
    uint32_t len;      // rows
    uint32_t context;  // keys, those of the rows included
    uint32_t table;    // first block among the tables; or first row of keys
};
struct Tile {
    uint32_t segment;
    uint32_t line;  // first of the segment's lines
};

// Lines are of 64 elements.
struct Params {
    TensorMap q;       // by line of a head, row, head
    TensorMap keys;    // and values. In the cache: by line, token of the block; else by line of a row, row
    TensorMap shared;  // rows whose last line ends every head's key, where keys are wider than values
    bf16* out;         // [rows, heads, kV]
    const Segment* segments;
    const Tile* tiles;
    const uint32_t* tile_count;
    const uint32_t* first_tile;  // which of them is the first; null: that at the beginning
    const uint64_t* tables;  // element offsets of blocks
    uint32_t* ticket;        // zero between launches; as are `arrived`
    uint32_t* arrived;       // by tile and head, and warpgroup: parts that are done
    float* partial;          // by part of a launch, and warpgroup: what its threads hold
    uint64_t arena_elements, layer_offset, block_elements;
    uint32_t heads, kv_heads, group;
    uint32_t key_lines;    // from one KV head to the next
    uint32_t value_line;   // from a head's key to its value
    uint32_t shared_line;
    float scale;           // times log2 of e
    uint32_t pad;
};

constexpr int kKeys = 128, kBlock = 64;
// From 64 columns of keys or values in shared memory to the next ones.
constexpr uint32_t kColumns = kKeys * 128;

__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, int token, int line, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(to),
        "l"(&map), "r"(0), "r"(token), "r"(line), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void load_queries(uint32_t to, const TensorMap& map, int head, int row, int line, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];\n" ::"r"(to),
        "l"(&map), "r"(0), "r"(head), "r"(row), "r"(line), "r"(bar)
        : "memory");
}
// What computing warps know of a tile.
struct Work {
    Segment segment;
    uint32_t line, head;
    uint32_t first;  // step of keys
    uint32_t steps;  // of keys; none: the end
    uint32_t valid;  // keys of the last step that exist
    uint32_t parts;  // that share the keys
    uint32_t most;   // places of a tile's parts
    uint32_t slot;   // this part's
};

// Parts of a tile at most where tiles are few, so that all blocks have some: by the steps of the longest.
constexpr uint32_t kMostParts = 8, kLeastSteps = 6;
__device__ __forceinline__ uint32_t parts_of(uint32_t tiles, uint32_t longest) {
    return max(1u, min(min(gridDim.x / tiles, kMostParts), longest / kLeastSteps));
}

template <int kQk_, int kV_, int kGroups_, bool kPaged_> struct Shape {
    static constexpr int kQk = kQk_, kV = kV_, kGroups = kGroups_, kLines = 64 * kGroups, kThreads = 128 * (kGroups + 1);
    static constexpr int kQkColumns = kQk / 64, kVColumns = kV / 64;
    static constexpr bool kPaged = kPaged_;
};

template <class S> struct Shared {
    bf16 q[S::kQkColumns][S::kLines][64];
    bf16 keys[2][S::kQkColumns][kKeys][64];
    bf16 values[2][S::kVColumns][kKeys][64];
    Work work;
    uint32_t done[4];
    uint64_t q_full, q_empty, k_full[2], k_empty[2], v_full[2], v_empty[2];
};

// Lines of the cache where the blocks of a segment begin, looked up by a warp for 16 steps at a time.
struct Blocks {
    uint64_t entry = 0;
    int at[2] = {};
    __device__ __forceinline__ void seek(const Params& p, const Segment& s, uint32_t step, bool anew) {
        if (anew || step % 16 == 0) {
            const uint32_t block = step / 16 * 32 + threadIdx.x % 32;
            entry = block * kBlock < s.context ? p.tables[s.table + block] : 0;
            // Dead entries read the arena's beginning instead of foreign memory.
            if (entry > p.arena_elements || p.layer_offset + p.block_elements > p.arena_elements - entry) entry = 0;
        }
#pragma unroll
        for (int b = 0; b < 2; b++) at[b] = int((__shfl_sync(0xffffffff, entry, (step * 2 + b) % 32) + p.layer_offset) / 64);
    }
};

// A warp; its first thread starts the copies.
template <class S> __device__ __forceinline__ void produce(const Params& p, Shared<S>& s) {
    const bool first = threadIdx.x % 32 == 0;
    const Tile* list = p.tiles + (p.first_tile != nullptr ? *p.first_tile : 0);
    const uint32_t tiles = *p.tile_count * p.kv_heads, rows = S::kLines / p.group;
    auto steps_of = [&](const Tile& tile, const Segment& seg) {
        const uint32_t seen = seg.context - seg.len + min(tile.line / p.group + rows, seg.len);
        return (seen + kKeys - 1) / kKeys;
    };
    // The first tile is the longest.
    const bool few = tiles > 0 && tiles * 2 <= gridDim.x;
    const uint32_t most = few ? parts_of(tiles, steps_of(list[0], p.segments[list[0].segment])) : 1, total = tiles * most;
    const uint32_t q_full = shared_address(&s.q_full), q_empty = shared_address(&s.q_empty);
    uint32_t steps_before = 0, turn = 0;
    for (uint32_t ticket = blockIdx.x; ticket < total;) {
        const uint32_t item = ticket / most, part = ticket % most;
        const Tile tile = list[item / p.kv_heads];
        const Segment seg = p.segments[tile.segment];
        const uint32_t head = item % p.kv_heads, row = tile.line / p.group;
        const uint32_t all = steps_of(tile, seg), share = (all + most - 1) / most, parts = (all + share - 1) / share;
        uint32_t next = 0;
        if (first) next = gridDim.x + atomicAdd(p.ticket, 1);
        const uint32_t begin = part * share, steps = part < parts ? min(share, all - begin) : 0;
        if (steps > 0) {
            barrier_wait(q_empty, (turn & 1) ^ 1);
            if (first) {
                const uint32_t valid = min(uint32_t(kKeys), seg.context - (begin + steps - 1) * kKeys);
                s.work = {seg, tile.line, head, begin, steps, valid, parts, most, ticket};
                barrier_expect(q_full, rows * p.group * S::kQk * 2);
#pragma unroll
                for (int c = 0; c < S::kQkColumns; c++) load_queries(shared_address(&s.q[c][0][0]), p.q, head * p.group, seg.start + row, c, q_full);
            }
            const uint32_t key_line = head * p.key_lines, value_line = key_line + p.value_line;
            // `kColumns_` lines from `line` on of the keys of a step.
            auto load = [&](bf16* to, uint32_t bar, int columns, uint32_t step, const int (&at)[2], uint32_t line, bool ends_shared) {
                if constexpr (S::kPaged) {
                    const uint32_t blocks = min(2u, (seg.context - step * kKeys + kBlock - 1) / kBlock);
                    barrier_expect(bar, blocks * columns * kBlock * 128);
                    for (uint32_t b = 0; b < blocks; b++) {
                        const int from = (b == 0 ? at[0] : at[1]) + line;
                        for (int c = 0; c < columns; c++) load_box(shared_address(to) + c * kColumns + b * kBlock * 128, p.keys, 0, from + c, bar);
                    }
                } else {
                    const int from = seg.table + step * kKeys;
                    barrier_expect(bar, columns * kColumns);
                    for (int c = 0; c < columns; c++) {
                        const bool shared = ends_shared && c == columns - 1;
                        load_box(shared_address(to) + c * kColumns, shared ? p.shared : p.keys, from, shared ? p.shared_line : line + c, bar);
                    }
                }
            };
            Blocks here, before;
            // Keys of a step, then values of the step before: as stages become free.
            for (uint32_t step = 0; step <= steps; step++) {
                before = here;
                if (step < steps) {
                    if constexpr (S::kPaged) here.seek(p, seg, begin + step, step == 0);
                    const uint32_t at = steps_before + step, stage = at & 1;
                    barrier_wait(shared_address(&s.k_empty[stage]), ((at >> 1) & 1) ^ 1);
                    if (first) load(&s.keys[stage][0][0][0], shared_address(&s.k_full[stage]), S::kQkColumns, begin + step, here.at, key_line, S::kQk > S::kV);
                }
                if (step > 0) {
                    const uint32_t at = steps_before + step - 1, stage = at & 1;
                    barrier_wait(shared_address(&s.v_empty[stage]), ((at >> 1) & 1) ^ 1);
                    if (first) load(&s.values[stage][0][0][0], shared_address(&s.v_full[stage]), S::kVColumns, begin + step - 1, before.at, value_line, false);
                }
            }
            steps_before += steps;
            turn++;
        }
        // As many ask in vain as have asked at all, so this one is the last.
        if (first && next == gridDim.x + total - 1) *p.ticket = 0;
        ticket = __shfl_sync(0xffffffff, next, 0);
    }
    barrier_wait(q_empty, (turn & 1) ^ 1);
    if (first) {
        s.work.steps = 0;
        barrier_arrive(q_full);
    }
}

// Four words of each of four lanes, turned: lane t has word t of all of them.
__device__ __forceinline__ uint4 turned(uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3, int t) {
    const bool odd = t & 1, high = t & 2;
    const uint32_t x = __shfl_xor_sync(0xffffffff, odd ? v0 : v1, 1), y = __shfl_xor_sync(0xffffffff, odd ? v2 : v3, 1);
    const uint32_t a0 = odd ? x : v0, a1 = odd ? v1 : x, b0 = odd ? y : v2, b1 = odd ? v3 : y;
    const uint32_t r0 = __shfl_xor_sync(0xffffffff, high ? a0 : b0, 2), r1 = __shfl_xor_sync(0xffffffff, high ? a1 : b1, 2);
    return high ? make_uint4(r0, r1, b0, b1) : make_uint4(a0, a1, r0, r1);
}

// Leaves a part's results to the warpgroup that is done last with the lines, which takes those of all
// parts in their order; whether this is it. Threads read what the same ones of other blocks wrote.
template <class S> __device__ __forceinline__ bool merge(const Params& p, Shared<S>& s, const Work& w, int group, float (&sums)[S::kV / 2], float (&top)[2], float (&mass)[2]) {
    constexpr uint32_t kHeld = S::kV / 2 + 4;
    const uint32_t thread = threadIdx.x % 128;
    auto at = [&](uint32_t slot) { return p.partial + (uint64_t(slot) * S::kGroups + group) * kHeld * 128 + thread; };
    float* mine = at(w.slot);
#pragma unroll
    for (int i = 0; i < S::kV / 2; i++) __stcg(mine + i * 128, sums[i]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        __stcg(mine + (S::kV / 2 + h) * 128, top[h]);
        __stcg(mine + (S::kV / 2 + 2 + h) * 128, mass[h]);
    }
    __threadfence();
    asm volatile("bar.sync %0, 128;\n" ::"r"(1 + group) : "memory");
    uint32_t* arrived = p.arrived + w.slot / w.most * S::kGroups + group;
    if (thread == 0) s.done[group] = atomicAdd(arrived, 1) + 1;
    asm volatile("bar.sync %0, 128;\n" ::"r"(1 + group) : "memory");
    if (s.done[group] != w.parts) return false;
    __threadfence();
    if (thread == 0) *arrived = 0;
    const uint32_t first = w.slot / w.most * w.most;
    float high[2] = {-INFINITY, -INFINITY};
    for (uint32_t i = 0; i < w.parts; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) high[h] = fmaxf(high[h], __ldcg(at(first + i) + (S::kV / 2 + h) * 128));
    }
#pragma unroll
    for (int i = 0; i < S::kV / 2; i++) sums[i] = 0.0f;
    mass[0] = mass[1] = 0.0f;
    for (uint32_t part = 0; part < w.parts; part++) {
        const float* from = at(first + part);
        float by[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            by[h] = exp2_of((__ldcg(from + (S::kV / 2 + h) * 128) - high[h]) * p.scale);
            mass[h] += by[h] * __ldcg(from + (S::kV / 2 + 2 + h) * 128);
        }
#pragma unroll
        for (int i = 0; i < S::kV / 2; i++) sums[i] += by[i / 2 % 2] * __ldcg(from + i * 128);
    }
    return true;
}

// A warpgroup and its lines of every tile.
template <class S> __device__ __forceinline__ void consume(const Params& p, Shared<S>& s) {
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, t = lane % 4;
    const int line = group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // of this thread, and 8 below
    const uint64_t q = operand(shared_address(&s.q[0][group * 64][0]));
    uint32_t steps_before = 0;
    float scores[kKeys / 2], sums[S::kV / 2];
    uint32_t weights[kKeys / 4];

    auto release = [&](uint64_t& bar) {
        if (lane == 0) barrier_arrive(shared_address(&bar));
    };
    auto start_scores = [&](uint32_t at) {
        const uint32_t stage = at & 1;
        barrier_wait(shared_address(&s.k_full[stage]), (at >> 1) & 1);
        const uint64_t keys = operand(shared_address(&s.keys[stage][0][0][0]));
        products_begin();
#pragma unroll
        for (int k = 0; k < S::kQk / 16; k++) {
            const uint64_t a = q + k / 4 * (S::kLines * 128 / 16) + k % 4 * kStep16;
            const uint64_t b = keys + k / 4 * (kColumns / 16) + k % 4 * kStep16;
            if (k == 0) {
                product_anew(scores, a, b);
            } else {
                product<128>(scores, a, b);
            }
        }
        products_commit();
    };
    auto start_sums = [&](uint32_t at) {
        const uint64_t values = operand_of_rows<kColumns>(shared_address(&s.values[at & 1][0][0][0]));
#pragma unroll
        for (int k = 0; k < kKeys / 16; k++) product_of_rows(sums, weights + 4 * k, values + k * kRows16);
        products_commit();
    };
    for (uint32_t turn = 0;; turn++) {
        barrier_wait(shared_address(&s.q_full), turn & 1);
        const Work w = s.work;
        if (w.steps == 0) break;
        const uint32_t before = w.segment.context - w.segment.len;
        // This thread's rows and the last key of each, and that of the warpgroup's first row.
        uint32_t rows[2], own[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            rows[h] = (w.line + line + h * 8) / p.group;
            own[h] = min(before + rows[h], w.segment.context - 1);
        }
        const uint32_t lowest = before + (w.line + group * 64) / p.group;
        float top[2] = {-INFINITY, -INFINITY}, mass[2] = {}, shrink[2];
        // Scores of a step become weights.
        auto weigh = [&](uint32_t step) {
            const uint32_t first = (w.first + step) * kKeys;
            if (first + kKeys - 1 > lowest) {
#pragma unroll
                for (int i = 0; i < kKeys / 2; i++) {
                    if (first + i / 4 * 8 + t * 2 + i % 2 > own[i / 2 % 2]) scores[i] = -INFINITY;
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float high = top[h];
#pragma unroll
                for (int j = 0; j < kKeys / 8; j++) high = fmaxf(high, fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
                high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, 1));
                high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, 2));
                // A row that sees no key of this part has none.
                const float floor = high == -INFINITY ? 0.0f : high * p.scale;
                shrink[h] = exp2_of(top[h] * p.scale - floor);
                top[h] = high;
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < kKeys / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& x = scores[4 * j + 2 * h + i];
                        x = exp2_of(x * p.scale - floor);
                        sum += x;
                    }
                }
                mass[h] = mass[h] * shrink[h] + sum;
            }
        };
        auto round = [&]() {
#pragma unroll
            for (int i = 0; i < kKeys / 4; i++) weights[i] = pack_bf16(scores[2 * i], scores[2 * i + 1]);
        };
        start_scores(steps_before);
        products_wait<0>();
        release(s.k_empty[steps_before & 1]);
        if (w.steps == 1) release(s.q_empty);
        weigh(0);
        round();
#pragma unroll
        for (int i = 0; i < S::kV / 2; i++) sums[i] = 0.0f;
        for (uint32_t step = 1; step < w.steps; step++) {
            const uint32_t at = steps_before + step - 1;
            start_scores(at + 1);
            barrier_wait(shared_address(&s.v_full[at & 1]), (at >> 1) & 1);
            start_sums(at);
            products_wait<1>();
            release(s.k_empty[(at + 1) & 1]);
            if (step + 1 == w.steps) release(s.q_empty);
            weigh(step);
            products_wait<0>();
            release(s.v_empty[at & 1]);
#pragma unroll
            for (int i = 0; i < S::kV / 2; i++) sums[i] *= shrink[i / 2 % 2];
            round();
        }
        const uint32_t at = steps_before + w.steps - 1, stage = at & 1;
        barrier_wait(shared_address(&s.v_full[stage]), (at >> 1) & 1);
        if (w.valid < kKeys) {
            // What lies behind the keys may be anything, and nothing times NaN is NaN. Every warpgroup
            // clears it for itself: writing zeros twice does no harm.
            const uint32_t units = (kKeys - w.valid) * 8;
#pragma unroll
            for (int c = 0; c < S::kVColumns; c++) {
                for (uint32_t i = threadIdx.x % 128; i < units; i += 128) {
                    *reinterpret_cast<uint4*>(&s.values[stage][c][w.valid + i / 8][i % 8 * 8]) = make_uint4(0, 0, 0, 0);
                }
            }
            fence_async();
            asm volatile("bar.sync %0, 128;\n" ::"r"(1 + group) : "memory");
        }
        products_begin();
        start_sums(at);
        products_wait<0>();
        release(s.v_empty[stage]);
        steps_before += w.steps;
        if (w.parts > 1 && !merge(p, s, w, group, sums, top, mass)) continue;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float all = mass[h];
            all += __shfl_xor_sync(0xffffffff, all, 1);
            all += __shfl_xor_sync(0xffffffff, all, 2);
            const float by = 1.0f / all;
            // A tile holds whole rows.
            const bool there = rows[h] < w.segment.len && uint32_t(line + h * 8) < S::kLines / p.group * p.group;
            const uint32_t head = w.head * p.group + (w.line + line + h * 8) % p.group;
            bf16* to = p.out + (uint64_t(w.segment.start + rows[h]) * p.heads + head) * S::kV + t * 8;
#pragma unroll
            for (int j = 0; j < S::kV / 32; j++) {
                auto word = [&](int i) {
                    const float* x = sums + 16 * j + 4 * i + 2 * h;
                    return pack_bf16(x[0] * by, x[1] * by);
                };
                const uint4 v = turned(word(0), word(1), word(2), word(3), t);
                if (there) *reinterpret_cast<uint4*>(to + j * 32) = v;
            }
        }
    }
}

template <class S> __device__ __forceinline__ void attend(const Params& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared<S>& s = *reinterpret_cast<Shared<S>*>(memory);
    if (threadIdx.x == 0) {
        constexpr uint32_t kWarps = 4 * S::kGroups;
        barrier_init(shared_address(&s.q_full), 1);
        barrier_init(shared_address(&s.q_empty), kWarps);
        for (int i = 0; i < 2; i++) {
            barrier_init(shared_address(&s.k_full[i]), 1);
            barrier_init(shared_address(&s.v_full[i]), 1);
            barrier_init(shared_address(&s.k_empty[i]), kWarps);
            barrier_init(shared_address(&s.v_empty[i]), kWarps);
        }
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_previous();
    allow_next();
    if (threadIdx.x < 128) {
        fewer_registers<S::kGroups == 2 ? 40 : 32>();
        if (threadIdx.x < 32) produce(p, s);
    } else {
        more_registers<S::kGroups == 2 ? 232 : 160>();
        consume(p, s);
    }
}

}  // namespace prompt
