// y = conv(act(x*scale + shift)) + bias + residual, with the statistics of y.
#include "convolution.h"
#include "primitives.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> preact_conv_forward(const Tensor& x, const std::optional<Tensor>& bn,
                                               const Tensor& weight, const std::optional<Tensor>& bias,
                                               const std::optional<Tensor>& residual, double slope,
                                               const std::vector<int64_t>& stride,
                                               const std::vector<int64_t>& padding,
                                               const std::vector<int64_t>& dilation, int64_t groups,
                                               bool want_stats) {
  const Activation input = check_activation(x, "input");
  const DType acc = acc_dtype(input.dtype);
  PreactConvForwardParams params{};
  params.g = check_convolution(input, weight, {stride, padding, dilation, groups});
  const ConvGeometry& g = params.g;
  std::optional<Tensor> bn_rows;
  if (bn) bn_rows = check_acc(*bn, "bn", 4, g.c, input.dtype);
  const std::optional<Tensor> bias_acc = check_bias(bias, g.k, input.dtype);
  if (residual) check_output_like(*residual, "residual", g, input.dtype);

  const Tensor y = empty_activation(g.n, g.k, g.p, g.q, input.dtype);
  if (is_empty(g)) return {y, want_stats ? zeros_matrix(2, g.k, acc) : empty_vector(0, acc)};
  const Tensor stats = want_stats ? empty_matrix(2, g.k, acc) : empty_vector(0, acc);
  params.x = input.data;
  params.bn = optional_data(bn_rows);
  params.slope = slope;
  params.weight = weight.const_data_ptr();
  params.weight_layout = weight_layout(weight, input.dtype);
  params.bias = optional_data(bias_acc);
  params.residual = optional_data(residual);
  params.y = y.mutable_data_ptr();
  params.stats = want_stats ? stats.mutable_data_ptr() : nullptr;
  params.parallel = torch_parallel();
  cpu_kernels().preact_conv_forward[index_of(input.dtype)](params);
  return {y, stats};
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "preact_conv_forward(Tensor x, Tensor? bn, Tensor weight, Tensor? bias, Tensor? residual, float slope,"
      " int[2] stride, int[2] padding, int[2] dilation, int groups, bool want_stats) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("preact_conv_forward", TORCH_BOX(&preact_conv_forward));
}

}  // namespace resnet_fused
