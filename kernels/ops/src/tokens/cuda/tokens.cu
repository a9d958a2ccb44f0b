// Ids that only the device knows, changes of block tables, and the tokens that later steps begin with.
#include "cuda/common.cuh"

constexpr uint32_t kOfSlot = 1u << 31;

struct BeginParams {
    const uint32_t* staged;
    const uint32_t* last;
    uint32_t* ids;
    const uint32_t* count;
    const uint32_t* changes;
    const uint32_t* changed;
    uint64_t* tables;
    uint32_t rows, slots, most_changes, entries;
};

extern "C" __global__ void __launch_bounds__(256) begin_step(const __grid_constant__ BeginParams p) {
    const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t step = gridDim.x * blockDim.x;
    const uint32_t rows = real_rows(p.count, p.rows);
    for (uint32_t row = first; row < rows; row += step) {
        const uint32_t id = p.staged[row];
        const uint32_t slot = id & ~kOfSlot;
        // A slot outside of the table becomes an id outside of every vocabulary.
        p.ids[row] = (id & kOfSlot) && slot < p.slots ? p.last[slot] : id;
    }
    const uint32_t changes = min(*p.changed, p.most_changes);
    for (uint32_t i = first; i < changes; i += step) {
        const uint32_t* change = p.changes + uint64_t(i) * 3;
        if (change[0] < p.entries) p.tables[change[0]] = uint64_t(change[2]) << 32 | change[1];
    }
}

struct KeepParams {
    const uint32_t* tokens;
    const uint32_t* kept;
    const uint32_t* count;
    uint32_t* last;
    uint32_t rows, slots;
};

extern "C" __global__ void __launch_bounds__(256) keep_tokens(const __grid_constant__ KeepParams p) {
    const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= real_rows(p.count, p.rows)) return;
    const uint32_t slot = p.kept[row];
    if (slot < p.slots) p.last[slot] = p.tokens[row];
}
