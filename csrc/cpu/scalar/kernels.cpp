// The scalar ISA: runs on every machine, and is the reading copy of the others.
#include "cpu/scalar/vec.h"
//
#include "cpu/scalar/tiles.h"
//
#include "cpu/simd/gather.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/math.h"
#include "cpu/simd/pooling.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/table.h"

namespace dhsa::cpu {

const Kernels kScalarKernels = scalar::make_table("scalar");

}  // namespace dhsa::cpu
