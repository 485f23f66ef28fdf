#include "reference.h"

namespace dhsa::test {
namespace {

// A predictor with random weights, its keys, and the logits of a call.
struct Predictor {
  Array k;
  int64_t heads, window, width = k.dim(1) * k.dim(3);
  Array in_weight, in_bias, out_weight, out_bias, norm_weight, norm_bias, gate_weight, gate_bias, fc1_weight, fc1_bias,
      fc2_weight, fc2_bias, logits;
  bool gated;

  Predictor(const Array& keys, int64_t heads, int64_t window, bool gated = true, DType dtype = DType::kFloat32,
            int64_t hidden = 256)
      : k(keys),
        heads(heads),
        window(window),
        in_weight(weight(dtype, {3 * width, width})),
        in_bias(weight(dtype, {3 * width})),
        out_weight(weight(dtype, {width, width})),
        out_bias(weight(dtype, {width})),
        norm_weight(weight(dtype, {width})),
        norm_bias(weight(dtype, {width})),
        gate_weight(weight(dtype, {1, width})),
        gate_bias(weight(dtype, {1})),
        fc1_weight(weight(dtype, {hidden, 4 * width + 1})),
        fc1_bias(weight(dtype, {hidden})),
        fc2_weight(weight(dtype, {1, hidden})),
        fc2_bias(weight(dtype, {1})),
        logits(DType::kFloat32, {keys.dim(0), keys.dim(2)}),
        gated(gated) {}

  static Array weight(DType dtype, std::initializer_list<int64_t> shape) {
    const double fan_in = shape.size() > 1 ? static_cast<double>(*(shape.end() - 1)) : 1.0;
    return Array(dtype, shape).fill_normal(1.0 / std::sqrt(std::max(fan_in, 1.0)));
  }

  BoundaryLogits call() const {
    BoundaryLogits p;
    p.k = k.tensor;
    p.in_proj_weight = in_weight.tensor, p.in_proj_bias = in_bias.tensor;
    p.out_proj_weight = out_weight.tensor, p.out_proj_bias = out_bias.tensor;
    p.norm_weight = norm_weight.tensor, p.norm_bias = norm_bias.tensor;
    if (gated) p.gate_weight = gate_weight.tensor, p.gate_bias = gate_bias.tensor;
    p.fc1_weight = fc1_weight.tensor, p.fc1_bias = fc1_bias.tensor;
    p.fc2_weight = fc2_weight.tensor, p.fc2_bias = fc2_bias.tensor;
    p.num_heads = heads;
    p.window = window;
    p.logits = logits.tensor;
    return p;
  }

  // weight x + bias, from row `first` of the weight on.
  static Row linear(const Array& weight, const Array& bias, const Row& x, int64_t first, int64_t rows) {
    Row y(rows);
    for (int64_t i = 0; i < rows; ++i) {
      y[i] = bias.at({first + i});
      for (size_t j = 0; j < x.size(); ++j) y[i] += weight.at({first + i, static_cast<int64_t>(j)}) * x[j];
    }
    return y;
  }

  static void softmax(Row* z) {
    double sum = 0;
    const double lse = log_sum_exp(*z);
    for (double& x : *z) sum += x = std::exp(x - lse);
    for (double& x : *z) x /= sum;
  }

  // One cut: self-attention over its window, LayerNorm, the pooled halves, the two-layer network.
  double cut(const std::vector<Row>& qkv, int64_t t) const {
    const int64_t dim = width / heads, span = 2 * window;
    std::vector<Row> halves(2, Row(width, 0.0));
    for (int64_t half = 0; half < 2; ++half) {
      std::vector<Row> rows;
      Row gates;
      for (int64_t i = t + (half - 1) * window; i < t + half * window; ++i) {
        Row attended(width, 0.0);
        for (int64_t h = 0; h < heads; ++h) {
          Row z(span, 0.0);
          for (int64_t j = 0; j < span; ++j) {
            for (int64_t e = h * dim; e < (h + 1) * dim; ++e) z[j] += qkv[i][e] * qkv[t - window + j][width + e];
            z[j] /= std::sqrt(static_cast<double>(dim));
          }
          softmax(&z);
          for (int64_t j = 0; j < span; ++j) {
            for (int64_t e = h * dim; e < (h + 1) * dim; ++e) attended[e] += z[j] * qkv[t - window + j][2 * width + e];
          }
        }
        Row y = linear(out_weight, out_bias, attended, 0, width);
        double mean = 0, variance = 0;
        for (const double x : y) mean += x / static_cast<double>(width);
        for (const double x : y) variance += (x - mean) * (x - mean) / static_cast<double>(width);
        for (int64_t c = 0; c < width; ++c) {
          y[c] = (y[c] - mean) / std::sqrt(variance + 1e-5) * norm_weight.at({c}) + norm_bias.at({c});
        }
        gates.push_back(gated ? linear(gate_weight, gate_bias, y, 0, 1)[0] : 0.0);
        rows.push_back(y);
      }
      softmax(&gates);
      for (int64_t i = 0; i < window; ++i) {
        for (int64_t c = 0; c < width; ++c) halves[half][c] += gates[i] * rows[i][c];
      }
    }
    const Row &l = halves[0], &r = halves[1];
    Row features = l;
    features.insert(features.end(), r.begin(), r.end());
    for (int64_t c = 0; c < width; ++c) features.push_back(std::fabs(l[c] - r[c]));
    for (int64_t c = 0; c < width; ++c) features.push_back(l[c] * r[c]);
    features.push_back(dot(l, r) / std::max(std::sqrt(dot(l, l) * dot(r, r)), 1e-8));
    Row hidden = linear(fc1_weight, fc1_bias, features, 0, fc1_weight.dim(0));
    for (double& x : hidden) x = std::max(x, 0.0);
    return linear(fc2_weight, fc2_bias, hidden, 0, 1)[0];
  }

