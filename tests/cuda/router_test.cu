// The router's CUDA stages against host references: boundaries, pooling, chunk scores, selection. Fresh random inputs,
// poisoned outputs, integer stages bit for bit. `router_test` runs the checks, `router_test small` is the subset for
// compute-sanitizer, `router_test time` times select_boundaries on seven patterns of 128K scores.
#include "router_cases.h"

namespace dhsa::test {
namespace {

// --- Boundaries ------------------------------------------------------------------------------------------------------

void test_boundary_scores() {
  struct Case {
    int64_t batch, heads, length, dim, window;
  };
  const Case cases[] = {{2, 2, 300, 64, 4}, {1, 8, 513, 128, 4}, {1, 3, 200, 96, 4},  {1, 2, 130, 256, 4},
                        {1, 2, 7, 64, 4},   {1, 1, 8, 64, 4},    {1, 1, 1, 64, 4},    {2, 2, 150, 64, 1},
                        {1, 2, 150, 96, 7}, {1, 1, 90, 64, 33},  {1, 20, 100, 64, 4}, {1, 1, 40, 64, 100}};
  for (const Case& c : cases)
    for (DType dtype : kTypes)
      for (Layout layout : kLayouts) {
        const Input k(c.batch, c.heads, c.length, c.dim, dtype, layout);
        Array<float> scores(c.batch, c.length);
        BoundaryScores stage;
        stage.k = k.view, stage.window = c.window, stage.scores = scores.view;
        const std::string what = std::string("boundary_scores ") + name(dtype) + " D" + std::to_string(c.dim) + " Lk" +
                                 std::to_string(c.length) + " w" + std::to_string(c.window);
        run_stage(stage, what);
        expect_scores(scores.get(), boundary_scores(k, c.window), what);
        expect(scores.buffer.guard_intact(), what + ": guard");
      }
}

void check_select_boundaries(const std::vector<float>& host, int64_t batch, int64_t max_chunks, int64_t radius,
                             float threshold, int64_t segment, const std::string& what) {
  const int64_t seqlen_k = static_cast<int64_t>(host.size()) / batch;
  const int64_t capacity = chunk_capacity(seqlen_k, max_chunks, segment);
  Array<float> scores(batch, seqlen_k);
  scores.set(host);
  Array<int> offsets(batch, capacity + 1), num_chunks(batch);
  SelectBoundaries stage;
  stage.scores = scores.view, stage.max_chunks = max_chunks, stage.nms_radius = radius, stage.threshold = threshold;
  stage.segment = segment, stage.offsets = offsets.view, stage.num_chunks = num_chunks.view;
  run_stage(stage, what);
  std::vector<int> want_offsets, want_count;
  select_boundaries(host, batch, seqlen_k, max_chunks, radius, threshold, segment, capacity, &want_offsets,
                    &want_count);
  expect_equal(num_chunks.get(), want_count, what + ": num_chunks");
  expect_equal(offsets.get(), want_offsets, what + ": offsets");
  expect(offsets.buffer.guard_intact() && num_chunks.buffer.guard_intact(), what + ": guard");
}
void test_select_boundaries() {
  const std::vector<int64_t> lengths = small_run ? std::vector<int64_t>{0, 1, 33, 700}
                                                 : std::vector<int64_t>{0, 1, 7, 17, 33, 64, 500, 2048, 2049, 10007};
  for (int64_t length : lengths)
    for (int pattern = 0; pattern < 7; ++pattern)
      for (int64_t radius : {0, 1, 8, 31, 32, 63, 100, 200, 300}) {
        if (small_run && radius != 8 && radius != 63 && radius != 300) continue;
        const int64_t batch = random_int(1, 3);
        const int64_t segments[] = {0, 0, 100, std::max<int64_t>(length / 3, 1), 2 * length + 1};
        const int64_t segment = segments[random_int(0, 4)];
        const int64_t base = segment > 0 ? segment : length;
        const int64_t quotas[] = {1, 2, std::max<int64_t>(base / 16, 1), std::max<int64_t>(base, 1), base + 5};
        const int64_t quota = quotas[random_int(0, 4)];
        const float thresholds[] = {-INFINITY, -INFINITY, 0.0f, 0.5f, 1e9f};
        const float threshold = thresholds[random_int(0, 4)];
        check_select_boundaries(
            make_scores(batch * length, static_cast<Pattern>(pattern)), batch, quota, radius, threshold, segment,
            std::string("select_boundaries ") + kPatternNames[pattern] + " Lk" + std::to_string(length) + " r" +
                std::to_string(radius) + " segment" + std::to_string(segment) + " quota" + std::to_string(quota));
      }
  if (small_run) return;
  constexpr int64_t kLong = 131072;
  for (int pattern = 0; pattern < 7; ++pattern) {
    check_select_boundaries(make_scores(kLong, static_cast<Pattern>(pattern)), 1, kLong / 16, 8, -INFINITY, 0,
                            std::string("select_boundaries 128K ") + kPatternNames[pattern]);
  }
  check_select_boundaries(make_scores(24 * kLong, Pattern::kConstant), 24, kLong / 16, 8, -INFINITY, 0,
                          "select_boundaries 24 rows of 128K: more tiles than fit");
  check_select_boundaries(make_scores(kLong, Pattern::kRandom), 1, 512, 8, -INFINITY, 8192,
                          "select_boundaries 128K segment 8192");
}

// --- Pooling and chunk scores ----------------------------------------------------------------------------------------

void test_pooling() {
  struct Case {
    int64_t batch, heads, length, dim, selection_heads, longest;
  };
  const Case cases[] = {{2, 4, 333, 64, 1, 30},   {1, 8, 700, 128, 8, 40},    {1, 2, 500, 96, 4, 20},
                        {1, 2, 260, 256, 1, 300}, {1, 1, 1500, 128, 1, 1500}, {2, 6, 100, 64, 3, 1},
                        {1, 32, 150, 128, 1, 64}};
  for (const Case& c : cases)
    for (DType dtype : kTypes)
      for (Layout layout : kLayouts)
        for (PoolScale scale : {PoolScale::kSqrt, PoolScale::kMean, PoolScale::kSum}) {
          if (scale == PoolScale::kSum && dtype != DType::kFloat32) continue;
          const Input x(c.batch, c.heads, c.length, c.dim, dtype, layout);
          const int64_t capacity = c.longest == 1 ? c.length : c.length / 3;
          std::vector<int> offsets, counts(c.batch);
          for (int64_t b = 0; b < c.batch; ++b) {
            const std::vector<int> row =
                random_offsets(c.length - random_int(0, 5), c.length, capacity, c.longest, &counts[b]);
            offsets.insert(offsets.end(), row.begin(), row.end());
          }
          Array<int> d_offsets(c.batch, capacity + 1), d_counts(c.batch);
          d_offsets.set(offsets), d_counts.set(counts);
          Array<float> pooled(c.batch, c.selection_heads, capacity, c.dim);
          ChunkPool stage;
          stage.x = x.view, stage.offsets = d_offsets.view, stage.num_chunks = d_counts.view;
          stage.heads = c.selection_heads, stage.scale = scale, stage.pooled = pooled.view;
          const std::string what = std::string(name(dtype)) + " D" + std::to_string(c.dim) + " S" +
                                   std::to_string(c.selection_heads) + " L" + std::to_string(c.length);
          run_stage(stage, "chunk_pool " + what);
          expect_scores(pooled.get(), chunk_pool(x, offsets, counts, c.selection_heads, scale), "chunk_pool " + what);
          expect(pooled.buffer.guard_intact(), "chunk_pool guard");

          for (int64_t q_block : {16, 64, 128, 1}) {
            const int64_t blocks = (c.length + q_block - 1) / q_block;
            std::vector<int> even;
            for (int64_t b = 0; b < c.batch; ++b)
              for (int64_t i = 0; i <= blocks; ++i) even.push_back(static_cast<int>(std::min(i * q_block, c.length)));
            Array<float> rows(c.batch, c.selection_heads, blocks, c.dim);
            QueryPool query;
            query.q = x.view, query.heads = c.selection_heads, query.q_block = q_block, query.scale = scale;
            query.pooled = rows.view;
            run_stage(query, "query_pool " + what);
            expect_scores(
                rows.get(),
                chunk_pool(x, even, std::vector<int>(c.batch, static_cast<int>(blocks)), c.selection_heads, scale),
                "query_pool " + what);
          }
        }
}

void test_chunk_scores() {
  struct Case {
    int64_t batch, heads, rows, columns, dim;
  };
  for (const Case& c : {Case{1, 1, 1, 1, 64}, Case{2, 3, 65, 129, 96}, Case{1, 2, 200, 333, 128},
                        Case{1, 1, 64, 7, 256}, Case{1, 1, 130, 260, 8}}) {
    std::vector<float> q(c.batch * c.heads * c.rows * c.dim), k(c.batch * c.heads * c.columns * c.dim);
    for (float& x : q) x = random_normal();
    for (float& x : k) x = random_normal();
    k[0] = INFINITY;  // one chunk of one head: scores of +-inf, as in float32
    Array<float> d_q(c.batch, c.heads, c.rows, c.dim), d_k(c.batch, c.heads, c.columns, c.dim);
    d_q.set(q), d_k.set(k);
    Array<float> scores(c.batch, c.heads, c.rows, c.columns);
    ChunkScores stage;
    stage.q_pooled = d_q.view, stage.k_pooled = d_k.view, stage.scores = scores.view;
    const std::string what =
        "chunk_scores " + std::to_string(c.rows) + "x" + std::to_string(c.columns) + " D" + std::to_string(c.dim);
    run_stage(stage, what);
    std::vector<double> ref;
    for (int64_t z = 0; z < c.batch * c.heads; ++z)
      for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t j = 0; j < c.columns; ++j) {
          double dot = 0;
          for (int64_t d = 0; d < c.dim; ++d) {
            dot += static_cast<double>(q[(z * c.rows + i) * c.dim + d]) * k[(z * c.columns + j) * c.dim + d];
          }
          ref.push_back(dot);
        }
    expect_scores(scores.get(), ref, what);
    expect(scores.buffer.guard_intact(), what + ": guard");
  }
}

void test_token_scores() {
  for (int64_t seqlen_k : {1, 300, 1000}) {
    const int64_t batch = 2, heads = 3, blocks = 11, capacity = 40;
    std::vector<int> offsets, counts(batch);
    for (int64_t b = 0; b < batch; ++b) {
      const std::vector<int> row = random_offsets(seqlen_k - seqlen_k / 7, seqlen_k, capacity, 50, &counts[b]);
      offsets.insert(offsets.end(), row.begin(), row.end());
    }
    std::vector<float> scores(batch * heads * blocks * capacity), want;
    for (float& x : scores) x = random_normal();
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < heads * blocks; ++i)
        for (int64_t t = 0; t < seqlen_k; ++t) {
          const int* o = offsets.data() + b * (capacity + 1);
          const int64_t c = std::upper_bound(o, o + counts[b] + 1, t) - o - 1;
          want.push_back(c < counts[b] ? scores[(b * heads * blocks + i) * capacity + c] : -INFINITY);
        }
    Array<float> d_scores(batch, heads, blocks, capacity), out(batch, heads, blocks, seqlen_k);
    Array<int> d_offsets(batch, capacity + 1), d_counts(batch);
    d_scores.set(scores), d_offsets.set(offsets), d_counts.set(counts);
    TokenScores stage;
    stage.chunk_scores = d_scores.view, stage.offsets = d_offsets.view, stage.num_chunks = d_counts.view;
    stage.seqlen_k = seqlen_k, stage.scores = out.view;
    run_stage(stage, "token_scores");
    expect_equal(out.get(), want, "token_scores Lk" + std::to_string(seqlen_k));
  }
}

