// Both gradients of a 1x1 pre-activation convolution with stride 1: dz and BN's sums, dweight and dbias.
#include "convolution.h"
#include "primitives.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor, Tensor, Tensor> preact_conv_backward_1x1(const Tensor& dy, const Tensor& weight,
                                                                    const Tensor& x, const Tensor& bn,
                                                                    const std::optional<Tensor>& dz_in,
                                                                    double slope, bool want_bias,
                                                                    bool into_dz_in, const PendingApply* dy_from) {
  const Activation input = check_activation(x, "input");
  const DType acc = acc_dtype(input.dtype);
  const ConvGeometry g = check_convolution(input, weight, {{1, 1}, {0, 0}, {1, 1}, 1});
  RF_CHECK(g.r == 1 && g.s == 1, "expected a weight of size 1x1, but got weight of size ", to_string(weight.sizes()));
  RF_CHECK(g.k > 0, "expected a weight with output channels, but got weight of size ",
           to_string(weight.sizes()));
  const Activation gradient = check_output_like(dy, "dy", g, input.dtype);
  const Tensor bn_rows = check_acc(bn, "bn", 4, g.c, input.dtype);
  if (dz_in) check_activation_like(*dz_in, "dz_in", input, "input");

  const Tensor dz = into_dz_in && dz_in ? *dz_in : empty_activation(g.n, g.c, g.h, g.w, input.dtype);
  Tensor dweight = torch::stable::empty_like(weight);
  const DType parameter = check_parameter_dtype(weight, "weight", input.dtype);
  if (is_empty(g)) {
    if (dy_from) run_preact_apply(*dy_from);
    torch::stable::zero_(dweight);
    Tensor dbias = empty_vector(want_bias ? g.k : 0, parameter);
    torch::stable::zero_(dbias);
    return {dz, zeros_matrix(2, g.c, acc), dweight, dbias};
  }
  const Tensor sums = empty_matrix(2, g.c, acc), dbias = empty_vector(want_bias ? g.k : 0, acc);
  const Parallel parallel = torch_parallel();
  const PreactConvDgradParams dgrad{g, gradient.data, weight.const_data_ptr(), weight_layout(weight, input.dtype),
                                    input.data, bn_rows.const_data_ptr(), slope, optional_data(dz_in), nullptr,
                                    dz.mutable_data_ptr(), sums.mutable_data_ptr(), parallel};
  std::optional<PreactApplyParams> apply;
  if (dy_from) apply = params_of(*dy_from);
  const PreactConvWgradParams wgrad{g, gradient.data, input.data, bn_rows.const_data_ptr(), slope,
                                    dweight.mutable_data_ptr(), weight_layout(dweight, input.dtype),
                                    want_bias ? dbias.mutable_data_ptr() : nullptr, parallel, apply ? &*apply : nullptr};
  cpu_kernels().preact_conv_backward_1x1[index_of(input.dtype)](dgrad, wgrad);
  return {dz, sums, dweight, parameter == acc ? dbias : torch::stable::to(dbias, weight.scalar_type())};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> preact_conv_backward_1x1_op(
    const Tensor& dy, const Tensor& weight, const Tensor& x, const Tensor& bn, const std::optional<Tensor>& dz_in,
    double slope, bool want_bias) {
  return preact_conv_backward_1x1(dy, weight, x, bn, dz_in, slope, want_bias, false, nullptr);
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "preact_conv_backward_1x1(Tensor dy, Tensor weight, Tensor x, Tensor bn, Tensor? dz_in, float slope,"
      " bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("preact_conv_backward_1x1", TORCH_BOX(&preact_conv_backward_1x1_op));
}

}  // namespace resnet_fused
