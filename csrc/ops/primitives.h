// The CPU primitives as functions: what the operators of those names run.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "apply_into.h"
#include "tensor.h"

namespace resnet_fused {

// Whether an elementwise kernel may write over what it reads. Where channels do not fill its vectors, the last of a row goes
// through some of them twice.
inline bool may_overwrite(const Activation& tensor) {
  constexpr int64_t kLanes = 16;
  return tensor.c % kLanes == 0;
}

Tensor channel_stats(const Tensor& x);

Tensor finalize_forward(const std::optional<Tensor>& stats, int64_t count,
                        const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps);

// The coefficients of dx. into_bn: they may take the memory of bn.
Tensor finalize_backward(const Tensor& sums, const Tensor& bn, int64_t count, bool training, bool into_bn);

void update_running_stats(const Tensor& running_mean, const Tensor& running_var, const Tensor& stats,
                          int64_t count, double momentum);
// The same of several BatchNorms, and one more batch for each counter.
void update_running_stats_of_unit(const std::vector<Tensor>& running_means, const std::vector<Tensor>& running_vars,
                                  const std::vector<Tensor>& stats, const std::vector<int64_t>& counts,
                                  const std::vector<double>& momenta, const std::vector<Tensor>& batches_tracked);

// (y, stats)
std::tuple<Tensor, Tensor> preact_conv_forward(const Tensor& x, const std::optional<Tensor>& bn,
                                               const Tensor& weight, const std::optional<Tensor>& bias,
                                               const std::optional<Tensor>& residual, double slope,
                                               const std::vector<int64_t>& stride,
                                               const std::vector<int64_t>& padding,
                                               const std::vector<int64_t>& dilation, int64_t groups,
                                               bool want_stats);

// (dz, sums). dz_in_sums: acc [2, C], the sums of dz_in, if they are known. into_dz_in: dz may take the memory of dz_in.
std::tuple<Tensor, Tensor> preact_conv_dgrad(const Tensor& dy, const Tensor& weight, const Tensor& x,
                                             const Tensor& bn, const std::optional<Tensor>& dz_in,
                                             double slope, const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             const std::optional<Tensor>& dz_in_sums, bool into_dz_in);

// dz = da * act'(z) (+ dz_in), and its sums. into_da: dz may take da's memory.
std::tuple<Tensor, Tensor> bn_act_backward(const Tensor& da, const Tensor& x, const Tensor& bn,
                                           const std::optional<Tensor>& dz_in, double slope, bool into_da);

// (dweight, dbias)
std::tuple<Tensor, Tensor> preact_conv_wgrad(const Tensor& dy, const Tensor& x,
                                             const std::optional<Tensor>& bn, const Tensor& weight,
                                             double slope, const std::vector<int64_t>& stride,
                                             const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             bool want_bias);

// What preact_apply has checked and is to compute.
struct PendingApply {
  Tensor dz, x, coefficients;
  std::optional<Tensor> dskip;
  Tensor dx;
};
// dx may take the memory that `into` says.
PendingApply begin_preact_apply(const Tensor& dz, const Tensor& x, const Tensor& coefficients,
                                const std::optional<Tensor>& dskip, ApplyInto into);
PreactApplyParams params_of(const PendingApply& apply);
void run_preact_apply(const PendingApply& apply);
// All of it at once.
Tensor preact_apply(const Tensor& dz, const Tensor& x, const Tensor& coefficients,
                    const std::optional<Tensor>& dskip, ApplyInto into);

// (dz, sums, dweight, dbias) of a 1x1 convolution with stride 1 and padding 0. into_dz_in: dz takes the memory of dz_in. dy_from:
// makes dy first, or none.
std::tuple<Tensor, Tensor, Tensor, Tensor> preact_conv_backward_1x1(const Tensor& dy, const Tensor& weight,
                                                                    const Tensor& x, const Tensor& bn,
                                                                    const std::optional<Tensor>& dz_in,
                                                                    double slope, bool want_bias,
                                                                    bool into_dz_in, const PendingApply* dy_from);

}  // namespace resnet_fused
