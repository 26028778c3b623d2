// dx = dskip + A*dz + B*(x - mean) + C.
#include "primitives.h"

namespace resnet_fused {
namespace cuda {

Tensor preact_apply_of(const Tensor& dz, const Tensor& x, const Tensor& coefficients,
                       const std::optional<Tensor>& dskip, const std::vector<WeightMerge>& merges,
                       ApplyInto into) {
  const Activation input = check_activation(x, "input");
  const Activation gradient = check_activation_like(dz, "dz", input, "input");
  if (dskip) check_activation_like(*dskip, "dskip", input, "input");
  const Target target(x);
  const Tensor rows = check_matrix(coefficients, "coefficients", 4, input.c);
  const Tensor dx = into == ApplyInto::dz  ? dz
                    : into == ApplyInto::x ? x
                                           : empty_activation(input.n, input.c, input.h, input.w, input.dtype, x);
  if (input.numel() == 0) return dx;
  const PreactApplyParams params{input.pixels(),       input.c,          gradient.data(),
                                 input.data(),         float_data(rows), optional_data(dskip),
                                 dx.mutable_data_ptr()};
  with_type(input.dtype, [&](auto type) {
    check(preact_apply_and_merge<decltype(type)>(params, merges.data(), static_cast<int>(merges.size()),
                                                 target.stream()));
  });
  return dx;
}

namespace {

Tensor preact_apply_op(const Tensor& dz, const Tensor& x, const Tensor& coefficients,
                       const std::optional<Tensor>& dskip) {
  return preact_apply_of(dz, x, coefficients, dskip, {}, ApplyInto::neither);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def("preact_apply(Tensor dz, Tensor x, Tensor coefficients, Tensor? dskip) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) { m.impl("preact_apply", TORCH_BOX(&preact_apply_op)); }

}  // namespace cuda
}  // namespace resnet_fused
