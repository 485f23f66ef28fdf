// boundary_logits on CPU: everything linear is done once per token, a cut only mixes rows that are there already.
//
//   q, k, v = W_in x + b_in             per token;   u[j, h] = W_out[:, h] v[j, h]   per token and head
//   y[i] = b_out + sum over the window's tokens j and all heads h of softmax_j(q[i, h] . k[j, h] / sqrt(d)) u[j, h]
//
// is row i of the window after attention and its output projection. A LayerNorm ignores what all channels share, so the
// mean over channels is taken off W_out and b_out beforehand: y has mean 0 and its variance is |y|^2 / C_in without a
// cancellation. Constants that the gate's softmax cancels (its bias, the norm's) are left out.
//
// A work item is a range of cuts; it projects its own tokens and the 2 * window - 1 that the next range needs too. What
// it keeps is of the size of its range: the rows above, the logits of neighbours, one window y, 64 cuts' features.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/half.h"
#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "cpu/views.h"
#include "dhsa.h"

namespace dhsa::cpu {
namespace {

constexpr int64_t kRange = 256;  // cuts of a work item; 8 windows where that is more
constexpr int64_t kRows = 64;    // cuts that enter the two-layer network together
constexpr float kNormEps = 1e-5f, kCosineEps = 1e-8f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Weights {
  const void* data;
  DType dtype;
  explicit Weights(const Tensor& t) : data(t.data), dtype(t.dtype) {}
  float operator[](int64_t i) const {
    if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return dtype == DType::kFloat16 ? float_from_half(bits) : float_from_bfloat16(bits);
  }
};

// Depths of products are multiples of 8, columns multiples of kMaxPanel: heads are padded in both directions.
struct Shape {
  int64_t seqlen_k, window, span, cuts, width, heads;
  int64_t head_dim, head_pad;  // of the self-attention
  int64_t token_rows;          // rows of u per token: heads, padded so that a window's rows are a multiple of 8
  int64_t qkv, out, features, hidden;
  int64_t range, tokens;  // of a work item: cuts, and tokens of their windows
  int64_t pitch;          // logits that a token keeps for each head: of its span - 1 neighbours on both sides

  explicit Shape(const BoundaryLogits& p)
      : seqlen_k(p.k.shape[2]),
        window(p.window),
        span(2 * window),
        cuts(seqlen_k / 2 >= window ? seqlen_k - span + 1 : 0),
        width(p.k.shape[1] * p.k.shape[3]),
        heads(p.num_heads),
        head_dim(width / heads),
        head_pad(round_up(head_dim, 8)),
        token_rows(round_up(heads, span % 8 == 0   ? 1
                                   : span % 4 == 0 ? 2
                                                   : 4)),
        qkv(round_up(3 * heads * head_pad, kMaxPanel)),
        out(round_up(width, kMaxPanel)),
        features(round_up(4 * width + 1, 8)),
        hidden(round_up(p.fc1_weight.shape[0], kMaxPanel)),
        range(std::min(std::max(kRange, 8 * window), cuts)),
        tokens(range + span - 1),
        pitch(2 * span) {}
};

// The weights as products take them: panels in slices of kMaxDepth, [slice][columns / panel][depth of slice][panel].
struct Packed {
  float* data;
  int64_t depth, columns;

  Packed(Arena& arena, int64_t depth, int64_t columns)
      : data(arena.take<float>(depth * columns)), depth(depth), columns(columns) {}

  template <class F>  // f(column, k) is the weight
  void fill(int64_t first_column, int64_t panel, F f) const {
    for (int64_t d0 = 0; d0 < depth; d0 += kMaxDepth) {
      const int64_t steps = std::min(kMaxDepth, depth - d0);
      float* to = data + d0 * columns + first_column * steps;
      for (int64_t k = 0; k < steps; ++k) {
        for (int64_t c = 0; c < panel; ++c) *to++ = f(first_column + c, d0 + k);
      }
    }
  }

