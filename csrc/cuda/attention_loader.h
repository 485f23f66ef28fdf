// How keys and values come to the sm_90a attention kernel, forced by an environment variable for tests and timing.
//
//   DHSA_FORCE_CUDA_LOADER=auto     as when unset: a tile of kBlockN neighbouring keys comes by TMA, every other tile,
//                                   and every tile where no tensor maps can be made (sm90/key_boxes.h), by cp.async
//                          gather   every tile by cp.async
//                          tma      as auto, but a call without tensor maps, or on another kernel, is refused
//
// Both ways leave the same bytes in shared memory: the answers are equal bit for bit.
#pragma once

#include <string>

#include "dhsa.h"

namespace dhsa::cuda {

// Why sparse_attention on the current device cannot load [B, Hkv, Lk, D] k and v as the variable asks, in one sentence;
// "" where it can. run() answers cudaErrorNotSupported to a refused call, without a launch.
std::string loader_refusal(const Tensor& k, const Tensor& v);

}  // namespace dhsa::cuda
