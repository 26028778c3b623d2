// A whole residual unit out of primitives, forward and backward: the sequence, once for every backend. It is
// that of resnet_fused/ops/residual_unit.py and residual_unit_backward.py, which runs where primitives of one
// unit go to different backends; results are the same to the bit. residual_units.h has the operators.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "apply_into.h"
#include "errors.h"
#include "release.h"

namespace resnet_fused {

using torch::stable::Tensor;

struct UnitNorm {
  std::optional<Tensor> weight, bias, running_mean, running_var;
  bool training;  // use batch statistics
  double eps;
  std::optional<double> momentum;  // the running statistics are to be updated with this
};

// What the running statistics of BatchNorms are to be updated with, as update_running_stats_of_unit takes it.
struct RunningStatsUpdates {
  std::vector<Tensor> means, vars, stats;
  std::vector<int64_t> counts;
  std::vector<double> momenta;

  void add(const UnitNorm& norm, const Tensor& batch, int64_t count) {
    if (!norm.momentum || !norm.training || !norm.running_mean) return;
    means.push_back(*norm.running_mean), vars.push_back(*norm.running_var), stats.push_back(batch);
    counts.push_back(count), momenta.push_back(*norm.momentum);
  }
};

struct UnitConvolution {
  Tensor weight;
  std::optional<Tensor> bias;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

// The convolutions in order; the last one of `convolutions` is the shortcut's where the unit projects.
struct Unit {
  std::vector<UnitNorm> norms;
  std::vector<UnitConvolution> convolutions;
  bool projects;
  double slope;