  // c[m][columns] += a[m][depth] . weights
  void add_products(const Kernels& kernels, int64_t m, const float* a, int64_t lda, float* c, int64_t ldc) const {
    for (int64_t d0 = 0; d0 < depth; d0 += kMaxDepth) {
      kernels.gemm(m, std::min(kMaxDepth, depth - d0), a + d0, lda, data + d0 * columns, columns, c, ldc, true);
    }
  }
};

struct Network {
  Packed qkv, out, fc1;  // out: of all heads, one after the other, each [head_pad][out]
  double* out_mean;
  float *qkv_bias, *out_bias, *gate, *norm_weight, *norm_bias, *fc1_bias, *fc2;

  Network(Arena& arena, const Shape& n)
      : qkv(arena, n.width, n.qkv),
        out(arena, n.heads * n.head_pad, n.out),
        fc1(arena, n.features, n.hidden),
        out_mean(arena.take<double>(n.width)),
        qkv_bias(arena.take<float>(n.qkv)),
        out_bias(arena.take<float>(n.out)),
        gate(arena.take<float>(n.out)),
        norm_weight(arena.take<float>(n.width)),
        norm_bias(arena.take<float>(n.width)),
        fc1_bias(arena.take<float>(n.hidden)),
        fc2(arena.take<float>(n.hidden)) {}

