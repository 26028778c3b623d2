#include "device.h"

namespace resnet_fused {
namespace cuda {
namespace {

__global__ void probe() {}

}  // namespace

cudaError_t runtime_version(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t kernel_architecture(int* architecture) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) *architecture = attributes.binaryVersion;
  return error;
}

}  // namespace cuda
}  // namespace resnet_fused
