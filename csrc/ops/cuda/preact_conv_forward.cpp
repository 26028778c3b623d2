// y = conv(act(x*scale + shift)) + bias + residual, with the statistics of y.
#include "primitives.h"

namespace resnet_fused {
namespace cuda {

std::tuple<Tensor, Tensor> preact_conv_forward_of(const Tensor& x, const std::optional<Tensor>& bn,
                                                  const Tensor& weight, const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& residual, double slope,
                                                  const ConvolutionOptions& options, bool want_stats,
                                                  const Prepared& prepared) {
  const Activation input = check_activation(x, "input");
  const Target target(x);
  PreactConvForwardParams params{};
  const ConvGeometry g = params.g = check_convolution(input, weight, options);
  std::optional<Tensor> bn_rows, shortcut;
  if (bn) bn_rows = check_matrix(*bn, "bn", 4, g.c);
  const std::optional<Tensor> bias_floats = check_bias(bias, g.k, input.dtype);
  if (residual) shortcut = aligned(check_output_like(*residual, "residual", g, input).tensor);

  const Tensor y = empty_activation(g.n, g.k, g.p, g.q, input.dtype, x);
  if (is_empty(g)) return {y, want_stats ? zeros_matrix(2, g.k, x) : empty_vector(0, x)};
  const Tensor stats = want_stats ? empty_matrix(2, g.k, x) : empty_vector(0, x);
  const Tensor partial = empty_vector(want_stats ? conv_forward_partial_floats(g) : 0, x);
  const Tensor source = aligned(x);
  const Tensor packed = prepared.weight ? *prepared.weight : packed_weight(weight, g, input.dtype, target);
  const Tensor counters =
      zero_counters(want_stats && !prepared.counters ? conv_forward_counters(g) : 0, input.dtype, x, target);
  params.x = source.const_data_ptr();
  params.bn = float_data(bn_rows), params.slope = static_cast<float>(slope);
  params.weight = packed.const_data_ptr();
  params.bias = float_data(bias_floats);
  params.residual = optional_data(shortcut);
  params.y = y.mutable_data_ptr();
  params.stats = want_stats ? mutable_floats(stats) : nullptr;
  params.partial = want_stats ? mutable_floats(partial) : nullptr;
  params.counters = prepared.counters ? prepared.counters : counters_of(counters);
  params.next = prepared.next;
  with_type(input.dtype,
            [&](auto type) { check(preact_conv_forward<decltype(type)>(params, target.stream())); });
  return {y, stats};
}

namespace {

std::tuple<Tensor, Tensor> preact_conv_forward_op(const Tensor& x, const std::optional<Tensor>& bn,
                                                  const Tensor& weight, const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& residual, double slope,
                                                  const std::vector<int64_t>& stride,
                                                  const std::vector<int64_t>& padding,
                                                  const std::vector<int64_t>& dilation, int64_t groups,
                                                  bool want_stats) {
  return preact_conv_forward_of(x, bn, weight, bias, residual, slope, {stride, padding, dilation, groups},
                                want_stats, {});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def(
      "preact_conv_forward(Tensor x, Tensor? bn, Tensor weight, Tensor? bias, Tensor? residual, float slope,"
      " int[2] stride, int[2] padding, int[2] dilation, int groups, bool want_stats) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) {
  m.impl("preact_conv_forward", TORCH_BOX(&preact_conv_forward_op));
}

}  // namespace cuda
}  // namespace resnet_fused