  Packed out_of_head(const Shape& n, int64_t head) const {
    Packed one = out;
    one.data += head * n.head_pad * n.out;
    one.depth = n.head_pad;
    return one;
  }
};

// Column c of the padded qkv projection: its row in in_proj_weight, or -1; q carries the softmax scale.
struct QkvColumn {
  int64_t row = -1;
  float scale = 1.0f;
  QkvColumn(const Shape& n, int64_t column) {
    const int64_t block = column / n.head_pad, e = column % n.head_pad;
    if (block >= 3 * n.heads || e >= n.head_dim) return;
    row = block * n.head_dim + e;
    if (block < n.heads) scale = 1.0f / std::sqrt(static_cast<float>(n.head_dim));
  }
};

void fill_vectors(const BoundaryLogits& p, const Shape& n, const Network& net) {
  const Weights in_bias(p.in_proj_bias), out_bias(p.out_proj_bias), gate(p.gate_weight);
  const Weights norm_weight(p.norm_weight), norm_bias(p.norm_bias), fc1_bias(p.fc1_bias), fc2(p.fc2_weight);
  const int64_t hidden = p.fc1_weight.shape[0];
  for (int64_t c = 0; c < n.qkv && n.width > 0; ++c) {
    const QkvColumn column(n, c);
    net.qkv_bias[c] = column.row < 0 ? 0.0f : column.scale * in_bias[column.row];
  }
  double mean = 0;
  for (int64_t c = 0; c < n.width; ++c) mean += out_bias[c] / static_cast<double>(n.width);
  std::fill_n(net.out_bias, n.out, 0.0f);
  std::fill_n(net.gate, n.out, 0.0f);
  for (int64_t c = 0; c < n.width; ++c) {
    net.out_bias[c] = static_cast<float>(out_bias[c] - mean);
    net.norm_weight[c] = norm_weight[c];
    net.norm_bias[c] = norm_bias[c];
    if (p.gate_weight.given()) net.gate[c] = gate[c] * norm_weight[c];
  }
  for (int64_t c = 0; c < n.hidden; ++c) {
    net.fc1_bias[c] = c < hidden ? fc1_bias[c] : 0.0f;
    net.fc2[c] = c < hidden ? fc2[c] : 0.0f;
  }
}

void fill_network(const BoundaryLogits& p, const Shape& n, const Network& net, int64_t panel,
                  const Executor& executor) {
  const Weights in(p.in_proj_weight), out(p.out_proj_weight), fc1(p.fc1_weight);
  const int64_t hidden = p.fc1_weight.shape[0], inputs = 4 * n.width + 1;
  constexpr int64_t kColumns = 64;
  fill_vectors(p, n, net);
  executor.run(ceil_div(n.width, kColumns), [&](int64_t item, int) {  // the mean over channels of W_out
    const int64_t first = item * kColumns, count = std::min(kColumns, n.width - first);
    double sum[kColumns] = {};
    for (int64_t c = 0; c < n.width; ++c) {
      for (int64_t k = 0; k < count; ++k) sum[k] += out[c * n.width + first + k];
    }
    for (int64_t k = 0; k < count; ++k) {
      net.out_mean[first + k] = sum[k] / static_cast<double>(n.width);
    }
  });
  const int64_t qkv_panels = n.width > 0 ? n.qkv / panel : 0, out_panels = n.out / panel;
  executor.run(qkv_panels + n.heads * out_panels + n.hidden / panel, [&](int64_t item, int) {
    if (item < qkv_panels) {
      return net.qkv.fill(item * panel, panel, [&](int64_t c, int64_t k) {
        const QkvColumn column(n, c);
        return column.row < 0 ? 0.0f : column.scale * in[column.row * n.width + k];
      });
    }
    item -= qkv_panels;
    if (item < n.heads * out_panels) {
      const int64_t head = item / out_panels;
      return net.out_of_head(n, head).fill(item % out_panels * panel, panel, [&](int64_t c, int64_t e) {
        const int64_t k = head * n.head_dim + e;
        return c < n.width && e < n.head_dim ? static_cast<float>(out[c * n.width + k] - net.out_mean[k]) : 0.0f;
      });
    }
    item -= n.heads * out_panels;
    net.fc1.fill(item * panel, panel,
                 [&](int64_t c, int64_t k) { return c < hidden && k < inputs ? fc1[c * inputs + k] : 0.0f; });
  });
}

struct Scratch {
  float *x, *qkv, *u, *logits;               // of a range's tokens
  float *row, *shares, *y, *pooled, *stats;  // of one window
  float *features, *hidden;                  // of kRows cuts
  int32_t* index;
  Scratch(Arena& arena, const Shape& n)
      : x(arena.take<float>(n.tokens * n.width)),
        qkv(arena.take<float>(n.tokens * n.qkv)),
        u(arena.take<float>(n.tokens * n.token_rows * n.out)),
        logits(arena.take<float>(n.tokens * n.heads * n.pitch)),
        row(arena.take<float>(round_up(n.span, kMaxPanel))),
        shares(arena.take<float>(n.span * n.span * n.token_rows)),
        y(arena.take<float>(n.span * n.out)),
        pooled(arena.take<float>(2 * n.out)),
        stats(arena.take<float>(2 * n.span)),
        features(arena.take<float>(kRows * n.features)),
        hidden(arena.take<float>(kRows * n.hidden)),
        index(arena.take<int32_t>(n.window)) {}
};

float dot(const Kernels& kernels, const float* a, const float* b, int64_t n) {
  float sum;
  kernels.dot_rows[0](a, 1, b, n, nullptr, 1, n, &sum, 1);
  return sum;
}

// Tokens [first, first + tokens): q, k and v; u in panels [out / panel][tokens * token_rows][panel], so that the rows
// of any window are a packed matrix in place; and each token's logits with its neighbours on both sides.
void project_tokens(const BoundaryLogits& p, const Shape& n, const Network& net, const Kernels& kernels, int64_t b,
                    int64_t first, int64_t tokens, const Scratch& s) {
  const RowView k(p.k);
  const int64_t kv_heads = p.k.shape[1], dim = p.k.shape[3], panel = kernels.panel;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      kernels.load_rows[k.dtype](k.at(b, head, first + t), k.row, 1, dim, 1.0f, s.x + t * n.width + head * dim);
    }
    std::copy_n(net.qkv_bias, n.qkv, s.qkv + t * n.qkv);
  }
  net.qkv.add_products(kernels, tokens, s.x, n.width, s.qkv, n.qkv);

