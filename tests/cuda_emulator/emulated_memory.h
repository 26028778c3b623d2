// Tensors for the emulated wrappers: full of NaN, so that what no kernel writes is seen, and between margins
// that nothing may write to.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace resnet_fused {
namespace emulator {

torch::stable::Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                                    int32_t dtype, int element_size);
// How many margins were written to since the last call.
int64_t damaged_margins();

}  // namespace emulator
}  // namespace resnet_fused
