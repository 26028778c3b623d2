// out = act(x + alpha * gate[n, c] * (affine[0, c]*y + affine[1, c])), with the statistics of out.
#include "tensor.h"

namespace resnet_fused {
namespace {

std::tuple<Tensor, Tensor> residual_add(const Tensor& x, const Tensor& y, const std::optional<Tensor>& affine,
                                        const std::optional<Tensor>& gate, double alpha,
                                        std::optional<double> slope, bool want_stats) {
  const Activation input = check_activation(x, "input");
  const Activation branch = check_activation_like(y, "y", input, "input");
  std::optional<Tensor> affine_rows, gates;
  if (affine) affine_rows = check_acc(*affine, "affine", 2, input.c, input.dtype);
  int64_t gate_channels = 0;
  if (gate) {
    const auto sizes = gate->sizes();
    RF_CHECK(sizes.size() == 2 && sizes[0] == input.n && (sizes[1] == input.c || sizes[1] == 1),
             "expected gate of size [", input.n, ", ", input.c, "] or [", input.n, ", 1], but got ",
             to_string(sizes));
    gate_channels = sizes[1];
    gates = check_acc(*gate, "gate", input.n, gate_channels, input.dtype);
  }
  const DType acc = acc_dtype(input.dtype);
  const Tensor out = empty_activation(input.n, input.c, input.h, input.w, input.dtype);
  if (input.numel() == 0) return {out, want_stats ? zeros_matrix(2, input.c, acc) : empty_vector(0, acc)};
  const Tensor stats = want_stats ? empty_matrix(2, input.c, acc) : empty_vector(0, acc);
  ResidualAddParams params{};
  params.images = input.n;
  params.pixels_per_image = input.h * input.w;
  params.channels = input.c;
  params.x = input.data;
  params.y = branch.data;
  params.affine = optional_data(affine_rows);
  params.gate = optional_data(gates);
  params.gate_channels = gate_channels;
  params.alpha = alpha;
  params.activate = slope.has_value();
  params.slope = slope.value_or(0.0);
  params.out = out.mutable_data_ptr();
  params.stats = want_stats ? stats.mutable_data_ptr() : nullptr;
  params.parallel = torch_parallel();
  cpu_kernels().residual_add[index_of(input.dtype)](params);
  return {out, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "residual_add(Tensor x, Tensor y, Tensor? affine, Tensor? gate, float alpha, float? slope,"
      " bool want_stats) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) { m.impl("residual_add", TORCH_BOX(&residual_add)); }

}  // namespace resnet_fused
