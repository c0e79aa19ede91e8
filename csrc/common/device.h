// The CUDA devices of this process.
#pragma once

namespace lift_fast {

// How many this build's CUDA runtime can use: 0 without a driver, or with one older than the toolkit.
int cuda_device_count();

}  // namespace lift_fast