  void compare(int workers = 3) const {
    run_stage(call(), workers);
    for (int64_t b = 0; b < k.dim(0); ++b) {
      std::vector<Row> qkv;
      for (int64_t t = 0; t < k.dim(2); ++t) {
        Row x;
        for (int64_t h = 0; h < k.dim(1); ++h) {
          for (int64_t d = 0; d < k.dim(3); ++d) x.push_back(k.at({b, h, t, d}));
        }
        qkv.push_back(linear(in_weight, in_bias, x, 0, 3 * width));
      }
      for (int64_t t = 0; t < k.dim(2); ++t) {
        const bool whole = t >= window && t <= k.dim(2) - window;
        expect_score(logits.at({b, t}), whole ? cut(qkv, t) : -kInf, "logit");
      }
    }
  }
};

Array keys(DType dtype, std::initializer_list<int64_t> shape, bool heads_last = false) {
  return Array(dtype, shape, heads_last).fill_normal();
}

TEST(BoundaryLogits, every_type_and_layout) {
  for (const DType dtype : kFloatTypes) {
    for (const bool heads_last : {false, true}) {
      Predictor(keys(dtype, {2, 2, 30, 16}, heads_last), 4, 4).compare();
      Predictor(keys(dtype, {1, 1, 30, 40}, heads_last), 5, 2, false, dtype, 20).compare();
    }
  }
}

TEST(BoundaryLogits, lengths_around_two_windows) {
  for (const int64_t window : {1, 2, 5}) {
    for (int64_t length = 0; length <= 2 * window + 1; ++length) {
      Predictor(keys(DType::kFloat32, {1, 1, length, 8}), 8, window, length % 2 == 0).compare();
    }
  }
  Predictor(keys(DType::kFloat32, {1, 1, 40, 8}), 8, int64_t{1} << 40).compare();
}

TEST(BoundaryLogits, heads_of_any_width) {
  for (const int64_t heads : {1, 3, 8, 24, 48}) {  // 48, 16, 6, 2 and 1 channels, 1 to 48 rows a token
    for (const int64_t window : {1, 3, 4}) Predictor(keys(DType::kFloat32, {1, 2, 17, 24}), heads, window).compare();
  }
}

TEST(BoundaryLogits, products_deeper_than_one_slice) {
  Predictor(keys(DType::kFloat32, {1, 2, 12, 136}), 1, 3, true, DType::kFloat32, 24).compare();
  Predictor(keys(DType::kFloat16, {1, 1, 90, 16}), 8, 21, true, DType::kFloat32, 24).compare();
}

TEST(BoundaryLogits, range_and_row_seams_of_a_long_sequence) {
  Predictor(keys(DType::kFloat32, {2, 1, 530, 8}), 2, 4, true, DType::kFloat32, 16).compare();
  Predictor(keys(DType::kFloat32, {1, 1, 264, 8}), 4, 4, false, DType::kFloat32, 16).compare();
}

TEST(BoundaryLogits, channels_that_share_a_large_offset) {  // the norm's variance is not drowned by its mean
  Predictor p(keys(DType::kFloat32, {1, 1, 20, 32}), 4, 4);
  for (int64_t c = 0; c < 32; ++c) p.out_bias.put({c}, 1e4 + p.out_bias.at({c}));
  run_stage(p.call());
  const Array with_offset = p.logits.copy();
  for (int64_t c = 0; c < 32; ++c) p.out_bias.put({c}, p.out_bias.at({c}) - 1e4);
  run_stage(p.call());
  for (int64_t t = 4; t <= 16; ++t) EXPECT_NEAR(with_offset.at({0, t}), p.logits.at({0, t}), 1e-4);
}

TEST(BoundaryLogits, nan_stays_in_its_windows) {
  Predictor p(keys(DType::kFloat32, {1, 2, 40, 8}), 2, 3);
  p.k.put({0, 1, 20, 3}, kNaN);
  run_stage(p.call());
  for (int64_t t = 3; t <= 37; ++t) EXPECT_EQ(std::isnan(p.logits.at({0, t})), t > 17 && t <= 23) << t;
}

TEST(BoundaryLogits, workspace_does_not_grow_with_the_sequence) {
  BoundaryLogits p = Predictor(keys(DType::kFloat32, {1, 1, 300, 8}), 8, 4).call();
  const int64_t bytes = cpu::workspace_bytes(p, 2);
  p.k.shape[2] = int64_t{1} << 30;
  EXPECT_EQ(cpu::workspace_bytes(p, 2), bytes);
}

TEST(BoundaryLogits, any_number_of_workers_gives_the_same_bits) {
  Predictor p(keys(DType::kBFloat16, {2, 1, 600, 16}), 8, 4);
  run_stage(p.call(), 1);
  for (const int workers : {2, 5}) {
    const Array logits = p.logits.copy();
    p.logits.fill(kNaN);
    run_stage(p.call(), workers);
    EXPECT_TRUE(logits.same_bits(p.logits)) << workers << " workers";
  }
}

}  // namespace
}  // namespace dhsa::test
