// The experts of up to eight tokens, and beside them experts that every token takes, in one launch that
// reads weights without a pause: the products with gate and up, then the one with down as a single sum
// over all experts of a token; see runs.cuh. Experts that every token takes are known before the router
// has chosen, so their weights come first.
//
// Tiles of the first products are dealt out as blocks get to them. Of the second product every block has
// outputs of its own: their weights follow through the same ring, and what they are multiplied by comes
// when the tiles of the first are done: first for experts that every token takes, which are done early,
// so that weights of the others arrive while blocks still wait for the last tiles. A block waits for
// tiles alone that running blocks have taken, and so ends whatever else runs.
//
// Counters are zero between launches. A block lets the next kernel begin when it takes no more tiles;
// the last one that gets there clears the counter they are dealt out by, so that a later launch may take
// tiles before this one has ended. No tile is done before the kernel in front has ended, and the last
// block that waits no more clears the counters of those.
#include "moe/cuda/runs.cuh"
#include "moe/cuda/touched.cuh"

struct Counters {
    uint32_t dealt;  // tiles
    uint32_t over;   // blocks that take no more
    uint32_t pad[30];
    uint32_t done[2];  // tiles: of experts that every token takes, and of others
    uint32_t passed;   // blocks that wait for none any more
    uint32_t end;
};

struct MoeStreamParams {
    const bf16* x;               // [tokens, hidden]
    const bf16* gate_up;         // [held, 2 * inner, hidden]
    const bf16* down;            // [held, hidden, inner]
    const bf16* always_gate_up;  // [2 * always, hidden] or null
    const bf16* always_down;     // [hidden, always] or null
    bf16* h;                     // [tokens * top_k, inner]
    bf16* always_h;              // [tokens, always]
    Counters* counters;
    bf16* out;                   // [tokens, hidden]
    const uint32_t* count;
    uint32_t tokens, hidden, inner, always;
    runs::Ring ring[2];          // of both products, of the same stages
    Chosen chosen;
    uint32_t add, pad;
};

namespace {

using stream::kTile;
using stream::kTokens;
using stream::kWarps;
using stream::Place;
using runs::Rows;

constexpr uint32_t kThreads = (kWarps + 2) * 32;  // a warp asks for weights, another one for tokens
constexpr uint32_t kOut = kTile / 2;              // outputs of a tile of gate and up
constexpr uint32_t kKept = kWarps * 32 * sizeof(float2);  // bytes of sums of a tile
constexpr uint32_t kPatience = 1u << 28;

struct MoeShared {
    stream::Shared common;
    alignas(128) Touched touched;
    uint32_t tile[stream::kMostStages];  // of a stage; none: there are no more
    Place second;                        // where the second product begins
};
static_assert(sizeof(MoeShared) == 11008 && sizeof(Counters) == 144, "as stream.rs says");

__device__ __forceinline__ void senders_meet() { asm volatile("bar.sync 3, 64;\n" ::: "memory"); }
__device__ __forceinline__ void all_know() { asm volatile("bar.sync 2, %0;\n" ::"n"(kThreads) : "memory"); }
__device__ __forceinline__ void tell() { asm volatile("bar.arrive 2, %0;\n" ::"n"(kThreads) : "memory"); }
// Orders ordinary accesses of memory before copies that the copy engine makes, and the other way.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

struct Experts {
    const MoeStreamParams& p;
    MoeShared& s;
    uint32_t tokens, kept_at, x_at, ring_at;
    uint32_t of_expert, of_all;  // tiles of an expert, and of those that every token takes
    uint32_t first, last;        // outputs of the second product
    uint32_t always;             // groups of it that every token takes

