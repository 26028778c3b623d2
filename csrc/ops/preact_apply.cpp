// dx = dskip + A*dz + B*(x - mean) + C: BN's backward and the skip's addition in one pass.
#include "primitives.h"

namespace resnet_fused {

PendingApply begin_preact_apply(const Tensor& dz, const Tensor& x, const Tensor& coefficients,
                                const std::optional<Tensor>& dskip, ApplyInto into) {
  const Activation input = check_activation(x, "input");
  check_activation_like(dz, "dz", input, "input");
  if (dskip) check_activation_like(*dskip, "dskip", input, "input");
  const Tensor rows = check_acc(coefficients, "coefficients", 4, input.c, input.dtype);
  const Tensor dx = into == ApplyInto::neither || !may_overwrite(input)
                        ? empty_activation(input.n, input.c, input.h, input.w, input.dtype)
                        : into == ApplyInto::dz ? dz : x;
  return {dz, x, rows, dskip, dx};
}

PreactApplyParams params_of(const PendingApply& apply) {
  const Activation input = check_activation(apply.x, "input");
  return {input.pixels(),
          input.c,
          apply.dz.const_data_ptr(),
          apply.x.const_data_ptr(),
          apply.coefficients.const_data_ptr(),
          optional_data(apply.dskip),
          apply.dx.mutable_data_ptr(),
          torch_parallel()};
}

void run_preact_apply(const PendingApply& apply) {
  const Activation input = check_activation(apply.x, "input");
  if (input.numel() > 0) cpu_kernels().preact_apply[index_of(input.dtype)](params_of(apply));
}

Tensor preact_apply(const Tensor& dz, const Tensor& x, const Tensor& coefficients,
                    const std::optional<Tensor>& dskip, ApplyInto into) {
  const PendingApply apply = begin_preact_apply(dz, x, coefficients, dskip, into);
  run_preact_apply(apply);
  return apply.dx;
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