// --- Selection -------------------------------------------------------------------------------------------------------

void test_select_keys() {
  const int rounds = small_run ? 30 : 1500;
  for (int round = 0; round < rounds; ++round) {
    const int64_t batch = random_int(1, 2), heads = random_int(1, 3);
    const int64_t q_blocks[] = {1, 16, 32, 64, 128}, q_block = q_blocks[random_int(0, 4)];
    const int64_t seqlen_k = random_int(0, round % 10 == 0 ? 6000 : 700);
    const int64_t seqlen_q = random_int(1, std::min<int64_t>(q_block * 12, 600));
    const int64_t blocks = (seqlen_q + q_block - 1) / q_block, capacity = random_int(1, seqlen_k + 2);
    KeyChoice choice;
    choice.sink = random_int(0, 40), choice.local = random_int(0, 80);
    choice.budget = choice.sink + choice.local + q_block + random_int(-1, 300);
    choice.window = random_int(0, 3) == 0 ? random_int(1, seqlen_k + 10) : 0;
    choice.dense_tail = random_int(0, 3) == 0 ? random_int(1, seqlen_q) : 0;
    std::vector<int> offsets, counts(batch);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t end = random_int(0, 2) == 0 ? random_int(0, seqlen_k) : seqlen_k;
      const std::vector<int> row = random_offsets(end, seqlen_k, capacity, random_int(1, 60), &counts[b]);
      offsets.insert(offsets.end(), row.begin(), row.end());
    }
    const Pattern pattern = static_cast<Pattern>(random_int(0, 6));
    const std::vector<float> scores = make_scores(batch * heads * blocks * capacity, pattern);
    const bool overflow = random_int(0, 4) == 0;
    const int64_t runs = overflow ? random_int(1, 6) : run_capacity(capacity, choice.budget, 1);
    const std::string what = "select_keys round " + std::to_string(round) + " " +
                             kPatternNames[static_cast<int>(pattern)] + (overflow ? " overflowing" : "");
    const Lists lists = select_keys_on_device(scores, offsets, counts, batch, heads, blocks, seqlen_q, seqlen_k,
                                              q_block, choice, runs, what);
    std::vector<int> want_runs(lists.runs.size()), want_num;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < heads * blocks; ++i) {
        const int64_t row = b * heads * blocks + i;
        const std::vector<int> keys = kept_keys(scores.data() + row * capacity, offsets.data() + b * (capacity + 1),
                                                counts[b], seqlen_q, seqlen_k, q_block, i % blocks, choice);
        want_num.push_back(write_runs(keys, runs, want_runs.data() + row * runs * 2));
      }
    expect_equal(lists.num_runs, want_num, what + ": num_runs");
    expect_equal(lists.runs, want_runs, what + ": runs");
  }
}

