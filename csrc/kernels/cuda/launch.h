// Launches one kernel with one POD parameter struct; the emulator has its own.
#pragma once

#include "platform.h"

namespace resnet_fused {
namespace cuda {

// Where kernels go: a stream of the current device, and how many multiprocessors that device has.
struct Stream {
  cudaStream_t handle;
  int multiprocessors;
};

#ifdef RF_EMULATE

template <auto kernel, typename Params>
cudaError_t launch(dim3 grid, int threads, size_t shared, Stream, const Params& params) {
  emulator::run(grid, threads, shared, [&] { kernel(params); });
  return cudaSuccess;
}

#define RF_SHARED_MEMORY(name) char* const name = emulator::shared_memory()

#elif defined(__CUDACC__)

template <auto kernel, typename Params>
cudaError_t launch(dim3 grid, int threads, size_t shared, Stream stream, const Params& params) {
  if (shared > 48 * 1024) {
    // Once a device would do; asked every time, it needs no state.
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads),
                                             arguments, shared, stream.handle);
  if (error != cudaSuccess) return error;
  return cudaGetLastError();
}

#define RF_SHARED_MEMORY(name) extern __shared__ __align__(128) char name[]

#endif

}  // namespace cuda
}  // namespace resnet_fused
