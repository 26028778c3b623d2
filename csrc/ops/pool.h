// Where output tensors get their memory. On Linux a fresh tensor of some MB is a mapping whose every page
// faults at the first touch, and freeing it gives the pages back: that costs as much as a normalisation. So
// large outputs come from a process-wide cache of blocks.
//
// A pooled tensor is an ordinary strided CPU tensor (save, pickle, numpy, shared memory, set_ all work), but
// PyTorch does not resize storage that it did not allocate: resize_() to more elements, out= of a larger
// result and untyped_storage().resize_() raise "Trying to resize storage that is not resizable".
//
// torch_from_blob is needed (torch 2.11 has it); without it, or with RESNET_FUSED_CPU_POOL_MB=0, outputs are
// plain torch tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../kernels/cpu_kernels.h"

namespace resnet_fused {

// The shim's code of a dtype.
int32_t shim_dtype(DType dtype);

// An uninitialised CPU tensor with dense strides, from the pool if it is large.
torch::stable::Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                                    DType dtype);
// The same of uint8.
torch::stable::Tensor empty_strided_bytes(int64_t dimensions, const int64_t* sizes, const int64_t* strides);

}  // namespace resnet_fused
