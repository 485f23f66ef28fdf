// sparse_prefill against its stages bit for bit, strict, graph replay with new inputs, and sparse_decode against a
// float64 reference. `pipeline_test` runs the checks, `pipeline_test small` is the subset for compute-sanitizer,
// `pipeline_test time` prints every stage's microseconds and the router's share, `pipeline_test profile` makes few
// calls.
#include "router_cases.h"

namespace dhsa::test {
namespace {

struct Prefill {
  Input q, k, v;
  Array<float> lse;
  Buffer out;
  SparsePrefill stage;

  Prefill(int64_t batch, int64_t heads, int64_t heads_kv, int64_t seqlen_q, int64_t seqlen_k, int64_t dim, DType dtype,
          Layout layout, bool keep_host = false)
      : q(batch, heads, seqlen_q, dim, dtype, layout, keep_host),
        k(batch, heads_kv, seqlen_k, dim, dtype, layout, keep_host),
        v(batch, heads_kv, seqlen_k, dim, dtype, layout, keep_host),
        lse(batch, heads, seqlen_q),
        out(batch * heads * seqlen_q * dim * element_size(dtype)) {
    stage.q = q.view, stage.k = k.view, stage.v = v.view;
    stage.out = cuda::contiguous(out.data(), dtype, batch, heads, seqlen_q, dim), stage.lse = lse.view;
    stage.max_chunks = std::max<int64_t>(seqlen_k / 16, 1), stage.threshold = -INFINITY;
    stage.softmax.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  }
};

// Stages 1 to 6 by their public functions.
struct Staged {
  Array<float> boundary, k_pooled, q_pooled, scores;
  Array<int> offsets, num_chunks, runs, num_runs;

  static int64_t capacity(const SparsePrefill& x) { return chunk_capacity(x.k.shape[2], x.max_chunks, x.segment); }
  static int64_t run_count(const SparsePrefill& x) {
    return run_capacity(capacity(x), x.choice.budget, x.segment == 0 ? x.nms_radius + 1 : 1);
  }
  explicit Staged(const SparsePrefill& x)
      : boundary(x.k.shape[0], x.k.shape[2]),
        k_pooled(x.k.shape[0], x.select_heads, capacity(x), x.k.shape[3]),
        q_pooled(x.k.shape[0], x.select_heads, cuda::ceil_div(x.q.shape[2], x.q_block), x.k.shape[3]),
        scores(x.k.shape[0], x.select_heads, cuda::ceil_div(x.q.shape[2], x.q_block), capacity(x)),
        offsets(x.k.shape[0], capacity(x) + 1),
        num_chunks(x.k.shape[0]),
        runs(x.k.shape[0], x.select_heads, cuda::ceil_div(x.q.shape[2], x.q_block), run_count(x), 2),
        num_runs(x.k.shape[0], x.select_heads, cuda::ceil_div(x.q.shape[2], x.q_block)) {
    BoundaryScores s1;
    s1.k = x.k, s1.window = x.boundary_window, s1.scores = boundary.view;
    run_stage(s1, "staged boundary_scores");
    SelectBoundaries s2;
    s2.scores = boundary.view, s2.max_chunks = x.max_chunks, s2.nms_radius = x.nms_radius, s2.threshold = x.threshold;
    s2.segment = x.segment, s2.offsets = offsets.view, s2.num_chunks = num_chunks.view;
    run_stage(s2, "staged select_boundaries");
    ChunkPool s3;
    s3.x = x.k, s3.offsets = offsets.view, s3.num_chunks = num_chunks.view, s3.heads = x.select_heads;
    s3.scale = x.pool, s3.pooled = k_pooled.view;
    run_stage(s3, "staged chunk_pool");
    QueryPool s3q;
    s3q.q = x.q, s3q.heads = x.select_heads, s3q.q_block = x.q_block, s3q.scale = x.pool, s3q.pooled = q_pooled.view;
    run_stage(s3q, "staged query_pool");
    ChunkScores s4;
    s4.q_pooled = q_pooled.view, s4.k_pooled = k_pooled.view, s4.scores = scores.view;
    run_stage(s4, "staged chunk_scores");
    SelectKeys s6;
    s6.chunk_scores = scores.view, s6.offsets = offsets.view, s6.num_chunks = num_chunks.view;
    s6.seqlen_q = x.q.shape[2], s6.seqlen_k = x.k.shape[2], s6.q_block = x.q_block, s6.choice = x.choice;
    s6.runs = runs.view, s6.num_runs = num_runs.view;
    run_stage(s6, "staged select_keys");
  }
};

std::vector<uint16_t> attention_of(const SparsePrefill& x, const Tensor& runs, const Tensor& num_runs, Buffer& out) {
  SparseAttention stage;
  stage.q = x.q, stage.k = x.k, stage.v = x.v, stage.runs = runs, stage.num_runs = num_runs, stage.q_block = x.q_block;
  stage.softmax = x.softmax, stage.out = x.out, stage.lse = x.lse;
  out.poison();
  run_stage(stage, "staged sparse_attention");
  return out.download<uint16_t>();
}

double relative_error(const std::vector<uint16_t>& x, const std::vector<uint16_t>& ref) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    const auto value = [](uint16_t bits) {
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      float f;
      std::memcpy(&f, &wide, 4);
      return static_cast<double>(f);
    };
    const double difference = value(x[i]) - value(ref[i]);
    error += difference * difference, norm += value(ref[i]) * value(ref[i]);
  }
  return norm == 0 ? error : std::sqrt(error / norm);
}

