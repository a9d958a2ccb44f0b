// Bulk copies with barriers, and launches that begin before the one before has ended.
#pragma once
#include "cuda/mma.cuh"

__device__ __forceinline__ void barrier_init(uint32_t bar, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(bar), "r"(arrivals));
}
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
// Orders ordinary accesses of shared memory before copies that the copy engine makes.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(bar), "r"(parity) : "memory");
}
// Both addresses and `bytes` are multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
}
// A box of a tensor map at (c0, c1), innermost first.
__device__ __forceinline__ void tensor_load_2d(uint32_t to, const void* map, int c0, int c1, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(to),
        "l"(map), "r"(c0), "r"(c1), "r"(bar)
        : "memory");
}
__device__ __forceinline__ void tensor_load_3d(uint32_t to, const void* map, int c0, int c1, int c2, uint32_t bar) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(to),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(bar)
        : "memory");
}
// As much into the second-level cache alone.
__device__ __forceinline__ void tensor_prefetch_2d(const void* map, int c0, int c1) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];\n" ::"l"(map), "r"(c0), "r"(c1) : "memory");
}
// In builds that look for results that depend on timing: one warp in four sleeps, up to 20 us.
__device__ __forceinline__ void jitter() {
#ifdef TOKENMILL_JITTER
    uint32_t hash = blockIdx.x * 2654435761u ^ threadIdx.x / 32 * 40503u ^ uint32_t(clock64());
    hash ^= hash >> 15, hash *= 2246822519u, hash ^= hash >> 13;
    if (hash % 4 == 0) __nanosleep((hash >> 8) % 20000);
#endif
}
// Until the kernels before have ended and their writes are seen.
__device__ __forceinline__ void wait_for_previous() {
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
    jitter();
}
// From here on the next kernel may take free multiprocessors.
__device__ __forceinline__ void allow_next() {
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
    jitter();
}
// 128 bytes into the second-level cache.
__device__ __forceinline__ void prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from)); }
// Sixteen bytes that no kernel in flight writes; not delayed beyond a wait for the previous kernel.
__device__ __forceinline__ uint4 load_ahead(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}
