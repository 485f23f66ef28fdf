// The AVX-512 ISA with BF16 (Zen 4, Cooper Lake, Sapphire Rapids): products of bfloat16 pairs beside those of AVX-512.
#define DHSA_ISA avx512bf16
#include "cpu/avx2/vec.h"
//
#include "cpu/avx512/wide.h"
//
#include "cpu/simd/ahead.h"
#include "cpu/simd/left.h"
//
#include "cpu/avx512/tiles.h"
//
#include "cpu/simd/gather.h"
#include "cpu/simd/math.h"
//
#include "cpu/avx512/exp.h"
//
#include "cpu/simd/columns.h"
//
#include "cpu/avx512/few_rows.h"
//
#include "cpu/avx512bf16/pairs.h"
#include "cpu/simd/pooling.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/table.h"

namespace dhsa::cpu {

const Kernels kAvx512bf16Kernels = avx512bf16::with_pairs(avx512bf16::with_few_rows(
    avx512bf16::with_wide_rows(avx512bf16::with_columns(avx512bf16::make_table("avx512bf16")))));

}  // namespace dhsa::cpu
