// a = act(x*scale + shift), and its backward with BN's two reductions.
#include "tensor.h"

namespace resnet_fused {
namespace cuda {
namespace {

Tensor bn_act_forward_op(const Tensor& x, const Tensor& bn, double slope) {
  const Activation input = check_activation(x, "input");
  const Target target(x);
  const Tensor bn_rows = check_matrix(bn, "bn", 4, input.c);
  const Tensor out = empty_activation(input.n, input.c, input.h, input.w, input.dtype, x);
  if (input.numel() == 0) return out;
  BnActParams params{};
  params.pixels = input.pixels(), params.channels = input.c;
  params.x = input.data(), params.bn = float_data(bn_rows), params.slope = static_cast<float>(slope);
  params.out = out.mutable_data_ptr();
  with_type(input.dtype, [&](auto type) { check(bn_act_forward<decltype(type)>(params, target.stream())); });
  return out;
}

std::tuple<Tensor, Tensor> bn_act_backward_op(const Tensor& da, const Tensor& x, const Tensor& bn,
                                              const std::optional<Tensor>& dz_in, double slope) {
  const Activation input = check_activation(x, "input");
  const Activation gradient = check_activation_like(da, "da", input, "input");
  if (dz_in) check_activation_like(*dz_in, "dz_in", input, "input");
  const Target target(x);
  const Tensor bn_rows = check_matrix(bn, "bn", 4, input.c);
  const Tensor dz = empty_activation(input.n, input.c, input.h, input.w, input.dtype, x);
  if (input.numel() == 0) return {dz, zeros_matrix(2, input.c, x)};
  const Tensor sums = empty_matrix(2, input.c, x);
  const Tensor partial = partial_for(input, target.stream());
  BnActParams params{};
  params.pixels = input.pixels(), params.channels = input.c;
  params.x = input.data(), params.bn = float_data(bn_rows), params.slope = static_cast<float>(slope);
  params.da = gradient.data(), params.dz_in = optional_data(dz_in);
  params.out = dz.mutable_data_ptr();
  params.sums = mutable_floats(sums), params.partial = mutable_floats(partial);
  with_type(input.dtype, [&](auto type) { check(bn_act_backward<decltype(type)>(params, target.stream())); });
  return {dz, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def("bn_act_forward(Tensor x, Tensor bn, float slope) -> Tensor");
  m.def("bn_act_backward(Tensor da, Tensor x, Tensor bn, Tensor? dz_in, float slope) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) {
  m.impl("bn_act_forward", TORCH_BOX(&bn_act_forward_op));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward_op));
}

}  // namespace cuda
}  // namespace resnet_fused
