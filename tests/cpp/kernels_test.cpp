// The micro-kernels of the active ISA, through its table, where a stage's test would not tell what went wrong.
#include "cpu/kernels.h"

#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "reference.h"

namespace dhsa::test {
namespace {

using cpu::active_kernels;
using cpu::Kernels;

constexpr int kHalf = static_cast<int>(DType::kFloat16), kBFloat = static_cast<int>(DType::kBFloat16);

// A vector of memory that ends at a guard page.
template <class T>
struct Guard {
  explicit Guard(int64_t count) : memory(count * static_cast<int64_t>(sizeof(T))) {}
  T* data() const { return reinterpret_cast<T*>(memory.data()); }
  Guarded memory;
};

TEST(Isa, active_one_is_detected_and_forced_by_name) {
  const std::string detected = std::string(",") + cpu::isas_detected() + ",", active = cpu::isa_active();
  EXPECT_NE(detected.find("," + active + ","), std::string::npos);
  const char* forced = std::getenv("DHSA_FORCE_ISA");
  if (forced != nullptr && *forced != '\0') {
    EXPECT_EQ(active, forced);
  } else if (active != "avx512") {  // which machines with slow bfloat16 pairs prefer to the last one
    EXPECT_EQ(active, detected.substr(detected.rfind(',', detected.size() - 2) + 1, active.size()));
  }
}

TEST(HalfTypes, every_half_widens_as_its_bits_say) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0, f = static_cast<double>(fraction);
    const double magnitude = exponent == 31  ? (fraction == 0 ? kInf : kNaN)
                             : exponent == 0 ? std::ldexp(f, -24)
                                             : std::ldexp(1024 + f, static_cast<int>(exponent) - 25);
    const float got = float_from_half(static_cast<uint16_t>(bits));
    if (std::isnan(magnitude)) {
      EXPECT_TRUE(std::isnan(got)) << bits;
    } else {
      EXPECT_EQ(got, sign * magnitude) << bits;
      EXPECT_EQ(half_from_float(got), bits);
    }
  }
}

// Between two neighbouring halves: at the middle to the even one, else to the nearer.
TEST(HalfTypes, rounding_to_nearest_even) {
  for (uint16_t low = 0; low < 0x7bff; ++low) {
    const float a = float_from_half(low), b = float_from_half(static_cast<uint16_t>(low + 1)), middle = (a + b) / 2;
    const uint16_t even = low % 2 == 0 ? low : static_cast<uint16_t>(low + 1);
    EXPECT_EQ(half_from_float(middle), even);
    EXPECT_EQ(half_from_float(std::nextafter(middle, a)), low);
    EXPECT_EQ(half_from_float(std::nextafter(middle, b)), low + 1);
    EXPECT_EQ(half_from_float(-middle), even | 0x8000);
  }
  EXPECT_EQ(half_from_float(65519.0f), 0x7bff);
  EXPECT_EQ(half_from_float(65520.0f), 0x7c00);
  for (uint32_t low = 0; low < 0x7f7f; low += 7) {
    const float a = float_from_bfloat16(static_cast<uint16_t>(low));
    const float b = float_from_bfloat16(static_cast<uint16_t>(low + 1)), middle = a + (b - a) / 2;
    EXPECT_EQ(bfloat16_from_float(middle), low % 2 == 0 ? low : low + 1);
    EXPECT_EQ(bfloat16_from_float(b), low + 1);
  }
  EXPECT_EQ(bfloat16_from_float(std::numeric_limits<float>::max()), 0x7f80);
}

