// The ops of lift_fast._C: one file each, no torch, no Python. Pointers and streams come in as integers.
#pragma once
#include <cstdint>

namespace lift_fast {

enum class Out : int { f32 = 0, bf16 = 1, f16 = 2 };

// out[i, :] = round(float(codes[rows[i], :]) * scales[rows[i]]); without `rows`, row i is row i.
struct Dequant {
  const int8_t* codes;   // [n, dim], rows codes_stride apart, each row contiguous
  const float* scales;   // [n], scales_stride apart; null: ones, so that every code stays what it is
  const int64_t* rows;   // [m] or null (then m == n)
  void* out;             // [m, dim], contiguous
  int64_t n, m, dim, codes_stride, scales_stride;
  Out type;
};

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };
Isa best_isa();

// The first i whose rows[i] is outside [0, n), or -1.
int64_t first_row_outside(const Dequant& job);
// Every rows[i] must be inside [0, n).
void dequant_cpu(const Dequant& job, int threads, Isa isa);

#if LIFT_FAST_CUDA
// Null, or the CUDA runtime's words for what went wrong. Asynchronous on `stream`; a row outside [0, n) gives NaN.
const char* dequant_cuda(const Dequant& job, int device, std::uintptr_t stream);
// Devices this runtime can use: 0 without a driver, or with one older than the toolkit.
int cuda_device_count();
#endif

}  // namespace lift_fast
