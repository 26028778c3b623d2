// dz = act'(z) * conv_transpose(dy, weight) + dz_in, with BN's two reductions over dz.
#include "convolution.h"
#include "primitives.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> preact_conv_dgrad(const Tensor& dy, const Tensor& weight, const Tensor& x,
                                             const Tensor& bn, const std::optional<Tensor>& dz_in,
                                             double slope, const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             bool into_dz_in) {
  const Activation input = check_activation(x, "input");
  const DType acc = acc_dtype(input.dtype);
  PreactConvDgradParams params{};
  params.g = check_convolution(input, weight, {stride, padding, dilation, groups});
  const ConvGeometry& g = params.g;
  const Activation gradient = check_output_like(dy, "dy", g, input.dtype);
  const Tensor bn_rows = check_acc(bn, "bn", 4, g.c, input.dtype);
  if (dz_in) check_activation_like(*dz_in, "dz_in", input, "input");
  RF_CHECK(g.k > 0, "expected a weight with output channels, but got weight of size ",
           to_string(weight.sizes()));

  // A 3x3 may be computed twice (Winograd's filtering of what is not finite): the second time needs dz_in as it was.
  const Tensor dz = into_dz_in && dz_in && g.r == 1 && g.s == 1
                        ? *dz_in
                        : empty_activation(g.n, g.c, g.h, g.w, input.dtype);
  if (is_empty(g)) return {dz, zeros_matrix(2, g.c, acc)};
  const Tensor sums = empty_matrix(2, g.c, acc);
  params.dy = gradient.data;
  params.weight = weight.const_data_ptr();
  params.weight_layout = weight_layout(weight, input.dtype);
  params.x = input.data;
  params.bn = bn_rows.const_data_ptr();
  params.slope = slope;
  params.dz_in = optional_data(dz_in);
  params.dz = dz.mutable_data_ptr();
  params.sums = sums.mutable_data_ptr();
  params.parallel = torch_parallel();
  cpu_kernels().preact_conv_dgrad[index_of(input.dtype)](params);
  return {dz, sums};
}

static std::tuple<Tensor, Tensor> preact_conv_dgrad_op(const Tensor& dy, const Tensor& weight, const Tensor& x,
                                                       const Tensor& bn, const std::optional<Tensor>& dz_in,
                                                       double slope, const std::vector<int64_t>& stride,
                                                       const std::vector<int64_t>& padding,
                                                       const std::vector<int64_t>& dilation, int64_t groups) {
  return preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, stride, padding, dilation, groups, false);
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "preact_conv_dgrad(Tensor dy, Tensor weight, Tensor x, Tensor bn, Tensor? dz_in, float slope,"
      " int[2] stride, int[2] padding, int[2] dilation, int groups) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("preact_conv_dgrad", TORCH_BOX(&preact_conv_dgrad_op));
}

}  // namespace resnet_fused
