// A whole residual unit, forward and backward, in few launches: what comes before the first convolution is one
// launch, finalize steps are done by the convolutions' last blocks, weight gradients are merged beside preact_apply.
#include "../residual_units.h"

#include "primitives.h"

namespace resnet_fused {
namespace cuda {
namespace {

class CudaUnit {
 public:
  struct Carry {
    void release(const Tensor& tensor) const { resnet_fused::release(tensor); }
    void finish() const {}
  };

  CudaUnit(const Unit& unit, const Tensor& x, const BoolList& combined, Carry*)
      : unit_(unit), x_(check_activation(x, "input")), target_(x), combined_(combined) {
    // The activation that each convolution reads, and its geometry.
    Activation input = x_;
    for (size_t i = 0; i < unit.convolutions.size(); ++i) {
      const ConvGeometry g =
          check_convolution(i == unit.shortcut() ? x_ : input, unit.convolutions[i].weight, options(i));
      geometry_.push_back(g);
      input = {g.n, g.k, g.p, g.q, x_.dtype, x};
    }
    packed_.resize(geometry_.size());
    counters_at_.resize(geometry_.size());
  }

  Tensor acc_nothing() const { return empty_vector(0, x_.tensor); }
  Tensor nothing_like(const Tensor& tensor) const { return torch::stable::new_empty(tensor, {0}); }

  // ---- forward

  Tensor channel_stats(const Tensor& x) const { return channel_stats_of(x); }

  OptionalTensorList begin_forward(const std::optional<Tensor>& stats, int64_t count) {
    OptionalTensorList bn(unit_.size());
    std::optional<Tensor> rows;
    if (stats) rows = check_matrix(*stats, "stats", 2, x_.c);
    std::vector<FinalizeForwardParams> norms;
    for (size_t i = 0; i < unit_.size(); ++i) {
      const UnitNorm& norm = unit_.norms[i];
      if (i > 0 && norm.training) continue;  // from statistics that are yet to come
      const int64_t channels = geometry_[i].c;
      norms.push_back(finalize_forward_params(i == 0 ? rows : std::nullopt, i == 0 ? count : 0,
                                              norm.running_mean, norm.running_var, norm.weight, norm.bias,
                                              norm.eps, channels));
      RF_CHECK(norms.back().stats || (norms.back().running_mean.data && norms.back().running_var.data),
               "expected stats, or running_mean and running_var: there is nothing to normalise with");
      bn[i] = empty_matrix(4, channels, x_.tensor);
      norms.back().bn = mutable_floats(*bn[i]);
    }
    std::vector<size_t> weights;
    std::vector<int64_t> counters;
    for (size_t i = 0; i < geometry_.size(); ++i) {
      weights.push_back(i);
      counters.push_back(i == unit_.shortcut() ? 0 : conv_forward_counters(geometry_[i]));
    }
    begin(weights, norms, counters);
    return bn;
  }

  Tensor finalize_forward(size_t i, const std::optional<Tensor>&, int64_t) const {
    raise("BatchNorm ", i, " was to be finalized before");
  }

  std::tuple<Tensor, Tensor, std::optional<Tensor>> convolution(size_t i, const Tensor& h, const Tensor& bn,
                                                                const std::optional<Tensor>& residual,
                                                                bool want_stats, bool next) const {
    const UnitConvolution& c = unit_.convolutions[i];
    const ConvGeometry& g = geometry_[i];
    Prepared prepared;
    prepared.weight = packed_[i], prepared.counters = counters(i);
    std::optional<Tensor> next_bn;
    if (next) {
      const UnitNorm& norm = unit_.norms[i + 1];
      next_bn = empty_matrix(4, g.k, x_.tensor);
      prepared.next.channels = g.k, prepared.next.count = g.n * g.p * g.q, prepared.next.eps = norm.eps;
      prepared.next.weight = check_vector(norm.weight, "weight", g.k);
      prepared.next.bias = check_vector(norm.bias, "bias", g.k);
      prepared.next.bn = mutable_floats(*next_bn);
    }
    auto [y, stats] =
        preact_conv_forward_of(h, bn, c.weight, c.bias, residual, unit_.slope, options(i), want_stats, prepared);
    return {std::move(y), std::move(stats), std::move(next_bn)};
  }

  // ---- backward

  void begin_backward(const UnitMask& mask) {
    std::vector<size_t> weights;
    std::vector<int64_t> counters(geometry_.size());
    const int multiprocessors = target_.stream().multiprocessors;
    for (size_t i = 0; i < geometry_.size(); ++i) {
      if (!mask.below(i == unit_.shortcut() ? 0 : i)) continue;
      weights.push_back(i);
      counters[i] = combines(i, mask.weight(i)) ? backward_1x1_counters(geometry_[i], multiprocessors)
                                                : conv_dgrad_counters(geometry_[i]);
    }
    begin(weights, {}, counters);
  }

