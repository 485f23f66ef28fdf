// The learned twin of stage 1: a logit for every token with two whole windows, -inf elsewhere. float32 throughout.
//
//   q, k, v = W_in x + b_in             per token;   u[j, h] = W_out[:, h] v[j, h]   per token and head
//   y[i] = b_out + sum over the window's tokens j and all heads h of share[i, j, h] u[j, h]
//   share[i, j, h] = softmax_j(q[i, h] . k[j, h] / sqrt(d))
//
// y is the window's row i after attention and its output projection: a cut only mixes rows that its tokens have
// already. A LayerNorm ignores what all channels share, so the mean over channels is taken off W_out and b_out
// beforehand: y has mean 0, its variance is |y|^2 / C_in without a cancellation, and a pooled half is, before the
// norm's weight and bias,
//
//   sum_i c[i] y[i] = b_out sum_i c[i] + sum_{j, h} (sum_i c[i] share[i, j, h]) u[j, h],   c[i] = gate share / sigma[i]
//
// so that y itself is never kept. Constants that the gate's softmax cancels (its bias, the norm's) are left out.
//
// Steps: weights folded once; then for each slab of cuts: keys widened, q k v, u, logits of neighbouring tokens,
// shares, windows, two-layer network. A slab is what fits in kSlabBytes; it projects the 2 * window - 1 tokens that the
// next one needs too. Nothing is kept beyond a slab, nothing within it is of the size tokens x window x C_in.
#include <algorithm>
#include <cmath>

#include "cuda/device/load.h"
#include "cuda/device/scan.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/linear.h"

namespace dhsa::cuda {
namespace {

constexpr int64_t kSlabBytes = 128 << 20;
constexpr int64_t kFewestCuts = 16;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRowTile = 8;  // rows of a window that a warp mixes at a time
constexpr float kNormEps = 1e-5f, kCosineEps = 1e-8f;

int round_up(int64_t a, int64_t b) { return static_cast<int>(ceil_div(a, b) * b); }

// Depths of products are multiples of 4, for copies of 16 bytes: head_dim and the features are padded with zeros.
struct Shape {
  int seqlen_k, window, span, cuts, width, heads;
  int head_dim, head_pad;  // of the self-attention
  int qkv, features, hidden;
  int row_tiles;          // of a window's rows
  int columns;            // span * heads: the rows of u that a window mixes
  int slab_cuts, tokens;  // of a slab: cuts, and the tokens of their windows

  explicit Shape(const BoundaryLogits& x) {
    const int64_t length = x.k.shape[2];
    seqlen_k = static_cast<int>(length);
    cuts = length / 2 >= x.window ? static_cast<int>(length - 2 * x.window + 1) : 0;
    window = cuts > 0 ? static_cast<int>(x.window) : 0;  // a longer one has no cut and no further meaning
    span = 2 * window;
    width = static_cast<int>(x.k.shape[1] * x.k.shape[3]), heads = static_cast<int>(x.num_heads);
    head_dim = width / heads, head_pad = round_up(head_dim, 4);
    qkv = 3 * heads * head_pad, features = 4 * width + 4, hidden = static_cast<int>(x.fc1_weight.shape[0]);
    row_tiles = static_cast<int>(ceil_div(span, kRowTile)), columns = span * heads;
    const int64_t per_cut = 4 * (static_cast<int64_t>(width) * (1 + heads) + qkv + 2 * span * heads +
                                 static_cast<int64_t>(columns) * (row_tiles * kRowTile + 2) + features + hidden);
    slab_cuts = static_cast<int>(std::min<int64_t>(std::max(kSlabBytes / per_cut, kFewestCuts), cuts));
    tokens = slab_cuts + span - 1;
  }
};

struct Network {
  float *in_weight, *in_bias;    // [qkv][width], [qkv]: q, k, v by head, rows padded to head_pad, q with its scale
  double* out_mean;              // [width + 1]: mean over channels of each column of W_out, and of b_out
  float *out_weight, *out_bias;  // [heads][width][head_pad], [width], centred
  float *fc1_weight, *fc1_bias;  // [hidden][features], [hidden]
  float *fc2_weight, *fc2_bias;  // [hidden], [1]
  float *norm_weight, *norm_bias, *gate;  // [width]; gate: times the norm's weight

