// Products of rows with a weight matrix, for stages that project tokens.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dhsa::cuda {

// c[z][m][n] = a[z][m][k] . b[z][n][k] + bias[n] for z of [0, batches): float32 to about 2^-21. Rows of a and b begin
// at multiples of 16 bytes and k is a multiple of 4.
struct Linear {
  const float *a, *b;
  const float* bias = nullptr;  // null: none
  float* c;
  int64_t a_batch = 0, b_batch = 0, c_batch = 0;  // floats from one z to the next
  int64_t a_row, b_row, c_row;
  int m, n, k, batches = 1;
  bool a_is_16_bit = false;  // a holds what was float16 or bfloat16: one TF32 number each, without a low half
};
cudaError_t run_linear(const Linear&, cudaStream_t);

}  // namespace dhsa::cuda