    __device__ Experts(const MoeStreamParams& params, MoeShared& shared)
        : p(params), s(shared), tokens(min(real_rows(p.count, p.tokens), kTokens)) {
        const uint32_t own = (p.hidden + gridDim.x - 1) / gridDim.x;
        kept_at = shared_address(&shared) + sizeof(MoeShared);
        x_at = kept_at + (own + kTile - 1) / kTile * kKept;
        ring_at = x_at + (p.tokens * p.ring[0].x_pitch + 127) / 128 * 128;
        of_expert = p.inner / kOut;
        of_all = p.always / kOut;
        first = uint32_t(uint64_t(p.hidden) * blockIdx.x / gridDim.x);
        last = uint32_t(uint64_t(p.hidden) * (blockIdx.x + 1) / gridDim.x);
        always = p.always != 0;
    }
    __device__ uint32_t stage(uint32_t i) const { return ring_at + i * p.ring[0].stage_bytes; }
    __device__ uint32_t full(uint32_t i) const { return shared_address(&s.common.weights_full[i]); }
    __device__ uint32_t empty(uint32_t i) const { return shared_address(&s.common.empty[i]); }
    __device__ void next(Place& place) const { place.next(p.ring[0].stages); }
    // Tiles of the first products.
    __device__ uint32_t tiles() const { return of_all + s.touched.count * of_expert; }
    __device__ Rows up_rows(uint32_t tile) const {
        const bool all = tile < of_all;
        const uint32_t routed = tile - of_all, at = (all ? tile : routed % of_expert) * kOut;
        const uint64_t up = uint64_t(all ? p.always : p.inner) * p.hidden;
        const bf16* w = all ? p.always_gate_up : p.gate_up + 2 * up * s.touched.expert[routed / of_expert];
        w += uint64_t(at) * p.hidden;
        return {w, w + up, kOut, kOut, kOut, p.hidden};
    }
    __device__ uint32_t groups() const { return always + s.touched.count; }
    __device__ Rows down_rows(uint32_t at, uint32_t group) const {
        const uint32_t count = min(last - at, uint32_t(kTile));
        if (group < always) return {p.always_down + uint64_t(at) * p.always, nullptr, count, 0, kTile, p.always};
        const bf16* w = p.down + (uint64_t(s.touched.expert[group - always]) * p.hidden + at) * p.inner;
        return {w, nullptr, count, 0, kTile, p.inner};
    }
    __device__ uint32_t every_token() const { return (1u << tokens) - 1; }
    __device__ uint32_t tokens_of(uint32_t group) const { return group < always ? every_token() : s.touched.mask[group - always]; }
    __device__ const bf16* h_row(uint32_t group, uint32_t token) const {
        if (group < always) return p.always_h + uint64_t(token) * p.always;
        return p.h + (uint64_t(token) * p.chosen.top_k + s.touched.pair[group - always][token]) * p.inner;
    }
    // Calls `each(at, group, column, columns)` for stages of the second product from the output `at` on:
    // of experts that every token takes, or of the others.
    template <class Each> __device__ void walk_down(bool others, Each each) const {
        const uint32_t begin = others ? always : 0, end = others ? groups() : always;
        const uint32_t all = others ? p.inner : p.always, step = p.ring[1].step;
        for (uint32_t at = first; at < last; at += kTile) {
            for (uint32_t group = begin; group < end; group++) {
                for (uint32_t column = 0; column < all; column += step) each(at, group, column, min(step, all - column));
            }
        }
    }

    // By a warp.
    __device__ void send_weights() {
        const uint32_t lane = threadIdx.x % 32, under_way = p.ring[0].under_way;
        Place place, landed;
        uint32_t sent = 0;
        bool known = false;
        // The next tile is on its way while one is asked for.
        uint32_t dealt = 0;
        const auto deal = [&] {
            if (lane == 0) dealt = atomicAdd(&p.counters->dealt, 1);
        };
        const auto ask = [&](const runs::Ring& ring, const Rows& rows, uint32_t column, uint32_t columns, uint32_t tile, bool alone) {
            barrier_wait(empty(place.stage), place.parity ^ 1);
            // Until it is known what there is, no more is under way than keeps memory busy: whoever reads
            // something small meanwhile would wait for all of it.
            if (!known && sent >= under_way) {
                barrier_wait(full(landed.stage), landed.parity);
                next(landed);
            }
            if (lane == 0) {
                if (alone) s.tile[place.stage] = tile, barrier_arrive(full(place.stage));
                barrier_expect(full(place.stage), rows.all() * columns * 2);
            }
            rows.ask(ring, stage(place.stage), column, columns, full(place.stage));
            next(place);
            sent++;
        };
        deal();
        for (;;) {
            const uint32_t tile = __shfl_sync(0xffffffff, dealt, 0);
            if (tile >= of_all && !known) {
                all_know();
                known = true;
            }
            if (known && tile >= tiles()) break;
            deal();
            const Rows rows = up_rows(tile);
            for (uint32_t column = 0; column < rows.columns; column += p.ring[0].step) {
                ask(p.ring[0], rows, column, min(p.ring[0].step, rows.columns - column), tile, true);
            }
        }
        if (lane == 0 && atomicAdd(&p.counters->over, 1) == gridDim.x - 1) {
            p.counters->dealt = 0;
            p.counters->over = 0;
            __threadfence();
        }
        __syncwarp();
        allow_next();
        barrier_wait(empty(place.stage), place.parity ^ 1);
        if (lane == 0) {
            s.tile[place.stage] = kNone;
            barrier_arrive(full(place.stage));
            barrier_arrive(full(place.stage));
        }
        next(place);
        if (lane == 0) s.second = place;
        senders_meet();
        for (const bool others : {false, true}) {
            walk_down(others, [&](uint32_t at, uint32_t group, uint32_t column, uint32_t columns) {
                ask(p.ring[1], down_rows(at, group), column, columns, 0, false);
            });
        }
    }

