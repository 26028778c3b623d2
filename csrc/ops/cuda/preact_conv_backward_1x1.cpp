// (dz, sums) of preact_conv_dgrad and (dweight, dbias) of preact_conv_wgrad in one kernel.
#include "kernels/cuda/index.h"
#include "primitives.h"

namespace resnet_fused {
namespace cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> preact_conv_backward_1x1_of(
    const Tensor& dy, const Tensor& weight, const Tensor& x, const Tensor& bn,
    const std::optional<Tensor>& dz_in, double slope, bool want_bias, const Prepared& prepared) {
  const Activation input = check_activation(x, "input");
  const Target target(x);
  const std::vector<int64_t> one = {1, 1}, zero = {0, 0};
  const ConvGeometry g = check_convolution(input, weight, {one, zero, one, 1});
  RF_CHECK(
      g.r == 1 && g.s == 1 && g.k <= 64,
      "one kernel for both gradients takes 1x1 convolutions with at most 64 output channels, but got weight"
      " of size ",
      to_string(weight.sizes()));
  const Tensor gradient = aligned(check_output_like(dy, "dy", g, input).tensor);
  const Tensor bn_rows = check_matrix(bn, "bn", 4, g.c);
  std::optional<Tensor> joined;
  if (dz_in) joined = aligned(check_activation_like(*dz_in, "dz_in", input, "input").tensor);

  const Tensor dz = empty_activation(g.n, g.c, g.h, g.w, input.dtype, x);
  Tensor dweight = torch::stable::empty_like(weight);
  const DType parameter = check_parameter_dtype(weight, "weight", input.dtype);
  if (is_empty(g)) {
    torch::stable::zero_(dweight);
    Tensor dbias = empty_vector(want_bias ? g.k : 0, x, parameter);
    torch::stable::zero_(dbias);
    return {dz, zeros_matrix(2, g.c, x), dweight, dbias};
  }
  const Stream stream = target.stream();
  const Tensor sums = empty_matrix(2, g.c, x);
  const Tensor bias_sums = want_bias ? empty_matrix(2, g.k, x) : empty_vector(0, x);
  const Backward1x1Partial floats =
      backward_1x1_partial_floats(g, element_size(input.dtype), want_bias, stream.multiprocessors);
  const Tensor partial_sums = empty_vector(floats.sums, x), partial_dweight = empty_vector(floats.dweight, x);
  const Tensor source = aligned(x);
  const Tensor packed = prepared.weight ? *prepared.weight : packed_weight(weight, g, input.dtype, target);
  const Tensor counters =
      zero_counters(prepared.counters ? 0 : backward_1x1_counters(g, stream.multiprocessors), input.dtype, x,
                    target);
  PreactConvDgradParams d{};
  d.g = g;
  d.dy = gradient.const_data_ptr();
  d.weight = packed.const_data_ptr();
  d.x = source.const_data_ptr();
  d.bn = float_data(bn_rows), d.slope = static_cast<float>(slope);
  d.dz_in = optional_data(joined);
  d.dz = dz.mutable_data_ptr();
  d.sums = mutable_floats(sums), d.partial = mutable_floats(partial_sums);
  d.counters = prepared.counters ? prepared.counters : counters_of(counters);
  d.centre = prepared.centre;
  d.centre.bn = d.bn;
  PreactConvWgradParams w{};
  w.dweight = dweight.mutable_data_ptr();
  w.type = parameter;
  const auto strides = dweight.strides();
  w.stride_k = strides[0], w.stride_c = strides[1], w.stride_r = strides[2], w.stride_s = strides[3];
  w.dbias = want_bias ? mutable_floats(bias_sums) : nullptr;
  w.partial = mutable_floats(partial_dweight);
  // The bias' gradient takes the memory of the partial results.
  WeightMerge* const later = want_bias ? nullptr : prepared.later;
  if (later) *prepared.later_partial = partial_dweight;
  with_type(input.dtype,
            [&](auto type) { check(preact_conv_backward_1x1<decltype(type)>(d, w, later, stream)); });
  if (!want_bias) return {dz, sums, dweight, empty_vector(0, x, parameter)};
  return {dz, sums, dweight, first_row(bias_sums, parameter)};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> preact_conv_backward_1x1_op(const Tensor& dy, const Tensor& weight,
                                                                       const Tensor& x, const Tensor& bn,
                                                                       const std::optional<Tensor>& dz_in,
                                                                       double slope, bool want_bias) {
  return preact_conv_backward_1x1_of(dy, weight, x, bn, dz_in, slope, want_bias, {});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def(
      "preact_conv_backward_1x1(Tensor dy, Tensor weight, Tensor x, Tensor bn, Tensor? dz_in, float slope,"
      " bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) {
  m.impl("preact_conv_backward_1x1", TORCH_BOX(&preact_conv_backward_1x1_op));
}

}  // namespace cuda
}  // namespace resnet_fused
