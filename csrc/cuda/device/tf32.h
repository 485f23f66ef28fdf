// float32 products on the tensor cores: an operand is split into two TF32 numbers, a = hi + lo, and the three larger
// products of the halves are summed. About 2^-21 of the operands; a single TF32 number has 2^-11.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dhsa::cuda {

__device__ inline uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// An infinity has no low half: lo is NaN.
__device__ inline void split(float x, uint32_t& hi, uint32_t& lo) {
  hi = to_tf32(x);
  lo = to_tf32(x - __uint_as_float(hi));
}

// c[16][8] += a[16][8] . b[8][8]. Lane = 4 * group + member; a holds rows group and group + 8 of columns member and
// member + 4, b rows member and member + 4 of column group, c rows as a and columns 2 * member and the next.
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace dhsa::cuda