// load_rows over all 65536 values, and store_row of what lies between them, against core/half.h.
TEST(HalfTypes, the_isa_converts_every_value_alike) {
  const Kernels& kernels = active_kernels();
  const Guard<uint16_t> halves(65536);
  const Guard<float> floats(65536);
  for (uint32_t i = 0; i < 65536; ++i) halves.data()[i] = static_cast<uint16_t>(i);
  for (const int dtype : {kHalf, kBFloat}) {
    const auto widen = dtype == kHalf ? float_from_half : float_from_bfloat16;
    const auto narrow = dtype == kHalf ? half_from_float : bfloat16_from_float;
    kernels.load_rows[dtype](halves.data(), 64, 1024, 64, 1.0f, floats.data());
    for (uint32_t i = 0; i < 65536; ++i) {
      const float want = widen(static_cast<uint16_t>(i)), got = floats.data()[i];
      EXPECT_TRUE(std::isnan(want) ? std::isnan(got) : got == want) << dtype << ", " << i;
    }
    for (int64_t i = 0; i < 65536; ++i) floats.data()[i] = static_cast<float>(normal() * std::exp2(draw(-30, 18)));
    const Guard<uint16_t> back(64);
    for (int64_t r = 0; r < 1024; ++r) {
      kernels.store_row[dtype](floats.data() + r * 64, 1.0f, 64, back.data());
      for (int64_t d = 0; d < 64; ++d) EXPECT_EQ(back.data()[d], narrow(floats.data()[r * 64 + d]));
    }
  }
}

// A float32 chain, one division and one rounding: the same bits on every ISA, ties and long sums included.
TEST(Kernels, means_of_rows_bit_for_bit) {
  const Kernels& kernels = active_kernels();
  for (const DType dtype : kFloatTypes) {
    for (const int64_t rows : {1, 2, 3, 16, 128, 131}) {
      const int64_t head_dim = 8 * draw(1, 5), type = static_cast<int64_t>(dtype);
      const Array x = Array(dtype, {1, 2, rows, head_dim}, true).fill_normal(std::exp2(draw(-20, 10)));
      const Array mean(dtype, {1, 1, 1, head_dim});
      kernels.mean_rows[type](static_cast<char*>(x.tensor.data) + head_dim * element_size(dtype), x.tensor.stride[2],
                              rows, head_dim, mean.tensor.data);
      const Row want = block_row(x, 0, 1, Geometry(0, rows, rows, rows, 0), 0, {rows, QueryRows::kMean});
      for (int64_t d = 0; d < head_dim; ++d) EXPECT_EQ(mean.at({0, 0, 0, d}), want[d]) << rows << " rows, " << d;
    }
  }
}

TEST(Kernels, softcap_of_every_size) {
  const Kernels& kernels = active_kernels();
  const Guard<float> s(1024);
  for (const float softcap : {1.0f, 50.0f}) {
    for (const double size : {1e-6, 1e-2, 0.29, 0.31, 1.0, 5.0, 100.0}) {
      Row x(1024);
      for (int64_t j = 0; j < 1024; ++j) {
        s.data()[j] = static_cast<float>(softcap * size * normal());
        x[j] = s.data()[j];
      }
      kernels.softcap_row(s.data(), 1024, softcap);
      for (int64_t j = 0; j < 1024; ++j) {
        const double want = capped(x[j], softcap);
        EXPECT_LE(std::fabs(s.data()[j] - want), 4e-7 * std::fabs(want)) << x[j];
      }
    }
  }
}

TEST(Kernels, softmax_row_carries_its_maximum_and_sum) {
  const Kernels& kernels = active_kernels();
  const Guard<float> s(64);
  for (const double size : {0.1, 3.0, 300.0}) {
    Row all;
    float row_max = -std::numeric_limits<float>::infinity(), row_sum = 0;
    for (int tile = 0; tile < 5; ++tile) {
      const float before = row_max;
      for (int64_t j = 0; j < 64; ++j) {
        s.data()[j] = tile == 0 || draw(0, 3) == 0 ? -std::numeric_limits<float>::infinity()  // masked
                                                   : static_cast<float>(size * normal());
        all.push_back(s.data()[j]);
      }
      const float shrink = kernels.softmax_row(s.data(), 64, &row_max, &row_sum);
      EXPECT_EQ(row_max, *std::max_element(all.begin(), all.end()));
      EXPECT_NEAR(shrink, before == row_max ? 1.0 : std::exp(static_cast<double>(before) - row_max), 1e-6);
      for (int64_t j = 0; j < 64; ++j) {
        const double logit = all[all.size() - 64 + j];
        EXPECT_NEAR(s.data()[j], logit == -kInf ? 0.0 : std::exp(logit - row_max), 3e-7);
      }
    }
    EXPECT_NEAR(row_max + std::log(row_sum), log_sum_exp(all), 1e-6 * std::max(1.0, size));
  }
}

