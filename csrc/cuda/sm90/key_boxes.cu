#include <cuda_runtime_api.h>

#include "cuda/sm90/key_boxes.h"

namespace dhsa::cuda::sm90 {
namespace {

// The driver's encoder, asked for by name: the library links no libcuda. Null where the driver has none.
auto find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // not the next launch's error
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

bool encode(CUtensorMap* map, const void* data, const Strides& stride, const AttentionParams& p, int head_dim,
            int rows) {
  static const auto encoder = find_encoder();
  if (encoder == nullptr) return false;
  const cuuint64_t size[] = {cuuint64_t(head_dim), cuuint64_t(p.seqlen_k), cuuint64_t(p.num_groups / p.groups_per_kv),
                             cuuint64_t(p.batch)};
  const int64_t elements[] = {stride.row, stride.head, stride.batch};
  cuuint64_t bytes[3];
  for (int d = 0; d < 3; ++d) {
    // The stride of a dimension of one entry is anything, and never used. TMA is not documented to take a stride of 0.
    if (size[d + 1] > 1 && elements[d] <= 0) return false;
    bytes[d] = 2 * cuuint64_t(size[d + 1] > 1 ? elements[d] : head_dim);
  }
  const cuuint32_t box[] = {64, cuuint32_t(rows), 1, 1}, step[] = {1, 1, 1, 1};
  // Copies do not look at the numbers: 16-bit words serve both types. Promotion: a row's whole panels, and no more.
  return encoder(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), size, bytes, box, step,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                 head_dim % 128 == 0 ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

KeyBoxes make_key_boxes(const AttentionParams& p, int head_dim, int rows) {
  KeyBoxes boxes = {};
  if (p.seqlen_k == 0) return boxes;
  boxes.usable =
      encode(&boxes.k, p.k, p.k_stride, p, head_dim, rows) && encode(&boxes.v, p.v, p.v_stride, p, head_dim, rows);
  return boxes;
}

}  // namespace dhsa::cuda::sm90
