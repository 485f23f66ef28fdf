// AMX's tile registers, eight of 16 rows of 64 bytes, and the product that adds to one of them. Rows of the left factor
// and columns of the right one hold pairs of bfloat16, neighbours in k; sums are float32:
//   c[i][j] += sum over p of a[i][p].x * b[p][j].x + a[i][p].y * b[p][j].y
// In assembly, since g++'s intrinsics do not say that a load reads memory, and take no number from a template.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

constexpr int64_t kTileRows = 16, kRowBytes = 64, kTileBytes = kTileRows * kRowBytes;

// What ldtilecfg reads.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);
alignas(64) static const TileShapes kWholeTiles;

// Tiles can be used between the two, 72 ns a pair, which a block of queries pays once; after them the thread's state is
// small again.
inline void begin_tiles() { asm volatile("ldtilecfg %0" ::"m"(kWholeTiles)); }
inline void end_tiles() { asm volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void load_tile(const void* rows, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void* rows, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kSum, int kLeft, int kRight>
inline void add_tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

}  // namespace dhsa::cpu::DHSA_ISA
