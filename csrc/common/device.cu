// Counts the CUDA devices.
#include "device.h"

#include <cuda_runtime.h>

namespace lift_fast {

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace lift_fast
