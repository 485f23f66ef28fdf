// Tile shapes of the sm_90a kernel, by head_dim; docs/attention_sm90.md has the reasons and what was measured.
#pragma once

#include "cuda/device/smem_tile.h"

namespace dhsa::cuda::sm90 {

// kHalves m64 tiles per consumer warpgroup (two of them): 128 rows share each gathered key, or 256. kBlockN keys a
// tile.
template <int kHeadDim_, int kHalves_, int kBlockN_, int kStages_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHalves = kHalves_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kBlockM = 64 * kHalves * kConsumers;
  static constexpr int kSlots = (kBlockN + 31) / 32;
  static constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;  // 2 x 128 x 224 + 128 x 56 <= 65536
  using QTile = SmemTile<kBlockM, kHeadDim>;
  using KTile = SmemTile<kBlockN, kHeadDim>;
  static constexpr int kStageBytes = 2 * KTile::kBytes;
  static constexpr int kStageOffset = QTile::kBytes;
  static constexpr int kKeysOffset = kStageOffset + kStages * kStageBytes;       // int32 [kStages, kBlockN]
  static constexpr int kHeaderOffset = kKeysOffset + kStages * kBlockN * 4;      // int32 [kStages]
  static constexpr int kBarrierOffset = (kHeaderOffset + kStages * 4 + 7) & ~7;  // listed, full, empty [kStages]
  static constexpr int kSmemBytes = kBarrierOffset + 3 * kStages * 8 + 1024;     // 1024: to align the tiles
  static_assert(kSmemBytes <= 232448, "an SM gives a block 227 KB");
  static_assert(kHalves == 1 || kStages >= 3, "the next tile is awaited before the last one is released");
};

}  // namespace dhsa::cuda::sm90
