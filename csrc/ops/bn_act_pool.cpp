// The mean of act(BN(x)) over each image's pixels, and its backward; and all of the backward of BN -> activation,
// with or without the mean.
#include "primitives.h"

namespace resnet_fused {
namespace {

BnActPoolParams params_of(const Activation& input, const Tensor& bn_rows, double slope) {
  RF_CHECK(input.h > 0 && input.w > 0, "expected x with non-zero spatial size for its mean, but got ", input.h, "x",
           input.w);
  BnActPoolParams params{};
  params.images = input.n;
  params.image_pixels = input.h * input.w;
  params.channels = input.c;
  params.x = input.data;
  params.bn = bn_rows.const_data_ptr();
  params.slope = slope;
  params.parallel = torch_parallel();
  return params;
}

Tensor bn_act_pool_forward(const Tensor& x, const Tensor& bn, double slope) {
  const Activation input = check_activation(x, "input");
  const Tensor bn_rows = check_acc(bn, "bn", 4, input.c, input.dtype);
  BnActPoolParams params = params_of(input, bn_rows, slope);
  const Tensor out = empty_activation(input.n, input.c, 1, 1, input.dtype);
  if (input.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  cpu_kernels().bn_act_pool_forward[index_of(input.dtype)](params);
  return out;
}

// The parameters with the gradient of the means.
BnActPoolParams backward_params_of(const Activation& input, const Tensor& dmeans, const Tensor& bn_rows,
                                   double slope) {
  BnActPoolParams params = params_of(input, bn_rows, slope);
  Activation expected = input;
  expected.h = expected.w = 1;
  params.dmeans = check_activation_like(dmeans, "da", expected, "means of the input").data;
  return params;
}

std::tuple<Tensor, Tensor> bn_act_pool_backward(const Tensor& dy, const Tensor& x, const Tensor& bn, double slope) {
  const Activation input = check_activation(x, "input");
  const Tensor bn_rows = check_acc(bn, "bn", 4, input.c, input.dtype);
  BnActPoolParams params = backward_params_of(input, dy, bn_rows, slope);
  const DType acc = acc_dtype(input.dtype);
  const Tensor dz = empty_activation(input.n, input.c, input.h, input.w, input.dtype);
  if (input.numel() == 0) return {dz, zeros_matrix(2, input.c, acc)};
  const Tensor sums = empty_matrix(2, input.c, acc);
  params.out = dz.mutable_data_ptr();
  params.sums = sums.mutable_data_ptr();
  cpu_kernels().bn_act_pool_backward[index_of(input.dtype)](params);
  return {dz, sums};
}

// (dx, sums), the bits that the primitives give one by one, without dz: it has two values in an image's channel.
std::tuple<Tensor, Tensor> pooled_backward(const Tensor& dout, const Tensor& x, const Tensor& bn, bool training,
                                           double slope, bool into_x) {
  const Activation input = check_activation(x, "input");
  const Tensor bn_rows = check_acc(bn, "bn", 4, input.c, input.dtype);
  BnActPoolParams params = backward_params_of(input, dout, bn_rows, slope);
  const DType acc = acc_dtype(input.dtype);
  const Tensor dx =
      into_x && may_overwrite(input) ? x : empty_activation(input.n, input.c, input.h, input.w, input.dtype);
  if (input.numel() == 0) return {dx, zeros_matrix(2, input.c, acc)};
  const Tensor sums = empty_matrix(2, input.c, acc);
  params.sums = sums.mutable_data_ptr();
  cpu_kernels().bn_act_pool_backward[index_of(input.dtype)](params);
  const Tensor coefficients = finalize_backward(sums, bn, input.pixels(), training, false);
  params.coefficients = coefficients.const_data_ptr();
  params.out = dx.mutable_data_ptr();
  cpu_kernels().bn_act_pool_apply[index_of(input.dtype)](params);
  return {dx, sums};
}

// BatchNorm -> activation (-> mean), all of its backward: (dx, sums). dx may take dout's memory or, behind a mean, x's.
std::tuple<Tensor, Tensor> preact_backward(const Tensor& dout, const Tensor& x, const Tensor& bn, bool training,
                                           double slope, bool pool, bool into_dout, bool into_x) {
  if (pool) return pooled_backward(dout, x, bn, training, slope, into_x);
  auto [dz, sums] = bn_act_backward(dout, x, bn, std::nullopt, slope, into_dout);
  const int64_t count = x.size(0) * x.size(2) * x.size(3);
  const Tensor coefficients = finalize_backward(sums, bn, count, training, false);
  return {preact_apply(dz, x, coefficients, std::nullopt, ApplyInto::dz), sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("bn_act_pool_forward(Tensor x, Tensor bn, float slope) -> Tensor");
  m.def("bn_act_pool_backward(Tensor dy, Tensor x, Tensor bn, float slope) -> (Tensor, Tensor)");
  m.def(
      "preact_backward(Tensor(a!) dout, Tensor(b!) x, Tensor bn, bool training, float slope, bool pool, "
      "bool into_dout, bool into_x) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("bn_act_pool_forward", TORCH_BOX(&bn_act_pool_forward));
  m.impl("bn_act_pool_backward", TORCH_BOX(&bn_act_pool_backward));
  m.impl("preact_backward", TORCH_BOX(&preact_backward));
}

}  // namespace resnet_fused
