// sparse_attention on the GPU against a float64 reference kernel, then timed. No torch.
//
//   attention_test check [kernel]   every dtype, head_dim, S, q_block, window, softcap and kind of list
//   attention_test small [kernel]   a few small shapes, for compute-sanitizer
//   attention_test repeat [kernel]  the same call hundreds of times, warm and with a cold L2: the bits must not change
//   attention_test time  [kernel [32K|loaders]]  ms and TFLOP/s (4 D H sum min(i + 1, budget)) in a CUDA graph
//
// kernel: sm80 or sm90 (DHSA_FORCE_CUDA_KERNEL); default: what this GPU gets. Every mode sets DHSA_FORCE_CUDA_LOADER
// itself: check, small and repeat run each call by gather and by tma, whose bits must be equal, where tma can be had,
// and fail where it is refused without a reason; time runs the two side by side on lists A, B, C and dense.
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

#include "attention_lists.h"
#include "cuda/attention_loader.h"
#include "cuda/launch.h"

namespace {

using dhsa::DType;
using namespace dhsa::test;

#define CHECK(call)                                                                              \
  do {                                                                                           \
    const cudaError_t error_ = (call);                                                           \
    if (error_ != cudaSuccess) {                                                                 \
      std::printf("FAIL %s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                              \
    }                                                                                            \
  } while (0)

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

// NaN into what lies between the rows.
template <class T>
__global__ void poison_gaps_kernel(T* data, int64_t count, int64_t head_dim, int64_t row) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    if (i % row >= head_dim) data[i] = T(NAN);
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
    const auto fill = [&](auto* data) {
      fill_kernel<<<1024, 256>>>(data, count, seed);
      if (gap > 0) poison_gaps_kernel<<<1024, 256>>>(data, count, head_dim, head_dim + gap);
    };
    switch (dtype) {
      case DType::kFloat32:
        fill(t.as<float>());
        break;
      case DType::kFloat16:
        fill(t.as<__half>());
        break;
      default:
        fill(t.as<__nv_bfloat16>());
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
  for (const auto& hole : problem.lists.holes) {
    for (dhsa::Tensor* t : {&x.k, &x.v}) {
      const unsigned grid = unsigned(c.batch * c.heads_kv);
      const int64_t b = hole.first, e = hole.second;
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

// --- Loaders ---------------------------------------------------------------------------------------------------------

void force_loader(const char* loader) { setenv("DHSA_FORCE_CUDA_LOADER", loader, 1); }

// Whether the sm_90a kernel answers calls of this type, the only one with two loaders.
bool runs_sm90(DType dtype) {
  int major = 0, minor = 0;
  CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  const char* kernel = dhsa::cuda::attention_kernel(major, minor);
  return dtype != DType::kFloat32 && kernel != nullptr && std::strcmp(kernel, "sm90") == 0;
}

bool has_boxes(const Problem& problem) { return runs_sm90(problem.x.k.dtype) && problem.x.k.shape[2] > 0; }

__global__ void count_different_kernel(const uint32_t* a, const uint32_t* b, int64_t words, unsigned* count) {
  unsigned different = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += int64_t(gridDim.x) * blockDim.x) {
    different += a[i] != b[i];
  }
  if (different > 0) atomicAdd(count, different);
}

// A copy of a problem's answers, and how many words of later ones differ from it.
class Answers {
 public:
  explicit Answers(Problem& problem)
      : x_(problem.x),
        out_bytes_(problem.out_bytes),
        lse_count_(problem.lse_count),
        out_(static_cast<uint32_t*>(problem.allocate(out_bytes_))),
        lse_(static_cast<uint32_t*>(problem.allocate(lse_count_ * 4))),
        count_(static_cast<unsigned*>(problem.allocate(4))) {
    CHECK(cudaMemset(count_, 0, 4));
  }
  void keep() {
    CHECK(cudaMemcpy(out_, x_.out.data, out_bytes_, cudaMemcpyDeviceToDevice));
    CHECK(cudaMemcpy(lse_, x_.lse.data, lse_count_ * 4, cudaMemcpyDeviceToDevice));
  }
  void poison() {
    CHECK(cudaMemset(x_.out.data, 0xff, out_bytes_));
    CHECK(cudaMemset(x_.lse.data, 0xff, lse_count_ * 4));
  }
  void count_different() {
    count_different_kernel<<<512, 256>>>(x_.out.as<uint32_t>(), out_, out_bytes_ / 4, count_);
    count_different_kernel<<<512, 256>>>(x_.lse.as<uint32_t>(), lse_, lse_count_, count_);
    CHECK(cudaGetLastError());
  }
  unsigned different() const {
    unsigned count = 0;
    CHECK(cudaMemcpy(&count, count_, 4, cudaMemcpyDeviceToHost));
    return count;
  }

 private:
  const dhsa::SparseAttention& x_;
  int64_t out_bytes_, lse_count_;
  uint32_t *out_, *lse_;
  unsigned* count_;
};

// By tma, after a run by gather: the same bits, or, where there can be no tensor maps, a refusal.
bool agrees_by_boxes(Problem& problem) {
  force_loader("tma");
  const std::string refusal = dhsa::cuda::loader_refusal(problem.x.k, problem.x.v);
  if (!has_boxes(problem)) {
    const bool good =
        !refusal.empty() && dhsa::cuda::run(problem.x, problem.workspace, nullptr) == cudaErrorNotSupported;
    if (!good) std::printf("tma was not refused: ");
    return good;
  }
  if (!refusal.empty()) {
    std::printf("%s: ", refusal.c_str());
    return false;
  }
  Answers gathered(problem);
  gathered.keep();
  gathered.poison();
  CHECK(dhsa::cuda::run(problem.x, problem.workspace, nullptr));
  gathered.count_different();
  const unsigned different = gathered.different();
  if (different > 0) std::printf("%u words differ from gather's: ", different);
  return different == 0;
}

// --- Comparison ------------------------------------------------------------------------------------------------------

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
  force_loader("gather");
  CHECK(dhsa::cuda::run(problem.x, problem.workspace, nullptr));
  CHECK(cudaDeviceSynchronize());
  double error, lse_error;
  bool good = compare(problem, c, {}, &error, &lse_error);
  good &= agrees_by_boxes(problem);
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

// --- Repeats: a race shows as bits that change between runs ----------------------------------------------------------

// Calls by gather and by tma in turn, two of each: one with a warm L2, one with a cold.
bool repeat_case(const Case& c, int repeats) {
  constexpr int64_t kFlushBytes = int64_t(128) << 20;  // more than any L2
  Problem problem;
  build(problem, c);
  const bool boxes = has_boxes(problem);
  Answers first(problem);
  void* const flush = problem.allocate(kFlushBytes);
  for (int i = 0; i <= repeats; ++i) {
    first.poison();
    if (i % 2 == 1) CHECK(cudaMemset(flush, i, kFlushBytes));
    force_loader(boxes && i / 2 % 2 == 1 ? "tma" : "gather");
    CHECK(dhsa::cuda::run(problem.x, problem.workspace, nullptr));
    if (i == 0) {
      first.keep();
    } else {
      first.count_different();
    }
  }
  const unsigned different = first.different();
  double error, lse_error;
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < 40; ++i) rows.push_back(problem.lse_count - 1 - i * 37 % problem.lse_count);
  const bool good = different == 0 && compare(problem, c, rows, &error, &lse_error);
  std::printf("%s %d times %s", good ? "ok  " : "FAIL", repeats, boxes ? "by both loaders " : "");
  print_case(c);
  std::printf(": %u words changed\n", different);
  std::fflush(stdout);
  return good;
}

// Short items, splits with and without a share, few and many tiles: where a producer may run far ahead.
int repeat(int repeats) {
  bool good = true;
  Case c;
  c.heads = 32, c.heads_kv = 8, c.select_heads = 8, c.budget = 400, c.transposed = true;
  c.seqlen_q = c.seqlen_k = 9000, c.lists = Lists::kTail, good &= repeat_case(c, repeats);
  c.lists = Lists::kLong, good &= repeat_case(c, repeats);  // boxes and gathered tiles by turns
  c.seqlen_q = c.seqlen_k = 4500, c.q_block = 16, c.budget = 64;
  c.lists = Lists::kTail, good &= repeat_case(c, repeats);
  c.seqlen_q = 48, c.q_block = 64, c.budget = 300, c.lists = Lists::kRuns, good &= repeat_case(c, 2 * repeats);
  for (const int64_t head_dim : {64, 96, 256}) {
    c.head_dim = head_dim, c.dtype = head_dim == 96 ? DType::kFloat16 : DType::kBFloat16;
    c.heads = 16, c.heads_kv = 4, c.select_heads = 4, c.seqlen_q = c.seqlen_k = 5000, c.q_block = 32;
    c.lists = Lists::kTail, good &= repeat_case(c, repeats);
    c.lists = Lists::kLong, good &= repeat_case(c, repeats);
    c.seqlen_q = 1, c.q_block = 1, c.lists = Lists::kRuns, good &= repeat_case(c, 2 * repeats);
  }
  return !good;
}

// --- Times -----------------------------------------------------------------------------------------------------------

// A captured call and the times of its replays.
struct Timed {
  const char* loader;
  cudaGraphExec_t exec = nullptr;
  std::vector<float> times;
  bool good = false;
  double error = 0, lse_error = 0;
};

// All loaders in one go, by turns.
bool time_case(const char* name, const Case& c, int repeats, std::initializer_list<const char*> loaders = {"auto"},
               double flops = 0) {
  Problem problem;
  build(problem, c);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  std::vector<int64_t> rows;
  std::mt19937 rng(5);
  for (int i = 0; i < 48; ++i) rows.push_back((int64_t(rng()) << 20 ^ rng()) % problem.lse_count);
  rows.push_back(problem.lse_count - 1);
  const int per_graph = c.seqlen_q <= 16 ? 50 : 1;
  std::vector<Timed> timed;
  for (const char* loader : loaders) {
    if (std::strcmp(loader, "tma") == 0 && !has_boxes(problem)) continue;
    Timed& t = timed.emplace_back(Timed{loader});
    force_loader(loader);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemset(problem.x.out.data, 0xff, problem.out_bytes));
    CHECK(cudaDeviceSynchronize());
    CHECK(dhsa::cuda::run(problem.x, problem.workspace, stream));
    CHECK(cudaStreamSynchronize(stream));
    t.good = compare(problem, c, rows, &t.error, &t.lse_error);
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < per_graph; ++i) CHECK(dhsa::cuda::run(problem.x, problem.workspace, stream));
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&t.exec, graph, 0));
    CHECK(cudaGraphDestroy(graph));
  }
  cudaEvent_t from, to;
  CHECK(cudaEventCreate(&from));
  CHECK(cudaEventCreate(&to));
  for (int i = 0; i < repeats + 2; ++i) {
    for (Timed& t : timed) {
      CHECK(cudaEventRecord(from, stream));
      CHECK(cudaGraphLaunch(t.exec, stream));
      CHECK(cudaEventRecord(to, stream));
      CHECK(cudaEventSynchronize(to));
      float ms;
      CHECK(cudaEventElapsedTime(&ms, from, to));
      if (i >= 2) t.times.push_back(ms / per_graph);
    }
  }
  if (flops == 0) {
    for (int64_t i = 0; i < c.seqlen_q; ++i) {
      flops += 4.0 * c.head_dim * c.heads * c.batch * double(std::min(c.seqlen_k - c.seqlen_q + i + 1, c.budget));
    }
  }
  bool good = true;
  for (Timed& t : timed) {
    std::sort(t.times.begin(), t.times.end());
    const double ms = t.times[t.times.size() / 2];
    std::printf("%-34s %-6s %8.4f ms %7.1f TFLOP/s  mean run %6.1f  workspace %5.1f MiB  %s (%.1e, %.1e)\n", name,
                t.loader, ms, flops / ms * 1e-9, problem.lists.keys / std::max(problem.lists.run_count, 1.0),
                double(dhsa::cuda::workspace_bytes(problem.x)) / (1 << 20), t.good ? "ok" : "WRONG", t.error,
                t.lse_error);
    good &= t.good;
    CHECK(cudaGraphExecDestroy(t.exec));
  }
  std::fflush(stdout);
  CHECK(cudaEventDestroy(from));
  CHECK(cudaEventDestroy(to));
  CHECK(cudaStreamDestroy(stream));
  return good;
}

// which: "" every shape, "32K" the shapes of that length, "loaders" only lists A, B, C and dense by both loaders.
int time_all(const std::string& which) {
  Case c;
  c.heads = 32, c.heads_kv = 8, c.select_heads = 1, c.q_block = 128, c.budget = 2048;
  const Case base = c;
  bool good = true;
  const auto lists_abc = [&](int64_t length, const char* at) {
    c = base, c.seqlen_q = c.seqlen_k = length;
    for (const auto& [name, lists] :
         {std::pair("A ", Lists::kRuns), std::pair("B ", Lists::kAligned), std::pair("C ", Lists::kSingle)}) {
      c.lists = lists;
      good &= time_case((std::string(name) + at).c_str(), c, 10, {"gather", "tma"});
    }
  };
  const auto dense = [&] {
    c = base, c.seqlen_q = c.seqlen_k = 32768, c.lists = Lists::kDense, c.budget = 32768;
    good &= time_case("dense 32K", c, 5, {"gather", "tma"});
  };
  lists_abc(32768, "32K/2048");
  if (which == "loaders") {
    dense();
    lists_abc(131072, "128K/2048");
    return !good;
  }
  c.lists = Lists::kRuns, c.head_dim = 64;
  good &= time_case("A 32K/2048 D 64", c, 10);
  c.head_dim = 256, c.heads = 8, c.heads_kv = 4, c.softcap = 50;
  good &= time_case("A 32K/2048 D 256 8/4 softcap 50", c, 10);
  if (which == "32K") return !good;

  lists_abc(131072, "128K/2048");
  c.lists = Lists::kTail;
  good &= time_case("A 128K/2048 dense_tail 64", c, 5);
  c.lists = Lists::kRuns, c.q_block = 64, c.select_heads = 8;
  good &= time_case("A 128K/2048 S 8 q_block 64", c, 5);
  c = base, c.seqlen_q = c.seqlen_k = 8192;
  good &= time_case("A 8K/2048", c, 20);
  dense();
  c.lists = Lists::kRuns, c.budget = 2048, c.dtype = DType::kFloat16;
  good &= time_case("A 32K/2048 fp16", c, 10);
  c.dtype = DType::kBFloat16, c.heads = 8, c.heads_kv = 8;
  good &= time_case("A 32K/2048 8/8 heads", c, 10);
  c.heads = 32, c.select_heads = 32, c.q_block = 64;
  good &= time_case("A 32K/2048 S 32 q_block 64", c, 10);
  c = base, c.seqlen_q = 1, c.seqlen_k = 131072, c.q_block = 1;
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
  if (mode == "repeat") return repeat(200);
  if (mode == "time") return time_all(argc > 3 ? argv[3] : "");
  return check(mode == "small");
}
