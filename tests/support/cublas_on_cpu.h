// cublasGemmEx on the CPU, for tests: what csrc/pairs/score_tiles.cu uses of it, with cuda_on_cpu.h's number formats.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda_on_cpu.h"

namespace emulated {

inline double value_at(const void* data, int type, int64_t i) {
  if (type == 0) return static_cast<const float*>(data)[i];
  if (type == 2) return __half2float(static_cast<const __half*>(data)[i]);
  const std::uint32_t bits = std::uint32_t{static_cast<const __nv_bfloat16*>(data)[i].bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// op(x) [rows, cols] in column-major order, as doubles.
inline std::vector<double> widened(const void* x, int type, bool transposed, int64_t rows, int64_t cols, int64_t ld) {
  std::vector<double> wide(rows * cols);
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = 0; i < rows; ++i) wide[j * rows + i] = value_at(x, type, transposed ? i * ld + j : j * ld + i);
  return wide;
}

// Matrices are column-major. Arguments are checked as cuBLAS does (returns 7: invalid value); values that our code
// never passes are not supported (returns 15).
inline int gemm_ex(void*, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a, int a_type,
                   int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                   int compute_type, int algorithm) {
  if (m < 0 || n < 0 || k < 0 || lda < (trans_a ? k : m) || ldb < (trans_b ? n : k) || ldc < m) return 7;
  if (compute_type != 68 || algorithm != -1 || a_type != b_type || (c_type != 0 && c_type != a_type)) return 15;
  const float scale = *static_cast<const float*>(alpha), add = *static_cast<const float*>(beta);
  const std::vector<double> left = widened(a, a_type, trans_a, m, k, lda);
  const std::vector<double> right = widened(b, b_type, trans_b, k, n, ldb);
  std::vector<double> sums(m);
  for (int64_t j = 0; j < n; ++j) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t l = 0; l < k; ++l)
      for (int64_t i = 0; i < m; ++i) sums[i] += left[l * m + i] * right[j * k + l];
    for (int64_t i = 0; i < m; ++i) {
      const int64_t at = j * static_cast<int64_t>(ldc) + i;
      const float out = static_cast<float>(scale * sums[i] + (add ? add * value_at(c, c_type, at) : 0.0));
      if (c_type == 0) static_cast<float*>(c)[at] = out;
      if (c_type == 2) static_cast<__half*>(c)[at] = __float2half_rn(out);
      if (c_type == 14) static_cast<__nv_bfloat16*>(c)[at] = __float2bfloat16_rn(out);
    }
  }
  return 0;
}

}  // namespace emulated
