// A whole residual unit, forward and backward, by the CPU primitives: one call from Python.
#include "residual_unit.h"

#include "convolution.h"
#include "primitives.h"

namespace resnet_fused {
namespace {

class CpuUnit {
 public:
  CpuUnit(const Unit& unit, const Tensor& x, std::vector<bool> combined = {})
      : unit_(unit), combined_(std::move(combined)), acc_(acc_dtype(check_activation(x, "input").dtype)) {}

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

  void begin_backward(const UnitMask&) const {}
  void finish_backward() const {}

  UnitGradients gradients(size_t i, const Tensor& dy, const Tensor& h, const Tensor& bn,
                          const std::optional<Tensor>& dz_in, UnitNeeds needs, bool centre) const {
    const UnitConvolution& c = unit_.convolutions[i];
    RF_CHECK(needs.weight || !needs.bias, "expected the weight's gradient to be needed where the bias' is");
    UnitGradients g{{}, {}, {}, nothing_like(c.weight), nothing_like(c.weight)};
    const bool both = combined_[i] && needs.weight && needs.dz;
    if (both)
      std::tie(g.dz, g.sums, g.dweight, g.dbias) =
          preact_conv_backward_1x1(dy, c.weight, h, bn, dz_in, unit_.slope, needs.bias);
    if (needs.weight && !both)
      std::tie(g.dweight, g.dbias) = preact_conv_wgrad(dy, h, bn, c.weight, unit_.slope, c.stride, c.padding,
                                                       c.dilation, c.groups, needs.bias);
    if (needs.dz && !both)
      std::tie(g.dz, g.sums) = preact_conv_dgrad(dy, c.weight, h, bn, dz_in, unit_.slope, c.stride, c.padding,
                                                 c.dilation, c.groups);
    if (centre)
      g.coefficients = finalize_backward(*g.sums, bn, values_per_channel(h), unit_.norms[i].training);
    return g;
  }

  Tensor preact_apply(const Tensor& dz, const Tensor& h, const Tensor& coefficients,
                      const std::optional<Tensor>& dskip) const {
    return resnet_fused::preact_apply(dz, h, coefficients, dskip);
  }

 private:
  const Unit& unit_;
  std::vector<bool> combined_;  // of each convolution: both gradients by preact_conv_backward_1x1
  DType acc_;
};

UnitForward forward(const Tensor& x, const std::optional<Tensor>& x_stats, const OptionalTensorList& bn_weights,
                    const OptionalTensorList& bn_biases, const OptionalTensorList& running_means,
                    const OptionalTensorList& running_vars, const TensorList& weights,
                    const OptionalTensorList& biases, const std::optional<Tensor>& shortcut_weight,
                    const std::optional<Tensor>& shortcut_bias, const std::vector<bool>& training,
                    const std::vector<double>& eps, double slope, const IntList& strides,
                    const IntList& paddings, const IntList& dilations, const IntList& groups,
                    const IntList& shortcut_stride, bool want_stats, bool want_raw) {
  const Unit unit = make_unit(bn_weights, bn_biases, running_means, running_vars, weights, biases,
                              shortcut_weight, shortcut_bias, training, eps, slope, strides, paddings,
                              dilations, groups, shortcut_stride);
  CpuUnit backend(unit, x);
  return residual_unit_forward(backend, unit, x, x_stats, want_stats, want_raw);
}

// The BatchNorms' parameters and eps are not needed: bns hold what is.
UnitBackward backward(const Tensor& dout, const Tensor& x, const TensorList& raw, const TensorList& bns,
                      const TensorList& weights, const std::optional<Tensor>& shortcut_weight,
                      const std::vector<bool>& training, double slope, const IntList& strides,
                      const IntList& paddings, const IntList& dilations, const IntList& groups,
                      const IntList& shortcut_stride, const std::vector<bool>& output_mask,
                      const std::vector<bool>& combined) {
  const OptionalTensorList none(weights.size());
  const Unit unit = make_unit(none, none, none, none, weights, none, shortcut_weight, std::nullopt, training,
                              std::vector<double>(weights.size()), slope, strides, paddings, dilations,
                              groups, shortcut_stride);
  RF_CHECK(combined.size() == unit.convolutions.size(), "expected combined of ", unit.convolutions.size(),
           " values, but got ", combined.size());
  CpuUnit backend(unit, x, combined);
  return residual_unit_backward(backend, unit, dout, x, raw, bns, UnitMask(output_mask, unit.size()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(RF_UNIT_FORWARD_SCHEMA);
  m.def(RF_UNIT_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("residual_unit_forward", TORCH_BOX(&forward));
  m.impl("residual_unit_backward", TORCH_BOX(&backward));
}

}  // namespace resnet_fused