  UnitGradients gradients(size_t i, const Tensor& dy, const Tensor& h, const Tensor& bn,
                          const std::optional<Tensor>& dz_in, const std::optional<Tensor>&, UnitNeeds needs,
                          bool centre, bool) {
    const UnitConvolution& c = unit_.convolutions[i];
    const ConvGeometry& g = geometry_[i];
    RF_CHECK(needs.weight || !needs.bias, "expected the weight's gradient to be needed where the bias' is");
    UnitGradients result{{}, {}, {}, nothing_like(c.weight), nothing_like(c.weight)};
    Prepared prepared;
    prepared.weight = packed_[i], prepared.counters = counters(i);
    WeightMerge merge{};
    std::optional<Tensor> partial;
    prepared.later = &merge, prepared.later_partial = &partial;
    if (centre) {
      result.coefficients = empty_matrix(4, g.c, x_.tensor);
      prepared.centre = {g.c, g.n * g.h * g.w, nullptr, nullptr, unit_.norm_of(i).training,
                         mutable_floats(*result.coefficients)};
    }
    if (needs.dz && combines(i, needs.weight)) {
      std::tie(result.dz, result.sums, result.dweight, result.dbias) = preact_conv_backward_1x1_of(
          dy, c.weight, h, bn, dz_in, unit_.slope, needs.bias, prepared);
    } else {
      if (needs.weight)
        std::tie(result.dweight, result.dbias) =
            preact_conv_wgrad_of(dy, h, bn, c.weight, unit_.slope, options(i), needs.bias, prepared);
      if (needs.dz)
        std::tie(result.dz, result.sums) =
            preact_conv_dgrad_of(dy, c.weight, h, bn, dz_in, unit_.slope, options(i), prepared);
    }
    if (partial) {
      merges_.push_back(merge);
      partials_.push_back(std::move(*partial));
      if (merges_.size() > kApplyMerges) finish_backward();
    }
    return result;
  }

  Tensor preact_apply(const Tensor& dz, const Tensor& h, const Tensor& coefficients,
                      const std::optional<Tensor>& dskip, ApplyInto into) {
    Tensor dx = preact_apply_of(dz, h, coefficients, dskip, merges_, into);
    merges_.clear(), partials_.clear();
    return dx;
  }

  static void update_running_stats(const TensorList& means, const TensorList& vars, const TensorList& stats,
                                   const IntList& counts, const std::vector<double>& momenta,
                                   const TensorList& batches_tracked) {
    update_running_stats_of(means, vars, stats, counts, momenta, batches_tracked);
  }

  // The merges that no preact_apply has taken along.
  void finish_backward() {
    for (const WeightMerge& merge : merges_) check(merge_weight(merge, target_.stream()));
    merges_.clear(), partials_.clear();
  }

 private:
  ConvolutionOptions options(size_t i) const {
    const UnitConvolution& c = unit_.convolutions[i];
    return {c.stride, c.padding, c.dilation, c.groups};
  }
  bool combines(size_t i, bool needs_weight) const {
    return needs_weight && i < combined_.size() && combined_[i];
  }
  uint32_t* counters(size_t i) const { return counters_ ? counters_of(*counters_) + counters_at_[i] : nullptr; }

  // One launch (more for long units): the weights of these convolutions packed, where they are not as the kernels
  // read them; BatchNorms finalized; counters for each convolution zeroed.
  void begin(const std::vector<size_t>& weights, const std::vector<FinalizeForwardParams>& norms,
             const std::vector<int64_t>& counters) {
    int64_t total = 0;
    for (size_t i = 0; i < counters.size(); ++i) counters_at_[i] = total, total += counters[i];
    counters_ = empty_vector(total > 0 ? total : 1, x_.tensor);
    std::vector<PackWeightParams> packs;
    for (const size_t i : weights) {
      const Tensor& weight = unit_.convolutions[i].weight;
      const ConvGeometry& g = geometry_[i];
      if (is_packed(weight, g, x_.dtype)) continue;
      packed_[i] = empty_activation(g.k, g.c, g.r, g.s, x_.dtype, x_.tensor);
      packs.push_back(pack_params(weight, g, x_.dtype, packed_[i]->mutable_data_ptr()));
    }
    size_t pack = 0, norm = 0;
    do {
      BeginUnitParams params{};
      for (; pack < packs.size() && params.weights < kUnitWeights; ++pack)
        params.weight[params.weights++] = packs[pack];
      for (; norm < norms.size() && params.norms < kUnitNorms; ++norm) params.norm[params.norms++] = norms[norm];
      if (total > 0) params.counters = counters_of(*counters_), params.counters_count = total;
      total = 0;
      with_type(x_.dtype, [&](auto type) { check(begin_unit<decltype(type)>(params, target_.stream())); });
    } while (pack < packs.size() || norm < norms.size());
  }

  const Unit& unit_;
  const Activation x_;
  const Target target_;
  const BoolList& combined_;
  std::vector<ConvGeometry> geometry_;
  OptionalTensorList packed_;
  std::optional<Tensor> counters_;
  std::vector<int64_t> counters_at_;
  std::vector<WeightMerge> merges_;
  TensorList partials_;
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def(RF_UNITS_FORWARD_SCHEMA);
  m.def(RF_UNITS_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) {
  m.impl("residual_units_forward", TORCH_BOX(&residual_units_forward<CudaUnit>));
  m.impl("residual_units_backward", TORCH_BOX(&residual_units_backward<CudaUnit>));
}

}  // namespace cuda
}  // namespace resnet_fused
