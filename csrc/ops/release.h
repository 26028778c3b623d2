// Freeing the memory of a tensor that others refer to, but that nobody reads again.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>

namespace resnet_fused {

// The tensor is empty then. A caller of an operator holds its arguments until it returns.
inline void release(const torch::stable::Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::set_", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace resnet_fused