// In one call and stage by stage: the same kernels on the same numbers, so the same bits.
void test_prefill_equals_its_stages() {
  struct Case {
    int64_t batch, heads, heads_kv, seqlen_q, seqlen_k, dim, selection_heads, q_block, window, segment, dense_tail;
  };
  const Case cases[] = {{1, 8, 2, 1500, 1500, 128, 1, 128, 0, 0, 0},  {2, 4, 2, 700, 900, 64, 2, 64, 0, 0, 64},
                        {1, 4, 1, 333, 2000, 96, 4, 16, 700, 0, 0},   {1, 4, 2, 600, 600, 256, 2, 32, 0, 200, 0},
                        {1, 32, 8, 9000, 9000, 128, 8, 64, 0, 0, 64}, {1, 4, 4, 300, 100, 64, 1, 64, 0, 0, 0}};
  for (const Case& c : cases) {
    if (small_run && c.seqlen_k > 1000) continue;
    for (Layout layout : kLayouts) {
      Prefill x(c.batch, c.heads, c.heads_kv, c.seqlen_q, c.seqlen_k, c.dim, DType::kBFloat16, layout);
      x.stage.select_heads = c.selection_heads, x.stage.q_block = c.q_block, x.stage.segment = c.segment;
      if (c.segment > 0) x.stage.max_chunks = c.segment / 16;
      x.stage.choice.budget = 400, x.stage.choice.window = x.stage.softmax.window = c.window;
      x.stage.choice.dense_tail = c.dense_tail;
      x.stage.choice.sink = std::min<int64_t>(16, c.seqlen_k), x.stage.choice.local = std::min<int64_t>(64, c.seqlen_k);
      const std::string what = "sparse_prefill Lk" + std::to_string(c.seqlen_k) + " S" +
                               std::to_string(c.selection_heads) + " q_block" + std::to_string(c.q_block);
      run_stage(x.stage, what);
      const std::vector<uint16_t> fused = x.out.download<uint16_t>();
      const Staged staged(x.stage);
      expect(fused == attention_of(x.stage, staged.runs.view, staged.num_runs.view, x.out), what + ": bits");

      SparsePrefill given = x.stage;  // the same boundaries, given
      given.offsets = staged.offsets.view, given.num_chunks = staged.num_chunks.view;
      x.out.poison();
      run_stage(given, what + " with offsets");
      expect(relative_error(x.out.download<uint16_t>(), fused) < 1e-2, what + ": given offsets");
    }
  }
}