// What select_keys' ties and the strict mode rest on: an element's value depends on its row and column alone.
TEST(Kernels, products_do_not_depend_on_the_place_in_the_tile) {
  const Kernels& kernels = active_kernels();
  const int64_t depth = 40, panel = kernels.panel, columns = 5 * panel, most = 41;
  const Guard<float> a(most * depth), b(depth * columns), c(most * columns), one(panel);
  for (int64_t i = 0; i < most * depth; ++i) a.data()[i] = static_cast<float>(normal());
  for (int64_t i = 0; i < depth * columns; ++i) b.data()[i] = static_cast<float>(normal());
  for (int64_t rows = 1; rows <= most; ++rows) {
    kernels.gemm(rows, depth, a.data(), depth, b.data(), columns, c.data(), columns, false);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; j += panel) {
        kernels.gemm(1, depth, a.data() + r * depth, depth, b.data() + j * depth, panel, one.data(), panel, false);
        EXPECT_EQ(std::memcmp(one.data(), c.data() + r * columns + j, panel * sizeof(float)), 0) << rows << ", " << r;
      }
    }
  }
}

// Exact where products and sums are small integers: every count of rows, the greatest depth, rows apart in memory, with
// and without something to add to.
TEST(Kernels, products_of_small_integers) {
  const Kernels& kernels = active_kernels();
  const int64_t panel = kernels.panel, columns = 4 * panel;
  for (const int64_t depth : {int64_t{8}, int64_t{24}, cpu::kMaxDepth}) {
    for (int64_t rows = 1; rows <= 41; ++rows) {
      const int64_t lda = depth + 4, ldc = columns + 4;
      const Guard<float> a(rows * lda), b(depth * columns), c(rows * ldc);
      for (int64_t i = 0; i < rows * lda; ++i) a.data()[i] = static_cast<float>(draw(-8, 8));
      for (int64_t i = 0; i < depth * columns; ++i) b.data()[i] = static_cast<float>(draw(-8, 8));
      for (const bool accumulate : {false, true}) {
        std::fill_n(c.data(), rows * ldc, 3.0f);
        kernels.gemm(rows, depth, a.data(), lda, b.data(), columns, c.data(), ldc, accumulate);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < columns; ++j) {
            double sum = accumulate ? 3.0 : 0.0;
            const float* panel_of_j = b.data() + j / panel * panel * depth;
            for (int64_t i = 0; i < depth; ++i) sum += a.data()[r * lda + i] * panel_of_j[i * panel + j % panel];
            EXPECT_EQ(c.data()[r * ldc + j], sum) << depth << ", " << rows << ", " << r << ", " << j;
          }
          for (int64_t j = columns; j < ldc; ++j) EXPECT_EQ(c.data()[r * ldc + j], 3.0f);
        }
      }
    }
  }
}

Array integers(DType dtype, int64_t n, int64_t columns) {
  Array x(dtype, {1, 1, n, columns});
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t d = 0; d < columns; ++d) x.put({0, 0, r, d}, draw(-4, 4));
  }
  return x;
}