    // By another warp: what the second product multiplies.
    __device__ void send_tokens() {
        const uint32_t lane = threadIdx.x % 32;
        all_know();
        senders_meet();
        Place place = s.second;
        for (const bool others : {false, true}) {
            if (lane == 0) {
                await(p.counters->done[others], others ? tiles() - of_all : of_all);
                if (others && atomicAdd(&p.counters->passed, 1) == gridDim.x - 1) *reinterpret_cast<uint4*>(p.counters->done) = {};
            }
            __syncwarp();
            fence_async_global();
            walk_down(others, [&](uint32_t, uint32_t group, uint32_t column, uint32_t columns) {
                const uint32_t mask = tokens_of(group), to = stage(place.stage) + kTile * p.ring[1].pitch;
                barrier_wait(empty(place.stage), place.parity ^ 1);
                if (lane == 0) barrier_expect(full(place.stage), __popc(mask) * columns * 2);
                if (lane < kTokens && mask >> lane & 1) bulk_load(to + lane * p.ring[1].x_pitch, h_row(group, lane) + column, columns * 2, full(place.stage));
                __syncwarp();
                next(place);
            });
        }
    }
    __device__ static void await(const uint32_t& counter, uint32_t all) {
        uint32_t done;
        for (uint32_t i = 0;; i++) {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(done) : "l"(&counter) : "memory");
            if (done == all) return;
            if (i == kPatience) __trap();
        }
    }