  size_t size() const { return norms.size(); }
  size_t shortcut() const { return norms.size(); }
  // Whose result convolution i reads.
  const UnitNorm& norm_of(size_t i) const { return norms[i == shortcut() ? 0 : i]; }
};

using TensorList = std::vector<Tensor>;
using OptionalTensorList = std::vector<std::optional<Tensor>>;
using IntList = std::vector<int64_t>;
using BoolList = std::vector<bool>;

// Values per channel, N*H*W.
inline int64_t values_per_channel(const Tensor& x) {
  RF_CHECK(x.dim() == 4, "expected 4D input (got ", x.dim(), "D input)");
  return x.size(0) * x.size(2) * x.size(3);
}

// What the primitives do not check of a BatchNorm, because they do not read it.
inline void check_norm(const UnitNorm& norm, const Tensor& x, int64_t channels, int64_t count) {
  RF_CHECK(norm.training ? norm.eps > 0.0 && count != 1 : norm.eps >= 0.0, "expected a positive eps, but got ",
           norm.eps, ", and more than 1 value per channel, but got ", count);
  RF_CHECK(norm.running_mean.has_value() == norm.running_var.has_value(),
           "expected both or none of running_mean and running_var");
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type(), acc = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  for (const auto* t : {&norm.weight, &norm.bias, &norm.running_mean, &norm.running_var}) {
    if (!*t) continue;
    const ScalarType own = (*t)->scalar_type();
    RF_CHECK((*t)->dim() == 1 && (*t)->size(0) == channels && (own == acc || own == dtype) &&
                 (*t)->is_cuda() == x.is_cuda() && (*t)->get_device_index() == x.get_device_index(),
             "expected a parameter of BatchNorm with ", channels, " elements, but got size ",
             to_string((*t)->sizes()), ", or another dtype or device than that of the input");
  }
}

using UnitForward = std::tuple<Tensor, Tensor, TensorList, TensorList, TensorList>;

// Backend: acc_nothing() gives an empty tensor of the acc dtype; channel_stats(x);
//   begin_forward(stats of x or none, count) -> bn of the first BatchNorm and, if it likes, of others that
//   use
//     running statistics;
//   finalize_forward(i, stats or none, count) -> bn of BatchNorm i;
//   convolution(i, h, bn, residual, want_stats, next) -> (y, stats, bn of BatchNorm i + 1 if `next`).
template <typename Backend>
UnitForward residual_unit_forward(Backend& backend, const Unit& unit, const Tensor& x,
                                  const std::optional<Tensor>& x_stats, bool want_stats, bool want_raw,
                                  RunningStatsUpdates& updates) {
  const size_t n = unit.size();
  const auto& norms = unit.norms;
  std::optional<Tensor> first_stats;
  TensorList raw, stats;
  const int64_t count = values_per_channel(x);
  check_norm(norms[0], x, x.size(1), count);
  for (size_t i = 1; i < n; ++i) check_norm(norms[i], x, unit.convolutions[i - 1].weight.size(0), 0);
  if (norms[0].training) {
    first_stats = x_stats ? *x_stats : backend.channel_stats(x);
    updates.add(norms[0], *first_stats, count);
  }
  // Statistics that came as an argument are not an output: outputs do not alias inputs.
  stats.push_back(first_stats && !x_stats ? *first_stats : backend.acc_nothing());
  OptionalTensorList bn = backend.begin_forward(first_stats, count);
  std::optional<Tensor> h = x, h_stats;
  for (size_t i = 0; i < n; ++i) {
    const bool last = i + 1 == n;
    std::optional<Tensor> residual;
    if (last && !unit.projects) residual = x;
    // As late as possible: the projection's output lives for one convolution.
    if (last && unit.projects)
      residual = std::get<0>(backend.convolution(unit.shortcut(), x, *bn[0], std::nullopt, false, false));
    const bool next = !last && norms[i + 1].training;
    auto [y, y_stats, y_bn] = backend.convolution(i, *h, *bn[i], residual, last ? want_stats : next, next);
    h = std::move(y), h_stats = std::move(y_stats);  // what was read is freed before the next is made
    if (last) break;
    const int64_t values = values_per_channel(*h);
    RF_CHECK(!next || values != 1, "expected more than 1 value per channel when training");
    if (next)
      bn[i + 1] = std::move(y_bn);
    else if (!bn[i + 1])
      bn[i + 1] = backend.finalize_forward(i + 1, std::nullopt, values);
    stats.push_back(next ? *h_stats : backend.acc_nothing());
    if (next) updates.add(norms[i + 1], *h_stats, values);
    if (want_raw) raw.push_back(*h);
  }
  TensorList bns;
  for (auto& rows : bn) bns.push_back(std::move(*rows));
  return {std::move(*h), std::move(*h_stats), std::move(raw), std::move(stats), std::move(bns)};
}

// dx, BatchNorms' sums, dweights, dbiases, the shortcut's dweight and dbias; of size 0 where not needed.
using UnitBackward = std::tuple<Tensor, TensorList, TensorList, TensorList, Tensor, Tensor>;

// output_mask: x; the BatchNorms, weights and biases in order; the shortcut's weight and bias.
class UnitMask {
 public:
  UnitMask(const BoolList& mask, size_t n) : mask_(mask), n_(n) {
    RF_CHECK(mask.size() == 3 * n + 3, "expected output_mask of ", 3 * n + 3, " values, but got ",
             mask.size());
  }
  bool x() const { return mask_[0]; }
  bool norm(size_t i) const { return mask_[1 + i]; }
  // i == n: of the shortcut
  bool weight(size_t i) const { return mask_[i == n_ ? 3 * n_ + 1 : 1 + n_ + i]; }
  bool bias(size_t i) const { return mask_[i == n_ ? 3 * n_ + 2 : 1 + 2 * n_ + i]; }
  // Whether anything that convolution i's input depends on needs a gradient.
  bool below(size_t i) const {
    bool any = x();
    for (size_t j = 0; j <= i; ++j) any = any || norm(j) || (j < i && (weight(j) || bias(j)));
    return any;
  }