// strict: each block's selection over chunks of which the one that holds p1 ends at p1 + 1.
void test_strict() {
  Prefill x(1, 4, 2, 600, 600, 64, DType::kBFloat16, Layout::kTokensFirst);
  SparsePrefill& s = x.stage;
  s.select_heads = 2, s.q_block = 16, s.choice.budget = 160, s.choice.sink = 8, s.choice.local = 1, s.strict = true;
  s.max_chunks = 12;  // chunks longer than a block, so that one which holds p1 has unforced keys
  run_stage(s, "strict");
  const std::vector<uint16_t> fused = x.out.download<uint16_t>();
  const Staged staged(s);
  const std::vector<int> offsets = staged.offsets.get(), count = staged.num_chunks.get();
  const int64_t blocks = 38, capacity = Staged::capacity(s);
  std::vector<float> scores(2 * blocks * capacity);
  for (int64_t block = 0; block < blocks; ++block) {
    const int end = static_cast<int>(std::min<int64_t>((block + 1) * 16, 600));
    std::vector<int> cut = offsets;
    for (int& o : cut) o = std::min(o, end);
    Array<int> d_cut(1, capacity + 1);
    d_cut.set(cut);
    Array<float> pooled(1, 2, capacity, 64), row(1, 2, blocks, capacity);
    ChunkPool pool;
    pool.x = s.k, pool.offsets = d_cut.view, pool.num_chunks = staged.num_chunks.view, pool.heads = 2;
    pool.scale = s.pool, pool.pooled = pooled.view;
    run_stage(pool, "strict chunk_pool");
    ChunkScores dot;
    dot.q_pooled = staged.q_pooled.view, dot.k_pooled = pooled.view, dot.scores = row.view;
    run_stage(dot, "strict chunk_scores");
    const std::vector<float> host = row.get();
    for (int64_t h = 0; h < 2; ++h) {
      std::copy_n(host.begin() + (h * blocks + block) * capacity, capacity,
                  scores.begin() + (h * blocks + block) * capacity);
    }
  }
  const int64_t runs = Staged::run_count(s);
  const Lists lists =
      select_keys_on_device(scores, offsets, count, 1, 2, blocks, 600, 600, 16, s.choice, runs, "strict");
  Array<int> d_runs(1, 2, blocks, runs, 2), d_num(1, 2, blocks);
  d_runs.set(lists.runs), d_num.set(lists.num_runs);
  const double error = relative_error(attention_of(s, d_runs.view, d_num.view, x.out), fused);
  expect(error < 1e-2, "strict: " + std::to_string(error));
  expect(fused != attention_of(s, staged.runs.view, staged.num_runs.view, x.out), "strict changes the selection");
}

void test_prefill_graph_replay() {
  const int64_t length = small_run ? 512 : 4096;
  Prefill x(1, 8, 2, length, length, 128, DType::kBFloat16, Layout::kTokensFirst);
  x.stage.q_block = 128, x.stage.choice.budget = 400;
  Buffer scratch = workspace(cuda::workspace_bytes(x.stage));
  Graph graph(1, [&](cudaStream_t stream) { CUDA_CHECK(cuda::run(x.stage, scratch.data(), stream)); });
  for (int i = 0; i < 3; ++i) {
    x.q.fill(false), x.k.fill(false), x.v.fill(false);
    run_stage(x.stage, "graph: direct");
    const std::vector<uint16_t> direct = x.out.download<uint16_t>();
    x.out.poison(), scratch.poison();
    graph.replay();
    expect(x.out.download<uint16_t>() == direct, "sparse_prefill replayed with new inputs");
  }
}