  Network(Arena& arena, const Shape& n) {
    in_weight = arena.take<float>(static_cast<int64_t>(n.qkv) * n.width), in_bias = arena.take<float>(n.qkv);
    out_mean = arena.take<double>(n.width + 1);
    out_weight = arena.take<float>(static_cast<int64_t>(n.heads) * n.width * n.head_pad);
    out_bias = arena.take<float>(n.width);
    fc1_weight = arena.take<float>(static_cast<int64_t>(n.hidden) * n.features), fc1_bias = arena.take<float>(n.hidden);
    fc2_weight = arena.take<float>(n.hidden), fc2_bias = arena.take<float>(1);
    norm_weight = arena.take<float>(n.width), norm_bias = arena.take<float>(n.width);
    gate = arena.take<float>(n.width);
  }
};

struct SlabRows {
  float* x;         // [tokens][width]
  float* qkv;       // [tokens][qkv]
  float* u;         // [tokens][heads][width]
  float* logits;    // [tokens][heads][2 * span]: with token i + o - (span - 1), o = 0 .. 2 * span - 2
  float* shares;    // [cuts][row_tiles][columns][kRowTile]
  float2* rates;    // [cuts][span]: 1 / sigma, then c; the gate's logit
  float2* mixed;    // [cuts][columns]: sum_i c[i] share[i] of the left half and of the right
  float* features;  // [cuts][features]
  float* hidden;    // [cuts][hidden]

