// The AMX ISA (Sapphire Rapids on): AVX-512 with BF16, whose products of 16-bit types are of tiles.
#define DHSA_ISA amx
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
//
#include "cpu/amx/registers.h"
//
#include "cpu/amx/parts.h"
//
#include "cpu/amx/products.h"
#include "cpu/simd/pooling.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/table.h"

namespace dhsa::cpu {

const Kernels kAmxKernels = amx::with_tiles(
    amx::with_pairs(amx::with_few_rows(amx::with_wide_rows(amx::with_columns(amx::make_table("amx"))))));

}  // namespace dhsa::cpu
