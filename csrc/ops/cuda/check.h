// Turns a CUDA error into torch's exception for it.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/macros.h>

namespace resnet_fused {

// STD_CUDA_CHECK asks libtorch_cuda even about success, which costs a call and needs a driver.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) STD_CUDA_CHECK(error);
}

}  // namespace resnet_fused
