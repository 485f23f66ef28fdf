// boundary_logits on the GPU against a host reference in float64 written from its definition: one cut at a time, every
// window projected afresh. Fresh random inputs, poisoned outputs. `logits_test` runs the checks, `logits_test small` is
// the subset for compute-sanitizer, `logits_test time` times 128K tokens at the widths of three models.
#include <memory>

#include "router_cases.h"

namespace dhsa::test {
namespace {

// A weight [rows, columns], or [rows] for columns = 0, with its rounded values on the host.
struct Weight {
  Buffer buffer;
  Tensor view;
  std::vector<float> host;
  int64_t columns;

  Weight(DType dtype, int64_t rows, int64_t columns, double size)
      : buffer(rows * std::max<int64_t>(columns, 1) * element_size(dtype)), columns(columns) {
    host.resize(rows * std::max<int64_t>(columns, 1));
    for (float& x : host) x = static_cast<float>(size * random_normal());
    view = columns > 0 ? cuda::contiguous(buffer.data(), dtype, rows, columns)
                       : cuda::contiguous(buffer.data(), dtype, rows);
    if (dtype == DType::kFloat32) round_and_upload<float>();
    if (dtype == DType::kFloat16) round_and_upload<__half>();
    if (dtype == DType::kBFloat16) round_and_upload<__nv_bfloat16>();
  }
  double at(int64_t row, int64_t column = 0) const { return host[row * std::max<int64_t>(columns, 1) + column]; }