void test_decode() {
  struct Case {
    int64_t batch, heads, heads_kv, seqlen_q, seqlen_k, dim, selection_heads, window;
    float softcap;
  };
  const Case cases[] = {{1, 8, 2, 1, 3000, 128, 1, 0, 0}, {2, 8, 2, 3, 1000, 64, 2, 0, 0},
                        {1, 4, 1, 16, 500, 96, 4, 0, 0},  {1, 6, 2, 2, 900, 256, 1, 300, 0},
                        {1, 10, 2, 1, 40, 128, 2, 0, 5},  {1, 4, 4, 1, 5000, 128, 4, 0, 0},
                        {1, 4, 2, 5, 3, 64, 1, 0, 0}};
  for (const Case& c : cases)
    for (DType dtype : kTypes)
      for (Layout layout : kLayouts) {
        const Input q(c.batch, c.heads, c.seqlen_q, c.dim, dtype, layout);
        const Input k(c.batch, c.heads_kv, c.seqlen_k, c.dim, dtype, layout);
        const Input v(c.batch, c.heads_kv, c.seqlen_k, c.dim, dtype, layout);
        const int64_t capacity = c.seqlen_k / 8 + 2;
        std::vector<int> offsets, counts(c.batch);
        for (int64_t b = 0; b < c.batch; ++b) {
          const std::vector<int> row =
              random_offsets(std::max<int64_t>(c.seqlen_k - 20, 1), c.seqlen_k, capacity, 30, &counts[b]);
          offsets.insert(offsets.end(), row.begin(), row.end());
        }
        const std::vector<double> pooled = chunk_pool(k, offsets, counts, c.selection_heads, PoolScale::kSqrt);
        Array<int> d_offsets(c.batch, capacity + 1), d_counts(c.batch);
        d_offsets.set(offsets), d_counts.set(counts);
        Array<float> d_pooled(c.batch, c.selection_heads, capacity, c.dim), lse(c.batch, c.heads, c.seqlen_q);
        d_pooled.set(std::vector<float>(pooled.begin(), pooled.end()));
        Array<float> out32(c.batch, c.heads, c.seqlen_q, c.dim);
        SparseDecode stage;
        stage.q = q.view, stage.k = k.view, stage.v = v.view, stage.k_pooled = d_pooled.view;
        stage.offsets = d_offsets.view, stage.num_chunks = d_counts.view;
        stage.choice.budget = 300, stage.choice.window = stage.softmax.window = c.window;
        stage.choice.sink = 4, stage.choice.local = 32;
        stage.softmax.scale = 1.0f / std::sqrt(static_cast<float>(c.dim)), stage.softmax.softcap = c.softcap;
        stage.out = cuda::contiguous(out32.buffer.data(), dtype, c.batch, c.heads, c.seqlen_q, c.dim);
        stage.lse = lse.view;
        const std::string what = std::string("sparse_decode ") + name(dtype) + " Lq" + std::to_string(c.seqlen_q) +
                                 " Lk" + std::to_string(c.seqlen_k) + " D" + std::to_string(c.dim) + " S" +
                                 std::to_string(c.selection_heads);
        run_stage(stage, what);

        const std::vector<float> got_lse = lse.get();
        const size_t n = c.batch * c.heads * c.seqlen_q * c.dim;
        std::vector<double> got(n);
        if (dtype == DType::kFloat32) {
          const std::vector<float> raw = out32.get();
          std::copy_n(raw.begin(), n, got.begin());
        } else if (dtype == DType::kFloat16) {
          const auto raw = out32.buffer.download<__half>();
          for (size_t i = 0; i < n; ++i) got[i] = static_cast<float>(raw[i]);
        } else {
          const auto raw = out32.buffer.download<__nv_bfloat16>();
          for (size_t i = 0; i < n; ++i) got[i] = static_cast<float>(raw[i]);
        }

        double error = 0, norm = 0, lse_error = 0;
        const int64_t per_list = c.heads / c.selection_heads, group = c.heads / c.heads_kv;
        for (int64_t b = 0; b < c.batch; ++b)
          for (int64_t h = 0; h < c.heads; ++h)
            for (int64_t u = 0; u < c.seqlen_q; ++u) {
              const int64_t s = h / per_list;
              std::vector<float> scores(capacity);
              for (int64_t ch = 0; ch < counts[b]; ++ch) {
                double dot = 0;
                for (int64_t d = 0; d < c.dim; ++d) {
                  double mean = 0;
                  for (int64_t x = s * per_list; x < (s + 1) * per_list; ++x) mean += q.at(b, x, u, d) / per_list;
                  dot += mean * pooled[((b * c.selection_heads + s) * capacity + ch) * c.dim + d];
                }
                scores[ch] = static_cast<float>(dot);
              }
              const std::vector<int> keys = kept_keys(scores.data(), offsets.data() + b * (capacity + 1), counts[b],
                                                      c.seqlen_q, c.seqlen_k, 1, u, stage.choice);
              double sum = 0;
              std::vector<double> out(c.dim, 0.0);
              for (int key : keys) {
                double logit = 0;
                for (int64_t d = 0; d < c.dim; ++d) logit += q.at(b, h, u, d) * k.at(b, h / group, key, d);
                logit *= stage.softmax.scale;
                if (c.softcap > 0) logit = c.softcap * std::tanh(logit / c.softcap);
                sum += std::exp(logit);
                for (int64_t d = 0; d < c.dim; ++d) out[d] += std::exp(logit) * v.at(b, h / group, key, d);
              }
              const size_t row = (b * c.heads + h) * c.seqlen_q + u;
              const double want_lse = keys.empty() ? -INFINITY : std::log(sum);
              if (keys.empty() ? got_lse[row] != -INFINITY : !(std::fabs(got_lse[row] - want_lse) <= 1e3))
                lse_error = 1e9;
              else if (!keys.empty())
                lse_error = std::max(lse_error, std::fabs(got_lse[row] - want_lse));
              for (int64_t d = 0; d < c.dim; ++d) {
                const double want = keys.empty() ? 0 : out[d] / sum, difference = got[row * c.dim + d] - want;
                error += difference * difference, norm += want * want;
              }
            }
        error = norm > 0 ? std::sqrt(error / norm) : error;
        const double limit = dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kFloat16 ? 2e-3 : 1e-2;
        expect(error < limit, what + ": error " + std::to_string(error));
        expect(lse_error < (dtype == DType::kFloat32   ? 1e-4
                            : dtype == DType::kFloat16 ? 1e-2
                                                       : 2e-2),
               what + ": lse error " + std::to_string(lse_error));
      }
}

