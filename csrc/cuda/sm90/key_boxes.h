// Tensor maps of k and v, by which the sm_90a kernel loads a tile of neighbouring keys with one copy a panel.
#pragma once

#include <cuda.h>

#include "cuda/device/attention_work.h"

namespace dhsa::cuda::sm90 {

// A kernel parameter, by value: a captured graph keeps it.
struct KeyBoxes {
  CUtensorMap k, v;    // 4-D, [B, Hkv, Lk, D]; a box is `rows` keys x 64 columns, laid down in SmemTile's swizzle
  int32_t usable = 0;  // 0: no maps, every tile is gathered
};

// Not usable where no map can be made: a driver without cuTensorMapEncodeTiled (older than CUDA 12.0), no keys, strides
// of 0 or of 2^40 bytes and more.
KeyBoxes make_key_boxes(const AttentionParams&, int head_dim, int rows);

}  // namespace dhsa::cuda::sm90
