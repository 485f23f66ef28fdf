// What every C++ test shares: seeded random numbers, arrays between guard pages, threads, and one way to run a stage.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "core/half.h"
#include "dhsa.h"

namespace dhsa::test {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline uint64_t seed() {  // fresh in every run; main() prints it, DHSA_TEST_SEED repeats it
  static const uint64_t value = [] {
    const char* given = std::getenv("DHSA_TEST_SEED");
    return given != nullptr ? std::strtoull(given, nullptr, 10) : std::random_device{}();
  }();
  return value;
}

inline std::mt19937_64& rng() {
  static std::mt19937_64 generator(seed());
  return generator;
}
inline double normal() { return std::normal_distribution<double>()(rng()); }
inline int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng()); }

// n random rounds, or DHSA_TEST_ROUNDS percent of them, where every instruction is emulated.
inline int rounds(int n) {
  static const int percent = [] {
    const char* given = std::getenv("DHSA_TEST_ROUNDS");
    return given != nullptr ? std::atoi(given) : 100;
  }();
  return std::max(1, n * percent / 100);
}

#if defined(__SANITIZE_ADDRESS__)
inline void forbid(const void* at, int64_t bytes) { __asan_poison_memory_region(at, bytes); }
inline void permit(const void* at, int64_t bytes) { __asan_unpoison_memory_region(at, bytes); }
#else
inline void forbid(const void*, int64_t) {}
inline void permit(const void*, int64_t) {}
#endif

// Bytes that end at a page nobody may touch, and begin behind another; filled with 0xff: NaN, or -1. Data start at a
// multiple of 16 bytes, of 64 if they are a multiple of 64 long; the sanitizer forbids what alignment leaves over.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    body_ = (bytes + page - 1) / page * page;
    base_ =
        static_cast<char*>(mmap(nullptr, body_ + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + body_, page, PROT_NONE);
    std::memset(base_ + page, 0xff, body_);
    data_ = base_ + page + body_ - (bytes + 15) / 16 * 16;
    forbid(base_ + page, body_);
    permit(data_, bytes);
  }
  ~Guarded() {
    const int64_t page = sysconf(_SC_PAGESIZE);
    permit(base_ + page, body_);
    munmap(base_, body_ + 2 * page);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  char* data() const { return data_; }

 private:
  char *base_, *data_;
  int64_t body_;
};

