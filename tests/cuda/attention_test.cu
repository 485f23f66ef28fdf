// sparse_attention on the GPU against a float64 reference kernel, then timed. No torch.
//
//   attention_test check [kernel]   every dtype, head_dim, S, q_block, window, softcap and kind of list
//   attention_test small [kernel]   a few small shapes, for compute-sanitizer
//   attention_test time  [kernel]   ms and TFLOP/s (4 D H sum min(i + 1, budget)) in a CUDA graph
//
// kernel: sm80 or sm90 (DHSA_FORCE_CUDA_KERNEL); default: what this GPU gets.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace {

using dhsa::DType;

#define CHECK(call)                                                                              \
  do {                                                                                           \
    const cudaError_t error_ = (call);                                                           \
    if (error_ != cudaSuccess) {                                                                 \
      std::printf("FAIL %s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                              \
    }                                                                                            \
  } while (0)

enum class Lists { kRuns, kAligned, kSingle, kDense, kMalformed, kTail };
const char* const kListNames[] = {"runs", "aligned", "single", "dense", "malformed", "tail"};

struct Case {
  DType dtype = DType::kBFloat16;
  int64_t batch = 1, heads = 4, heads_kv = 1, select_heads = 1, seqlen_q = 100, seqlen_k = 100, head_dim = 128;
  int64_t q_block = 64, window = 0;
  float softcap = 0, scale = 0;  // scale 0: 1 / sqrt(head_dim)
  bool transposed = true;        // [B, L, heads, D] in memory, with gaps between rows
  Lists lists = Lists::kRuns;
  int64_t budget = 64;
  unsigned seed = 1;
};

// --- Inputs ----------------------------------------------------------------------------------------------------------

__device__ float hash_normal(uint64_t i, uint64_t seed) {
  uint64_t x = i * 0x9e3779b97f4a7c15ull + seed * 0xd1b54a32d192ed03ull;
  x ^= x >> 32, x *= 0xd6e8feb86659fd93ull, x ^= x >> 32, x *= 0xd6e8feb86659fd93ull, x ^= x >> 32;
  const float u = (uint32_t(x) + 0.5f) * 2.3283064e-10f, v = (uint32_t(x >> 32) + 0.5f) * 2.3283064e-10f;
  return sqrtf(-2.0f * logf(fminf(u, 0.9999999f))) * cospif(2.0f * v);
}

template <class T>
__global__ void fill_kernel(T* data, int64_t count, uint64_t seed) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    data[i] = T(hash_normal(i, seed));
  }
}

// NaN into rows [begin, end) of every head.
template <class T>
__global__ void poison_kernel(T* data, dhsa::Tensor t, int64_t begin, int64_t end) {
  const int64_t head = blockIdx.x % t.shape[1], batch = blockIdx.x / t.shape[1];
  for (int64_t i = threadIdx.x; i < (end - begin) * t.shape[3]; i += blockDim.x) {
    data[batch * t.stride[0] + head * t.stride[1] + (begin + i / t.shape[3]) * t.stride[2] + i % t.shape[3]] = T(NAN);
  }
}

// --- Reference: one thread block a row, float64 ----------------------------------------------------------------------

struct Reference {
  dhsa::SparseAttention x;
  double *out, *lse;  // [rows, D], [rows]
  double* logits;     // [rows, capacity]
  int64_t capacity;
  const int64_t* rows;  // flat [B, H, Lq]
};

template <class T>
__global__ void reference_kernel(Reference r) {
  const dhsa::SparseAttention& x = r.x;
  const int64_t heads = x.q.shape[1], seqlen_q = x.q.shape[2], head_dim = x.q.shape[3], seqlen_k = x.k.shape[2];
  const int64_t row = r.rows[blockIdx.x], token = row % seqlen_q, head = row / seqlen_q % heads;
  const int64_t batch = row / seqlen_q / heads, kv_head = head / (heads / x.k.shape[1]);
  const int64_t s = head / (heads / x.runs.shape[1]), blocks = x.runs.shape[2], capacity = x.runs.shape[3];
  const int64_t list = (batch * x.runs.shape[1] + s) * blocks + token / x.q_block;
  const int64_t p = seqlen_k - seqlen_q + token;
  const int* runs = static_cast<const int*>(x.runs.data) + list * capacity * 2;
  const int64_t num_runs =
      max(0ll, min((long long)static_cast<const int*>(x.num_runs.data)[list], (long long)capacity));
  const T* q = static_cast<const T*>(x.q.data) + batch * x.q.stride[0] + head * x.q.stride[1] + token * x.q.stride[2];
  const T* k = static_cast<const T*>(x.k.data) + batch * x.k.stride[0] + kv_head * x.k.stride[1];
  const T* v = static_cast<const T*>(x.v.data) + batch * x.v.stride[0] + kv_head * x.v.stride[1];
  double* logits = r.logits + blockIdx.x * r.capacity;

  // Keys by list position, so that a key named twice counts twice.
  int64_t n = 0;
  for (int64_t i = 0; i < num_runs; ++i) {
    const int64_t begin = max(0ll, (long long)runs[2 * i]), end = min((long long)seqlen_k, (long long)runs[2 * i + 1]);
    for (int64_t j = begin + threadIdx.x; j < end; j += blockDim.x) {
      double logit = -INFINITY;
      if (j <= p && (x.softmax.window == 0 || p - x.softmax.window < j)) {
        double dot = 0;
        for (int64_t d = 0; d < head_dim; ++d) dot += double(float(q[d])) * double(float(k[j * x.k.stride[2] + d]));
        logit = dot * x.softmax.scale;
        if (x.softmax.softcap > 0) logit = x.softmax.softcap * tanh(logit / x.softmax.softcap);
      }
      if (n + j - begin < r.capacity) logits[n + j - begin] = logit;
    }
    n += max(0ll, (long long)(end - begin));
  }
  __syncthreads();
  double top = -INFINITY, sum = 0;
  for (int64_t i = 0; i < n; ++i) top = fmax(top, logits[i]);
  if (top > -INFINITY) {
    for (int64_t i = 0; i < n; ++i) sum += exp(logits[i] - top);
  }
  for (int64_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
    double out = 0;
    int64_t at = 0;
    for (int64_t i = 0; i < num_runs; ++i) {
      const int64_t begin = max(0ll, (long long)runs[2 * i]),
                    end = min((long long)seqlen_k, (long long)runs[2 * i + 1]);
      for (int64_t j = begin; j < end; ++j, ++at) {
        if (logits[at] > -INFINITY) out += exp(logits[at] - top) * double(float(v[j * x.v.stride[2] + d]));
      }
    }
    r.out[blockIdx.x * head_dim + d] = sum > 0 ? out / sum : 0;
  }
  if (threadIdx.x == 0) r.lse[blockIdx.x] = sum > 0 ? top + log(sum) : -INFINITY;
}

// --- Lists -----------------------------------------------------------------------------------------------------------

struct HostLists {
  std::vector<int32_t> runs, num_runs;
  int64_t capacity = 1;
  int64_t free_begin = 0, free_end = 0;  // keys in no list
  double keys = 0;                       // kept and seen by the block's last query, all lists
  double run_count = 0;
};

using Runs = std::vector<std::pair<int32_t, int32_t>>;

Runs merged(std::vector<int32_t> keys) {
  std::sort(keys.begin(), keys.end());
  Runs runs;
  for (const int32_t key : keys) {
    if (!runs.empty() && runs.back().second == key) {
      ++runs.back().second;
    } else {
      runs.push_back({key, key + 1});
    }
  }
  return runs;
}

// `unit` aligned pieces of random lengths, from [0, end), until `budget` keys are kept; sink and local keys first.
Runs pick(std::mt19937& rng, int64_t end, int64_t p0, int64_t budget, int64_t sink, int64_t local, int64_t shortest,
          int64_t longest) {
  if (end <= budget) return end > 0 ? Runs{{0, int32_t(end)}} : Runs{};
  std::vector<char> kept(end, 0);
  int64_t left = budget;
  const auto keep = [&](int64_t begin, int64_t past) {
    for (int64_t j = std::max<int64_t>(begin, 0); j < std::min(past, end) && left > 0; ++j) {
      if (!kept[j]) kept[j] = 1, --left;
    }
  };
  keep(0, sink);
  keep(p0 - local + 1, end);
  std::vector<std::pair<int64_t, int64_t>> chunks;
  for (int64_t j = 0; j < end;) {
    const int64_t n = shortest + int64_t(rng() % unsigned(longest - shortest + 1));
    chunks.push_back({j, j + n});
    j += n;
  }
  while (left > 0 && !chunks.empty()) {
    const size_t i = rng() % chunks.size();
    keep(chunks[i].first, chunks[i].second);
    chunks[i] = chunks.back();
    chunks.pop_back();
  }
  Runs runs;
  for (int64_t j = 0; j < end; ++j) {
    if (!kept[j]) continue;
    if (!runs.empty() && runs.back().second == j) {
      ++runs.back().second;
    } else {
      runs.push_back({int32_t(j), int32_t(j + 1)});
    }
  }
  return runs;
}

HostLists make_lists(const Case& c) {
  std::mt19937 rng(c.seed * 7919 + 13);
  const int64_t blocks = (c.seqlen_q + c.q_block - 1) / c.q_block;
  HostLists out;
  std::vector<Runs> lists;
  const bool timing = c.seqlen_k > 4096;
  if (!timing && c.seqlen_k > 20) {
    out.free_begin = c.seqlen_k * 3 / 10, out.free_end = out.free_begin + c.seqlen_k / 8;
    if (c.lists == Lists::kMalformed) out.free_begin = out.free_end = 0;
  }
  for (int64_t i = 0; i < c.batch * c.select_heads * blocks; ++i) {
    const int64_t block = i % blocks, p0 = c.seqlen_k - c.seqlen_q + block * c.q_block;
    const int64_t p1 = std::min(p0 + c.q_block, c.seqlen_k) - 1;
    // In checks, a third of the lists also name keys that the causal mask must hide.
    const int64_t end = !timing && rng() % 3 == 0 ? c.seqlen_k : std::max<int64_t>(p1 + 1, 0);
    Runs runs;
    switch (c.lists) {
      case Lists::kRuns:
        runs = timing ? pick(rng, end, p0, c.budget, 128, 128, 9, 23) : pick(rng, end, p0, c.budget, 3, 7, 1, 40);
        break;
      case Lists::kAligned:
        runs = pick(rng, end, p0, c.budget, timing ? 128 : 16, 1, timing ? 128 : 16, timing ? 128 : 16);
        break;
      case Lists::kSingle: {
        std::vector<int32_t> keys;
        if (end <= 2 * c.budget) {
          for (int64_t j = 0; j < std::min(end, c.budget); ++j) keys.push_back(int32_t(end <= c.budget ? j : 2 * j));
        } else {
          std::vector<char> taken(end / 2, 0);
          while (int64_t(keys.size()) < c.budget) {
            const size_t j = rng() % taken.size();
            if (!taken[j]) taken[j] = 1, keys.push_back(int32_t(2 * j));
          }
        }
        runs = merged(keys);
        break;
      }
      case Lists::kDense:
        runs = end > 0 ? Runs{{0, int32_t(end)}} : Runs{};
        break;
      case Lists::kTail:
        runs = c.seqlen_q - 64 < (block + 1) * c.q_block ? Runs{{0, int32_t(std::max<int64_t>(end, 0))}}
                                                         : pick(rng, end, p0, c.budget, 128, 128, 9, 23);
        break;
      case Lists::kMalformed:
        for (int j = 0; j < 9; ++j) {
          const int32_t odd[] = {INT32_MIN,
                                 -5,
                                 0,
                                 3,
                                 int32_t(c.seqlen_k / 2),
                                 int32_t(c.seqlen_k - 1),
                                 int32_t(c.seqlen_k),
                                 int32_t(c.seqlen_k + 100),
                                 INT32_MAX};
          runs.push_back({odd[rng() % 9], odd[rng() % 9]});
        }
        break;
    }
    if (!timing && c.lists != Lists::kMalformed) {
      if (rng() % 9 == 0) runs.clear();  // a block with no key
      Runs cut;                          // nothing from the free keys
      for (const auto& run : runs) {
        const int32_t fb = int32_t(out.free_begin), fe = int32_t(out.free_end);
        if (run.first < std::min(run.second, fb)) cut.push_back({run.first, std::min(run.second, fb)});
        if (std::max(run.first, fe) < run.second) cut.push_back({std::max(run.first, fe), run.second});
      }
      runs = cut;
    }
    out.capacity = std::max<int64_t>(out.capacity, runs.size());
    for (const auto& run : runs) out.keys += run.second - run.first;
    out.run_count += runs.size();
    lists.push_back(runs);
  }
  out.runs.assign(lists.size() * out.capacity * 2, 0);
  for (size_t i = 0; i < lists.size(); ++i) {
    int32_t count = int32_t(lists[i].size());
    if (c.lists == Lists::kMalformed) count = int32_t(rng() % 40) - 10;
    out.num_runs.push_back(count);
    for (size_t j = 0; j < lists[i].size(); ++j) {
      out.runs[(i * out.capacity + j) * 2] = lists[i][j].first;
      out.runs[(i * out.capacity + j) * 2 + 1] = lists[i][j].second;
    }
  }
  return out;
}

// --- One problem on the device ---------------------------------------------------------------------------------------

struct Problem {
  dhsa::SparseAttention x;
  std::vector<void*> owned;
  void* workspace = nullptr;
  int64_t out_bytes = 0, lse_count = 0;
  HostLists lists;

  void* allocate(int64_t bytes) {
    void* data = nullptr;
    CHECK(cudaMalloc(&data, std::max<int64_t>(bytes, 256)));
    owned.push_back(data);
    return data;
  }
  ~Problem() {
    for (void* data : owned) cudaFree(data);
  }
};

dhsa::Tensor strided(Problem& problem, DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t head_dim,
                     bool transposed, uint64_t seed, int64_t* bytes) {
  dhsa::Tensor t;
  t.dtype = dtype, t.ndim = 4;
  const int64_t shape[] = {batch, heads, rows, head_dim};
  std::copy(shape, shape + 4, t.shape);
  const int64_t gap = rows > 4096 ? 0 : 8;
  t.stride[3] = 1;
  t.stride[transposed ? 1 : 2] = head_dim + gap;
  t.stride[transposed ? 2 : 1] = (head_dim + gap) * (transposed ? heads : rows);
  t.stride[0] = (head_dim + gap) * heads * rows;
  const int64_t count = t.stride[0] * batch;
  *bytes = count * dhsa::element_size(dtype);
  t.data = problem.allocate(*bytes);
  if (seed != 0 && count > 0) {
    switch (dtype) {
      case DType::kFloat32:
        fill_kernel<<<1024, 256>>>(t.as<float>(), count, seed);
        break;
      case DType::kFloat16:
        fill_kernel<<<1024, 256>>>(t.as<__half>(), count, seed);
        break;
      default:
        fill_kernel<<<1024, 256>>>(t.as<__nv_bfloat16>(), count, seed);
        break;
    }
    CHECK(cudaGetLastError());
  }
  return t;
}

dhsa::Tensor ints(Problem& problem, const std::vector<int32_t>& values, std::vector<int64_t> shape) {
  dhsa::Tensor t;
  t.dtype = DType::kInt32, t.ndim = int32_t(shape.size());
  int64_t stride = 1;
  for (int d = t.ndim - 1; d >= 0; --d) t.shape[d] = shape[d], t.stride[d] = stride, stride *= shape[d];
  t.data = problem.allocate(values.size() * 4);
  CHECK(cudaMemcpy(t.data, values.data(), values.size() * 4, cudaMemcpyHostToDevice));
  return t;
}

void build(Problem& problem, const Case& c) {
  dhsa::SparseAttention& x = problem.x;
  problem.lists = make_lists(c);
  int64_t bytes;
  x.q = strided(problem, c.dtype, c.batch, c.heads, c.seqlen_q, c.head_dim, c.transposed, c.seed * 3 + 1, &bytes);
  x.k = strided(problem, c.dtype, c.batch, c.heads_kv, c.seqlen_k, c.head_dim, c.transposed, c.seed * 3 + 2, &bytes);
  x.v = strided(problem, c.dtype, c.batch, c.heads_kv, c.seqlen_k, c.head_dim, c.transposed, c.seed * 3 + 3, &bytes);
  if (problem.lists.free_end > problem.lists.free_begin) {
    for (dhsa::Tensor* t : {&x.k, &x.v}) {
      const unsigned grid = unsigned(c.batch * c.heads_kv);
      const int64_t b = problem.lists.free_begin, e = problem.lists.free_end;
      switch (c.dtype) {
        case DType::kFloat32:
          poison_kernel<<<grid, 256>>>(t->as<float>(), *t, b, e);
          break;
        case DType::kFloat16:
          poison_kernel<<<grid, 256>>>(t->as<__half>(), *t, b, e);
          break;
        default:
          poison_kernel<<<grid, 256>>>(t->as<__nv_bfloat16>(), *t, b, e);
          break;
      }
    }
  }
  x.out = strided(problem, c.dtype, c.batch, c.heads, c.seqlen_q, c.head_dim, c.transposed, 0, &problem.out_bytes);
  const int64_t blocks = (c.seqlen_q + c.q_block - 1) / c.q_block;
  x.runs = ints(problem, problem.lists.runs, {c.batch, c.select_heads, blocks, problem.lists.capacity, 2});
  x.num_runs = ints(problem, problem.lists.num_runs, {c.batch, c.select_heads, blocks});
  x.q_block = c.q_block;
  x.softmax.scale = c.scale != 0 ? c.scale : 1.0f / std::sqrt(float(c.head_dim));
  x.softmax.softcap = c.softcap;
  x.softmax.window = c.window;
  problem.lse_count = c.batch * c.heads * c.seqlen_q;
  x.lse.ndim = 3, x.lse.dtype = DType::kFloat32;
  x.lse.data = problem.allocate(problem.lse_count * 4);
  problem.workspace = problem.allocate(dhsa::cuda::workspace_bytes(x));
  CHECK(cudaMemset(problem.workspace, 0xff, std::max<int64_t>(dhsa::cuda::workspace_bytes(x), 1)));
  CHECK(cudaMemset(x.out.data, 0xff, std::max<int64_t>(problem.out_bytes, 1)));
  CHECK(cudaMemset(x.lse.data, 0xff, std::max<int64_t>(problem.lse_count * 4, 1)));
}

float to_float(const void* data, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(data)[i]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
}

// Compares `rows` (flat [B, H, Lq]; empty: all) with the reference. True when within SPEC's tolerances.
bool compare(Problem& problem, const Case& c, std::vector<int64_t> rows, double* error, double* lse_error) {
  if (rows.empty()) {
    for (int64_t i = 0; i < problem.lse_count; ++i) rows.push_back(i);
  }
  const dhsa::SparseAttention& x = problem.x;
  Problem scratch;
  Reference r;
  r.x = x;
  r.capacity = c.lists == Lists::kMalformed ? 9 * c.seqlen_k : c.seqlen_k;
  const int64_t count = int64_t(rows.size());
  r.out = static_cast<double*>(scratch.allocate(count * c.head_dim * 8));
  r.lse = static_cast<double*>(scratch.allocate(count * 8));
  r.logits = static_cast<double*>(scratch.allocate(count * std::max<int64_t>(r.capacity, 1) * 8));
  int64_t* device_rows = static_cast<int64_t*>(scratch.allocate(count * 8));
  CHECK(cudaMemcpy(device_rows, rows.data(), count * 8, cudaMemcpyHostToDevice));
  r.rows = device_rows;
  switch (c.dtype) {
    case DType::kFloat32:
      reference_kernel<float><<<unsigned(count), 128>>>(r);
      break;
    case DType::kFloat16:
      reference_kernel<__half><<<unsigned(count), 128>>>(r);
      break;
    default:
      reference_kernel<__nv_bfloat16><<<unsigned(count), 128>>>(r);
      break;
  }
  CHECK(cudaGetLastError());
  std::vector<double> out(count * c.head_dim), lse(count);
  CHECK(cudaMemcpy(out.data(), r.out, out.size() * 8, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(lse.data(), r.lse, lse.size() * 8, cudaMemcpyDeviceToHost));
  std::vector<char> got(problem.out_bytes);
  std::vector<float> got_lse(problem.lse_count);
  CHECK(cudaMemcpy(got.data(), x.out.data, got.size(), cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(got_lse.data(), x.lse.data, got_lse.size() * 4, cudaMemcpyDeviceToHost));
  double difference = 0, norm = 0;
  *lse_error = 0;
  bool exact = true;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = rows[i] % c.seqlen_q, head = rows[i] / c.seqlen_q % c.heads;
    const int64_t batch = rows[i] / c.seqlen_q / c.heads;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      const double want = out[i * c.head_dim + d];
      const double have =
          to_float(got.data(), batch * x.out.stride[0] + head * x.out.stride[1] + token * x.out.stride[2] + d, c.dtype);
      difference += (have - want) * (have - want), norm += want * want;
      exact &= std::isfinite(have);
    }
    if (std::isinf(lse[i])) {
      exact &= got_lse[rows[i]] == -INFINITY;
    } else {
      const double e = std::abs(got_lse[rows[i]] - lse[i]);
      *lse_error = e > *lse_error || std::isnan(e) ? e : *lse_error;
    }
  }
  *error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  const double bound = c.dtype == DType::kFloat32 ? 1e-5 : c.dtype == DType::kFloat16 ? 2e-3 : 1e-2;
  const double lse_bound = c.dtype == DType::kFloat32 ? 1e-4 : c.dtype == DType::kFloat16 ? 1e-2 : 2e-2;
  return exact && *error < bound && *lse_error < lse_bound;
}

const char* dtype_name(DType dtype) {
  return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kFloat16 ? "fp16" : "bf16";
}

void print_case(const Case& c) {
  std::printf("%s D%lld B%lld H%lld/%lld S%lld Lq%lld Lk%lld q_block%lld window%lld cap%g scale%g %s %s",
              dtype_name(c.dtype), (long long)c.head_dim, (long long)c.batch, (long long)c.heads, (long long)c.heads_kv,
              (long long)c.select_heads, (long long)c.seqlen_q, (long long)c.seqlen_k, (long long)c.q_block,
              (long long)c.window, c.softcap, c.scale, c.transposed ? "BLHD" : "BHLD",
              kListNames[static_cast<int>(c.lists)]);
}

bool check_case(const Case& c) {
  Problem problem;
  build(problem, c);
  CHECK(dhsa::cuda::run(problem.x, problem.workspace, nullptr));
  CHECK(cudaDeviceSynchronize());
  double error, lse_error;
  const bool good = compare(problem, c, {}, &error, &lse_error);
  if (!good) {
    std::printf("FAIL ");
    print_case(c);
    std::printf(": error %.2e, lse %.2e\n", error, lse_error);
  }
  return good;
}

// --- The cases -------------------------------------------------------------------------------------------------------

// Every dtype x head_dim x kind of list, with the other arguments drawn at random: each value of each argument meets
// each kernel many times.
std::vector<Case> cases(bool small) {
  std::mt19937 rng(20240611);
  const auto one_of = [&](std::initializer_list<int64_t> values) { return values.begin()[rng() % values.size()]; };
  std::vector<Case> all;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const int64_t head_dim : {64, 96, 128, 256}) {
      for (int repeat = 0; repeat < (small ? 1 : 4); ++repeat) {
        for (int kind = 0; kind <= static_cast<int>(Lists::kMalformed); ++kind) {
          Case c;
          c.dtype = dtype, c.head_dim = head_dim, c.lists = static_cast<Lists>(kind);
          c.heads_kv = one_of({1, 2});
          c.heads = c.heads_kv * one_of({1, 3, 4, 8});
          c.select_heads = one_of({1, c.heads_kv, c.heads});
          c.q_block = one_of({1, 16, 32, 64, 128});
          c.batch = one_of({1, 2});
          c.seqlen_q = c.q_block == 1 ? one_of({1, 5, 16}) : one_of({1, 17, 64, 128, 200, 333});
          c.seqlen_k = one_of({0, 1, 63, 300, 700}) + (rng() % 4 ? c.seqlen_q : 0);
          if (small) c.seqlen_q = std::min<int64_t>(c.seqlen_q, 130), c.seqlen_k = std::min<int64_t>(c.seqlen_k, 260);
          c.window = one_of({0, 0, 1, 30, 100});
          c.softcap = one_of({0, 0, 10});
          c.scale = c.softcap > 0 ? 30.0f / (1.5f * std::sqrt(float(head_dim))) : 0;  // logits to 3 x the cap
          if (c.softcap == 0 && rng() % 8 == 0) c.scale = -0.05f;
          c.transposed = rng() % 2;
          c.budget = one_of({16, 64, 200});
          c.seed = unsigned(rng() % 1000 + 1);
          all.push_back(c);
        }
      }
    }
  }
  return all;
}

