// torch.ops.resnet_fused_cuda.{runtime_version, kernel_architecture}: told by `resnet-fused doctor`.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "check.h"
#include "kernels/cuda/device.h"

namespace resnet_fused {
namespace {

int64_t runtime_version() {
  int version = 0;
  check(cuda::runtime_version(&version));
  return version;
}

int64_t kernel_architecture(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  int architecture = 0;
  check(cuda::kernel_architecture(&architecture));
  return architecture;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cuda, m) {
  m.def("runtime_version() -> int");
  m.def("kernel_architecture(int device) -> int");
}

// No tensor among the arguments, so no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cuda, CompositeExplicitAutograd, m) {
  m.impl("runtime_version", TORCH_BOX(&runtime_version));
  m.impl("kernel_architecture", TORCH_BOX(&kernel_architecture));
}

}  // namespace resnet_fused
