// chunk_mass by wgmma: the shape of its launches and the memory between them (chunk_mass_wgmma.h).
#include <algorithm>

#include "cuda/chunk_mass_wgmma.h"
#include "cuda/launch.h"

namespace dhsa::cuda {
namespace {

using mass_wgmma::Config;
using mass_wgmma::kGroups;
using mass_wgmma::WgmmaParams;

constexpr int kFewTiles = 512, kLeastSplit = 512;  // chunks are split until there are so many thread blocks

// Splits of the chunks, so that a call of few tiles fills a GPU, and the chunks of each.
void split_chunks(const MassParams& x, int64_t tiles, int* splits, int* chunks) {
  const int64_t most = std::max<int64_t>(x.capacity / kLeastSplit, 1);
  *splits = static_cast<int>(std::clamp<int64_t>(ceil_div(kFewTiles, std::max<int64_t>(tiles, 1)), 1, most));
  *chunks = static_cast<int>(ceil_div(std::max(x.capacity, 1), static_cast<int64_t>(*splits) * kMassTile) * kMassTile);
}

template <class C>
WgmmaParams plan(const MassParams& x, int all_pairs) {
  WgmmaParams p = {};
  static_cast<MassParams&>(p) = x;
  p.all_pairs = all_pairs, p.octets = (x.rows() + 7) / 8, p.head_dim = C::kHeadDim, p.tile_slots = C::kSlots;
  p.pitch = static_cast<int>(mass_pitch(x.capacity));
  p.group_blocks = C::kGroupOctets / p.octets;
  p.parts = p.group_blocks > 0 ? 1 : static_cast<int>(ceil_div(p.octets, kGroups * C::kGroupOctets));
  const auto row_tiles = [&](int blocks) {
    return p.group_blocks > 0 ? static_cast<int>(ceil_div(blocks, kGroups * p.group_blocks)) : blocks * p.parts;
  };
  p.row_tiles = row_tiles(x.blocks);
  split_chunks(x, static_cast<int64_t>(all_pairs) * row_tiles(x.query_blocks), &p.lse_splits, &p.lse_chunks);
  split_chunks(x, static_cast<int64_t>(x.pairs) * (p.row_tiles / p.parts), &p.score_splits, &p.score_chunks);
  return p;
}

void layout(WgmmaParams& p, Arena& arena) {
  const int64_t lists = static_cast<int64_t>(p.lse_splits) * p.all_pairs * p.query_blocks;
  p.partial = arena.take<float2>(lists * p.octets * 8);
  p.careful = arena.take<int>(lists);
}

}  // namespace

bool mass_uses_wgmma() {
  bool sm90 = false;
  return choose_kernels(&sm90) == cudaSuccess && sm90;
}

int64_t mass_wgmma_bytes(const MassParams& all, int head_dim) {
  Arena arena(nullptr);
  with_head_dim(head_dim, [&](auto dim) {
    WgmmaParams p = plan<Config<dim.value>>(all, all.pairs);
    layout(p, arena);
    return cudaSuccess;
  });
  return arena.used();
}

cudaError_t run_mass_wgmma(MassStep step, const MassParams& x, int all_pairs, const MassMeans& means, DType dtype,
                           int head_dim, void* memory, cudaStream_t stream) {
  if (x.pairs == 0 || x.blocks == 0) return cudaSuccess;
  return with_head_dim(head_dim, [&](auto dim) {
    using C = Config<dim.value>;
    Arena arena(memory);
    WgmmaParams p = plan<C>(x, all_pairs);
    layout(p, arena);
    p.means = means;
    return step == MassStep::kLse ? mass_wgmma::launch_lse(p, dtype, stream)
                                  : mass_wgmma::launch_scores(p, dtype, stream);
  });
}

}  // namespace dhsa::cuda