// Exact where products and sums are small integers; every count of rows and of panels, and an accumulator to add to.
TEST(Kernels, pair_products_of_packed_keys_and_values) {
  const Kernels& kernels = active_kernels();
  if (kernels.gemm_pairs == nullptr) GTEST_SKIP() << kernels.name << " has no pair products";
  for (const int64_t head_dim : {8, 16, 24, 48}) {
    for (int64_t rows = 1; rows <= 17; ++rows) {
      const Array q = integers(DType::kBFloat16, rows, head_dim), k = integers(DType::kBFloat16, 20, head_dim);
      const Array v = integers(DType::kBFloat16, 20, head_dim), p = integers(DType::kBFloat16, rows, 16);
      const int32_t index[13] = {3, 7, 19, 0, 1, 2, 4, 5, 6, 8, 9, 10, 11};
      const int64_t width = (head_dim + 15) / 16 * 16;
      const Guard<float> panels(16 * width / 2), scores(rows * 16), out(rows * width);
      kernels.pack_key_pairs[kBFloat](k.tensor.data, head_dim, index, 13, 16, head_dim, panels.data());
      kernels.gemm_pairs(rows, head_dim, q.tensor.data, head_dim, panels.data(), 16, scores.data(), 16, false);
      EXPECT_TRUE(kernels.pack_value_pairs[kBFloat](v.tensor.data, head_dim, index, 13, 16, head_dim, panels.data()));
      std::fill_n(out.data(), rows * width, 5.0f);
      kernels.gemm_pairs(rows, 16, p.tensor.data, 16, panels.data(), width, out.data(), width, true);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < 16; ++j) {
          double score = 0.0;
          for (int64_t d = 0; d < head_dim && j < 13; ++d) score += q.at({0, 0, r, d}) * k.at({0, 0, index[j], d});
          EXPECT_EQ(scores.data()[r * 16 + j], score) << head_dim << ", " << r << ", " << j;
        }
        for (int64_t d = 0; d < width; ++d) {
          double sum = 5.0;
          for (int64_t j = 0; j < 13 && d < head_dim; ++j) sum += p.at({0, 0, r, j}) * v.at({0, 0, index[j], d});
          EXPECT_EQ(out.data()[r * width + d], sum) << head_dim << ", " << r << ", " << d;
        }
      }
    }
  }
}

int64_t whole_steps(int64_t n) { return cpu::round_up(n, cpu::kPairStep); }

