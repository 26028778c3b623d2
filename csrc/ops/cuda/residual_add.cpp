// out = act(x + alpha * gate[n, c] * (affine[0, c]*y + affine[1, c])), with the statistics of out.
#include "tensor.h"

namespace resnet_fused {
namespace cuda {
namespace {

std::tuple<Tensor, Tensor> residual_add_op(const Tensor& x, const Tensor& y,
                                           const std::optional<Tensor>& affine,
                                           const std::optional<Tensor>& gate, double alpha,
                                           std::optional<double> slope, bool want_stats) {
  const Activation input = check_activation(x, "input");
  const Activation branch = check_activation_like(y, "y", input, "input");
  const Target target(x);
  std::optional<Tensor> affine_rows, gates;
  if (affine) affine_rows = check_matrix(*affine, "affine", 2, input.c);
  int64_t gate_channels = 0;
  if (gate) {
    const auto sizes = gate->sizes();
    RF_CHECK(sizes.size() == 2 && sizes[0] == input.n && (sizes[1] == input.c || sizes[1] == 1),
             "expected gate of size [", input.n, ", ", input.c, "] or [", input.n, ", 1], but got ",
             to_string(sizes));
    gate_channels = sizes[1];
    gates = check_matrix(*gate, "gate", input.n, gate_channels);
  }
  const Tensor out = empty_activation(input.n, input.c, input.h, input.w, input.dtype, x);
  if (input.numel() == 0) return {out, want_stats ? zeros_matrix(2, input.c, x) : empty_vector(0, x)};
  const Tensor stats = want_stats ? empty_matrix(2, input.c, x) : empty_vector(0, x);
  const Tensor partial = want_stats ? partial_for(input, target.stream()) : empty_vector(0, x);
  ResidualAddParams params{};
  params.pixels = input.pixels(), params.pixels_per_image = input.h * input.w, params.channels = input.c;
  params.x = input.data(), params.y = branch.data();
  params.affine = float_data(affine_rows);
  params.gate = float_data(gates), params.gate_channels = gate_channels;
  params.alpha = static_cast<float>(alpha);
  params.activate = slope.has_value(), params.slope = static_cast<float>(slope.value_or(0.0));
  params.out = out.mutable_data_ptr();
  params.stats = want_stats ? mutable_floats(stats) : nullptr;
  params.partial = want_stats ? mutable_floats(partial) : nullptr;
  with_type(input.dtype, [&](auto type) { check(residual_add<decltype(type)>(params, target.stream())); });
  return {out, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def(
      "residual_add(Tensor x, Tensor y, Tensor? affine, Tensor? gate, float alpha, float? slope,"
      " bool want_stats) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) { m.impl("residual_add", TORCH_BOX(&residual_add_op)); }

}  // namespace cuda
}  // namespace resnet_fused
