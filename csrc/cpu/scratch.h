// Carves the adapter's workspace into aligned arrays. The same code, over no memory, says how many bytes it takes.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace dhsa::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

class Arena {
 public:
  explicit Arena(void* base) : next_(reinterpret_cast<uintptr_t>(base)), base_(next_) {}

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), kAlign));
    return array;
  }
  int64_t bytes() const { return static_cast<int64_t>(next_ - base_); }

 private:
  uintptr_t next_, base_;
};

// Scratch is a struct of arrays that its constructor Scratch(Arena&, args...) takes.
template <class Scratch, class... Args>
int64_t scratch_bytes(const Args&... args) {
  Arena arena(nullptr);
  Scratch scratch(arena, args...);
  return arena.bytes();
}

// One Scratch per worker, side by side.
template <class Scratch, class... Args>
Scratch worker_scratch(void* base, int worker, const Args&... args) {
  Arena arena(static_cast<char*>(base) + worker * scratch_bytes<Scratch>(args...));
  return Scratch(arena, args...);
}

}  // namespace dhsa::cpu
