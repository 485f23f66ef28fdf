// Writes a tile's finished rows: out in q's type and lse, or a float32 partial answer of a split list.
#pragma once

#include "cuda/device/attention_work.h"
#include "cuda/device/mma.h"
#include "cuda/device/softmax.h"

namespace dhsa::cuda {

// Four lanes of a quad hold 4 words each; afterwards lane c holds word c of lanes 0 to 3.
__device__ inline void transpose_quad(uint32_t (&word)[4], int32_t lane) {
#pragma unroll
  for (int32_t step = 1; step <= 2; step *= 2) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, lane & step ? word[i] : word[i + step], step);
      if (lane & step) {
        word[i] = received;
      } else {
        word[i + step] = received;
      }
    }
  }
}

// The lane's rows are row_in_tile and row_in_tile + 8; all lanes of the warp call it. A quad writes 64 bytes of a row
// at a time: whole sectors, without a stop in shared memory.
template <class T, int kHeadDim>
__device__ inline void store_rows(const AttentionParams& p, const WorkItem& item, bool partial, int32_t row_in_tile,
                                  const float (&o)[kHeadDim / 2], OnlineSoftmax& softmax, float factor, int32_t lane) {
  softmax.total();
#pragma unroll
  for (int32_t r = 0; r < 2; ++r) {
    const int32_t row = row_in_tile + 8 * r;
    const bool valid = row < item.num_rows;
    const float by = softmax.inverse_sum(r);
    const float lse = softmax.lse(r, factor);
    if (partial) {
      if (!valid) continue;
      const int64_t place = partial_row(p, item, row);
      if (lane % 4 == 0) p.partial_lse[place] = lse;
      float* out = p.partial_out + place * kHeadDim;
#pragma unroll
      for (int32_t j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<float2*>(out + 8 * j + 2 * (lane % 4)) =
            make_float2(o[4 * j + 2 * r] * by, o[4 * j + 2 * r + 1] * by);
      }
      continue;
    }
    const RowPlace place = row_place(p, item, valid ? row : 0);
    if (valid && lane % 4 == 0) {
      p.lse[(int64_t(item.batch) * p.heads + place.head) * p.seqlen_q + place.token] = lse;
    }
    T* out = static_cast<T*>(p.out) + item.batch * p.out_stride.batch + place.head * p.out_stride.head +
             place.token * p.out_stride.row;
#pragma unroll
    for (int32_t j = 0; j < kHeadDim / 8; j += 4) {
      uint32_t word[4];
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) word[i] = pack<T>(o[4 * (j + i) + 2 * r] * by, o[4 * (j + i) + 2 * r + 1] * by);
      transpose_quad(word, lane);
      if (valid) {
        *reinterpret_cast<uint4*>(out + 8 * (j + lane % 4)) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

}  // namespace dhsa::cuda