  SlabRows(Arena& arena, const Shape& n) {
    const int64_t tokens = n.tokens, cuts = n.slab_cuts;
    x = arena.take<float>(tokens * n.width), qkv = arena.take<float>(tokens * n.qkv);
    u = arena.take<float>(tokens * n.heads * n.width), logits = arena.take<float>(tokens * n.heads * 2 * n.span);
    shares = arena.take<float>(cuts * n.row_tiles * n.columns * kRowTile);
    rates = arena.take<float2>(cuts * n.span), mixed = arena.take<float2>(cuts * n.columns);
    features = arena.take<float>(cuts * n.features), hidden = arena.take<float>(cuts * n.hidden);
  }
};

// --- Weights ---------------------------------------------------------------------------------------------------------

struct RawWeights {
  const void *in_weight, *in_bias, *out_weight, *out_bias, *norm_weight, *norm_bias, *gate, *fc1_weight, *fc1_bias,
      *fc2_weight, *fc2_bias;
};

template <class T>
__device__ inline float weight(const void* w, int64_t i) {
  return to_float(static_cast<const T*>(w)[i]);
}

template <class T>
__device__ inline float centred(const void* w, int64_t i, double mean) {
  return static_cast<float>(weight<T>(w, i) - mean);
}

// A block takes the mean over channels of 32 columns of W_out; the column after the last one is b_out.
template <class T>
__global__ void __launch_bounds__(kThreads) mean_over_channels_kernel(RawWeights raw, Network net, int width) {
  __shared__ double parts[kWarps][32];
  const int column = blockIdx.x * 32 + lane_id();
  double sum = 0;
  for (int c = warp_id(); c < width && column <= width; c += kWarps) {
    sum += column < width ? weight<T>(raw.out_weight, static_cast<int64_t>(c) * width + column)
                          : weight<T>(raw.out_bias, c);
  }
  parts[warp_id()][lane_id()] = sum;
  __syncthreads();
  if (warp_id() != 0 || column > width) return;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += parts[w][lane_id()];
  net.out_mean[column] = sum / width;
}

template <class T>
__global__ void __launch_bounds__(kThreads) fold_weights_kernel(RawWeights raw, Network net, Shape n) {
  const float scale = rsqrtf(static_cast<float>(n.head_dim));
  const int64_t in = static_cast<int64_t>(n.qkv) * n.width, out = static_cast<int64_t>(n.heads) * n.width * n.head_pad;
  const int64_t fc1 = static_cast<int64_t>(n.hidden) * n.features, vectors = max(n.qkv, max(n.width, n.hidden));
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < in + out + fc1 + vectors; i += threads) {
    if (i < in) {
      const int row = static_cast<int>(i / n.width), block = row / n.head_pad, e = row % n.head_pad;
      const int64_t from = static_cast<int64_t>(block * n.head_dim + e) * n.width + i % n.width;
      net.in_weight[i] = e < n.head_dim ? weight<T>(raw.in_weight, from) * (block < n.heads ? scale : 1.0f) : 0.0f;
    } else if (i < in + out) {
      const int64_t at = i - in;
      const int e = static_cast<int>(at % n.head_pad), channel = static_cast<int>(at / n.head_pad % n.width);
      const int column = static_cast<int>(at / n.head_pad / n.width) * n.head_dim + e;
      net.out_weight[at] = e < n.head_dim ? centred<T>(raw.out_weight, static_cast<int64_t>(channel) * n.width + column,
                                                       net.out_mean[column])
                                          : 0.0f;
    } else if (i < in + out + fc1) {
      const int64_t at = i - in - out;
      const int column = static_cast<int>(at % n.features), inputs = 4 * n.width + 1;
      net.fc1_weight[at] = column < inputs ? weight<T>(raw.fc1_weight, at / n.features * inputs + column) : 0.0f;
    } else {
      const int at = static_cast<int>(i - in - out - fc1);
      if (at < n.qkv) {
        const int block = at / n.head_pad, e = at % n.head_pad;
        net.in_bias[at] =
            e < n.head_dim ? weight<T>(raw.in_bias, block * n.head_dim + e) * (block < n.heads ? scale : 1.0f) : 0.0f;
      }
      if (at < n.width) {
        net.out_bias[at] = centred<T>(raw.out_bias, at, net.out_mean[n.width]);
        net.norm_weight[at] = weight<T>(raw.norm_weight, at), net.norm_bias[at] = weight<T>(raw.norm_bias, at);
        net.gate[at] = raw.gate == nullptr ? 0.0f : weight<T>(raw.gate, at) * net.norm_weight[at];
      }
      if (at < n.hidden) {
        net.fc1_bias[at] = weight<T>(raw.fc1_bias, at), net.fc2_weight[at] = weight<T>(raw.fc2_weight, at);
      }
      if (at == 0) *net.fc2_bias = weight<T>(raw.fc2_bias, 0);
    }
  }
}

// --- Tokens ----------------------------------------------------------------------------------------------------------

struct Keys {
  const void* k;  // token 0 of the slab
  int64_t stride_head, stride_token;
  int head_dim;
};

template <class T>
__global__ void __launch_bounds__(kThreads) widen_keys_kernel(Keys keys, float* x, int tokens, int width) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (i >= static_cast<int64_t>(tokens) * width) return;
  const int64_t token = i / width;
  const int channel = static_cast<int>(i % width);
  const T* from = static_cast<const T*>(keys.k) + token * keys.stride_token +
                  channel / keys.head_dim * keys.stride_head + channel % keys.head_dim;
  *reinterpret_cast<float4*>(x + i) = load4(from);
}

