// What all CUDA files share: launching on a device, and two approximate instructions.
#pragma once
#include <cuda_runtime.h>

namespace lift_fast {
namespace {

// Calls launch() with `device` current. Returns null, or the CUDA runtime's error message.
template <typename F>
const char* on_device(int device, F launch) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  launch();
  error = cudaGetLastError();
  if (before != device) cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// 2^x to two units in the last place; 0 below 2^-126.
__device__ inline float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return exp2f(x);
#endif
}

// 1 / x to one unit in the last place; 0 for infinity.
__device__ inline float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
#else
  return 1.f / x;
#endif
}

}  // namespace
}  // namespace lift_fast
