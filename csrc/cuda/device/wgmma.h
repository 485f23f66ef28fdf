// wgmma (sm_90a): D[64, N] += A[64, 16] B[16, N], issued by a warpgroup, asynchronous, float32 accumulators.
//
// Accumulators lie as in mma.h, rows 16 w + lane / 4 (+ 8) for warp w of the group. A comes from shared memory through
// a descriptor (ss) or from registers (rs; B MN-major, or K-major as ss has it). Between issue and wait neither
// accumulators nor A registers may be touched.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dhsa::cuda {

// Descriptor of an operand in SmemTile's 128-byte swizzle.
//   K-major (Q, K):  stride = bytes between groups of 8 rows; a k16 step is 32 bytes further. `leading` is not used.
//   MN-major (V):    stride = bytes between groups of 8 keys, leading = between panels of 64 columns; a k16 step is
//                    2048 bytes further.
__device__ inline uint64_t wgmma_descriptor(uint32_t smem, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return uint64_t((smem & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | kSwizzle128;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending of the committed groups are under way.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Tells the compiler that registers change here, so that it moves no use of them across a wait.
template <int kCount>
__device__ inline void wgmma_touch(float (&r)[kCount]) {
#pragma unroll
  for (int32_t i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

template <class T, int kN>
struct Wgmma;

#define DHSA_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DHSA_NAMES_32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DHSA_NAMES_48                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define DHSA_NAMES_64                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DHSA_NAMES_128                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DHSA_OUT_8(d, i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define DHSA_OUT_16(d) DHSA_OUT_8(d, 0), DHSA_OUT_8(d, 8)
#define DHSA_OUT_32(d) DHSA_OUT_8(d, 0), DHSA_OUT_8(d, 8), DHSA_OUT_8(d, 16), DHSA_OUT_8(d, 24)
#define DHSA_OUT_48(d) DHSA_OUT_32(d), DHSA_OUT_8(d, 32), DHSA_OUT_8(d, 40)
#define DHSA_OUT_64(d) DHSA_OUT_48(d), DHSA_OUT_8(d, 48), DHSA_OUT_8(d, 56)
#define DHSA_OUT_128(d)                                                                                          \
  DHSA_OUT_64(d), DHSA_OUT_8(d, 64), DHSA_OUT_8(d, 72), DHSA_OUT_8(d, 80), DHSA_OUT_8(d, 88), DHSA_OUT_8(d, 96), \
      DHSA_OUT_8(d, 104), DHSA_OUT_8(d, 112), DHSA_OUT_8(d, 120)

// R accumulator registers; operands follow them: R0 .. R5 are "%R", "%R+1", ...
#define DHSA_WGMMA(T, TYPE, N, R, R0, R1, R2, R3, R4, R5)                                              \
  template <>                                                                                          \
  struct Wgmma<T, N> {                                                                                 \
    static __device__ void ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R2                                              \
                   ", 0;\n"                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DHSA_NAMES_##R \
                   "}, " R0 ", " R1 ", p, 1, 1, 0, 0;\n}\n"                                            \
                   : DHSA_OUT_##R(d)                                                                   \
                   : "l"(a), "l"(b), "r"(int32_t(accumulate)));                                        \
    }                                                                                                  \
    static __device__ void rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b) {                     \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R5                                              \
                   ", 0;\n"                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DHSA_NAMES_##R \
                   "}, {" R0 ", " R1 ", " R2 ", " R3 "}, " R4 ", p, 1, 1, 1;\n}\n"                     \
                   : DHSA_OUT_##R(d)                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                      \
    }                                                                                                  \
    static __device__ void rs_kmajor(float (&d)[R], const uint32_t (&a)[4], uint64_t b) {              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " R5                                              \
                   ", 0;\n"                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DHSA_NAMES_##R \
                   "}, {" R0 ", " R1 ", " R2 ", " R3 "}, " R4 ", p, 1, 1, 0;\n}\n"                     \
                   : DHSA_OUT_##R(d)                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                      \
    }                                                                                                  \
  };
DHSA_WGMMA(__nv_bfloat16, "bf16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
DHSA_WGMMA(__nv_bfloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
DHSA_WGMMA(__nv_bfloat16, "bf16", 96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
DHSA_WGMMA(__nv_bfloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
DHSA_WGMMA(__nv_bfloat16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
DHSA_WGMMA(__half, "f16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
DHSA_WGMMA(__half, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
DHSA_WGMMA(__half, "f16", 96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
DHSA_WGMMA(__half, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
DHSA_WGMMA(__half, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
#undef DHSA_WGMMA
#undef DHSA_OUT_8
#undef DHSA_OUT_16
#undef DHSA_NAMES_16
#undef DHSA_OUT_32
#undef DHSA_NAMES_32
#undef DHSA_OUT_48
#undef DHSA_NAMES_48
#undef DHSA_OUT_64
#undef DHSA_NAMES_64
#undef DHSA_OUT_128
#undef DHSA_NAMES_128

}  // namespace dhsa::cuda
