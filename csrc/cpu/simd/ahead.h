// Asking for what will be read soon.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

constexpr int kLine = 64, kLinePair = 2 * kLine;  // bytes; Intel's cores bring a line's neighbour along

// Whether there is a next row, to which it turns.
inline __attribute__((noinline)) bool turn_to_next_row(Ahead& ahead) {
  if (ahead.asked == ahead.n && ahead.then != nullptr) {
    ahead.rows = ahead.then;
    ahead.row_bytes = ahead.then_row_bytes;
    ahead.then = nullptr;
    ahead.asked = 0;
  }
  if (ahead.asked == ahead.n) return false;
  ahead.line = ahead.rows + ahead.index[ahead.asked++] * ahead.row_bytes;
  ahead.end = ahead.line + ahead.bytes;
  return true;
}

// Asks for so many lines, kBytes apart, into the second-level cache.
template <int kBytes = kLine>
inline __attribute__((always_inline)) void ask(Ahead& ahead, int lines) {
  for (int i = 0; i < lines; ++i) {
    if (ahead.line >= ahead.end) {
      const bool done = ahead.asked == ahead.n && ahead.then == nullptr;
      if (done || !turn_to_next_row(ahead)) return;
    }
    __builtin_prefetch(ahead.line, 0, 2);
    ahead.line += kBytes;
  }
}

}  // namespace dhsa::cpu::DHSA_ISA