// Exact where products and sums are small integers and probabilities too, which those rounded to pairs are where every
// key has the largest score or none: every type, counts of keys around the tile's rows, an odd one too, and one tile of
// columns, one and a half, and two.
TEST(Kernels, scores_by_key_and_their_values) {
  const Kernels& kernels = active_kernels();
  if (kernels.dot_columns[0] == nullptr) GTEST_SKIP() << kernels.name << " packs keys";
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const int type = static_cast<int>(dtype);
    const bool pairs = kernels.pack_key_pairs[type] != nullptr, between = pairs && kernels.begin_block != nullptr;
    for (const int64_t head_dim : {8, 24, 48, 128, 256}) {
      for (const int64_t n : {1, 3, 4, 6, 7, 8, 9, 12, 13, 17, 64, 199}) {
        if (n > (pairs ? kernels.pair_keys : cpu::kBlockN)) continue;
        for (const int64_t columns : {16, 48, 64}) {
          const float scale = columns == 48 ? 0.5f : 1.0f;
          const bool exact = columns != 48;
          const int64_t rows = columns - 3, keys = 70, lds = columns + 16, width = (head_dim + 15) / 16 * 16;
          const Array q = integers(pairs ? dtype : DType::kFloat32, rows, head_dim);
          const Array k = integers(dtype, keys, head_dim), v = integers(dtype, keys, head_dim);
          const Guard<int32_t> index(n);
          for (int64_t j = 0; j < n; ++j) index.data()[j] = static_cast<int32_t>((j * 13 + 5) % keys);
          const Guard<float> q_panels(columns * whole_steps(head_dim)), s(n * lds + lds);
          const Guard<float> copies(whole_steps(n) * whole_steps(head_dim));
          const Guard<float> v_panels(whole_steps(n) * width), out(rows * width);
          if (pairs) {
            kernels.pack_key_pairs[type](q.tensor.data, head_dim, nullptr, rows, columns, head_dim, q_panels.data());
          } else {
            kernels.pack_keys[0](q.tensor.data, head_dim, nullptr, rows, columns, head_dim, q_panels.data());
          }
          const cpu::KeyTile tile{k.tensor.data, v.tensor.data, head_dim, head_dim, index.data(), n, head_dim};
          cpu::Ahead ahead{static_cast<const char*>(k.tensor.data),
                           static_cast<const char*>(v.tensor.data),
                           head_dim * element_size(dtype),
                           head_dim * element_size(dtype),
                           head_dim * element_size(dtype),
                           index.data(),
                           draw(0, 1) * n};
          if (between) kernels.begin_block();
          if (kernels.copy_keys[type] != nullptr) kernels.copy_keys[type](tile, copies.data());
          const bool few = columns <= kernels.few_columns[type] && draw(0, 1) == 0;
          kernels.dot_columns[type](tile, few ? nullptr : copies.data(), q_panels.data(), 0, columns, scale, s.data(),
                                    lds, ahead);
          for (int64_t j = 0; j < n; ++j) {
            for (int64_t i = 0; i < rows; ++i) {
              double sum = 0;
              for (int64_t d = 0; d < head_dim; ++d) sum += q.at({0, 0, i, d}) * k.at({0, 0, index.data()[j], d});
              ASSERT_EQ(s.data()[j * lds + i], scale * sum) << head_dim << ", " << n << ", " << j << ", " << i;
            }
          }

          std::vector<float> factors(rows, 1.0f);
          std::vector<double> p(n * lds);
          std::fill_n(out.data(), rows * width, 5.0f);
          if (pairs) {
            EXPECT_TRUE(kernels.pack_value_pairs[type](tile.v, head_dim, index.data(), n, (n + 1) / 2 * 2, head_dim,
                                                       v_panels.data()));
            const Guard<float> row_max(columns), row_sum(columns), shrink(columns);
            std::fill_n(row_max.data(), columns, -static_cast<float>(kInf));
            std::fill_n(row_sum.data(), columns, 0.0f);
            for (double& x : p) x = exact ? (draw(0, 1) == 0 ? 0.0 : -kInf) : 2 * normal();
            std::copy(p.begin(), p.end(), s.data());
            kernels.softmax_column_pairs[type](s.data(), lds, n, columns, 0.75f, row_max.data(), row_sum.data(),
                                               shrink.data(), ahead);
            for (int64_t i = 0; i < n * lds; ++i) {
              const double row_max_i = row_max.data()[i % lds % columns];
              p[i] = std::isinf(p[i]) ? 0.0 : std::exp(0.75 * p[i] - row_max_i);
            }
            kernels.add_column_pairs[type](s.data(), lds, n, v_panels.data(), width, rows, out.data(), width, ahead);
          } else {
            for (int64_t i = 0; i < n * lds; ++i) s.data()[i] = static_cast<float>(p[i] = draw(0, 8));
            EXPECT_TRUE(kernels.pack_values[type](tile.v, head_dim, index.data(), n, n, head_dim, v_panels.data()));
            const bool shrinks = draw(0, 2) > 0;
            for (float& factor : factors) factor = shrinks ? static_cast<float>(draw(0, 4)) / 4 : 1.0f;
            const float* shrink = shrinks ? factors.data() : nullptr;
            const auto add_listed_columns = head_dim == width ? kernels.add_listed_columns[type] : nullptr;
            if (add_listed_columns != nullptr && draw(0, 1) == 0) {
              add_listed_columns(s.data(), lds, tile, rows, shrink, out.data(), width, ahead);
            } else {
              kernels.add_columns(s.data(), lds, n, v_panels.data(), width, rows, shrink, out.data(), width, ahead);
            }
          }
          EXPECT_LE(ahead.asked, n);
          if (between) kernels.end_block();
          const double rounding = exact || !pairs ? 0.0 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-14;
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t d = 0; d < head_dim; ++d) {
              double sum = 5 * factors[i], size = 5;
              for (int64_t j = 0; j < n; ++j) {
                const double x = p[j * lds + i] * v.at({0, 0, index.data()[j], d});
                sum += x;
                size += std::abs(x);
              }
              ASSERT_NEAR(out.data()[i * width + d], sum, rounding * size) << head_dim << ", " << n << ", " << i;
            }
          }
        }
      }
    }
  }
}

