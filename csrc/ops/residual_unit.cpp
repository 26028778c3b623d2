// Whole residual units, forward and backward, by the CPU primitives: one call from Python.
#include "residual_units.h"

#include "convolution.h"
#include "primitives.h"

namespace resnet_fused {
namespace {

class CpuUnit {
 public:
  // The gradient of a unit's input, which the last convolution of the unit before makes as it reads it: in memory once, not twice.
  class Carry {
   public:
    void defer(PendingApply apply) { apply_ = std::move(apply); }
    const PendingApply* apply() const { return apply_ ? &*apply_ : nullptr; }
    void done() {
      apply_.reset();
      for (const Tensor& tensor : releases_) resnet_fused::release(tensor);
      releases_.clear();
    }
    void finish() {
      if (apply_) run_preact_apply(*apply_);
      done();
    }
    void release(const Tensor& tensor) {
      if (apply_)
        releases_.push_back(tensor);
      else
        resnet_fused::release(tensor);
    }

   private:
    std::optional<PendingApply> apply_;
    TensorList releases_;
  };

  CpuUnit(const Unit& unit, const Tensor& x, const BoolList& combined, Carry* carry)
      : unit_(unit), combined_(combined), carry_(carry), acc_(acc_dtype(check_activation(x, "input").dtype)) {}

  Tensor acc_nothing() const { return empty_vector(0, acc_); }
  Tensor nothing_like(const Tensor& tensor) const {
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float64})
      if (has_dtype(tensor, dtype)) return empty_vector(0, dtype);
    return torch::stable::new_empty(tensor, {0});
  }

  Tensor channel_stats(const Tensor& x) const { return resnet_fused::channel_stats(x); }

  OptionalTensorList begin_forward(const std::optional<Tensor>& stats, int64_t count) const {
    OptionalTensorList bn(unit_.size());
    bn[0] = finalize_forward(0, stats, count);
    return bn;
  }

  Tensor finalize_forward(size_t i, const std::optional<Tensor>& stats, int64_t count) const {
    const UnitNorm& norm = unit_.norms[i];
    return resnet_fused::finalize_forward(stats, count, norm.running_mean, norm.running_var, norm.weight,
                                          norm.bias, norm.eps);
  }

  std::tuple<Tensor, Tensor, std::optional<Tensor>> convolution(size_t i, const Tensor& h, const Tensor& bn,
                                                                const std::optional<Tensor>& residual,
                                                                bool want_stats, bool next) const {
    const UnitConvolution& c = unit_.convolutions[i];
    auto [y, stats] = preact_conv_forward(h, bn, c.weight, c.bias, residual, unit_.slope, c.stride, c.padding,
                                          c.dilation, c.groups, want_stats);
    std::optional<Tensor> next_bn;
    if (next) next_bn = finalize_forward(i + 1, stats, values_per_channel(y));
    return {std::move(y), std::move(stats), std::move(next_bn)};
  }

  static void update_running_stats(const TensorList& means, const TensorList& vars, const TensorList& stats,
                                   const IntList& counts, const std::vector<double>& momenta,
                                   const TensorList& batches_tracked) {
    update_running_stats_of_unit(means, vars, stats, counts, momenta, batches_tracked);
  }

  void begin_backward(const UnitMask&) const {}
  void finish_backward() const {}

  UnitGradients gradients(size_t i, const Tensor& dy, const Tensor& h, const Tensor& bn,
                          const std::optional<Tensor>& dz_in, const std::optional<Tensor>& dz_in_sums, UnitNeeds needs,
                          bool centre, bool reuse_bn) const {
    const UnitConvolution& c = unit_.convolutions[i];
    RF_CHECK(needs.weight || !needs.bias, "expected the weight's gradient to be needed where the bias' is");
    UnitGradients g{{}, {}, {}, nothing_like(c.weight), nothing_like(c.weight)};
    const bool both = combined_[i] && needs.weight && needs.dz;
    if (!both) carry_->finish();
    if (both)
      std::tie(g.dz, g.sums, g.dweight, g.dbias) =
          preact_conv_backward_1x1(dy, c.weight, h, bn, dz_in, unit_.slope, needs.bias, true, carry_->apply());
    carry_->done();
    if (needs.weight && !both)
      std::tie(g.dweight, g.dbias) = preact_conv_wgrad(dy, h, bn, c.weight, unit_.slope, c.stride, c.padding,
                                                       c.dilation, c.groups, needs.bias);
    if (needs.dz && !both)
      std::tie(g.dz, g.sums) = preact_conv_dgrad(dy, c.weight, h, bn, dz_in, unit_.slope, c.stride, c.padding,
                                                 c.dilation, c.groups, dz_in_sums, true);
    if (centre)
      g.coefficients = finalize_backward(*g.sums, bn, values_per_channel(h), unit_.norm_of(i).training, reuse_bn);
    return g;
  }

  Tensor preact_apply(const Tensor& dz, const Tensor& h, const Tensor& coefficients,
                      const std::optional<Tensor>& dskip, ApplyInto into) const {
    PendingApply apply = begin_preact_apply(dz, h, coefficients, dskip, into);
    const Tensor dx = apply.dx;
    carry_->defer(std::move(apply));
    if (!dskip) carry_->finish();  // inside of a unit it would keep dz while the next is made
    return dx;
  }

 private:
  const Unit& unit_;
  const BoolList& combined_;  // of each convolution: both gradients by preact_conv_backward_1x1
  Carry* const carry_;
  DType acc_;
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(RF_UNITS_FORWARD_SCHEMA);
  m.def(RF_UNITS_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("residual_units_forward", TORCH_BOX(&residual_units_forward<CpuUnit>));
  m.impl("residual_units_backward", TORCH_BOX(&residual_units_backward<CpuUnit>));
}

}  // namespace resnet_fused
