// What blocks of a cluster tell each other, through the shared memory of the one that is told.
//
// A block may be told nothing before it has begun, which a barrier says, and nothing after it has ended.
#pragma once
#include <cstdint>

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
}
// A barrier of all threads of the cluster in two halves: what was written before the first is seen after
// the second.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }

// The place in block `rank` that is `at` in this one.
__device__ __forceinline__ uint32_t remote_address(uint32_t at, uint32_t rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(at), "r"(rank));
    return there;
}
__device__ __forceinline__ void store_remote16(uint32_t to, float4 v) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// Stores that count towards the bytes that barrier `bar`, of the block that is told, expects: seen by who
// waits for that, without another barrier.
__device__ __forceinline__ void tell8(uint32_t to, float2 v, uint32_t bar) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(to), "f"(v.x), "f"(v.y), "r"(bar) : "memory");
}
__device__ __forceinline__ void tell16(uint32_t to, float4 v, uint32_t bar) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(bar) : "memory");
}