// An infinity or a NaN of a key or of a query is in its own scores alone, as a product of float32 has it. Where float16
// is split in two bfloat16, their lower parts, 2^-7 of the whole each, are not multiplied.
TEST(Kernels, scores_by_key_of_what_is_not_finite) {
  const Kernels& kernels = active_kernels();
  if (kernels.dot_columns[0] == nullptr) GTEST_SKIP() << kernels.name << " packs keys";
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const int type = static_cast<int>(dtype);
    const bool pairs = kernels.pack_key_pairs[type] != nullptr, between = pairs && kernels.begin_block != nullptr;
    for (int round = 0; round < rounds(60); ++round) {
      const int64_t head_dim = 8 * draw(1, 20), n = draw(1, 64), columns = 16 * draw(1, 5), lds = columns + 16;
      Array q = Array(pairs ? dtype : DType::kFloat32, {1, 1, columns, head_dim}).fill_normal();
      Array k = Array(dtype, {1, 1, n, head_dim}).fill_normal();
      const double poisons[] = {kInf, -kInf, kNaN, 0.0};
      for (int i = static_cast<int>(draw(0, 3)); i > 0; --i) {
        (draw(0, 1) == 0 ? q : k).put({0, 0, draw(0, n - 1) % columns, draw(0, head_dim - 1)}, poisons[draw(0, 3)]);
      }
      const Guard<int32_t> index(n);
      for (int64_t j = 0; j < n; ++j) index.data()[j] = static_cast<int32_t>(j);
      const Guard<float> q_panels(columns * whole_steps(head_dim)), s(n * lds);
      const Guard<float> copies(whole_steps(n) * whole_steps(head_dim));
      if (pairs) {
        kernels.pack_key_pairs[type](q.tensor.data, head_dim, nullptr, columns, columns, head_dim, q_panels.data());
      } else {
        kernels.pack_keys[0](q.tensor.data, head_dim, nullptr, columns, columns, head_dim, q_panels.data());
      }
      const cpu::KeyTile tile{k.tensor.data, k.tensor.data, head_dim, head_dim, index.data(), n, head_dim};
      if (between) kernels.begin_block();
      if (kernels.copy_keys[type] != nullptr) kernels.copy_keys[type](tile, copies.data());
      cpu::Ahead ahead{};
      kernels.dot_columns[type](tile, copies.data(), q_panels.data(), 0, columns, 0.5f, s.data(), lds, ahead);
      if (between) kernels.end_block();
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < columns; ++i) {
          double want = 0.0, size = 0.0;
          for (int64_t d = 0; d < head_dim; ++d) {
            const double product = 0.5 * q.at({0, 0, i, d}) * k.at({0, 0, j, d});
            want += product;
            size += std::fabs(product);
          }
          const double got = s.data()[j * lds + i];
          if (!std::isfinite(want)) {
            EXPECT_TRUE(std::isnan(want) ? std::isnan(got) : got == want) << type << ": " << got << ", not " << want;
          } else {
            EXPECT_NEAR(got, want, 6.2e-5 * size) << type << ", " << head_dim << ", " << n << ", " << j << ", " << i;
          }
        }
      }
    }
  }
}

