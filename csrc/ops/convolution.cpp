#include "convolution.h"

namespace resnet_fused {
namespace {

void check_pair(const std::vector<int64_t>& values, const char* name) {
  RF_CHECK(values.size() == 2, "expected ", name, " to be 2 integers, but got ",
           to_string(IntHeaderOnlyArrayRef(values.data(), values.size())));
}

}  // namespace

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
  check_pair(options.stride, "stride");
  check_pair(options.padding, "padding");
  check_pair(options.dilation, "dilation");
  RF_CHECK(options.groups == 1, "expected groups to be 1, but got ", options.groups,
           ": grouped convolutions take the unfused path");
  check_parameter_dtype(weight, "weight", x.dtype);
  const auto w = weight.sizes();
  RF_CHECK(w.size() == 4, "expected 4D weight (got ", w.size(), "D weight)");
  const int64_t input_size[] = {x.n, x.c, x.h, x.w};
  RF_CHECK(w[1] == x.c, "Given groups=1, weight of size ", to_string(w), ", expected input",
           to_string(IntHeaderOnlyArrayRef(input_size, 4)), " to have ", w[1], " channels, but got ", x.c,
           " channels instead");
  RF_CHECK(options.stride[0] > 0 && options.stride[1] > 0, "non-positive stride is not supported");
  RF_CHECK(options.padding[0] >= 0 && options.padding[1] >= 0, "negative padding is not supported");
  RF_CHECK(options.dilation[0] > 0 && options.dilation[1] > 0, "dilation should be greater than zero");
  RF_CHECK(x.c > 0 && x.h > 0 && x.w > 0 && w[2] > 0 && w[3] > 0,
           "expected non-empty images and kernels (only the batch may be empty), but got input of size ",
           to_string(IntHeaderOnlyArrayRef(input_size, 4)), " and weight of size ", to_string(w));
  ConvGeometry g{};
  g.n = x.n, g.c = x.c, g.h = x.h, g.w = x.w;
  g.k = w[0], g.r = w[2], g.s = w[3];
  g.stride_h = options.stride[0], g.stride_w = options.stride[1];
  g.pad_h = options.padding[0], g.pad_w = options.padding[1];
  g.dilation_h = options.dilation[0], g.dilation_w = options.dilation[1];
  g.groups = 1;
  g.p = conv_output_size(g.h, g.r, g.stride_h, g.pad_h, g.dilation_h);
  g.q = conv_output_size(g.w, g.s, g.stride_w, g.pad_w, g.dilation_w);
  RF_CHECK(g.p > 0 && g.q > 0, "Calculated padded input size per channel: (", g.h + 2 * g.pad_h, " x ",
           g.w + 2 * g.pad_w, "). Kernel size: (", g.dilation_h * (g.r - 1) + 1, " x ",
           g.dilation_w * (g.s - 1) + 1, "). Kernel size can't be greater than actual input size");
  return g;
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