int check(bool small) {
  int bad = 0, total = 0;
  for (const Case& c : cases(small)) {
    ++total;
    bad += !check_case(c);
    if (bad > 20) break;
  }
  std::printf("%d cases, %d wrong\n", total, bad);
  return bad != 0;
}

// --- Times -----------------------------------------------------------------------------------------------------------

bool time_case(const char* name, const Case& c, int repeats, double flops = 0) {
  Problem problem;
  build(problem, c);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaDeviceSynchronize());
  CHECK(dhsa::cuda::run(problem.x, problem.workspace, stream));
  CHECK(cudaStreamSynchronize(stream));
  std::vector<int64_t> rows;
  std::mt19937 rng(5);
  for (int i = 0; i < 48; ++i) rows.push_back((int64_t(rng()) << 20 ^ rng()) % problem.lse_count);
  rows.push_back(problem.lse_count - 1);
  double error, lse_error;
  const bool good = compare(problem, c, rows, &error, &lse_error);

  const int per_graph = c.seqlen_q <= 16 ? 50 : 1;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < per_graph; ++i) CHECK(dhsa::cuda::run(problem.x, problem.workspace, stream));
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t from, to;
  CHECK(cudaEventCreate(&from));
  CHECK(cudaEventCreate(&to));
  std::vector<float> times;
  for (int i = 0; i < repeats + 2; ++i) {
    CHECK(cudaEventRecord(from, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(to, stream));
    CHECK(cudaEventSynchronize(to));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, from, to));
    if (i >= 2) times.push_back(ms / per_graph);
  }
  std::sort(times.begin(), times.end());
  const double ms = times[times.size() / 2];
  if (flops == 0) {
    for (int64_t i = 0; i < c.seqlen_q; ++i) {
      flops += 4.0 * c.head_dim * c.heads * c.batch * double(std::min(c.seqlen_k - c.seqlen_q + i + 1, c.budget));
    }
  }
  std::printf("%-34s %8.4f ms %7.1f TFLOP/s  mean run %6.1f  workspace %5.1f MiB  %s (%.1e, %.1e)\n", name, ms,
              flops / ms * 1e-9, problem.lists.keys / std::max(problem.lists.run_count, 1.0),
              double(dhsa::cuda::workspace_bytes(problem.x)) / (1 << 20), good ? "ok" : "WRONG", error, lse_error);
  std::fflush(stdout);
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
  return good;
}