TEST(Kernels, masks_and_softmax_down_columns) {
  const Kernels& kernels = active_kernels();
  if (kernels.softmax_columns == nullptr) GTEST_SKIP() << kernels.name << " has rows only";
  for (const int64_t n : {1, 3, 4, 29, 64}) {
    const int64_t m = 48, lds = m + 16;
    const Guard<float> s(n * lds), row_max(m), row_sum(m), shrink(m);
    const Guard<int32_t> index(n), low(m), high(m);
    for (int64_t i = 0; i < m; ++i) {
      row_max.data()[i] = -std::numeric_limits<float>::infinity();
      row_sum.data()[i] = 0.0f;
      low.data()[i] = static_cast<int32_t>(i / 2 - 1);
      high.data()[i] = static_cast<int32_t>(i);
    }
    std::vector<Row> all(m);
    for (int tile = 0; tile < 4; ++tile) {
      for (int64_t i = 0; i < n * lds; ++i) s.data()[i] = static_cast<float>(20.0 * normal());
      for (int64_t j = 0; j < n; ++j) index.data()[j] = static_cast<int32_t>(draw(0, m));
      std::vector<double> logits(s.data(), s.data() + n * lds);
      for (double& logit : logits) logit *= 0.5;
      std::vector<float> before(row_max.data(), row_max.data() + m);
      kernels.mask_columns(s.data(), lds, index.data(), n, low.data(), high.data(), m);
      cpu::Ahead ahead{};
      kernels.softmax_columns(s.data(), lds, n, m, 0.5f, row_max.data(), row_sum.data(), shrink.data(), ahead);
      for (int64_t i = 0; i < m; ++i) {
        const auto seen = [&](int64_t j) {
          return low.data()[i] < index.data()[j] && index.data()[j] <= high.data()[i];
        };
        for (int64_t j = 0; j < n; ++j) all[i].push_back(seen(j) ? logits[j * lds + i] : -kInf);
        const double peak = *std::max_element(all[i].begin(), all[i].end());
        EXPECT_LE(row_max.data()[i], peak);
        EXPECT_GE(row_max.data()[i], peak - 4);
        if (row_max.data()[i] == -kInf) {
          EXPECT_EQ(row_sum.data()[i], 0.0f);
          for (int64_t j = 0; j < n; ++j) EXPECT_EQ(s.data()[j * lds + i], 0.0f);
          continue;
        }
        const double rise = before[i] == -kInf ? 0 : row_max.data()[i] - static_cast<double>(before[i]);
        EXPECT_NEAR(shrink.data()[i], std::exp(-rise), 1e-6);
        EXPECT_TRUE(rise == 0 || rise > 4);
        for (int64_t j = 0; j < n; ++j) {
          const double p = seen(j) ? std::exp(logits[j * lds + i] - row_max.data()[i]) : 0.0;
          EXPECT_NEAR(s.data()[j * lds + i], p, 3e-7 * std::max(1.0, 2 * p));
        }
        EXPECT_NEAR(row_max.data()[i] + std::log(row_sum.data()[i]), log_sum_exp(all[i]), 1e-5);
      }
    }
  }
}

