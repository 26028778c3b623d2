#include "convolution.h"

namespace resnet_fused {

DType check_parameter_dtype(const Tensor& parameter, const char* name, DType activation) {
  RF_CHECK(parameter.is_cpu(), "expected ", name, " to be on the CPU");
  if (has_dtype(parameter, activation)) return activation;
  const DType acc = acc_dtype(activation);
  RF_CHECK(has_dtype(parameter, acc), "expected ", name, " to have dtype ", dtype_name(activation),
           acc == activation ? "" : " or ", acc == activation ? "" : dtype_name(acc), ", but got ",
           dtype_name(parameter));
  return acc;
}

ConvGeometry check_convolution(const Activation& x, const Tensor& weight, const ConvolutionOptions& options) {
  check_parameter_dtype(weight, "weight", x.dtype);
  const int64_t input_size[] = {x.n, x.c, x.h, x.w};
  return check_geometry(IntHeaderOnlyArrayRef(input_size, 4), weight.sizes(), options);
}

WeightLayout weight_layout(const Tensor& weight, DType activation) {
  const auto strides = weight.strides();
  return WeightLayout{strides[0], strides[1], strides[2], strides[3], !has_dtype(weight, activation)};
}

std::optional<Tensor> check_bias(const std::optional<Tensor>& bias, int64_t length, DType activation) {
  if (!bias) return std::nullopt;
  const DType dtype = check_parameter_dtype(*bias, "bias", activation);
  RF_CHECK(bias->dim() == 1 && bias->size(0) == length, "expected bias to be 1-dimensional with ", length,
           " elements, but got bias of size ", to_string(bias->sizes()), " instead");
  const DType acc = acc_dtype(activation);
  if (dtype != acc) return torch::stable::to(*bias, torch::headeronly::ScalarType::Float);
  return bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
}

Activation check_output_like(const Tensor& tensor, const char* name, const ConvGeometry& g, DType dtype) {
  const Activation output{g.n, g.k, g.p, g.q, dtype, nullptr};
  return check_activation_like(tensor, name, output, "the convolution's output");
}

}  // namespace resnet_fused