__device__ inline float dot4(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ inline float4 scaled(float s, float4 a) { return make_float4(s * a.x, s * a.y, s * a.z, s * a.w); }
__device__ inline void add_scaled(float4& sum, float s, float4 a) {
  sum.x += s * a.x, sum.y += s * a.y, sum.z += s * a.z, sum.w += s * a.w;
}

// A warp a (token, head): its query with the keys of every neighbour that shares a window with it. Groups of `lanes`
// lanes, a power of two that spans the head, take every 32 / lanes-th neighbour.
__global__ void __launch_bounds__(kThreads) neighbour_logits_kernel(SlabRows rows, Shape n, int tokens, int lanes) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (item >= static_cast<int64_t>(tokens) * n.heads) return;
  const int token = static_cast<int>(item / n.heads), head = static_cast<int>(item % n.heads);
  const int group = lane_id() / lanes, member = lane_id() % lanes, neighbours = 2 * n.span - 1;
  const float* q = rows.qkv + static_cast<int64_t>(token) * n.qkv + head * n.head_pad;
  float* logits = rows.logits + item * 2 * n.span;
  for (int first = 0; first < neighbours; first += 32 / lanes) {
    const int o = first + group, other = token + o - (n.span - 1);
    float sum = 0;
    if (o < neighbours && other >= 0 && other < tokens) {
      const float* k = rows.qkv + static_cast<int64_t>(other) * n.qkv + (n.heads + head) * n.head_pad;
      for (int e = member * 4; e < n.head_pad; e += lanes * 4) {
        sum += dot4(*reinterpret_cast<const float4*>(q + e), *reinterpret_cast<const float4*>(k + e));
      }
    }
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    if (member == 0 && o < neighbours) logits[o] = sum;
  }
}

// --- Cuts ------------------------------------------------------------------------------------------------------------

// A thread a (cut, row of its window, head): the softmax over the window's keys. Rows that only fill a tile get zeros.
__global__ void __launch_bounds__(kThreads) shares_kernel(SlabRows rows, Shape n, int cuts) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t tile = item / (kRowTile * n.heads);  // of all cuts
  if (tile >= static_cast<int64_t>(cuts) * n.row_tiles) return;
  const int row = static_cast<int>(tile % n.row_tiles) * kRowTile + static_cast<int>(item % kRowTile);
  const int head = static_cast<int>(item / kRowTile % n.heads);
  const int64_t cut = tile / n.row_tiles;
  float* shares = rows.shares + (tile * n.columns + head) * kRowTile + item % kRowTile;
  const int step = n.heads * kRowTile;
  if (row >= n.span) {
    for (int j = 0; j < n.span; ++j) shares[static_cast<int64_t>(j) * step] = 0;
    return;
  }
  const float* logits = rows.logits + ((cut + row) * n.heads + head) * 2 * n.span + n.span - 1 - row;
  float peak = -INFINITY, sum = 0;
  for (int j = 0; j < n.span; ++j) peak = fmaxf(peak, logits[j]);
  for (int j = 0; j < n.span; ++j) sum += expf(logits[j] - peak);
  const float inverse = 1.0f / sum;
  for (int j = 0; j < n.span; ++j) shares[static_cast<int64_t>(j) * step] = expf(logits[j] - peak) * inverse;
}

__device__ inline float4 read4(const float* p) { return __ldg(reinterpret_cast<const float4*>(p)); }