 private:
  const BoolList& mask_;
  size_t n_;
};

struct UnitNeeds {
  bool dz, weight, bias;
};

// Of one convolution. dz and sums are none if not needed, dweight and dbias of size 0.
struct UnitGradients {
  std::optional<Tensor> dz, sums, coefficients;
  std::optional<Tensor> dweight, dbias;
};

// Backend: acc_nothing(), nothing_like(tensor); begin_backward(mask);
//   gradients(i, dy, h, bn, dz_in, its sums, needs, centre, reuse_bn) with the coefficients of BatchNorm's backward if
//     `centre`, which may take the memory of bn if `reuse_bn`; dz may take the memory of dz_in;
//   preact_apply(dz, h, coefficients, dskip, into) into the memory of dz, or of h; finish_backward();
//   Backend::Carry, what units that follow each other share: release(tensor) as soon as nothing is left to be read of it, and
//     finish() after the last. With it the result of preact_apply for a unit's input may be made by the next gradients().
// dout: none if nothing is needed. bns: of each BatchNorm the rows that forward made, or the statistics [2, C] that it made
// them of. reuse_x, reuse_raw: whether gradients may be written over x, over raw. What a convolution has read is needed no
// more once its BatchNorm's backward has run: dz is then freed in its place, and one tensor less is alive beside what was
// saved. A raw output goes when the gradient that was written over it has been used.
template <typename Backend>
UnitBackward residual_unit_backward(Backend& backend, const Unit& unit, const std::optional<Tensor>& dout,
                                    const Tensor& x, const TensorList& raw, const TensorList& bns,
                                    const UnitMask& mask, bool reuse_x, bool reuse_raw) {
  const size_t n = unit.size();
  if (dout) backend.begin_backward(mask);
  const auto needs = [&](size_t i, bool below) { return UnitNeeds{below, mask.weight(i), mask.bias(i)}; };
  OptionalTensorList sums(n), dweights(n), dbiases(n);
  std::optional<Tensor> dshortcut_weight, dshortcut_bias, dy = dout;
  for (size_t i = n; i-- > 0;) {
    const Tensor& h = i == 0 ? x : raw[i - 1];
    const bool below = mask.below(i);
    const bool onwards = below && (i > 0 || mask.x()), joined = i == 0 && unit.projects;
    UnitGradients g;
    const bool by_stats = bns[i].dim() == 2 && bns[i].size(0) == 2;
    std::optional<Tensor> bn = bns[i];
    if (by_stats && dout) bn = backend.finalize_forward(i, bns[i], values_per_channel(h));
    if (dy) {
      g = backend.gradients(i, *dy, h, *bn, std::nullopt, std::nullopt, needs(i, below), onwards && !joined,
                            by_stats);
      dy.reset();  // freed before the next one is allocated
      if (reuse_raw && i + 1 < n) release(raw[i]);
      dweights[i] = std::move(g.dweight), dbiases[i] = std::move(g.dbias);
    }
    if (joined && dout) {  // the shortcut's 1x1 adds to the other gradient of z, where that lies
      g = backend.gradients(unit.shortcut(), *dout, x, *bn, g.dz, g.sums, needs(unit.shortcut(), below), onwards,
                            by_stats);
      dshortcut_weight = std::move(g.dweight), dshortcut_bias = std::move(g.dbias);
    }
    if (!below || !g.dz) continue;  // nothing further down needs a gradient
    if (onwards) {
      std::optional<Tensor> dskip;
      if (i == 0 && !unit.projects) dskip = dout;
      const bool reuse = i == 0 ? reuse_x : reuse_raw;
      dy = backend.preact_apply(*g.dz, h, *g.coefficients, dskip, reuse ? ApplyInto::x : ApplyInto::dz);
    }
    if (mask.norm(i)) sums[i] = std::move(g.sums);
  }
  backend.finish_backward();
  const auto filled = [&](OptionalTensorList& list, bool acc) {
    TensorList out;
    for (size_t i = 0; i < n; ++i)
      out.push_back(list[i] ? std::move(*list[i])
                    : acc   ? backend.acc_nothing()
                            : backend.nothing_like(unit.convolutions[i].weight));
    return out;
  };
  const auto or_nothing = [&](std::optional<Tensor>& t) {
    return t ? std::move(*t) : backend.nothing_like(x);
  };
  std::optional<Tensor> dx;
  if (mask.x()) dx = std::move(dy);
  TensorList all_sums = filled(sums, true), all_dweights = filled(dweights, false),
             all_dbiases = filled(dbiases, false);
  return {or_nothing(dx),           std::move(all_sums),         std::move(all_dweights),
          std::move(all_dbiases),   or_nothing(dshortcut_weight), or_nothing(dshortcut_bias)};
}

}  // namespace resnet_fused
