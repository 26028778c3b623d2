// Where the wrappers of this directory are registered and what they launch on: CUDA; or, under RF_EMULATE,
// the tests' emulator on CPU tensors (tests/cuda_emulator).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels/cuda/launch.h"

#ifdef RF_EMULATE
#define RF_LIBRARY resnet_fused_cuda_emulated
#define RF_KEY CPU
#else
#include "check.h"
#include "kernels/cuda/device.h"
#define RF_LIBRARY resnet_fused_cuda
#define RF_KEY CUDA
#endif

namespace resnet_fused {
namespace cuda {

#ifdef RF_EMULATE

constexpr const char* kDevice = "the CPU";
inline bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
inline bool on_target(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
inline void check(cudaError_t) {}

extern int emulated_multiprocessors;

class Target {
 public:
  explicit Target(const torch::stable::Tensor&) {}
  Stream stream() const { return {nullptr, 0, emulated_multiprocessors}; }
};

#else

constexpr const char* kDevice = "a CUDA device";
inline bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }
using resnet_fused::check;

// Makes a tensor's device the current one while it lives; kernels go to that device's current stream.
class Target {
 public:
  explicit Target(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {}

  Stream stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    int multiprocessors = 0;
    check(cuda::multiprocessors(device_, &multiprocessors));
    return {static_cast<cudaStream_t>(stream), device_, multiprocessors};
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// Whether a tensor is on the device of the Target that lives.
inline bool on_target(const torch::stable::Tensor& tensor) {
  return tensor.is_cuda() && tensor.get_device_index() == torch::stable::accelerator::getCurrentDeviceIndex();
}

#endif

}  // namespace cuda
}  // namespace resnet_fused
