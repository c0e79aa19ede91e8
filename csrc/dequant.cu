// Gather rows of int8 codes and widen them, on the GPU: out[i, c] = round(codes[rows[i], c] * scales[rows[i]]).
//
//   one warp: row i, up to 128 chunks of it      chunk = VEC codes, whose widened form is one 16-byte store
//     row = rows[i]; scale = scales[row]         one broadcast load each
//     for k in lane, lane + 32, ... (4 chunks a lane, their loads in flight together):
//       VEC codes in (4 or 8 bytes a lane), x scale, round to nearest even, 16 bytes a lane out
//
// Bytes a warp, dim 4096, bf16: 1 KB in, 2 KB out; one multiplication an element. The bound is HBM:
// 12 KB a row, so 4096 rows are 48 MB or 16 us at 3 TB/s. A row outside the table gives NaN: raising an
// error here would make the host wait for the GPU, and reading there would end the process's CUDA context.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "ops.h"

namespace lift_fast {
namespace {

constexpr int kWarps = 4;          // rows a block
constexpr int kChunksPerLane = 4;  // loads in flight a lane
constexpr int kChunksPerWarp = 32 * kChunksPerLane;

__device__ inline void round_to(float x, float* out) { *out = x; }
__device__ inline void round_to(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void round_to(float x, __half* out) { *out = __float2half_rn(x); }

template <typename T, int VEC>
struct alignas(VEC * sizeof(T)) Wide {
  T x[VEC];
};

template <typename T, int VEC>
__global__ void __launch_bounds__(32 * kWarps) dequant_kernel(
    const int8_t* __restrict__ codes, const float* __restrict__ scales, const int64_t* __restrict__ rows,
    T* __restrict__ out, int64_t n, int64_t m, int64_t chunks, int64_t codes_stride, int64_t scales_stride) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (i >= m) return;
  const int64_t row = rows ? rows[i] : i;
  const bool inside = row >= 0 && row < n;
  const float scale = inside ? (scales ? scales[row * scales_stride] : 1.f) : __int_as_float(0x7fffffff);
  // A row outside reads row 0 (there is one, or the launcher would not have come here) times NaN.
  const auto* from = reinterpret_cast<const Wide<int8_t, VEC>*>(codes + (inside ? row : 0) * codes_stride);
  auto* to = reinterpret_cast<Wide<T, VEC>*>(out + i * chunks * VEC);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kChunksPerWarp + threadIdx.x;

  Wide<int8_t, VEC> code[kChunksPerLane];
#pragma unroll
  for (int k = 0; k < kChunksPerLane; ++k)
    if (first + 32 * k < chunks) code[k] = from[first + 32 * k];
#pragma unroll
  for (int k = 0; k < kChunksPerLane; ++k) {
    if (first + 32 * k >= chunks) return;
    Wide<T, VEC> wide;
#pragma unroll
    for (int v = 0; v < VEC; ++v) round_to(static_cast<float>(code[k].x[v]) * scale, &wide.x[v]);
    to[first + 32 * k] = wide;
  }
}

template <typename T, int VEC>
void launch(const Dequant& job, cudaStream_t stream) {
  const int64_t chunks = job.dim / VEC;
  const dim3 grid(static_cast<unsigned>((job.m + kWarps - 1) / kWarps),
                  static_cast<unsigned>((chunks + kChunksPerWarp - 1) / kChunksPerWarp));
  dequant_kernel<T, VEC><<<grid, dim3(32, kWarps), 0, stream>>>(
      job.codes, job.scales, job.rows, static_cast<T*>(job.out), job.n, job.m, chunks, job.codes_stride,
      job.scales_stride);
}

template <typename T>
void launch_widest(const Dequant& job, cudaStream_t stream) {
  constexpr int VEC = 16 / sizeof(T);
  const bool whole = job.dim % VEC == 0 && job.codes_stride % VEC == 0 &&
                     reinterpret_cast<std::uintptr_t>(job.codes) % VEC == 0 &&
                     reinterpret_cast<std::uintptr_t>(job.out) % 16 == 0;
  if (whole)
    launch<T, VEC>(job, stream);
  else
    launch<T, 1>(job, stream);
}

}  // namespace

const char* dequant_cuda(const Dequant& job, int device, std::uintptr_t stream_handle) {
  if (job.m == 0 || job.dim == 0) return nullptr;
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  if (job.type == Out::f32) launch_widest<float>(job, stream);
  if (job.type == Out::bf16) launch_widest<__nv_bfloat16>(job, stream);
  if (job.type == Out::f16) launch_widest<__half>(job, stream);
  error = cudaGetLastError();
  if (before != device) cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace lift_fast