// --- Times -----------------------------------------------------------------------------------------------------------

void time_prefill(int64_t length, int64_t selection_heads, int64_t q_block, Layout layout) {
  Prefill x(1, 32, 8, length, length, 128, DType::kBFloat16, layout);
  SparsePrefill& s = x.stage;
  s.select_heads = selection_heads, s.q_block = q_block;
  s.choice.budget = 2048, s.choice.sink = 128, s.choice.local = 128;
  const int repeats = length > 40000 ? 5 : 20;
  BoundaryScores s1;
  Staged staged(s);
  s1.k = s.k, s1.window = 4, s1.scores = staged.boundary.view;
  SelectBoundaries s2;
  s2.scores = staged.boundary.view, s2.max_chunks = s.max_chunks, s2.threshold = s.threshold;
  s2.offsets = staged.offsets.view, s2.num_chunks = staged.num_chunks.view;
  ChunkPool s3;
  s3.x = s.k, s3.offsets = staged.offsets.view, s3.num_chunks = staged.num_chunks.view, s3.heads = selection_heads;
  s3.pooled = staged.k_pooled.view;
  QueryPool s3q;
  s3q.q = s.q, s3q.heads = selection_heads, s3q.q_block = q_block, s3q.pooled = staged.q_pooled.view;
  ChunkScores s4;
  s4.q_pooled = staged.q_pooled.view, s4.k_pooled = staged.k_pooled.view, s4.scores = staged.scores.view;
  SelectKeys s6;
  s6.chunk_scores = staged.scores.view, s6.offsets = staged.offsets.view, s6.num_chunks = staged.num_chunks.view;
  s6.seqlen_q = length, s6.seqlen_k = length, s6.q_block = q_block, s6.choice = s.choice;
  s6.runs = staged.runs.view, s6.num_runs = staged.num_runs.view;
  SparseAttention s7;
  s7.q = s.q, s7.k = s.k, s7.v = s.v, s7.runs = staged.runs.view, s7.num_runs = staged.num_runs.view;
  s7.q_block = q_block, s7.softmax = s.softmax, s7.out = s.out, s7.lse = s.lse;
  const double whole = time_stage(s, repeats), attention = time_stage(s7, repeats);
  std::printf(
      "%7ld S=%ld q_block %3ld %s | %8.1f %8.1f %8.1f %8.1f %8.1f %8.1f | whole %9.1f attention %9.1f router "
      "%7.1f (%4.1f%%) workspace %.1f MiB\n",
      static_cast<long>(length), static_cast<long>(selection_heads), static_cast<long>(q_block),
      layout == Layout::kHeadsFirst ? "BHLD" : "BLHD", time_stage(s1, repeats), time_stage(s2, repeats),
      time_stage(s3, repeats), time_stage(s3q, repeats), time_stage(s4, repeats), time_stage(s6, repeats), whole,
      attention, whole - attention, 100 * (whole - attention) / whole, cuda::workspace_bytes(s) / 1048576.0);
  std::fflush(stdout);
}

