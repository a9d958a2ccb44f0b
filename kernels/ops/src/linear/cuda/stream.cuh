// Products of up to eight tokens at the speed of memory: warps that send rows of weights through a ring
// in shared memory, and warps that multiply.
//
// A tile is up to eight rows of weights; the warps that multiply share its columns, and their sums meet
// in shared memory. Weights that are known early are asked for before the kernel in front has ended.
// The order of every sum is fixed, and a token's does not depend on the others.
#pragma once
#include "cuda/async.cuh"

namespace stream {

constexpr int kWarps = 8;    // that multiply
constexpr int kSenders = 4;  // warps that ask for rows; one instruction asks for one
constexpr int kThreads = (kWarps + kSenders) * 32;
constexpr int kTile = 8;  // rows of weights
constexpr int kTokens = 8;
constexpr int kMostStages = 16;
constexpr int kAhead = 4;  // reads of shared memory under way

struct alignas(128) Shared {
    float sums[2][kWarps][kTokens][kTile];
    uint64_t weights_full[kMostStages], x_full[kMostStages], empty[kMostStages], x_ready;
};

// How the ring lies in shared memory, as the host found it fits. Rows of a stage lie `pitch` bytes
// apart, an odd number of half banks, so that two rows are read at once without conflict; after those
// of weights come those of tokens, where they come with every stage.
struct Ring {
    uint32_t stages, pitch, stage_bytes;
    uint32_t step;     // columns of a stage
    uint32_t x_pitch;    // bytes from token to token where tokens stay
    uint32_t under_way;  // stages of weights at once, early
};

// Rows of weights that are multiplied by the same tokens. In pairs, odd rows lie `up` elements after the
// even ones. Rows from `cut` on lie at `then`.
struct Rows {
    const bf16* w;
    uint64_t up;
    uint32_t pairs, count, columns;
    uint32_t cut = kTile;
    const bf16* then = nullptr;
    __device__ const bf16* row(uint32_t i) const {
        if (i >= cut) return then + uint64_t(i - cut) * columns;
        return w + uint64_t(i >> pairs) * columns + (i & pairs) * up;
    }
};

__device__ __forceinline__ void multipliers_meet() { asm volatile("bar.sync 1, %0;\n" ::"n"(kWarps * 32) : "memory"); }

__device__ __forceinline__ uint4 load_shared16(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

// Walks the stages of a ring.
struct Place {
    uint32_t stage = 0, parity = 0;
    __device__ void next(uint32_t stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// By one lane of every warp that sends. Until it is known what there is, no more is under way than keeps
// memory busy: whoever reads something small meanwhile would wait for all of it.
template <class Job> struct Sender {
    const Job& job;
    Shared& s;
    const Ring& ring;
    uint32_t ring_at, sender;
    Place place, landed;
    uint32_t sent = 0;
    bool early = true;

    __device__ uint32_t at(uint32_t stage) const { return ring_at + stage * ring.stage_bytes; }
    __device__ void weights(const Rows& rows, uint32_t column, uint32_t columns) {
        if (sent >= ring.stages) barrier_wait(shared_address(&s.empty[place.stage]), place.parity ^ 1);
        if (early && sent >= ring.under_way) {
            barrier_wait(shared_address(&s.weights_full[landed.stage]), landed.parity);
            landed.next(ring.stages);
        }
        const uint32_t bar = shared_address(&s.weights_full[place.stage]);
        if (sender == 0) barrier_expect(bar, rows.count * columns * 2);
        for (uint32_t i = sender; i < rows.count; i += kSenders) bulk_load(at(place.stage) + i * ring.pitch, rows.row(i) + column, columns * 2, bar);
        place.next(ring.stages);
        sent++;
    }
    __device__ void tokens(uint32_t stage, uint32_t tile, uint32_t group, uint32_t column, uint32_t columns) const {
        const uint32_t bar = shared_address(&s.x_full[stage]), mask = job.tokens_of(tile, group), to = at(stage) + kTile * ring.pitch;
        if (sender == 0) barrier_expect(bar, __popc(mask) * columns * 2);
        for (uint32_t token = sender; token < kTokens; token += kSenders) {
            if (mask >> token & 1) bulk_load(to + token * ring.pitch, job.x_row(tile, group, token) + column, columns * 2, bar);
        }
    }
    // Calls `send(tile, group, rows, column, columns)` for stages of tiles and groups, until it says no.
    template <class Send> __device__ static void walk(const Job& job, const Ring& ring, uint32_t first, uint32_t end, uint32_t groups, Send send) {
        for (uint32_t tile = first; tile < end; tile++) {
            for (uint32_t group = 0; group < groups; group++) {
                const Rows rows = job.rows(tile, group);
                for (uint32_t column = 0; column < rows.columns; column += ring.step) {
                    if (!send(tile, group, rows, column, min(ring.step, rows.columns - column))) return;
                }
            }
        }
    }
};

// Threads that send and that multiply, when it is known what there is.
__device__ __forceinline__ void all_know() { asm volatile("bar.sync 2, %0;\n" ::"n"(kThreads) : "memory"); }
__device__ __forceinline__ void tell() { asm volatile("bar.arrive 2, %0;\n" ::"n"(kThreads) : "memory"); }

// By the warps that send. Weights wait for nothing but to be known and for room.
template <class Job> __device__ void send(Job& job, Shared& s, const Ring& ring, uint32_t ring_at) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Sender<Job> to{job, s, ring, ring_at, warp - kWarps, {}, {}};
    const auto weights = [&](uint32_t, uint32_t, const Rows& rows, uint32_t column, uint32_t columns) {
        to.weights(rows, column, columns);
        return true;
    };
    if constexpr (!Job::kStaged) {
        if (lane == 0) Sender<Job>::walk(job, ring, 0, job.early_tiles(), 1, weights);
        __syncwarp();
        all_know();
        allow_next();
        job.settle();
        to.early = false;
        if (lane == 0) Sender<Job>::walk(job, ring, job.early_tiles(), job.tiles(), 1, weights);
    } else {
        // A stage of tokens follows its weights as soon as there are some.
        uint32_t skip = 0;
        const auto while_room = [&](uint32_t, uint32_t, const Rows& rows, uint32_t column, uint32_t columns) {
            if (skip > 0) return skip--, true;
            if (to.sent == ring.stages) return false;
            to.weights(rows, column, columns);
            return true;
        };
        if (lane == 0) Sender<Job>::walk(job, ring, 0, 1, job.at_once(), while_room);
        __syncwarp();
        all_know();
        allow_next();
        job.settle();
        to.early = false;
        if (lane == 0) {
            skip = to.sent;
            Sender<Job>::walk(job, ring, 0, job.tiles(), job.groups(), while_room);
            wait_for_previous();
            Place place;
            skip = to.sent;
            Sender<Job>::walk(job, ring, 0, job.tiles(), job.groups(), [&](uint32_t tile, uint32_t group, const Rows& rows, uint32_t column, uint32_t columns) {
                if (skip > 0) {
                    skip--;
                } else {
                    to.weights(rows, column, columns);
                }
                to.tokens(place.stage, tile, group, column, columns);
                place.next(ring.stages);
                return true;
            });
        }
    }
}

// What a job says:
//   kStaged                     whether tokens come with every stage; else they lie at `x_at`
//   kAhead                      whether it learns before the kernel in front has ended
//   early_tiles()               tiles whose weights are known before it learns, where tokens stay
//   at_once()                   groups of the first tile that are, where they do not
//   learn(wait)                 by the threads that multiply: what there is; waits for the kernel in front
//                               where it does not learn ahead
//   settle()                    by each thread after that
//   tiles(), groups(), rows(tile, group), tokens_of(tile, group), x_row(tile, group, token),
//   weight(tile, group, token)
//   finish(tile, token, row, sum), by the threads of two warps
template <class Job> __device__ void run(Job& job, Shared& s, const Ring& ring, uint32_t x_at, uint32_t ring_at) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < ring.stages; i++) {
            barrier_init(shared_address(&s.weights_full[i]), 1);
            barrier_init(shared_address(&s.x_full[i]), 1);
            barrier_init(shared_address(&s.empty[i]), kWarps);
        }
        barrier_init(shared_address(&s.x_ready), 1);
        fence_barrier_init();
    }
    __syncthreads();
    if (warp >= kWarps) {
        send(job, s, ring, ring_at);
        return;
    }
    const auto wait = [&] {
        wait_for_previous();
        if constexpr (Job::kStaged) return;
        const uint32_t bar = shared_address(&s.x_ready), mask = job.tokens_of(0, 0), bytes = job.x_columns() * 2;
        if (threadIdx.x == 0) barrier_expect(bar, __popc(mask) * bytes);
        if (lane == 0 && (mask >> warp & 1)) bulk_load(x_at + warp * ring.x_pitch, job.x_row(0, 0, warp), bytes, bar);
    };
    job.learn(wait);
    tell();
    // What was learned lies in memory for the next kernel too.
    allow_next();
    job.settle();
    if constexpr (Job::kAhead) wait();
    if constexpr (!Job::kStaged) barrier_wait(shared_address(&s.x_ready), 0);
    const uint32_t g = lane / 4, t = lane % 4;
    Place place;
    for (uint32_t tile = 0; tile < job.tiles(); tile++) {
        const uint32_t round = tile % 2;
        float total[2] = {};
        for (uint32_t group = 0; group < job.groups(); group++) {
            const Rows rows = job.rows(tile, group);
            const bool mine = job.tokens_of(tile, group) >> g & 1;
            float d[2][4] = {};
            for (uint32_t column = 0; column < rows.columns; column += ring.step) {
                const uint32_t columns = min(ring.step, rows.columns - column);
                barrier_wait(shared_address(&s.weights_full[place.stage]), place.parity);
                if constexpr (Job::kStaged) barrier_wait(shared_address(&s.x_full[place.stage]), place.parity);
                const uint32_t base = ring_at + place.stage * ring.stage_bytes;
                const uint32_t w_at = base + g * ring.pitch + t * 16;
                const uint32_t x_from = Job::kStaged ? base + (kTile + g) * ring.pitch + t * 16 : x_at + g * ring.x_pitch + column * 2 + t * 16;
                for (uint32_t begin = warp * 32; begin < columns; begin += kWarps * 32 * kAhead) {
                    uint4 w[kAhead], x[kAhead];
#pragma unroll
                    for (int j = 0; j < kAhead; j++) {
                        const uint32_t at = begin + j * kWarps * 32;
                        // Rows beyond the last hold anything; nobody reads their sums.
                        const bool there = at + t * 8 < columns;
                        w[j] = there ? load_shared16(w_at + at * 2) : uint4{0, 0, 0, 0};
                        x[j] = there && mine ? load_shared16(x_from + at * 2) : uint4{0, 0, 0, 0};
                    }
#pragma unroll
                    for (int j = 0; j < kAhead; j++) {
                        mma_16816(d[0], x[j].x, 0, x[j].y, 0, w[j].x, w[j].y);
                        mma_16816(d[1], x[j].z, 0, x[j].w, 0, w[j].z, w[j].w);
                    }
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(shared_address(&s.empty[place.stage]));
                place.next(ring.stages);
            }
            if (mine) {
                const float by = job.weight(tile, group, g);
                total[0] += by * (d[0][0] + d[1][0]);
                total[1] += by * (d[0][1] + d[1][1]);
            }
        }
        *reinterpret_cast<float2*>(&s.sums[round][warp][g][t * 2]) = {total[0], total[1]};
        multipliers_meet();
        // Two warps at a time, in turn.
        if (warp / 2 == int(tile % (kWarps / 2))) {
            const uint32_t token = threadIdx.x % 64 / kTile, row = threadIdx.x % kTile;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < kWarps; w++) sum += s.sums[round][w][token][row];
            job.finish(tile, token, row, sum);
        }
    }
}

}  // namespace stream