int time_all(bool all) {
  Case c;
  c.heads = 32, c.heads_kv = 8, c.select_heads = 1, c.q_block = 128, c.budget = 2048;
  bool good = true;
  for (const int64_t length : {int64_t(131072), int64_t(32768)}) {
    c.seqlen_q = c.seqlen_k = length;
    const std::string at = length == 131072 ? " 128K/2048" : " 32K/2048";
    c.lists = Lists::kRuns, good &= time_case(("A" + at).c_str(), c, 10);
    c.lists = Lists::kAligned, good &= time_case(("B" + at).c_str(), c, 10);
    c.lists = Lists::kSingle, good &= time_case(("C" + at).c_str(), c, 10);
  }
  if (!all) return !good;
  c.seqlen_q = c.seqlen_k = 131072, c.lists = Lists::kTail;
  good &= time_case("A 128K/2048 dense_tail 64", c, 5);
  c.lists = Lists::kRuns, c.q_block = 64, c.select_heads = 8;
  good &= time_case("A 128K/2048 S 8 q_block 64", c, 5);
  c.seqlen_q = c.seqlen_k = 8192, c.q_block = 128, c.select_heads = 1;
  good &= time_case("A 8K/2048", c, 20);
  c.seqlen_q = c.seqlen_k = 32768, c.lists = Lists::kDense, c.budget = 32768;
  good &= time_case("dense 32K", c, 5);
  c.lists = Lists::kRuns, c.budget = 2048, c.head_dim = 64;
  good &= time_case("A 32K/2048 D 64", c, 10);
  c.head_dim = 256, c.heads = 8, c.heads_kv = 4, c.softcap = 50;
  good &= time_case("A 32K/2048 D 256 8/4 softcap 50", c, 10);
  c.head_dim = 128, c.heads = 32, c.heads_kv = 8, c.softcap = 0, c.dtype = DType::kFloat16;
  good &= time_case("A 32K/2048 fp16", c, 10);
  c.dtype = DType::kBFloat16, c.heads = 8, c.heads_kv = 8;
  good &= time_case("A 32K/2048 8/8 heads", c, 10);
  c.heads = 32, c.seqlen_q = 1, c.seqlen_k = 131072, c.q_block = 1;
  good &= time_case("decode 1 query 128K/2048", c, 10);
  return !good;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (argc > 2) setenv("DHSA_FORCE_CUDA_KERNEL", argv[2], 1);
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, compiled for %s, kernel %s\n", properties.name, dhsa::cuda::archs_compiled(),
              argc > 2 ? argv[2] : "default");
  if (mode == "time") return time_all(argc <= 3);
  return check(mode == "small");
}
