// The elementwise part of the unfused path: a = act(x*scale + shift), and its backward with BN's two reductions.
#include "primitives.h"

namespace resnet_fused {

static Tensor bn_act_forward(const Tensor& x, const Tensor& bn, double slope) {
  const Activation input = check_activation(x, "input");
  const Tensor bn_rows = check_acc(bn, "bn", 4, input.c, input.dtype);
  const Tensor out = empty_activation(input.n, input.c, input.h, input.w, input.dtype);
  if (input.numel() == 0) return out;
  BnActParams params{};
  params.pixels = input.pixels();
  params.channels = input.c;
  params.x = input.data;
  params.bn = bn_rows.const_data_ptr();
  params.slope = slope;
  params.out = out.mutable_data_ptr();
  params.parallel = torch_parallel();
  cpu_kernels().bn_act_forward[index_of(input.dtype)](params);
  return out;
}

std::tuple<Tensor, Tensor> bn_act_backward(const Tensor& da, const Tensor& x, const Tensor& bn,
                                           const std::optional<Tensor>& dz_in, double slope, bool into_da) {
  const Activation input = check_activation(x, "input");
  const Activation gradient = check_activation_like(da, "da", input, "input");
  if (dz_in) check_activation_like(*dz_in, "dz_in", input, "input");
  const Tensor bn_rows = check_acc(bn, "bn", 4, input.c, input.dtype);
  const DType acc = acc_dtype(input.dtype);
  const Tensor dz =
      into_da && may_overwrite(input) ? da : empty_activation(input.n, input.c, input.h, input.w, input.dtype);
  if (input.numel() == 0) return {dz, zeros_matrix(2, input.c, acc)};
  const Tensor sums = empty_matrix(2, input.c, acc);
  BnActParams params{};
  params.pixels = input.pixels();
  params.channels = input.c;
  params.x = input.data;
  params.bn = bn_rows.const_data_ptr();
  params.slope = slope;
  params.da = gradient.data;
  params.dz_in = optional_data(dz_in);
  params.out = dz.mutable_data_ptr();
  params.sums = sums.mutable_data_ptr();
  params.parallel = torch_parallel();
  cpu_kernels().bn_act_backward[index_of(input.dtype)](params);
  return {dz, sums};
}

static std::tuple<Tensor, Tensor> bn_act_backward_op(const Tensor& da, const Tensor& x, const Tensor& bn,
                                                     const std::optional<Tensor>& dz_in, double slope) {
  return bn_act_backward(da, x, bn, dz_in, slope, false);
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("bn_act_forward(Tensor x, Tensor bn, float slope) -> Tensor");
  m.def("bn_act_backward(Tensor da, Tensor x, Tensor bn, Tensor? dz_in, float slope) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("bn_act_forward", TORCH_BOX(&bn_act_forward));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward_op));
}

}  // namespace resnet_fused
