// dweight of a pre-activation convolution, with the activation recomputed from x, and dbias.
#include "primitives.h"

namespace resnet_fused {
namespace cuda {

std::tuple<Tensor, Tensor> preact_conv_wgrad_of(const Tensor& dy, const Tensor& x,
                                                const std::optional<Tensor>& bn, const Tensor& weight,
                                                double slope, const ConvolutionOptions& options, bool want_bias,
                                                const Prepared& prepared) {
  const Activation input = check_activation(x, "input");
  const Target target(x);
  PreactConvWgradParams params{};
  const ConvGeometry g = params.g = check_convolution(input, weight, options);
  const Tensor gradient = aligned(check_output_like(dy, "dy", g, input).tensor);
  std::optional<Tensor> bn_rows;
  if (bn) bn_rows = check_matrix(*bn, "bn", 4, g.c);

  // The weight's own strides where it is dense, as a gradient should have them.
  Tensor dweight = torch::stable::empty_like(weight);
  const DType parameter = check_parameter_dtype(weight, "weight", input.dtype);
  if (is_empty(g)) {
    torch::stable::zero_(dweight);
    Tensor dbias = empty_vector(want_bias ? g.k : 0, x, parameter);
    torch::stable::zero_(dbias);
    return {dweight, dbias};
  }
  const Stream stream = target.stream();
  const Tensor bias_sums = want_bias ? empty_matrix(2, g.k, x) : empty_vector(0, x);
  const Tensor partial = empty_vector(
      conv_wgrad_partial_floats(g, element_size(input.dtype), want_bias, stream.multiprocessors), x);
  const Tensor source = aligned(x);
  params.dy = gradient.const_data_ptr();
  params.x = source.const_data_ptr();
  params.bn = float_data(bn_rows), params.slope = static_cast<float>(slope);
  params.dweight = dweight.mutable_data_ptr();
  params.type = parameter;
  const auto strides = dweight.strides();
  params.stride_k = strides[0], params.stride_c = strides[1], params.stride_r = strides[2],
  params.stride_s = strides[3];
  params.dbias = want_bias ? mutable_floats(bias_sums) : nullptr;
  params.partial = mutable_floats(partial);
  // The bias' gradient takes the memory of the partial results.
  WeightMerge* const later = want_bias ? nullptr : prepared.later;
  if (later) *prepared.later_partial = partial;
  with_type(input.dtype, [&](auto type) { check(preact_conv_wgrad<decltype(type)>(params, later, stream)); });
  if (!want_bias) return {dweight, empty_vector(0, x, parameter)};
  return {dweight, first_row(bias_sums, parameter)};
}

namespace {

std::tuple<Tensor, Tensor> preact_conv_wgrad_op(const Tensor& dy, const Tensor& x,
                                                const std::optional<Tensor>& bn, const Tensor& weight,
                                                double slope, const std::vector<int64_t>& stride,
                                                const std::vector<int64_t>& padding,
                                                const std::vector<int64_t>& dilation, int64_t groups,
                                                bool want_bias) {
  return preact_conv_wgrad_of(dy, x, bn, weight, slope, {stride, padding, dilation, groups}, want_bias, {});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def(
      "preact_conv_wgrad(Tensor dy, Tensor x, Tensor? bn, Tensor weight, float slope, int[2] stride,"
      " int[2] padding, int[2] dilation, int groups, bool want_bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) {
  m.impl("preact_conv_wgrad", TORCH_BOX(&preact_conv_wgrad_op));
}

}  // namespace cuda
}  // namespace resnet_fused