  const int64_t rows = tokens * n.token_rows;
  std::fill_n(s.u, rows * n.out, 0.0f);
  for (int64_t head = 0; head < n.heads; ++head) {
    const Packed weights = net.out_of_head(n, head);
    const float* v = s.qkv + (2 * n.heads + head) * n.head_pad;
    for (int64_t d0 = 0; d0 < n.head_pad; d0 += kMaxDepth) {
      const int64_t depth = std::min(kMaxDepth, n.head_pad - d0);
      for (int64_t c = 0; c < n.out; c += panel) {
        kernels.gemm(tokens, depth, v + d0, n.qkv, weights.data + d0 * n.out + c * depth, panel,
                     s.u + c * rows + head * panel, n.token_rows * panel, true);
      }
    }
  }

  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t j0 = std::max<int64_t>(0, i - n.span + 1), j1 = std::min(tokens, i + n.span);
    for (int64_t head = 0; head < n.heads; ++head) {
      kernels.dot_rows[0](s.qkv + i * n.qkv + head * n.head_pad, 1, s.qkv + j0 * n.qkv + (n.heads + head) * n.head_pad,
                          n.qkv, nullptr, j1 - j0, n.head_pad,
                          s.logits + (i * n.heads + head) * n.pitch + j0 - i + n.span - 1, n.pitch);
    }
  }
}

// y of the window that begins at the range's token `start`.
void mix_window(const Shape& n, const Network& net, const Kernels& kernels, int64_t start, int64_t tokens,
                const Scratch& s) {
  const int64_t depth = n.span * n.token_rows, padded = round_up(n.span, kMaxPanel);
  for (int64_t i = 0; i < n.span; ++i) {
    for (int64_t head = 0; head < n.heads; ++head) {
      std::copy_n(s.logits + ((start + i) * n.heads + head) * n.pitch + n.span - 1 - i, n.span, s.row);
      std::fill(s.row + n.span, s.row + padded, -kInfinity);
      float row_max = -kInfinity, row_sum = 0.0f;
      kernels.softmax_row(s.row, padded, &row_max, &row_sum);
      float* shares = s.shares + i * depth + head;
      for (int64_t j = 0; j < n.span; ++j) shares[j * n.token_rows] = s.row[j] / row_sum;
    }
    std::copy_n(net.out_bias, n.out, s.y + i * n.out);
  }
  const int64_t panel = kernels.panel, rows = tokens * n.token_rows;
  for (int64_t c = 0; c < n.out; c += panel) {
    const float* u = s.u + c * rows + start * n.token_rows * panel;
    for (int64_t d0 = 0; d0 < depth; d0 += kMaxDepth) {
      kernels.gemm(n.span, std::min(kMaxDepth, depth - d0), s.shares + d0, depth, u + d0 * panel, panel, s.y + c, n.out,
                   true);
    }
  }
}

// pooled[half] = sum over its rows of share / sigma * y: the halves before the norm's weight and bias.
void pool_halves(const BoundaryLogits& p, const Shape& n, const Network& net, const Kernels& kernels,
                 const Scratch& s) {
  float *gates = s.stats, *rates = s.stats + n.span;  // rates: 1 / sigma
  for (int64_t i = 0; i < n.span; ++i) {
    const float* y = s.y + i * n.out;
    rates[i] = 1.0f / std::sqrt(dot(kernels, y, y, n.out) / static_cast<float>(n.width) + kNormEps);
  }
  if (p.gate_weight.given()) {
    kernels.dot_rows[0](s.y, n.span, net.gate, n.out, nullptr, 1, n.out, gates, 1);
  } else {
    std::fill_n(gates, n.span, 0.0f);
  }
  std::fill_n(s.pooled, 2 * n.out, 0.0f);
  for (int64_t half = 0; half < 2; ++half) {
    float *gate = gates + half * n.window, *rate = rates + half * n.window;
    float peak = -kInfinity, sum = 0.0f;
    for (int64_t i = 0; i < n.window; ++i) {
      gate[i] *= rate[i];
      peak = std::max(peak, gate[i]);
    }
    for (int64_t i = 0; i < n.window; ++i) sum += gate[i] = std::exp(gate[i] - peak);
    for (int64_t i = 0; i < n.window; ++i) rate[i] *= gate[i] / sum;
    kernels.add_weighted_rows[0](rate, n.window, 1, s.y + half * n.window * n.out, n.out, s.index, n.window, n.out,
                                 s.pooled + half * n.out);
  }
}

