// Checks that the three convolution wrappers share, with the wording of torch.nn.functional.conv2d.
#pragma once

#include "geometry.h"
#include "tensor.h"

namespace resnet_fused {

// Geometry of a convolution of `input` with `weight`; raises where they do not fit.
ConvGeometry check_convolution(const Activation& input, const Tensor& weight,
                               const ConvolutionOptions& options);
// Strides and dtype of a checked weight.
WeightLayout weight_layout(const Tensor& weight, DType activation);
// dtype of a weight or bias: the activation dtype, or acc.
DType check_parameter_dtype(const Tensor& parameter, const char* name, DType activation);
// A bias of `length` as contiguous acc, or nothing.
std::optional<Tensor> check_bias(const std::optional<Tensor>& bias, int64_t length, DType activation);
// The convolution's output, or a tensor of its size (dy, residual).
Activation check_output_like(const Tensor& tensor, const char* name, const ConvGeometry& g, DType dtype);

inline bool is_empty(const ConvGeometry& g) { return g.n == 0 || g.k == 0; }

}  // namespace resnet_fused
