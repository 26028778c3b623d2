// dz = act'(z) * conv_transpose(dy, weight) + dz_in, with BN's two reductions over dz.
#include <cmath>

#include "convolution.h"
#include "primitives.h"

namespace resnet_fused {

static bool all_finite(const Tensor& t, int64_t count, DType dtype) {
  const void* const data = t.const_data_ptr();
  bool finite = true;
  for (int64_t i = 0; i < count; ++i)
    finite = finite && std::isfinite(dtype == DType::float64 ? static_cast<const double*>(data)[i]
                                                             : double(static_cast<const float*>(data)[i]));
  return finite;
}

std::tuple<Tensor, Tensor> preact_conv_dgrad(const Tensor& dy, const Tensor& weight, const Tensor& x,
                                             const Tensor& bn, const std::optional<Tensor>& dz_in,
                                             double slope, const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             const std::optional<Tensor>& dz_in_sums, bool into_dz_in) {
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

  // A strided 1x1 convolution reads one pixel of several: with the sums known, the others stay as they are in dz_in.
  const bool pointwise = g.r == 1 && g.s == 1;
  const bool replaces = dz_in && dz_in_sums && pointwise && g.pad_h == 0 && g.pad_w == 0 && g.stride_h * g.stride_w > 1 &&
                        !is_empty(g);
  std::optional<Tensor> sums_before;
  if (dz_in_sums) sums_before = check_acc(*dz_in_sums, "dz_in_sums", 2, g.c, input.dtype);
  // A 3x3 may be computed twice (Winograd's filtering of what is not finite): the second time needs dz_in as it was.
  const Tensor dz = into_dz_in && dz_in && pointwise
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
  if (replaces) {
    params.dz_in = dz.const_data_ptr();
    params.dz_in_sums = sums_before->const_data_ptr();
    if (params.dz_in != dz_in->const_data_ptr())
      std::memcpy(dz.mutable_data_ptr(), dz_in->const_data_ptr(), input.numel() * element_size(input.dtype));
  }
  params.dz = dz.mutable_data_ptr();
  params.sums = sums.mutable_data_ptr();
  params.parallel = torch_parallel();
  cpu_kernels().preact_conv_dgrad[index_of(input.dtype)](params);
  // inf - inf is no number where the sum of all is inf.
  if (replaces && !all_finite(sums, 2 * g.c, acc))
    return {dz, std::get<1>(bn_act_backward(dz, x, bn, std::nullopt, 1.0, false))};
  return {dz, sums};
}

static std::tuple<Tensor, Tensor> preact_conv_dgrad_op(const Tensor& dy, const Tensor& weight, const Tensor& x,
                                                       const Tensor& bn, const std::optional<Tensor>& dz_in,
                                                       double slope, const std::vector<int64_t>& stride,
                                                       const std::vector<int64_t>& padding,
                                                       const std::vector<int64_t>& dilation, int64_t groups) {
  return preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, stride, padding, dilation, groups, std::nullopt, false);
}

// The same for a dz_in of which the sums are known.
static std::tuple<Tensor, Tensor> preact_conv_dgrad_with_sums(
    const Tensor& dy, const Tensor& weight, const Tensor& x, const Tensor& bn, const Tensor& dz_in,
    const Tensor& dz_in_sums, double slope, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups) {
  return preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, stride, padding, dilation, groups, dz_in_sums, false);
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "preact_conv_dgrad(Tensor dy, Tensor weight, Tensor x, Tensor bn, Tensor? dz_in, float slope,"
      " int[2] stride, int[2] padding, int[2] dilation, int groups) -> (Tensor, Tensor)");
  m.def(
      "preact_conv_dgrad_with_sums(Tensor dy, Tensor weight, Tensor x, Tensor bn, Tensor dz_in, Tensor dz_in_sums,"
      " float slope, int[2] stride, int[2] padding, int[2] dilation, int groups) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("preact_conv_dgrad", TORCH_BOX(&preact_conv_dgrad_op));
  m.impl("preact_conv_dgrad_with_sums", TORCH_BOX(&preact_conv_dgrad_with_sums));
}

}  // namespace resnet_fused
