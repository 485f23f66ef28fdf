// The AVX2 ISA: x86-64 with AVX2, FMA and F16C (2013 on). Compiled with those flags, alone with this one file.
#include "cpu/avx2/vec.h"
//
#include "cpu/avx2/wide.h"
//
#include "cpu/simd/ahead.h"
#include "cpu/simd/left.h"
//
#include "cpu/avx2/tiles.h"
//
#include "cpu/simd/gather.h"
#include "cpu/simd/math.h"
//
#include "cpu/avx2/exp.h"
//
#include "cpu/simd/columns.h"
#include "cpu/simd/pooling.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/table.h"

namespace dhsa::cpu {

const Kernels kAvx2Kernels = avx2::with_columns(avx2::make_table("avx2"));

}  // namespace dhsa::cpu