// A tensor with its memory. heads_last stores [B, heads, L, D] as [B, L, heads, D].
class Array {
 public:
  Array(DType dtype, std::initializer_list<int64_t> shape, bool heads_last = false) {
    tensor.dtype = dtype;
    tensor.ndim = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), tensor.shape);
    int64_t count = 1;
    for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
      tensor.stride[i] = count;
      count *= tensor.shape[i];
    }
    if (heads_last) {
      tensor.stride[2] = tensor.shape[1] * tensor.shape[3];
      tensor.stride[1] = tensor.shape[3];
    }
    size = count;
    memory_ = std::make_shared<Guarded>(count * element_size(dtype));
    tensor.data = memory_->data();
  }

  double at(std::initializer_list<int64_t> index) const {
    const int64_t i = offset(index);
    switch (tensor.dtype) {
      case DType::kFloat32:
        return tensor.as<float>()[i];
      case DType::kFloat16:
        return float_from_half(tensor.as<uint16_t>()[i]);
      case DType::kBFloat16:
        return float_from_bfloat16(tensor.as<uint16_t>()[i]);
      default:
        return tensor.as<int32_t>()[i];
    }
  }
  void put(std::initializer_list<int64_t> index, double value) { store(offset(index), value); }
  double flat(int64_t i) const {  // of a contiguous array
    return tensor.dtype == DType::kFloat32 ? tensor.as<float>()[i] : tensor.as<int32_t>()[i];
  }
  Array& fill(double value) {
    for (int64_t i = 0; i < size; ++i) store(i, value);
    return *this;
  }
  Array& fill_normal(double scale = 1.0) {
    for (int64_t i = 0; i < size; ++i) store(i, scale * normal());
    return *this;
  }
  Array& fill_integers(int64_t low, int64_t high) {
    for (int64_t i = 0; i < size; ++i) store(i, static_cast<double>(draw(low, high)));
    return *this;
  }
  // Indices that nobody should pass: around [0, high], negative, or far away.
  Array& fill_malformed(int64_t high) {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t kind = draw(0, 5);
      tensor.as<int32_t>()[i] = kind == 0   ? std::numeric_limits<int32_t>::min()
                                : kind == 1 ? std::numeric_limits<int32_t>::max()
                                            : static_cast<int32_t>(draw(-high, 2 * high));
    }
    return *this;
  }
  Array copy() const {
    Array other = *this;
    other.memory_ = std::make_shared<Guarded>(size * element_size(tensor.dtype));
    other.tensor.data = other.memory_->data();
    std::memcpy(other.tensor.data, tensor.data, size * element_size(tensor.dtype));
    return other;
  }
  bool same_bits(const Array& other) const {  // of arrays of one shape and layout
    return std::memcmp(tensor.data, other.tensor.data, size * element_size(tensor.dtype)) == 0;
  }
  int64_t dim(int i) const { return tensor.shape[i]; }

  Tensor tensor;
  int64_t size;

 private:
  int64_t offset(std::initializer_list<int64_t> index) const {
    int64_t i = 0, d = 0;
    for (const int64_t x : index) i += x * tensor.stride[d++];
    return i;
  }
  void store(int64_t i, double value) {
    const float x = static_cast<float>(value);
    if (tensor.dtype == DType::kFloat32) tensor.as<float>()[i] = x;
    if (tensor.dtype == DType::kFloat16) tensor.as<uint16_t>()[i] = half_from_float(x);
    if (tensor.dtype == DType::kBFloat16) tensor.as<uint16_t>()[i] = bfloat16_from_float(x);
    if (tensor.dtype == DType::kInt32) tensor.as<int32_t>()[i] = static_cast<int32_t>(value);
  }
  std::shared_ptr<Guarded> memory_;
};

class Threads final : public cpu::Executor {
 public:
  explicit Threads(int workers) : workers_(workers) {}
  int workers() const override { return workers_; }
  void run(int64_t count, const std::function<void(int64_t, int)>& task) const override {
    std::vector<std::thread> threads;
    for (int worker = 0; worker < workers_; ++worker) {
      threads.emplace_back([&, worker] {
        for (int64_t item = worker; item < count; item += workers_) task(item, worker);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int workers_;
};

// Checks, lends a poisoned workspace of exactly the size that was asked for, and runs.
template <class P>
void run_stage(const P& p, int workers = 3) {
  check(p);
  const int64_t bytes = cpu::workspace_bytes(p, workers);
  ASSERT_EQ(bytes % 64, 0);
  cpu::run(p, Guarded(bytes).data(), Threads(workers));
}

constexpr DType kFloatTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// Random chunks of 1 to 12 tokens over [0, length), the row padded to `capacity` columns; fewer cover only a part.
struct Chunks {
  Array offsets, num_chunks;

  Chunks(int64_t batch, int64_t capacity, int64_t length, bool to_the_end = true)
      : offsets(DType::kInt32, {batch, capacity + 1}), num_chunks(DType::kInt32, {batch}) {
    for (int64_t b = 0; b < batch; ++b) {
      int64_t t = 0, c = 0;
      offsets.put({b, 0}, 0);
      while (c < capacity && t < length && (c == 0 || to_the_end || draw(0, 9) > 0)) {
        t = c + 1 == capacity && to_the_end ? length : std::min(length, t + draw(1, 12));
        offsets.put({b, ++c}, static_cast<double>(t));
      }
      num_chunks.put({b}, static_cast<double>(c));
      for (int64_t i = c + 1; i <= capacity; ++i) offsets.put({b, i}, static_cast<double>(length));
    }
  }
};

// |got - want| <= 1e-4 + 1e-4 |want|: float32 sums of a few hundred products; infinities must agree.
inline void expect_score(double got, double want, const char* what = "score") {
  if (std::isinf(want)) {
    EXPECT_EQ(got, want) << what;
  } else {
    EXPECT_LE(std::fabs(got - want), 1e-4 + 1e-4 * std::fabs(want)) << what << ": got " << got << ", want " << want;
  }
}

}  // namespace dhsa::test
