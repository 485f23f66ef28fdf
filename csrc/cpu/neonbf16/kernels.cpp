// The NEON ISA with FHM and BF16 (armv8.6-a: Neoverse N2 and V1, Cortex-X2 and A710): products of bfloat16 by bfmmla.
#define DHSA_ISA neonbf16
#include "cpu/neon/vec.h"
//
#include "cpu/neon/product.h"
//
#include "cpu/neon/tiles.h"
//
#include "cpu/neon/registers.h"
//
#include "cpu/neonfhm/products.h"
//
#include "cpu/neon/gather.h"
//
#include "cpu/neonfhm/rows.h"
//
#include "cpu/neonbf16/pairs.h"
//
#include "cpu/simd/math.h"
#include "cpu/simd/pooling.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/table.h"

namespace dhsa::cpu {

const Kernels kNeonbf16Kernels = neonbf16::with_pairs(neonbf16::with_half_products(neonbf16::make_table("neonbf16")));

}  // namespace dhsa::cpu
