// dweight of a pre-activation convolution, with the activation recomputed from x, and dbias.
#include "convolution.h"
#include "primitives.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> preact_conv_wgrad(const Tensor& dy, const Tensor& x,
                                             const std::optional<Tensor>& bn, const Tensor& weight,
                                             double slope, const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             bool want_bias) {
  const Activation input = check_activation(x, "input");
  const DType acc = acc_dtype(input.dtype);
  PreactConvWgradParams params{};
  params.g = check_convolution(input, weight, {stride, padding, dilation, groups});
  const ConvGeometry& g = params.g;
  const Activation gradient = check_output_like(dy, "dy", g, input.dtype);
  std::optional<Tensor> bn_rows;
  if (bn) bn_rows = check_acc(*bn, "bn", 4, g.c, input.dtype);

  // The weight's own strides where it is dense, as a gradient should have them.
  Tensor dweight = torch::stable::empty_like(weight);
  const DType parameter = check_parameter_dtype(weight, "weight", input.dtype);
  if (is_empty(g)) {
    torch::stable::zero_(dweight);
    Tensor dbias = empty_vector(want_bias ? g.k : 0, parameter);
    torch::stable::zero_(dbias);
    return {dweight, dbias};
  }
  const Tensor dbias = empty_vector(want_bias ? g.k : 0, acc);
  params.dy = gradient.data;
  params.x = input.data;
  params.bn = optional_data(bn_rows);
  params.slope = slope;
  params.dweight = dweight.mutable_data_ptr();
  params.weight_layout = weight_layout(dweight, input.dtype);
  params.dbias = want_bias ? dbias.mutable_data_ptr() : nullptr;
  params.parallel = torch_parallel();
  cpu_kernels().preact_conv_wgrad[index_of(input.dtype)](params);
  // dbias is in the weight's dtype, as the bias is.
  return {dweight, parameter == acc ? dbias : torch::stable::to(dbias, weight.scalar_type())};
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "preact_conv_wgrad(Tensor dy, Tensor x, Tensor? bn, Tensor weight, float slope, int[2] stride,"
      " int[2] padding, int[2] dilation, int groups, bool want_bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("preact_conv_wgrad", TORCH_BOX(&preact_conv_wgrad));
}

}  // namespace resnet_fused
