// Launches one kernel with one POD parameter struct; the emulator has its own.
#pragma once

#include "platform.h"

#if defined(__CUDACC__) && !defined(RF_EMULATE)
#include <atomic>
#endif

namespace resnet_fused {
namespace cuda {

// Where kernels go: a stream of the current device, and how many multiprocessors that device has.
struct Stream {
  cudaStream_t handle;
  int device;
  int multiprocessors;
};

// What every kernel may have of dynamic shared memory; more has to be asked for.
constexpr size_t kPlainShared = 48 * 1024;

#ifdef RF_EMULATE

template <auto kernel, size_t kMaxShared = kPlainShared, typename Params>
cudaError_t launch(dim3 grid, int threads, size_t shared, Stream, const Params& params) {
  emulator::allow_shared(kMaxShared, shared);
  emulator::run(grid, threads, shared, [&] { kernel(params); });
  return cudaSuccess;
}

#define RF_SHARED_MEMORY(name) char* const name = emulator::shared_memory()

#elif defined(__CUDACC__)

// Lets a kernel have up to kMaxShared bytes of dynamic shared memory, or what the device has if that is less: once for
// each device, and the same whatever a launch needs, so that launches of other threads cannot take it back.
template <auto kernel, size_t kMaxShared> cudaError_t allow_shared(int device) {
  static std::atomic<uint64_t> allowed{0};  // a bit per device
  const uint64_t bit = device >= 0 && device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_acquire) & bit) return cudaSuccess;
  int most = 0;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  if (static_cast<size_t>(most) > kMaxShared) most = static_cast<int>(kMaxShared);
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_release);
  return error;
}

// kMaxShared: the most that any launch of this kernel asks for.
template <auto kernel, size_t kMaxShared = kPlainShared, typename Params>
cudaError_t launch(dim3 grid, int threads, size_t shared, Stream stream, const Params& params) {
  if constexpr (kMaxShared > kPlainShared) {
    const cudaError_t error = allow_shared<kernel, kMaxShared>(stream.device);
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
