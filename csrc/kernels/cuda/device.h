// What the CUDA library and the machine have in common. Torch-free.
#pragma once

#include <cuda_runtime_api.h>

namespace resnet_fused {
namespace cuda {

// Version of the CUDA runtime that this process has loaded: 1000*major + 10*minor.
cudaError_t runtime_version(int* version);

// Compute capability, 10*major + minor, that the machine code was compiled for which the current device would
// run; an error where this library has none for it. Launches nothing.
cudaError_t kernel_architecture(int* architecture);

// Multiprocessors of a device, asked once for each.
cudaError_t multiprocessors(int device, int* count);

}  // namespace cuda
}  // namespace resnet_fused