 private:
  template <class T>
  void round_and_upload() {
    std::vector<T> rounded(host.size());
    for (size_t i = 0; i < host.size(); ++i)
      rounded[i] = static_cast<T>(host[i]), host[i] = static_cast<float>(rounded[i]);
    buffer.upload(rounded);
  }
};

using Row = std::vector<double>;

double dot(const Row& a, const Row& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

Row linear(const Weight& weight, const Weight& bias, const Row& x, int64_t rows) {
  Row y(rows);
  for (int64_t i = 0; i < rows; ++i) {
    y[i] = bias.at(i);
    for (size_t j = 0; j < x.size(); ++j) y[i] += weight.at(i, static_cast<int64_t>(j)) * x[j];
  }
  return y;
}

void softmax(Row& z) {
  const double peak = *std::max_element(z.begin(), z.end());
  double sum = 0;
  for (double& x : z) sum += x = std::exp(x - peak);
  for (double& x : z) x /= sum;
}

struct Predictor {
  int64_t width, heads, window, hidden;
  bool gated;
  Weight in, in_bias, out, out_bias, norm, norm_bias, gate, gate_bias, fc1, fc1_bias, fc2, fc2_bias;

  Predictor(int64_t width, int64_t heads, int64_t window, bool gated, DType dtype, int64_t hidden = 256)
      : width(width),
        heads(heads),
        window(window),
        hidden(hidden),
        gated(gated),
        in(dtype, 3 * width, width, 1 / std::sqrt(width)),
        in_bias(dtype, 3 * width, 0, 0.3),
        out(dtype, width, width, 1 / std::sqrt(width)),
        out_bias(dtype, width, 0, 0.3),
        norm(dtype, width, 0, 1),
        norm_bias(dtype, width, 0, 1),
        gate(dtype, 1, width, 1 / std::sqrt(width)),
        gate_bias(dtype, 1, 0, 1),
        fc1(dtype, hidden, 4 * width + 1, 0.5 / std::sqrt(width)),
        fc1_bias(dtype, hidden, 0, 1),
        fc2(dtype, 1, hidden, 1 / std::sqrt(hidden)),
        fc2_bias(dtype, 1, 0, 1) {}

  BoundaryLogits stage(const Tensor& k, const Tensor& logits) const {
    BoundaryLogits p;
    p.k = k, p.logits = logits, p.num_heads = heads, p.window = window;
    p.in_proj_weight = in.view, p.in_proj_bias = in_bias.view;
    p.out_proj_weight = out.view, p.out_proj_bias = out_bias.view;
    p.norm_weight = norm.view, p.norm_bias = norm_bias.view;
    if (gated) p.gate_weight = gate.view, p.gate_bias = gate_bias.view;
    p.fc1_weight = fc1.view, p.fc1_bias = fc1_bias.view, p.fc2_weight = fc2.view, p.fc2_bias = fc2_bias.view;
    return p;
  }

  // One cut: self-attention over its window, LayerNorm, the pooled halves, the two-layer network.
  double logit(const Input& k, int64_t b, int64_t t) const {
    if (t < window || t > k.length - window) return kMinusInf;
    const int64_t span = 2 * window, dim = width / heads;
    std::vector<Row> qkv;
    for (int64_t i = t - window; i < t + window; ++i) {
      Row x;
      for (int64_t h = 0; h < k.heads; ++h)
        for (int64_t d = 0; d < k.dim; ++d) x.push_back(k.at(b, h, i, d));
      qkv.push_back(linear(in, in_bias, x, 3 * width));
    }
    Row pooled[2];
    for (int half = 0; half < 2; ++half) {
      std::vector<Row> rows;
      Row gates;
      for (int64_t i = half * window; i < (half + 1) * window; ++i) {
        Row attended(width, 0.0);
        for (int64_t h = 0; h < heads; ++h) {
          Row z(span, 0.0);
          for (int64_t j = 0; j < span; ++j) {
            for (int64_t e = h * dim; e < (h + 1) * dim; ++e) z[j] += qkv[i][e] * qkv[j][width + e];
            z[j] /= std::sqrt(dim);
          }
          softmax(z);
          for (int64_t j = 0; j < span; ++j)
            for (int64_t e = h * dim; e < (h + 1) * dim; ++e) attended[e] += z[j] * qkv[j][2 * width + e];
        }
        Row y = linear(out, out_bias, attended, width);
        const double mean = std::accumulate(y.begin(), y.end(), 0.0) / width;
        for (double& x : y) x -= mean;
        const double sigma = std::sqrt(dot(y, y) / width + 1e-5);
        for (int64_t c = 0; c < width; ++c) y[c] = y[c] / sigma * norm.at(c) + norm_bias.at(c);
        gates.push_back(gated ? linear(gate, gate_bias, y, 1)[0] : 0.0);
        rows.push_back(y);
      }
      softmax(gates);
      pooled[half].assign(width, 0.0);
      for (int64_t i = 0; i < window; ++i)
        for (int64_t c = 0; c < width; ++c) pooled[half][c] += gates[i] * rows[i][c];
    }
    const Row &l = pooled[0], &r = pooled[1];
    Row features = l;
    features.insert(features.end(), r.begin(), r.end());
    for (int64_t c = 0; c < width; ++c) features.push_back(std::fabs(l[c] - r[c]));
    for (int64_t c = 0; c < width; ++c) features.push_back(l[c] * r[c]);
    features.push_back(dot(l, r) / std::max(std::sqrt(dot(l, l) * dot(r, r)), 1e-8));
    Row first = linear(fc1, fc1_bias, features, hidden);
    for (double& x : first) x = std::max(x, 0.0);
    return linear(fc2, fc2_bias, first, 1)[0];
  }
};

struct Case {
  int64_t batch, kv_heads, length, dim, heads, window;
  bool gated;
  int64_t hidden = 256;
};

std::string label(const Case& c, DType dtype) {
  return std::string("boundary_logits ") + name(dtype) + " C" + std::to_string(c.kv_heads * c.dim) + " heads" +
         std::to_string(c.heads) + " Lk" + std::to_string(c.length) + " w" + std::to_string(c.window);
}

void test_shapes() {
  const Case cases[] = {
      {2, 1, 40, 64, 8, 4, true},          // head_dim 8 of the self-attention
      {1, 2, 150, 64, 8, 4, false, 200},   // a hidden size that no tile divides
      {1, 1, 60, 96, 1, 4, true},          // one head as wide as the keys
      {1, 1, 30, 96, 96, 2, true, 64},     // one channel a head: padded to four
      {1, 1, 25, 64, 4, 3, true, 32},      // rows of a window that fill no tile
      {2, 1, 14, 128, 2, 7, true, 32},     // two tiles, one cut
      {1, 1, 90, 64, 8, 21, false, 32},    // a window of 42 tokens
      {1, 1, 3, 64, 8, 1, true, 32},       // one token on each side
      {1, 1, 7, 64, 8, 4, true, 32},       // no cut at all
      {1, 1, 0, 64, 8, 4, true, 32},       // no token
      {1, 1, 20, 256, 32, 1000000, true},  // a window far past the sequence
      {1, 1, 24, 8, 2, 4, true, 5},        // the narrowest key
  };
  for (const Case& c : cases)
    for (DType dtype : kTypes)
      for (Layout layout : kLayouts) {
        if (small_run && layout == Layout::kTokensFirst) continue;
        const Input k(c.batch, c.kv_heads, c.length, c.dim, dtype, layout);
        const DType weights = layout == Layout::kHeadsFirst ? DType::kFloat32 : dtype;
        const Predictor predictor(c.kv_heads * c.dim, c.heads, c.window, c.gated, weights, c.hidden);
        Array<float> logits(c.batch, c.length);
        run_stage(predictor.stage(k.view, logits.view), label(c, dtype));
        Row want;
        for (int64_t b = 0; b < c.batch; ++b)
          for (int64_t t = 0; t < c.length; ++t) want.push_back(predictor.logit(k, b, t));
        expect_scores(logits.get(), want, label(c, dtype));
        expect(logits.buffer.guard_intact(), label(c, dtype) + ": guard");
      }
}

// More cuts than one slab holds, at the width of a model with 8 KV heads of 128: cuts at every 500th token and at both
// ends against the reference, all of them finite, and the seams against a call whose slabs lie elsewhere.
void test_wide_and_long() {
  const Case c = {1, 8, small_run ? 300 : 6000, 128, 8, 4, true};
  const Input k(c.batch, c.kv_heads, c.length, c.dim, DType::kBFloat16, Layout::kTokensFirst);
  const Predictor predictor(c.kv_heads * c.dim, c.heads, c.window, c.gated, DType::kFloat32);
  Array<float> logits(c.batch, c.length);
  run_stage(predictor.stage(k.view, logits.view), "wide and long");
  const std::vector<float> got = logits.get();
  std::vector<float> sampled;
  Row want;
  bool finite = true;
  for (int64_t t = 0; t < c.length; ++t) {
    const bool cut = t >= c.window && t <= c.length - c.window;
    finite &= cut ? std::isfinite(got[t]) : got[t] == -INFINITY;
    if (t % (small_run ? 60 : 500) > 0 && t != c.window && t != c.length - c.window) continue;
    sampled.push_back(got[t]), want.push_back(predictor.logit(k, 0, t));
  }
  expect(finite, "wide and long: every cut has a finite logit, nothing else has");
  expect_scores(sampled, want, "wide and long: sampled cuts");

  // A call on a part of the sequence works in other slabs and other tiles: the logits agree to rounding.
  const int64_t from = c.length / 3, part = c.length / 2;
  Tensor some = k.view;
  some.data = k.view.as<char>() + from * some.stride[2] * 2, some.shape[2] = part;
  Array<float> again(c.batch, part);
  run_stage(predictor.stage(some, again.view), "part of the sequence");
  const Row inner(got.begin() + from + c.window, got.begin() + from + part - c.window + 1);
  const std::vector<float> other = again.get();
  expect_scores({other.begin() + c.window, other.begin() + part - c.window + 1}, inner, "part of the sequence");
}

// Keys ten times larger saturate the self-attention, and a bias far from zero must not drown the norm's variance.
void test_large_keys_and_offsets() {
  const int64_t length = 100, width = 128;
  Input k(1, 1, length, width, DType::kFloat32, Layout::kHeadsFirst);
  for (float& x : k.host) x *= 10;
  k.buffer.upload(k.host);
  Predictor predictor(width, 8, 4, true, DType::kFloat32);
  for (float& x : predictor.out_bias.host) x += 1000;
  predictor.out_bias.buffer.upload(predictor.out_bias.host);
  Array<float> logits(1, length);
  run_stage(predictor.stage(k.view, logits.view), "large keys");
  Row want;
  for (int64_t t = 0; t < length; ++t) want.push_back(predictor.logit(k, 0, t));
  expect_scores(logits.get(), want, "large keys");
}

void test_nan_stays_in_its_windows() {
  const int64_t length = 300, window = 3;
  Input k(1, 2, length, 64, DType::kFloat32, Layout::kHeadsFirst);
  k.host[(length + 170) * 64 + 5] = NAN;
  k.buffer.upload(k.host);
  const Predictor predictor(128, 8, window, true, DType::kFloat32);
  Array<float> logits(1, length);
  run_stage(predictor.stage(k.view, logits.view), "NaN key");
  const std::vector<float> got = logits.get();
  bool right = true;
  for (int64_t t = window; t <= length - window; ++t) right &= std::isnan(got[t]) == (t > 170 - window && t <= 173);
  expect(right, "a NaN reaches the logits of its windows and no other");
}

void test_graph_replays_with_new_keys() {
  const int64_t length = 700;
  Input k(2, 2, length, 64, DType::kBFloat16, Layout::kTokensFirst);
  const Predictor predictor(128, 8, 4, true, DType::kFloat32);
  Array<float> logits(2, length), direct(2, length);
  const BoundaryLogits stage = predictor.stage(k.view, logits.view);
  Buffer scratch = workspace(cuda::workspace_bytes(stage));
  Graph graph(1, [&](cudaStream_t stream) { CUDA_CHECK(cuda::run(stage, scratch.data(), stream)); });
  for (int round = 0; round < 3; ++round) {
    k.fill();
    logits.set(std::vector<float>(2 * length, NAN));
    graph.replay();
    run_stage(predictor.stage(k.view, direct.view), "graph");
    const std::vector<float> got = logits.get(), want = direct.get();
    expect(std::memcmp(got.data(), want.data(), 2 * length * sizeof(float)) == 0, "a replay gives the bits of a call");
  }
}

void test_workspace_is_of_one_slab() {
  const Input k(1, 2, 1, 64, DType::kBFloat16, Layout::kTokensFirst);
  Array<float> logits(1, 1);
  const Predictor predictor(128, 8, 4, true, DType::kFloat32);
  BoundaryLogits stage = predictor.stage(k.view, logits.view);
  stage.k.shape[2] = 1 << 17;
  const int64_t bytes = cuda::workspace_bytes(stage);
  expect(bytes < 144 << 20, "workspace of 128K tokens: " + std::to_string(bytes >> 20) + " MiB");
  stage.k.shape[2] = 1 << 22;
  expect(cuda::workspace_bytes(stage) == bytes, "workspace does not grow with the sequence");
}

void time_widths() {
  constexpr int64_t kLong = 131072;
  for (const auto& [kv_heads, dim] : {std::pair<int64_t, int64_t>{1, 256}, {4, 128}, {8, 128}}) {
    const int64_t width = kv_heads * dim;
    const Input k(1, kv_heads, kLong, dim, DType::kBFloat16, Layout::kTokensFirst, false);
    const Predictor predictor(width, 8, 4, true, DType::kFloat32);
    Array<float> logits(1, kLong);
    const BoundaryLogits stage = predictor.stage(k.view, logits.view);
    const double us = time_stage(stage, 1);
    // Multiply-adds of a token: q k v, u, eight rows of 64 products, the first layer.
    const double products = 4.0 * width * width + 512.0 * width + 4.0 * 256 * width;
    std::printf("boundary_logits 128K width %4lld: %8.2f ms, %5.1f TFLOP/s, workspace %lld MiB\n",
                static_cast<long long>(width), us / 1e3, 2 * products * kLong / us / 1e6,
                static_cast<long long>(cuda::workspace_bytes(stage) >> 20));
  }
}

}  // namespace
}  // namespace dhsa::test

int main(int argc, char** argv) {
  using namespace dhsa::test;
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (!device_ready()) return 2;
  if (mode == "time") return time_widths(), 0;
  small_run = mode == "small";
  return run_tests({{"shapes", test_shapes},
                    {"wide and long", test_wide_and_long},
                    {"large keys and offsets", test_large_keys_and_offsets},
                    {"NaN keys", test_nan_stays_in_its_windows},
                    {"graph", test_graph_replays_with_new_keys},
                    {"workspace", test_workspace_is_of_one_slab}});
}