    __device__ void release(Place& place) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(empty(place.stage));
        next(place);
    }

    // By the warps that multiply: so many tiles are done since.
    __device__ void say_done(bool others, uint32_t tiles) const {
        fence_async_global();
        stream::multipliers_meet();
        // Releases what all of them stored: the barrier in front makes it this thread's to release.
        if (threadIdx.x == 0 && tiles > 0) asm volatile("red.release.gpu.global.add.u32 [%0], %1;\n" ::"l"(&p.counters->done[others]), "r"(tiles) : "memory");
    }

    // silu(gate x) * up x of every expert that is touched; how many tiles these were here.
    __device__ uint32_t multiply_up(Place& place) const {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const bool mine = every_token() >> g & 1;
        uint32_t round = 0, said = 0;
        for (bool others = false;; round++) {
            barrier_wait(full(place.stage), place.parity);
            const uint32_t tile = s.tile[place.stage];
            if (tile >= of_all && !others) {
                say_done(false, round);
                said = round, others = true;
            }
            if (tile == kNone) break;
            float d[2][4] = {};
            for (uint32_t column = 0; column < p.hidden; column += p.ring[0].step) {
                if (column > 0) barrier_wait(full(place.stage), place.parity);
                const uint32_t w_at = stage(place.stage) + g * p.ring[0].pitch, x_from = x_at + g * p.ring[0].x_pitch + column * 2;
                stream::multiply(d, w_at + t * 16, x_from + t * 16, min(p.ring[0].step, p.hidden - column), mine);
                release(place);
            }
            float total[2] = {};
            if (mine) total[0] = d[0][0] + d[1][0], total[1] = d[0][1] + d[1][1];
            runs::gather(s.common, round, total, [&](uint32_t token, uint32_t row, float sum) {
                const float up = __shfl_xor_sync(0xffffffff, sum, kOut);
                jitter();
                if (row >= kOut || token >= tokens) return;
                const bf16 h = narrow<bf16>(sum / (1.0f + expf(-sum)) * up);
                if (tile < of_all) {
                    p.always_h[uint64_t(token) * p.always + tile * kOut + row] = h;
                    return;
                }
                const uint32_t place = (tile - of_all) / of_expert, at = (tile - of_all) % of_expert * kOut + row;
                if (s.touched.mask[place] >> token & 1) p.h[(uint64_t(token) * p.chosen.top_k + s.touched.pair[place][token]) * p.inner + at] = h;
            });
        }
        release(place);
        say_done(true, round - said);
        return round;
    }

    // The sum over a token's experts of weight * down h: of those that every token takes, kept for each
    // tile, and the others added to it.
    __device__ void multiply_down(Place& place, uint32_t round) const {
        const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, kept = kept_at + threadIdx.x * sizeof(float2);
        float2 total = {};
        for (const bool others : {false, true}) {
            const uint32_t begin = others ? always : 0, end = others ? groups() : always;
            const uint32_t all = others ? p.inner : p.always, step = p.ring[1].step;
            for (uint32_t at = first, tile = 0; at < last; at += kTile, tile++) {
                if (others) asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(total.x), "=f"(total.y) : "r"(kept + tile * kKept));
                for (uint32_t group = begin; group < end; group++) {
                    const bool mine = tokens_of(group) >> g & 1;
                    float d[2][4] = {};
                    for (uint32_t column = 0; column < all; column += step) {
                        barrier_wait(full(place.stage), place.parity);
                        const uint32_t w_at = stage(place.stage) + g * p.ring[1].pitch, x_from = stage(place.stage) + kTile * p.ring[1].pitch + g * p.ring[1].x_pitch;
                        stream::multiply(d, w_at + t * 16, x_from + t * 16, min(step, all - column), mine);
                        release(place);
                    }
                    if (mine) {
                        const float by = group < always ? 1.0f : s.touched.weight[group - always][g];
                        total.x += by * (d[0][0] + d[1][0]);
                        total.y += by * (d[0][1] + d[1][1]);
                    }
                }
                if (!others) {
                    asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(kept + tile * kKept), "f"(total.x), "f"(total.y) : "memory");
                    total = {};
                    continue;
                }
                const float sums[2] = {total.x, total.y};
                runs::gather(s.common, round++, sums, [&](uint32_t token, uint32_t row, float sum) {
                    if (token >= tokens || at + row >= last) return;
                    bf16* out = p.out + uint64_t(token) * p.hidden + at + row;
                    *out = narrow<bf16>(p.add ? sum + widen(*out) : sum);
                });
            }
        }
    }

    __device__ void multiply() {
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, bar = shared_address(&s.common.x_ready);
        touch(p.chosen, s.touched, tokens, [&] {
            wait_for_previous();
            if (threadIdx.x == 0) barrier_expect(bar, tokens * p.hidden * 2);
            if (lane == 0 && warp < tokens) bulk_load(x_at + warp * p.ring[0].x_pitch, p.x + uint64_t(warp) * p.hidden, p.hidden * 2, bar);
        });
        tell();
        barrier_wait(bar, 0);
        Place place;
        const uint32_t rounds = multiply_up(place);
        allow_next();
        multiply_down(place, rounds);
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) moe_stream(const __grid_constant__ MoeStreamParams p) {
    extern __shared__ __align__(128) uint8_t memory[];
    MoeShared& s = *reinterpret_cast<MoeShared*>(memory);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < p.ring[0].stages; i++) {
            // Weights, and what is said of a tile or asked for by the warp that asks for tokens.
            barrier_init(shared_address(&s.common.weights_full[i]), 2);
            barrier_init(shared_address(&s.common.empty[i]), kWarps);
        }
        barrier_init(shared_address(&s.common.x_ready), 1);
        fence_barrier_init();
    }
    __syncthreads();
    Experts job(p, s);
    const uint32_t warp = threadIdx.x / 32;
    if (warp < kWarps) {
        job.multiply();
    } else if (warp == kWarps) {
        job.send_weights();
    } else {
        job.send_tokens();
    }
}