// rates[i] = (1 / sigma[i], the gate's logit) of a cut's rows: y[i] passes by in registers, eight rows and four
// channels a lane. u and shares are this cut's.
__device__ inline void measure_rows(const Network& net, const Shape& n, const float* u, const float* shares,
                                    float2* rates) {
  for (int tile = 0; tile < n.row_tiles; ++tile, shares += n.columns * kRowTile) {
    float square[kRowTile] = {}, gate[kRowTile] = {};
    for (int c = lane_id() * 4; c < n.width; c += 128) {
      float4 y[kRowTile];
#pragma unroll
      for (float4& row : y) row = read4(net.out_bias + c);
#pragma unroll 4
      for (int m = 0; m < n.columns; ++m) {
        const float4 value = read4(u + static_cast<int64_t>(m) * n.width + c);
        const float4 low = read4(shares + m * kRowTile), high = read4(shares + m * kRowTile + 4);
        add_scaled(y[0], low.x, value), add_scaled(y[1], low.y, value);
        add_scaled(y[2], low.z, value), add_scaled(y[3], low.w, value);
        add_scaled(y[4], high.x, value), add_scaled(y[5], high.y, value);
        add_scaled(y[6], high.z, value), add_scaled(y[7], high.w, value);
      }
      const float4 weights = read4(net.gate + c);
#pragma unroll
      for (int i = 0; i < kRowTile; ++i) square[i] += dot4(y[i], y[i]), gate[i] += dot4(y[i], weights);
    }
#pragma unroll
    for (int i = 0; i < kRowTile; ++i) {
      const float rate = rsqrtf(warp_sum(square[i]) / static_cast<float>(n.width) + kNormEps);
      const float logit = warp_sum(gate[i]) * rate;
      const int row = tile * kRowTile + i;
      if (lane_id() == 0 && row < n.span) rates[row] = make_float2(rate, logit);
    }
  }
  __syncwarp();
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// rates[i].x becomes c[i], the softmax of the half's gate logits over sigma[i]; returns their sum.
__device__ inline float gate_half(float2* rates, int window) {
  float peak = -INFINITY, sum = 0, weights = 0;
  for (int i = lane_id(); i < window; i += 32) peak = fmaxf(peak, rates[i].y);
  peak = warp_max(peak);
  for (int i = lane_id(); i < window; i += 32) sum += expf(rates[i].y - peak);
  sum = warp_sum(sum);
  for (int i = lane_id(); i < window; i += 32) {
    const float c = rates[i].x * expf(rates[i].y - peak) / sum;
    rates[i].x = c;
    weights += c;
  }
  return warp_sum(weights);
}

// A warp a cut: its window's rows to the network's input.
__global__ void __launch_bounds__(kThreads, 2) windows_kernel(Network net, SlabRows rows, Shape n, int cuts) {
  const int64_t cut = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (cut >= cuts) return;
  const float* u = rows.u + cut * n.heads * n.width;
  const float* shares = rows.shares + cut * n.row_tiles * n.columns * kRowTile;
  float2 *rates = rows.rates + cut * n.span, *mixed = rows.mixed + cut * n.columns;
  measure_rows(net, n, u, shares, rates);
  const float left_sum = gate_half(rates, n.window), right_sum = gate_half(rates + n.window, n.window);
  __syncwarp();

  for (int m = lane_id(); m < n.columns; m += 32) {
    float2 sum = make_float2(0, 0);
    for (int i = 0; i < n.span; ++i) {
      const float share =
          __ldg(shares + (static_cast<int64_t>(i / kRowTile) * n.columns + m) * kRowTile + i % kRowTile);
      (i < n.window ? sum.x : sum.y) += rates[i].x * share;
    }
    mixed[m] = sum;
  }
  __syncwarp();

  float* out = rows.features + cut * n.features;
  float left_square = 0, right_square = 0, product = 0;
  for (int c = lane_id() * 4; c < n.width; c += 128) {
    const float4 bias = read4(net.out_bias + c);
    float4 l = scaled(left_sum, bias), r = scaled(right_sum, bias);
#pragma unroll 8
    for (int m = 0; m < n.columns; ++m) {
      const float4 value = read4(u + static_cast<int64_t>(m) * n.width + c);
      const float2 both = mixed[m];
      add_scaled(l, both.x, value), add_scaled(r, both.y, value);
    }
    const float4 w = read4(net.norm_weight + c), b = read4(net.norm_bias + c);
    l = make_float4(l.x * w.x + b.x, l.y * w.y + b.y, l.z * w.z + b.z, l.w * w.w + b.w);
    r = make_float4(r.x * w.x + b.x, r.y * w.y + b.y, r.z * w.z + b.z, r.w * w.w + b.w);
    left_square += dot4(l, l), right_square += dot4(r, r), product += dot4(l, r);
    const auto write = [&](int part, float4 x) { *reinterpret_cast<float4*>(out + part * n.width + c) = x; };
    write(0, l), write(1, r);
    write(2, make_float4(fabsf(l.x - r.x), fabsf(l.y - r.y), fabsf(l.z - r.z), fabsf(l.w - r.w)));
    write(3, make_float4(l.x * r.x, l.y * r.y, l.z * r.z, l.w * r.w));
  }
  left_square = warp_sum(left_square), right_square = warp_sum(right_square), product = warp_sum(product);
  const float cosine = product / (fmaxf(sqrtf(left_square), kCosineEps) * fmaxf(sqrtf(right_square), kCosineEps));
  if (lane_id() == 0) *reinterpret_cast<float4*>(out + 4 * n.width) = make_float4(cosine, 0, 0, 0);
}

// A warp a cut: the second layer.
__global__ void __launch_bounds__(kThreads)
    second_layer_kernel(Network net, SlabRows rows, int hidden, int cuts, float* logits) {
  const int64_t cut = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (cut >= cuts) return;
  float sum = 0;
  for (int j = lane_id(); j < hidden; j += 32) {
    const float x = rows.hidden[cut * hidden + j];
    sum += (x < 0 ? 0.0f : x) * net.fc2_weight[j];  // a NaN stays
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) logits[cut] = sum + *net.fc2_bias;
}

__global__ void __launch_bounds__(kThreads) fill_kernel(float* logits, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) logits[i] = -INFINITY;
}