// Exact where products and sums are small integers: every count of rows and of keys around the blocks that kernels work
// in, with an index and without, q as float32 and, where the ISA has it, as stored.
TEST(Kernels, rows_in_place) {
  const Kernels& kernels = active_kernels();
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (const int64_t head_dim : {int64_t{8}, int64_t{24}, int64_t{40}, int64_t{72}, int64_t{136}, cpu::kMaxDepth}) {
      const int64_t length = 90, stride = head_dim + 8;
      Array x(static_cast<DType>(dtype), {1, 1, length, stride});
      for (int64_t r = 0; r < length; ++r) {
        for (int64_t d = 0; d < stride; ++d) x.put({0, 0, r, d}, draw(-4, 4));
      }
      for (const int64_t n : {0, 1, 7, 8, 9, 16, 63, 64, 75}) {
        const int64_t m = draw(1, 9), lds = n + 3;
        const Guard<int32_t> index(n);
        for (int64_t j = 0; j < n; ++j)
          index.data()[j] =
              static_cast<int32_t>(j > 0 && draw(0, 2) > 0 ? (index.data()[j - 1] + 1) % length : draw(0, length - 1));
        Array q(static_cast<DType>(dtype), {1, 1, m, head_dim});
        const Guard<float> floats(m * head_dim), p(m * lds), scores(m * lds), out(m * head_dim);
        for (int64_t i = 0; i < m * head_dim; ++i) {
          q.put({0, 0, i / head_dim, i % head_dim}, floats.data()[i] = static_cast<float>(draw(-4, 4)));
        }
        for (int64_t i = 0; i < m * lds; ++i) p.data()[i] = static_cast<float>(draw(0, 16)) / 16;
        const auto check_scores = [&](bool indexed) {
          for (int64_t r = 0; r < m; ++r) {
            for (int64_t j = 0; j < n; ++j) {
              double want = 0.0;
              for (int64_t d = 0; d < head_dim; ++d)
                want += floats.data()[r * head_dim + d] * x.at({0, 0, indexed ? index.data()[j] : j, d});
              EXPECT_EQ(scores.data()[r * lds + j], want)
                  << dtype << ", " << head_dim << ", " << n << ", " << r << ", " << j;
            }
            for (int64_t j = n; j < lds; ++j) EXPECT_EQ(scores.data()[r * lds + j], 9.0f);
          }
        };
        for (const int32_t* keys : {static_cast<const int32_t*>(index.data()), static_cast<const int32_t*>(nullptr)}) {
          std::fill_n(scores.data(), m * lds, 9.0f);
          kernels.dot_rows[dtype](floats.data(), m, x.tensor.data, stride, keys, n, head_dim, scores.data(), lds);
          check_scores(keys != nullptr);
        }
        if (kernels.dot_stored_rows[dtype] != nullptr) {
          std::fill_n(scores.data(), m * lds, 9.0f);
          kernels.dot_stored_rows[dtype](q.tensor.data, m, x.tensor.data, stride, index.data(), n, head_dim,
                                         scores.data(), lds);
          check_scores(true);
        }
        std::fill_n(out.data(), m * head_dim, 5.0f);
        kernels.add_weighted_rows[dtype](p.data(), lds, m, x.tensor.data, stride, index.data(), n, head_dim,
                                         out.data());
        for (int64_t r = 0; r < m; ++r) {
          for (int64_t d = 0; d < head_dim; ++d) {
            double want = 5.0;
            for (int64_t j = 0; j < n; ++j) want += p.data()[r * lds + j] * x.at({0, 0, index.data()[j], d});
            EXPECT_EQ(out.data()[r * head_dim + d], want)
                << dtype << ", " << head_dim << ", " << n << ", " << r << ", " << d;
          }
        }
      }
    }
  }
}

// Small probabilities are not lost where an ISA rounds them: 2^-20 of the largest is far below what a half holds.
TEST(Kernels, small_weights_of_half_types) {
  const Kernels& kernels = active_kernels();
  for (const int dtype : {kHalf, kBFloat}) {
    const Array v = Array(static_cast<DType>(dtype), {1, 1, 64, 128}).fill_normal();
    const Guard<int32_t> index(64);
    const Guard<float> p(64), out(128);
    for (int j = 0; j < 64; ++j) {
      index.data()[j] = j;
      p.data()[j] = static_cast<float>(std::exp2(-20 - draw(0, 4)) * 1.37);
    }
    std::fill_n(out.data(), 128, 0.0f);
    kernels.add_weighted_rows[dtype](p.data(), 64, 1, v.tensor.data, 128, index.data(), 64, 128, out.data());
    for (int64_t d = 0; d < 128; ++d) {
      double want = 0.0, size = 0.0;
      for (int64_t j = 0; j < 64; ++j) {
        want += p.data()[j] * v.at({0, 0, j, d});
        size += p.data()[j] * std::fabs(v.at({0, 0, j, d}));
      }
      EXPECT_NEAR(out.data()[d], want, size / (dtype == kHalf ? 2048 : 256));
    }
  }
}

TEST(Kernels, pack_values_tells_of_values_that_are_no_number) {
  const Kernels& kernels = active_kernels();
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (const double poison : {0.0, kNaN, kInf, -kInf}) {
      for (int round = 0; round < rounds(20); ++round) {
        Array v = Array(static_cast<DType>(dtype), {1, 1, 20, 24}).fill_normal();
        v.put({0, 0, 7, draw(0, 23)}, poison);
        const int32_t index[3] = {3, 7, 19};
        const Guard<float> panels(32 * 16);
        EXPECT_EQ(kernels.pack_values[dtype](v.tensor.data, 24, index, 3, 16, 24, panels.data()), poison == 0.0);
      }
    }
  }
}

}  // namespace
}  // namespace dhsa::test
