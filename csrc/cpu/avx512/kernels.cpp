// The AVX-512 ISA: x86-64 with F, BW, VL and DQ (2017 on). Compiled with those flags, alone with this one file.
#define DHSA_ISA avx512
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
#include "cpu/simd/pooling.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/table.h"

namespace dhsa::cpu {

const Kernels kAvx512Kernels =
    avx512::with_few_rows(avx512::with_wide_rows(avx512::with_columns(avx512::make_table("avx512"))));

}  // namespace dhsa::cpu