// --- Launch ----------------------------------------------------------------------------------------------------------

cudaError_t fold_weights(const BoundaryLogits& x, const Network& net, const Shape& n, cudaStream_t stream) {
  RawWeights raw = {};
  raw.in_weight = x.in_proj_weight.data, raw.in_bias = x.in_proj_bias.data;
  raw.out_weight = x.out_proj_weight.data, raw.out_bias = x.out_proj_bias.data;
  raw.norm_weight = x.norm_weight.data, raw.norm_bias = x.norm_bias.data, raw.gate = x.gate_weight.data;
  raw.fc1_weight = x.fc1_weight.data, raw.fc1_bias = x.fc1_bias.data;
  raw.fc2_weight = x.fc2_weight.data, raw.fc2_bias = x.fc2_bias.data;
  constexpr int kBlocks = 1024;
  return with_dtype(x.in_proj_weight.dtype, [&](auto element) {
    using T = decltype(element);
    mean_over_channels_kernel<T><<<n.width / 32 + 1, kThreads, 0, stream>>>(raw, net, n.width);
    fold_weights_kernel<T><<<kBlocks, kThreads, 0, stream>>>(raw, net, n);
    return cudaGetLastError();
  });
}

// The linear parts of a slab, between which the kernels above work.
Linear qkv_of_tokens(const Network& net, const SlabRows& rows, const Shape& n, int tokens, bool keys_are_16_bit) {
  Linear p;
  p.a = rows.x, p.b = net.in_weight, p.bias = net.in_bias, p.c = rows.qkv;
  p.a_row = p.b_row = n.width, p.c_row = n.qkv;
  p.m = tokens, p.n = n.qkv, p.k = n.width;
  p.a_is_16_bit = keys_are_16_bit;
  return p;
}

Linear values_through_out_proj(const Network& net, const SlabRows& rows, const Shape& n, int tokens) {
  Linear p;
  p.a = rows.qkv + 2 * n.heads * n.head_pad, p.b = net.out_weight, p.c = rows.u;
  p.a_batch = n.head_pad, p.b_batch = static_cast<int64_t>(n.width) * n.head_pad, p.c_batch = n.width;
  p.a_row = n.qkv, p.b_row = n.head_pad, p.c_row = static_cast<int64_t>(n.heads) * n.width;
  p.m = tokens, p.n = n.width, p.k = n.head_pad, p.batches = n.heads;
  return p;
}