void write_features(const Shape& n, const Network& net, const Kernels& kernels, const Scratch& s, float* features) {
  const int64_t width = n.width;
  for (int64_t c = 0; c < width; ++c) {
    const float l = s.pooled[c] * net.norm_weight[c] + net.norm_bias[c];
    const float r = s.pooled[n.out + c] * net.norm_weight[c] + net.norm_bias[c];
    features[c] = l;
    features[width + c] = r;
    features[2 * width + c] = std::fabs(l - r);
    features[3 * width + c] = l * r;
  }
  const float *l = features, *r = features + width;
  const float left = std::sqrt(dot(kernels, l, l, width)), right = std::sqrt(dot(kernels, r, r, width));
  features[4 * width] =
      dot(kernels, l, r, width) / ((left < kCosineEps ? kCosineEps : left) * (right < kCosineEps ? kCosineEps : right));
  std::fill(features + 4 * width + 1, features + n.features, 0.0f);
}

// The two-layer network on kRows cuts at most.
void classify(const Shape& n, const Network& net, const Kernels& kernels, float fc2_bias, int64_t m, const Scratch& s,
              float* logits) {
  for (int64_t r = 0; r < m; ++r) std::copy_n(net.fc1_bias, n.hidden, s.hidden + r * n.hidden);
  net.fc1.add_products(kernels, m, s.features, n.features, s.hidden, n.hidden);
  for (int64_t i = 0; i < m * n.hidden; ++i) s.hidden[i] = s.hidden[i] < 0.0f ? 0.0f : s.hidden[i];
  kernels.dot_rows[0](s.hidden, m, net.fc2, n.hidden, nullptr, 1, n.hidden, logits, 1);
  for (int64_t r = 0; r < m; ++r) logits[r] += fc2_bias;
}

}  // namespace

int64_t workspace_bytes(const BoundaryLogits& p, int workers) {
  const Shape n(p);
  return n.cuts == 0 ? 0 : scratch_bytes<Network>(n) + workers * scratch_bytes<Scratch>(n);
}

void run(const BoundaryLogits& p, void* workspace, const Executor& executor) {
  const Kernels& kernels = active_kernels();
  const Shape n(p);
  const int64_t batch = p.k.shape[0];
  float* logits = p.logits.as<float>();
  std::fill_n(logits, batch * n.seqlen_k, -kInfinity);
  if (n.cuts == 0 || batch == 0) return;
  Arena arena(workspace);
  const Network net(arena, n);
  void* workers = arena.take<char>(0);
  fill_network(p, n, net, kernels.panel, executor);
  const float fc2_bias = Weights(p.fc2_bias)[0];

  const int64_t ranges = ceil_div(n.cuts, n.range);
  executor.run(batch * ranges, [&](int64_t item, int worker) {
    const Scratch s = worker_scratch<Scratch>(workers, worker, n);
    for (int64_t i = 0; i < n.window; ++i) s.index[i] = static_cast<int32_t>(i);
    std::fill_n(s.shares, n.span * n.span * n.token_rows, 0.0f);  // of the heads that only pad
    const int64_t b = item / ranges, first = item % ranges * n.range, count = std::min(n.range, n.cuts - first);
    const int64_t tokens = count + n.span - 1;
    project_tokens(p, n, net, kernels, b, first, tokens, s);
    float* out = logits + b * n.seqlen_k + n.window + first;
    for (int64_t cut = 0; cut < count; ++cut) {
      mix_window(n, net, kernels, cut, tokens, s);
      pool_halves(p, n, net, kernels, s);
      write_features(n, net, kernels, s, s.features + cut % kRows * n.features);
      const int64_t done = cut % kRows + 1;
      if (done == kRows || cut + 1 == count) {
        classify(n, net, kernels, fc2_bias, done, s, out + cut + 1 - done);
      }
    }
  });
}

}  // namespace dhsa::cpu
