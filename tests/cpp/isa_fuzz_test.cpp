// Differential fuzzing: stages on random shapes, strides, types and lists, by the active ISA and by scalar code, and
// what a machine does with an ISA that it lacks. Beside the stages' own tests, whose oracles know the answer but want
// small shapes, the shapes here reach over tiles, strips and their tails. refine_keys is not among them: two ISAs may
// order near ties differently, which only its oracle can tell from a mistake.
#include <sys/resource.h>

#include <csignal>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "problem.h"

namespace dhsa::cpu {
#if defined(__aarch64__)
extern const Kernels kNeonfhmKernels, kNeonbf16Kernels;
#elif defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512bf16Kernels, kAmxKernels;
#endif
}  // namespace dhsa::cpu

namespace dhsa::test {
namespace {

// What scalar code gives for `outputs`, which are left as the active ISA computes them.
template <class P>
std::vector<Array> by_scalar_code(const P& p, const std::vector<Array*>& outputs) {
  const char* active = cpu::isa_active();
  std::vector<Array> scalar;
  cpu::force_isa("scalar");
  run_stage(p);
  for (Array* output : outputs) {
    scalar.push_back(output->copy());
    output->fill(-1.0);
  }
  cpu::force_isa(active);
  run_stage(p);
  return scalar;
}

// Each is within the bounds of docs/numerics.md of the truth, so that the two are within twice the bounds.
void expect_same_attention(const Problem& problem, const Array& out, const Array& lse) {
  const Shape& n = problem.shape;
  const int type = static_cast<int>(out.tensor.dtype);
  const double out_bound[] = {2e-5, 4e-3, 2e-2}, lse_bound[] = {2e-4, 2e-2, 4e-2};
  for (int64_t b = 0; b < n.batch; ++b) {
    for (int64_t h = 0; h < n.heads; ++h) {
      for (int64_t i = 0; i < n.seqlen_q; ++i) {
        double error = 0.0, norm = 0.0;
        for (int64_t d = 0; d < n.head_dim; ++d) {
          const double want = out.at({b, h, i, d}), difference = problem.out.at({b, h, i, d}) - want;
          error += difference * difference;
          norm += want * want;
        }
        EXPECT_LE(std::sqrt(error), out_bound[type] * std::sqrt(norm)) << "b " << b << ", head " << h << ", " << i;
        const double want = lse.at({b, h, i}), got = problem.lse.at({b, h, i});
        EXPECT_TRUE(std::isinf(want) ? got == want : std::fabs(got - want) <= lse_bound[type])
            << "lse of b " << b << ", head " << h << ", " << i << ": got " << got << ", scalar " << want;
      }
    }
  }
}

void expect_same_scores(const Array& got, const Array& scalar) {
  for (int64_t i = 0; i < got.size; ++i) expect_score(got.flat(i), scalar.flat(i), "element");
}

// A group of heads, lengths and a head_dim of any size, most of them no multiple of a tile's.
Shape random_shape(int64_t most_queries, int64_t most_keys) {
  const int64_t kv_heads = draw(1, 2);
  return {1, kv_heads * draw(1, 5), kv_heads, draw(1, most_queries), draw(1, most_keys), 8 * draw(1, 32)};
}

Softmax random_softmax(const Shape& n) {
  return softmax_of(n.head_dim, draw(0, 2) == 0 ? 20.0f : 0.0f, draw(0, 2) == 0 ? draw(1, n.seqlen_k) : 0);
}

testing::Message message(const Shape& n) {
  return testing::Message() << "heads " << n.heads << ", " << n.kv_heads << ", lengths " << n.seqlen_q << ", "
                            << n.seqlen_k << ", head_dim " << n.head_dim;
}

bool is_scalar() { return std::string(cpu::isa_active()) == "scalar"; }

TEST(IsaFuzz, sparse_attention) {
  if (is_scalar()) GTEST_SKIP() << "scalar code is what the others are compared with";
  for (int round = 0; round < rounds(40); ++round) {
    const Shape n = random_shape(70, 240);
    SCOPED_TRACE(message(n));
    Problem problem(kFloatTypes[round % 3], n, draw(0, 1) == 0, random_softmax(n));
    const int64_t choices[] = {1, n.kv_heads, n.heads}, lists = choices[draw(0, 2)];
    const int64_t q_blocks[] = {1, 16, draw(1, 70)}, q_block = q_blocks[draw(0, 2)];
    const int64_t blocks = problem.blocks(q_block), capacity = draw(1, 40);
    Array runs(DType::kInt32, {n.batch, lists, blocks, capacity, 2});
    Array num_runs(DType::kInt32, {n.batch, lists, blocks});
    num_runs.fill_integers(0, capacity + 1);
    if (draw(0, 3) == 0) {
      runs.fill_malformed(n.seqlen_k);
    } else {
      for (int64_t list = 0; list < n.batch * lists * blocks; ++list) {
        int32_t* run = runs.tensor.as<int32_t>() + list * capacity * 2;
        for (int64_t i = 0, key = 0; i < 2 * capacity; ++i) run[i] = static_cast<int32_t>(key += draw(0, 20));
      }
    }
    SparseAttention p;
    problem.lend(&p);
    p.runs = runs.tensor;
    p.num_runs = num_runs.tensor;
    p.q_block = q_block;
    const auto scalar = by_scalar_code(p, {&problem.out, &problem.lse});
    expect_same_attention(problem, scalar[0], scalar[1]);
  }
}

TEST(IsaFuzz, sparse_decode_over_every_key) {  // a choice of keys could differ in near ties
  if (is_scalar()) GTEST_SKIP() << "scalar code is what the others are compared with";
  for (int round = 0; round < rounds(40); ++round) {
    const Shape n = random_shape(4, 700);
    SCOPED_TRACE(message(n));
    Problem problem(kFloatTypes[round % 3], n, draw(0, 1) == 0, random_softmax(n));
    const Chunks chunks(n.batch, 30, n.seqlen_k);
    const Array pooled = Array(DType::kFloat32, {n.batch, n.kv_heads, 30, n.head_dim}).fill_normal();
    SparseDecode p;
    problem.lend(&p);
    p.k_pooled = pooled.tensor;
    p.offsets = chunks.offsets.tensor;
    p.num_chunks = chunks.num_chunks.tensor;
    p.choice.sink = p.choice.local = 1;
    p.choice.window = problem.softmax.window;
    p.choice.budget = n.seqlen_k + 2;
    const auto scalar = by_scalar_code(p, {&problem.out, &problem.lse});
    expect_same_attention(problem, scalar[0], scalar[1]);
  }
}

TEST(IsaFuzz, pooling_and_scores) {
  if (is_scalar()) GTEST_SKIP() << "scalar code is what the others are compared with";
  for (int round = 0; round < rounds(40); ++round) {
    const Shape n = random_shape(150, 200);
    SCOPED_TRACE(message(n));
    const Problem problem(kFloatTypes[round % 3], n, draw(0, 1) == 0, random_softmax(n));
    const Chunks chunks(n.batch, draw(1, 60), n.seqlen_k, draw(0, 1) == 0);
    const int64_t columns = chunks.offsets.dim(1) - 1, q_block = draw(1, 80), q_stride = draw(1, q_block);
    const int64_t blocks = problem.blocks(q_block);

    Array boundaries(DType::kFloat32, {n.batch, n.seqlen_k});
    const BoundaryScores boundary_scores{problem.k.tensor, draw(1, 9), boundaries.tensor};
    expect_same_scores(boundaries, by_scalar_code(boundary_scores, {&boundaries})[0]);

    Array k_pooled(DType::kFloat32, {n.batch, n.kv_heads, columns, n.head_dim});
    ChunkPool chunk_pool;
    chunk_pool.x = problem.k.tensor;
    chunk_pool.offsets = chunks.offsets.tensor;
    chunk_pool.num_chunks = chunks.num_chunks.tensor;
    chunk_pool.heads = n.kv_heads;
    chunk_pool.scale = PoolScale::kMean;
    chunk_pool.pooled = k_pooled.tensor;
    expect_same_scores(k_pooled, by_scalar_code(chunk_pool, {&k_pooled})[0]);

    Array q_pooled(DType::kFloat32, {n.batch, n.kv_heads, blocks, n.head_dim});
    QueryPool query_pool;
    query_pool.q = problem.q.tensor;
    query_pool.heads = n.kv_heads;
    query_pool.q_block = q_block;
    query_pool.scale = PoolScale::kMean;
    query_pool.pooled = q_pooled.tensor;
    expect_same_scores(q_pooled, by_scalar_code(query_pool, {&q_pooled})[0]);

    Array scores(DType::kFloat32, {n.batch, n.kv_heads, blocks, columns});
    const ChunkScores chunk_scores{q_pooled.tensor, k_pooled.tensor, scores.tensor};
    expect_same_scores(scores, by_scalar_code(chunk_scores, {&scores})[0]);

    Array row_lse(DType::kFloat32, {n.batch, n.heads, blocks, (q_block + q_stride - 1) / q_stride});
    ChunkMass chunk_mass;
    chunk_mass.q = problem.q.tensor;
    chunk_mass.k_mean = k_pooled.tensor;
    chunk_mass.offsets = chunks.offsets.tensor;
    chunk_mass.num_chunks = chunks.num_chunks.tensor;
    chunk_mass.seqlen_k = n.seqlen_k;
    chunk_mass.q_block = q_block;
    chunk_mass.q_stride = q_stride;
    chunk_mass.rows = draw(0, 1) == 0 ? QueryRows::kSample : QueryRows::kMean;
    chunk_mass.softmax = problem.softmax;
    chunk_mass.scores = scores.tensor;
    chunk_mass.row_lse = row_lse.tensor;
    const auto scalar = by_scalar_code(chunk_mass, {&scores, &row_lse});
    expect_same_scores(scores, scalar[0]);
    expect_same_scores(row_lse, scalar[1]);
  }
}

// One product by an instruction that the ISA alone has.
void multiply(const cpu::Kernels& kernels) {
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  alignas(64) static float zeros[1024], sums[1024];
  static const int32_t first[8] = {};
  if (kernels.begin_block != nullptr) kernels.begin_block();
  if (kernels.gemm_pairs != nullptr) {
    kernels.gemm_pairs(8, 8, zeros, 8, zeros, cpu::kMaxPanel, sums, cpu::kMaxPanel, false);
  } else if (kernels.dot_columns[2] != nullptr) {
    const cpu::KeyTile tile{zeros, zeros, 8, 8, first, 1, 8};
    cpu::Ahead ahead{};
    kernels.dot_columns[2](tile, zeros, zeros, 0, cpu::kMaxPanel, 1.0f, sums, cpu::kMaxPanel, ahead);
  } else if (kernels.dot_stored_rows[1] != nullptr) {
    kernels.dot_stored_rows[1](zeros, 1, zeros, 32, first, 8, 32, sums, 8);
  } else {
    kernels.gemm(8, 8, zeros, 8, zeros, cpu::kMaxPanel, sums, cpu::kMaxPanel, false);
  }
}

// Why DHSA_FORCE_ISA refuses what it does not detect: run past the check, the kernels of another machine die.
TEST(IsaDeathTest, kernels_of_an_isa_that_the_machine_lacks_are_illegal_instructions) {
  const std::string detected = std::string(",") + cpu::isas_detected() + ",";
  std::vector<const cpu::Kernels*> lacking;
#if defined(__aarch64__)
  const cpu::Kernels* const tables[] = {&cpu::kNeonfhmKernels, &cpu::kNeonbf16Kernels};
#elif defined(__x86_64__)
  const cpu::Kernels* const tables[] = {&cpu::kAvx2Kernels, &cpu::kAvx512Kernels, &cpu::kAvx512bf16Kernels,
                                        &cpu::kAmxKernels};
#else
  const cpu::Kernels* const tables[] = {&cpu::active_kernels()};
#endif
  for (const cpu::Kernels* table : tables) {
    if (detected.find(std::string(",") + table->name + ",") == std::string::npos) lacking.push_back(table);
  }
  if (lacking.empty()) GTEST_SKIP() << "this machine has every ISA";
  for (const cpu::Kernels* table : lacking) {
    EXPECT_THROW(cpu::force_isa(table->name), std::runtime_error);
    EXPECT_EXIT(multiply(*table), testing::KilledBySignal(SIGILL), "") << table->name;
  }
}

}  // namespace
}  // namespace dhsa::test