Linear first_layer(const Network& net, const SlabRows& rows, const Shape& n, int cuts) {
  Linear p;
  p.a = rows.features, p.b = net.fc1_weight, p.bias = net.fc1_bias, p.c = rows.hidden;
  p.a_row = p.b_row = n.features, p.c_row = n.hidden;
  p.m = cuts, p.n = n.hidden, p.k = n.features;
  return p;
}

int lanes_of_head(const Shape& n) {
  int lanes = 1;
  while (lanes < 32 && lanes * 4 < n.head_pad) lanes *= 2;
  return lanes;
}

// Cuts [first, first + cuts) of batch row b; cut c's window begins at token c.
cudaError_t run_slab(const BoundaryLogits& x, const Network& net, const SlabRows& rows, const Shape& n, int64_t b,
                     int first, int cuts, cudaStream_t stream) {
  const int tokens = cuts + n.span - 1;
  const int64_t head_rows = static_cast<int64_t>(tokens) * n.heads;
  const Keys keys = {x.k.as<char>() + (b * x.k.stride[0] + first * x.k.stride[2]) * element_size(x.k.dtype),
                     x.k.stride[1], x.k.stride[2], static_cast<int>(x.k.shape[3])};
  if (n.width > 0) {
    const int64_t quads = static_cast<int64_t>(tokens) * n.width / 4;
    with_dtype(x.k.dtype, [&](auto element) {
      using T = decltype(element);
      widen_keys_kernel<T><<<ceil_div(quads, kThreads), kThreads, 0, stream>>>(keys, rows.x, tokens, n.width);
      return cudaSuccess;
    });
  }
  cudaError_t error = run_linear(qkv_of_tokens(net, rows, n, tokens, x.k.dtype != DType::kFloat32), stream);
  if (error == cudaSuccess) error = run_linear(values_through_out_proj(net, rows, n, tokens), stream);
  if (error != cudaSuccess) return error;
  neighbour_logits_kernel<<<ceil_div(head_rows, kWarps), kThreads, 0, stream>>>(rows, n, tokens, lanes_of_head(n));
  const int64_t share_rows = static_cast<int64_t>(cuts) * n.row_tiles * kRowTile * n.heads;
  shares_kernel<<<ceil_div(share_rows, kThreads), kThreads, 0, stream>>>(rows, n, cuts);
  windows_kernel<<<ceil_div(cuts, kWarps), kThreads, 0, stream>>>(net, rows, n, cuts);
  error = run_linear(first_layer(net, rows, n, cuts), stream);
  if (error != cudaSuccess) return error;
  second_layer_kernel<<<ceil_div(cuts, kWarps), kThreads, 0, stream>>>(
      net, rows, n.hidden, cuts, x.logits.as<float>() + b * n.seqlen_k + n.window + first);
  return cudaGetLastError();
}

}  // namespace

int64_t workspace_bytes(const BoundaryLogits& x) {
  const Shape n(x);
  if (n.cuts == 0) return 0;
  Arena arena(nullptr);
  const Network net(arena, n);
  const SlabRows rows(arena, n);
  return arena.used();
}

cudaError_t run(const BoundaryLogits& x, void* workspace, cudaStream_t stream) {
  const Shape n(x);
  const int64_t batch = x.k.shape[0], count = batch * n.seqlen_k;
  if (count == 0) return cudaSuccess;
  fill_kernel<<<ceil_div(count, kThreads), kThreads, 0, stream>>>(x.logits.as<float>(), count);
  if (n.cuts == 0) return cudaGetLastError();
  Arena arena(workspace);
  const Network net(arena, n);
  const SlabRows rows(arena, n);
  cudaError_t error = fold_weights(x, net, n, stream);
  for (int64_t b = 0; b < batch; ++b) {
    for (int first = 0; first < n.cuts && error == cudaSuccess; first += n.slab_cuts) {
      error = run_slab(x, net, rows, n, b, first, std::min(n.slab_cuts, n.cuts - first), stream);
    }
  }
  return error;
}

}  // namespace dhsa::cuda
