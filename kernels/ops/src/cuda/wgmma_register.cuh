// Tensor core products of a warpgroup that begin from nothing, whose left operand is in registers, or whose
// right operand lies by rows.
#pragma once

#include "cuda/wgmma.cuh"

// Eight registers of a sum: added to, and written alone.
#define ADD8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SET8(d, i) \
    "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3]), "=f"(d[i + 4]), "=f"(d[i + 5]), "=f"(d[i + 6]), "=f"(d[i + 7])
#define SUMS32                                                                                        \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SUMS64                                                                                        \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define SUMS128                                                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "    \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// d = a b, as `product`; what d held is not read.
__device__ __forceinline__ void product_anew(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SUMS64 ", %64, %65, 0, 1, 1, 0, 0;\n"
                 : SET8(d, 0), SET8(d, 8), SET8(d, 16), SET8(d, 24), SET8(d, 32), SET8(d, 40), SET8(d, 48), SET8(d, 56)
                 : "l"(a), "l"(b));
}
__device__ __forceinline__ void product_anew(float (&d)[16], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 0, 1, 1, 0, 0;\n"
                 : SET8(d, 0), SET8(d, 8)
                 : "l"(a), "l"(b));
}

// Where a right operand begins whose lines are its rows (along k): 64 columns to a line, `kLead` bytes
// from those to the next 64 columns.
template <uint32_t kLead> __device__ __forceinline__ uint64_t operand_of_rows(uint32_t address) {
    constexpr uint64_t kSwizzled128 = 1ull << 62, kGroup = uint64_t(1024 / 16) << 32, kNext = uint64_t(kLead / 16) << 16;
    return kSwizzled128 | kGroup | kNext | ((address & 0x3ffff) >> 4);
}
// From one step of 16 rows to the next one.
constexpr uint64_t kRows16 = 16 * 128 / 16;

// d += a b for a in registers: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..) of the 16 rows
// of the warp; b by `operand_of_rows`. Those registers stay as they are until the product is done.
__device__ __forceinline__ void product_of_rows(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SUMS64 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : ADD8(d, 0), ADD8(d, 8), ADD8(d, 16), ADD8(d, 24), ADD8(d, 32), ADD8(d, 40), ADD8(d, 48), ADD8(d, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void product_of_rows(float (&d)[32], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SUMS32 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : ADD8(d, 0), ADD8(d, 8), ADD8(d, 16), ADD8(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// d += a b for a in shared memory.
__device__ __forceinline__ void product_of_rows(float (&d)[128], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " SUMS128 ", %128, %129, 1, 1, 1, 0, 1;\n"
                 : ADD8(d, 0), ADD8(d, 8), ADD8(d, 16), ADD8(d, 24), ADD8(d, 32), ADD8(d, 40), ADD8(d, 48), ADD8(d, 56),
                   ADD8(d, 64), ADD8(d, 72), ADD8(d, 80), ADD8(d, 88), ADD8(d, 96), ADD8(d, 104), ADD8(d, 112), ADD8(d, 120)
                 : "l"(a), "l"(b));
}
#undef ADD8
#undef SET8
#undef SUMS32
#undef SUMS64
#undef SUMS128
