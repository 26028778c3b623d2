// dz = act'(z) * conv_transpose(dy, weight) + dz_in, with BN's two reductions over dz.
#include "primitives.h"

namespace resnet_fused {
namespace cuda {

std::tuple<Tensor, Tensor> preact_conv_dgrad_of(const Tensor& dy, const Tensor& weight, const Tensor& x,
                                                const Tensor& bn, const std::optional<Tensor>& dz_in,
                                                double slope, const ConvolutionOptions& options,
                                                const Prepared& prepared) {
  const Activation input = check_activation(x, "input");
  const Target target(x);
  PreactConvDgradParams params{};
  const ConvGeometry g = params.g = check_convolution(input, weight, options);
  const Tensor gradient = aligned(check_output_like(dy, "dy", g, input).tensor);
  const Tensor bn_rows = check_matrix(bn, "bn", 4, g.c);
  std::optional<Tensor> joined;
  if (dz_in) joined = aligned(check_activation_like(*dz_in, "dz_in", input, "input").tensor);
  RF_CHECK(g.k > 0, "expected a weight with output channels, but got weight of size ",
           to_string(weight.sizes()));

  const Tensor dz = empty_activation(g.n, g.c, g.h, g.w, input.dtype, x);
  if (is_empty(g)) return {dz, zeros_matrix(2, g.c, x)};
  const Tensor sums = empty_matrix(2, g.c, x);
  const Tensor partial = empty_vector(conv_dgrad_partial_floats(g), x);
  const Tensor source = aligned(x);
  const Tensor packed = prepared.weight ? *prepared.weight : packed_weight(weight, g, input.dtype, target);
  const Tensor counters =
      zero_counters(prepared.counters ? 0 : conv_dgrad_counters(g), input.dtype, x, target);
  params.dy = gradient.const_data_ptr();
  params.weight = packed.const_data_ptr();
  params.x = source.const_data_ptr();
  params.bn = float_data(bn_rows), params.slope = static_cast<float>(slope);
  params.dz_in = optional_data(joined);
  params.dz = dz.mutable_data_ptr();
  params.sums = mutable_floats(sums), params.partial = mutable_floats(partial);
  params.counters = prepared.counters ? prepared.counters : counters_of(counters);
  params.centre = prepared.centre;
  params.centre.bn = params.bn;
  with_type(input.dtype,
            [&](auto type) { check(preact_conv_dgrad<decltype(type)>(params, target.stream())); });
  return {dz, sums};
}

namespace {

std::tuple<Tensor, Tensor> preact_conv_dgrad_op(const Tensor& dy, const Tensor& weight, const Tensor& x,
                                                const Tensor& bn, const std::optional<Tensor>& dz_in,
                                                double slope, const std::vector<int64_t>& stride,
                                                const std::vector<int64_t>& padding,
                                                const std::vector<int64_t>& dilation, int64_t groups) {
  return preact_conv_dgrad_of(dy, weight, x, bn, dz_in, slope, {stride, padding, dilation, groups}, {});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def(
      "preact_conv_dgrad(Tensor dy, Tensor weight, Tensor x, Tensor bn, Tensor? dz_in, float slope,"
      " int[2] stride, int[2] padding, int[2] dilation, int groups) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) {
  m.impl("preact_conv_dgrad", TORCH_BOX(&preact_conv_dgrad_op));
}

}  // namespace cuda
}  // namespace resnet_fused
