// Products of up to eight tokens at the speed of memory: warps that send rows of weights through a ring
// in shared memory, and warps that multiply.
//
// A tile is up to eight rows of weights; the warps that multiply share its columns, and their sums meet
// in shared memory. Weights are asked for before the kernel in front has ended.
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
    uint32_t x_pitch;  // bytes from token to token where tokens stay
    uint32_t left;     // stages that are still to be asked for when the next kernel may begin; 0: it may at once
};

// Rows of weights that are multiplied by the same tokens. In pairs, odd rows lie `up` elements after the
// even ones.
struct Rows {
    const bf16* w;
    uint64_t up;
    uint32_t pairs, count, columns;
    __device__ const bf16* row(uint32_t i) const {
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

// By one lane of every warp that sends.
template <class Job> struct Sender {
    const Job& job;
    Shared& s;
    const Ring& ring;
    uint32_t ring_at, sender;
    Place place;
    uint32_t sent = 0;

    __device__ uint32_t at(uint32_t stage) const { return ring_at + stage * ring.stage_bytes; }
    __device__ void weights(const Rows& rows, uint32_t column, uint32_t columns) {
        if (sent >= ring.stages) barrier_wait(shared_address(&s.empty[place.stage]), place.parity ^ 1);
        const uint32_t bar = shared_address(&s.weights_full[place.stage]);
        if (sender == 0) barrier_expect(bar, rows.count * columns * 2);
        for (uint32_t i = sender; i < rows.count; i += kSenders) bulk_load(at(place.stage) + i * ring.pitch, rows.row(i) + column, columns * 2, bar);
        place.next(ring.stages);
        sent++;
    }
    __device__ void tokens(uint32_t stage, uint32_t column, uint32_t columns) const {
        const uint32_t bar = shared_address(&s.x_full[stage]), to = at(stage) + kTile * ring.pitch;
        if (sender == 0) barrier_expect(bar, job.tokens() * columns * 2);
        for (uint32_t token = sender; token < job.tokens(); token += kSenders) bulk_load(to + token * ring.pitch, job.x_row(token) + column, columns * 2, bar);
    }
    // Calls `send(rows, column, columns)` for stages of all tiles, until it says no.
    template <class Send> __device__ static void walk(const Job& job, const Ring& ring, Send send) {
        for (uint32_t tile = 0; tile < job.tiles(); tile++) {
            const Rows rows = job.rows(tile);
            for (uint32_t column = 0; column < rows.columns; column += ring.step) {
                if (!send(rows, column, min(ring.step, rows.columns - column))) return;
            }
        }
    }
};

// By the warps that send. Weights wait for nothing but room. The next kernel begins as soon as one thread
// of every block lets it: where it fits beside this one it fills a ring of its own then, which is best done
// while the last weights here are on their way: earlier they compete with those, later nothing is read.
template <class Job> __device__ void send(Job& job, Shared& s, const Ring& ring, uint32_t ring_at) {
    if (ring.left == 0) allow_next();
    if (threadIdx.x % 32 != 0) return;
    Sender<Job> to{job, s, ring, ring_at, threadIdx.x / 32 - kWarps, {}};
    if constexpr (!Job::kStaged) {
        const uint32_t all = job.tiles() * ((job.columns() + ring.step - 1) / ring.step);
        const uint32_t last = all > ring.left ? all - ring.left : 1;
        Sender<Job>::walk(job, ring, [&](const Rows& rows, uint32_t column, uint32_t columns) {
            to.weights(rows, column, columns);
            if (ring.left > 0 && to.sent == last && to.sender == 0) allow_next();
            return true;
        });
    } else {
        // A stage of tokens follows its weights as soon as there are some.
        Sender<Job>::walk(job, ring, [&](const Rows& rows, uint32_t column, uint32_t columns) {
            if (to.sent == ring.stages) return false;
            to.weights(rows, column, columns);
            return true;
        });
        wait_for_previous();
        Place place;
        uint32_t skip = to.sent;
        Sender<Job>::walk(job, ring, [&](const Rows& rows, uint32_t column, uint32_t columns) {
            if (skip > 0) {
                skip--;
            } else {
                to.weights(rows, column, columns);
            }
            to.tokens(place.stage, column, columns);
            place.next(ring.stages);
            return true;
        });
    }
}

// By one warp of those that multiply: its columns of eight rows of weights and of a token. Lane 4 g + t
// gives the addresses of row g and token g, 16 t bytes on; it has products of token g with rows 2 t and
// 2 t + 1 in the first two sums of both halves of `d`. A token that is not `mine` counts as zeros.
__device__ __forceinline__ void multiply(float (&d)[2][4], uint32_t w_at, uint32_t x_at, uint32_t columns, bool mine) {
    const uint32_t warp = threadIdx.x / 32, t = threadIdx.x % 4;
    for (uint32_t begin = warp * 32; begin < columns; begin += kWarps * 32 * kAhead) {
        uint4 w[kAhead], x[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; j++) {
            const uint32_t at = begin + j * kWarps * 32;
            // Rows beyond the last hold anything; nobody reads their sums.
            const bool there = at + t * 8 < columns;
            w[j] = there ? load_shared16(w_at + at * 2) : uint4{0, 0, 0, 0};
            x[j] = there && mine ? load_shared16(x_at + at * 2) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int j = 0; j < kAhead; j++) {
            mma_16816(d[0], x[j].x, 0, x[j].y, 0, w[j].x, w[j].y);
            mma_16816(d[1], x[j].z, 0, x[j].w, 0, w[j].z, w[j].w);
        }
    }
}

// What a job says:
//   kStaged                 whether tokens come with every stage; else they lie at `x_at`
//   begin()                 by the threads that multiply, before the kernel in front has ended
//   arrived(s, x_at, ring)  by them, when tokens that stay are there
//   tokens(), columns(), x_row(token), tiles(), rows(tile)
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
    job.begin();
    if (ring.left == 0) allow_next();
    wait_for_previous();
    if constexpr (!Job::kStaged) {
        const uint32_t bar = shared_address(&s.x_ready), bytes = job.columns() * 2;
        if (threadIdx.x == 0) barrier_expect(bar, job.tokens() * bytes);
        if (lane == 0 && uint32_t(warp) < job.tokens()) bulk_load(x_at + warp * ring.x_pitch, job.x_row(warp), bytes, bar);
        barrier_wait(bar, 0);
        job.arrived(s, x_at, ring);
    }
    const uint32_t g = lane / 4, t = lane % 4;
    Place place;
    const bool mine = g < job.tokens();
    for (uint32_t tile = 0; tile < job.tiles(); tile++) {
        const uint32_t round = tile % 2;
        float d[2][4] = {};
        for (uint32_t column = 0; column < job.columns(); column += ring.step) {
            const uint32_t columns = min(ring.step, job.columns() - column);
            barrier_wait(shared_address(&s.weights_full[place.stage]), place.parity);
            if constexpr (Job::kStaged) barrier_wait(shared_address(&s.x_full[place.stage]), place.parity);
            const uint32_t base = ring_at + place.stage * ring.stage_bytes;
            const uint32_t w_at = base + g * ring.pitch + t * 16;
            const uint32_t x_from = Job::kStaged ? base + (kTile + g) * ring.pitch + t * 16 : x_at + g * ring.x_pitch + column * 2 + t * 16;
            multiply(d, w_at, x_from, columns, mine);
            __syncwarp();
            if (lane == 0) barrier_arrive(shared_address(&s.empty[place.stage]));
            place.next(ring.stages);
        }
        float total[2] = {};
        if (mine) total[0] = d[0][0] + d[1][0], total[1] = d[0][1] + d[1][1];
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
