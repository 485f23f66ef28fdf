// The NEON ISA with FHM (Apple M1, Kunpeng 920; part of armv8.4-a): products of float16 in place by fmlal.
#define DHSA_ISA neonfhm
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
#include "cpu/simd/math.h"
#include "cpu/simd/pooling.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/table.h"

namespace dhsa::cpu {

const Kernels kNeonfhmKernels = neonfhm::with_half_products(neonfhm::make_table("neonfhm"));

}  // namespace dhsa::cpu