void time_decode(int64_t length, int64_t selection_heads) {
  Prefill x(1, 32, 8, 1, length, 128, DType::kBFloat16, Layout::kHeadsFirst);
  const int64_t capacity = length / 16;
  Array<int> offsets(1, capacity + 1), num_chunks(1);
  std::vector<int> even;
  for (int64_t i = 0; i <= capacity; ++i) even.push_back(static_cast<int>(i * 16));
  offsets.set(even), num_chunks.set({static_cast<int>(capacity)});
  Array<float> pooled(1, selection_heads, capacity, 128);
  ChunkPool pool;
  pool.x = x.k.view, pool.offsets = offsets.view, pool.num_chunks = num_chunks.view, pool.heads = selection_heads;
  pool.pooled = pooled.view;
  run_stage(pool, "decode chunk_pool");
  SparseDecode stage;
  stage.q = x.q.view, stage.k = x.k.view, stage.v = x.v.view, stage.k_pooled = pooled.view;
  stage.offsets = offsets.view, stage.num_chunks = num_chunks.view, stage.choice.budget = 2048;
  stage.choice.min_chunk = 9, stage.softmax = x.stage.softmax, stage.out = x.stage.out, stage.lse = x.stage.lse;
  Buffer scratch = workspace(cuda::workspace_bytes(stage));
  std::printf("decode %7ld S=%ld | %6.2f us a call\n", static_cast<long>(length), static_cast<long>(selection_heads),
              time_stage(stage, 50));
}

void time_all() {
  std::printf("microseconds: boundary_scores, select_boundaries, chunk_pool, query_pool, chunk_scores, select_keys\n");
  for (int64_t length : {8192, 32768, 131072}) time_prefill(length, 1, 128, Layout::kTokensFirst);
  time_prefill(131072, 1, 128, Layout::kHeadsFirst);
  for (int64_t length : {32768, 131072}) time_prefill(length, 8, 64, Layout::kTokensFirst);
  for (int64_t heads : {1, 8}) time_decode(131072, heads);
  time_decode(32768, 1);
}

// One call of the large shapes' router, for a profiler.
void profile() {
  Prefill x(1, 32, 8, 32768, 32768, 128, DType::kBFloat16, Layout::kTokensFirst);
  x.stage.select_heads = 8, x.stage.q_block = 64, x.stage.choice.budget = 2048;
  run_stage(x.stage, "profile S=8");
  x.stage.select_heads = 1, x.stage.q_block = 128;
  run_stage(x.stage, "profile S=1");
  time_decode(131072, 1);
}
}  // namespace
}  // namespace dhsa::test

int main(int argc, char** argv) {
  using namespace dhsa::test;
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (!device_ready()) return 2;
  if (mode == "time") return time_all(), 0;
  if (mode == "profile") return profile(), 0;
  small_run = mode == "small";
  return run_tests({{"decode", test_decode},
                    {"prefill equals its stages", test_prefill_equals_its_stages},
                    {"strict", test_strict},
                    {"graph replay", test_prefill_graph_replay}});
}