// Whatever offsets hold, every run lies in [0, Lk) and nothing else is touched.
void test_malformed_offsets() {
  for (int round = 0; round < (small_run ? 10 : 100); ++round) {
    const int64_t seqlen_k = random_int(1, 500), seqlen_q = random_int(1, 300), blocks = (seqlen_q + 63) / 64;
    const int64_t capacity = random_int(1, 100), runs = random_int(1, 60);
    std::vector<int> offsets(capacity + 1), counts = {static_cast<int>(random_int(-5, 300))};
    for (int& o : offsets) o = static_cast<int>(random_int(-1000, 2000));
    KeyChoice choice;
    choice.budget = 200, choice.sink = random_int(0, 16), choice.local = 64;
    const Lists lists = select_keys_on_device(make_scores(blocks * capacity, Pattern::kRandom), offsets, counts, 1, 1,
                                              blocks, seqlen_q, seqlen_k, 64, choice, runs, "malformed offsets");
    bool safe = true;
    for (int x : lists.runs) safe &= x >= 0 && x <= seqlen_k;
    for (int n : lists.num_runs) safe &= n >= 0 && n <= runs;
    expect(safe, "malformed offsets, round " + std::to_string(round));
  }
}
// --- Times -----------------------------------------------------------------------------------------------------------

