// The NEON ISA: every AArch64 machine, from the Raspberry Pi 3 on.
#include "cpu/neon/vec.h"
//
#include "cpu/neon/product.h"
//
#include "cpu/neon/tiles.h"
//
#include "cpu/neon/registers.h"
//
#include "cpu/neon/gather.h"
//
#include "cpu/simd/math.h"
#include "cpu/simd/pooling.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/table.h"

namespace dhsa::cpu {

const Kernels kNeonKernels = neon::make_table("neon");

}  // namespace dhsa::cpu
