// dx = dskip + A*dz + B*(x - mean) + C: BN's backward and the skip's addition in one pass.
#include "primitives.h"

namespace resnet_fused {

Tensor preact_apply(const Tensor& dz, const Tensor& x, const Tensor& coefficients,
                    const std::optional<Tensor>& dskip, ApplyInto into) {
  const Activation input = check_activation(x, "input");
  const Activation gradient = check_activation_like(dz, "dz", input, "input");
  if (dskip) check_activation_like(*dskip, "dskip", input, "input");
  const Tensor rows = check_acc(coefficients, "coefficients", 4, input.c, input.dtype);
  const Tensor dx = into == ApplyInto::neither || !may_overwrite(input)
                        ? empty_activation(input.n, input.c, input.h, input.w, input.dtype)
                        : into == ApplyInto::dz ? dz : x;
  if (input.numel() == 0) return dx;
  const PreactApplyParams params{input.pixels(),        input.c,
                                 gradient.data,         input.data,
                                 rows.const_data_ptr(), optional_data(dskip),
                                 dx.mutable_data_ptr(), torch_parallel()};
  cpu_kernels().preact_apply[index_of(input.dtype)](params);
  return dx;
}

static Tensor preact_apply_op(const Tensor& dz, const Tensor& x, const Tensor& coefficients,
                              const std::optional<Tensor>& dskip) {
  return preact_apply(dz, x, coefficients, dskip, ApplyInto::neither);
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("preact_apply(Tensor dz, Tensor x, Tensor coefficients, Tensor? dskip) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) { m.impl("preact_apply", TORCH_BOX(&preact_apply_op)); }

}  // namespace resnet_fused