void time_boundaries() {
  constexpr int64_t kLong = 131072;
  for (int pattern = 0; pattern < 7; ++pattern) {
    Array<float> scores(1, kLong);
    scores.set(make_scores(kLong, static_cast<Pattern>(pattern)));
    Array<int> offsets(1, kLong / 16 + 1), num_chunks(1);
    SelectBoundaries stage;
    stage.scores = scores.view, stage.max_chunks = kLong / 16, stage.threshold = -INFINITY;
    stage.offsets = offsets.view, stage.num_chunks = num_chunks.view;
    std::printf("select_boundaries 128K %-9s %8.1f us\n", kPatternNames[pattern], time_stage(stage, 5));
  }
}
}  // namespace
}  // namespace dhsa::test

int main(int argc, char** argv) {
  using namespace dhsa::test;
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (!device_ready()) return 2;
  if (mode == "time") return time_boundaries(), 0;
  small_run = mode == "small";
  return run_tests({{"boundary_scores", test_boundary_scores},
                    {"select_boundaries", test_select_boundaries},
                    {"pooling", test_pooling},
                    {"chunk_scores", test_chunk_scores},
                    {"token_scores", test_token_scores},
                    {"select_keys", test_select_keys},
                    {"malformed offsets", test_malformed_offsets}});
}
