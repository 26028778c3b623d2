// Residual units that run one after another, by one operator: what it costs to get from Python to the
// kernels, and autograd's bookkeeping, is then paid once for all of them. The operators are those of every
// backend.
#pragma once

#include <algorithm>
#include <iterator>

#include "residual_unit.h"

// Everything of convolutions and BatchNorms is listed over all units: lengths says how many there are in
// each, the shortcuts' lists have an entry per unit. x, dout and raw are dense channels_last, and so are out
// and dx.
//
// momenta: with which the running statistics of the BatchNorms in training are updated; empty: they are not. 1 is added to
//   batches_tracked.
// raw: what every convolution but the last gave, the units' sums included. stats: of what each BatchNorm
// reads, of
//   size 0 where it came as an argument or is not needed.
// output_mask: x; the weights, then the biases of the BatchNorms; those of the convolutions; of the shortcuts. The gradients
//   that it asks for come in this order, those of a BatchNorm (in the acc dtype) as rows of one tensor, the bias' first.
// bns, in backward: of each BatchNorm what forward gave or, on the CPU, the statistics that it was made of, which are half
//   as much; the BatchNorms' parameters and eps are read for these only.
// reuse_raw: nobody reads raw afterwards. Gradients may be written over it, and it is left empty.
// combined: of each convolution, then of each shortcut, whether preact_conv_backward_1x1 makes both of its
// gradients,
//   where both are needed.
#define RF_UNITS_FORWARD_SCHEMA                                                                             \
  "residual_units_forward(Tensor x, Tensor? x_stats, Tensor?[] bn_weights, Tensor?[] bn_biases,"            \
  " Tensor(a!)?[] running_means, Tensor(b!)?[] running_vars, Tensor[] weights, Tensor?[] biases,"           \
  " Tensor?[] shortcut_weights, Tensor?[] shortcut_biases, bool[] training, float[] eps,"                   \
  " float negative_slope, int[] strides, int[] paddings, int[] dilations, int[] groups,"                    \
  " int[] shortcut_strides, int[] lengths, float[] momenta, Tensor(c!)[] batches_tracked, bool want_stats," \
  " bool want_raw)"                                                                                         \
  " -> (Tensor out, Tensor out_stats, Tensor[] raw, Tensor[] stats, Tensor[] bns)"
#define RF_UNITS_BACKWARD_SCHEMA                                                                            \
  "residual_units_backward(Tensor dout, Tensor x, Tensor(a!)[] raw, Tensor[] bns,"                          \
  " Tensor?[] bn_weights, Tensor?[] bn_biases, Tensor[] weights, Tensor?[] shortcut_weights,"               \
  " bool[] training, float[] eps, float negative_slope, int[] strides, int[] paddings, int[] dilations,"    \
  " int[] groups, int[] shortcut_strides, int[] lengths, bool[] output_mask, bool[] combined,"              \
  " bool reuse_raw) -> Tensor[] gradients"

namespace resnet_fused {

// The units of the operators' lists. Backward has no running statistics.
inline std::vector<Unit> make_units(const OptionalTensorList& bn_weights, const OptionalTensorList& bn_biases,
                                    const OptionalTensorList& running_means,
                                    const OptionalTensorList& running_vars, const TensorList& weights,
                                    const OptionalTensorList& biases, const OptionalTensorList& shortcut_weights,
                                    const OptionalTensorList& shortcut_biases, const BoolList& training,
                                    const std::vector<double>& eps, double slope, const IntList& strides,
                                    const IntList& paddings, const IntList& dilations, const IntList& groups,
                                    const IntList& shortcut_strides, const IntList& lengths,
                                    const std::vector<double>& momenta) {
  const size_t n = weights.size(), count = lengths.size();
  int64_t total = 0;
  for (const int64_t length : lengths) {
    RF_CHECK(length > 0, "expected at least one convolution in each unit, but got ", length);
    total += length;
  }
  RF_CHECK(momenta.empty() || momenta.size() == n, "expected ", n, " momenta or none, but got ", momenta.size());
  RF_CHECK(count > 0 && total == static_cast<int64_t>(n), "expected ", n, " convolutions in the units, but got ",
           total);
  for (const size_t length : {bn_weights.size(), bn_biases.size(), running_means.size(), running_vars.size(),
                              biases.size(), training.size(), eps.size(), groups.size()})
    RF_CHECK(length == n, "expected ", n, " of everything that a convolution has, but got ", length);
  for (const size_t length : {strides.size(), paddings.size(), dilations.size()})
    RF_CHECK(length == 2 * n, "expected ", n, " pairs, but got ", length, " integers");
  for (const size_t length : {shortcut_weights.size(), shortcut_biases.size(), shortcut_strides.size() / 2})
    RF_CHECK(length == count, "expected ", count, " shortcuts, but got ", length);
  const auto pair = [](const IntList& list, size_t i) { return IntList{list[2 * i], list[2 * i + 1]}; };
  std::vector<Unit> units;
  units.reserve(count);
  for (size_t u = 0, i = 0; u < count; ++u) {
    Unit unit{{}, {}, shortcut_weights[u].has_value(), slope};
    unit.norms.reserve(lengths[u]);
    unit.convolutions.reserve(lengths[u] + 1);
    for (const size_t end = i + lengths[u]; i < end; ++i) {
      unit.norms.push_back({bn_weights[i], bn_biases[i], running_means[i], running_vars[i], training[i], eps[i],
                            momenta.empty() ? std::nullopt : std::optional<double>(momenta[i])});
      unit.convolutions.push_back(
          {weights[i], biases[i], pair(strides, i), pair(paddings, i), pair(dilations, i), groups[i]});
    }
    if (unit.projects)
      unit.convolutions.push_back(
          {*shortcut_weights[u], shortcut_biases[u], pair(shortcut_strides, u), {0, 0}, {1, 1}, 1});
    units.push_back(std::move(unit));
  }
  return units;
}

template <typename T>
void append(std::vector<T>& to, std::vector<T>&& from) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

// The operator. Backend(unit, x, combined) as in residual_unit.h.
template <typename Backend>
UnitForward residual_units_forward(const Tensor& x, const std::optional<Tensor>& x_stats,
                                   const OptionalTensorList& bn_weights, const OptionalTensorList& bn_biases,
                                   const OptionalTensorList& running_means,
                                   const OptionalTensorList& running_vars, const TensorList& weights,
                                   const OptionalTensorList& biases, const OptionalTensorList& shortcut_weights,
                                   const OptionalTensorList& shortcut_biases, const BoolList& training,
                                   const std::vector<double>& eps, double slope, const IntList& strides,
                                   const IntList& paddings, const IntList& dilations, const IntList& groups,
                                   const IntList& shortcut_strides, const IntList& lengths,
                                   const std::vector<double>& momenta, const TensorList& batches_tracked,
                                   bool want_stats, bool want_raw) {
  const std::vector<Unit> units =
      make_units(bn_weights, bn_biases, running_means, running_vars, weights, biases, shortcut_weights,
                 shortcut_biases, training, eps, slope, strides, paddings, dilations, groups, shortcut_strides,
                 lengths, momenta);
  const BoolList none;
  Tensor h = x;
  std::optional<Tensor> h_stats = x_stats;
  TensorList raw, stats, bns;
  RunningStatsUpdates updates;
  for (size_t u = 0; u < units.size(); ++u) {
    const bool last = u + 1 == units.size();
    Backend backend(units[u], h, none);
    auto [y, y_stats, unit_raw, unit_stats, unit_bns] = residual_unit_forward(
        backend, units[u], h, h_stats, last ? want_stats : units[u + 1].norms[0].training, want_raw, updates);
    // Those of a later unit's input are an output of the operator, not an argument of it.
    if (u > 0 && units[u].norms[0].training) unit_stats[0] = std::move(*h_stats);
    append(raw, std::move(unit_raw)), append(stats, std::move(unit_stats)), append(bns, std::move(unit_bns));
    h = std::move(y), h_stats = std::move(y_stats);
    if (!last && want_raw) raw.push_back(h);
  }
  if (!updates.means.empty() || !batches_tracked.empty())
    Backend::update_running_stats(updates.means, updates.vars, updates.stats, updates.counts, updates.momenta,
                                  batches_tracked);
  return {std::move(h), std::move(*h_stats), std::move(raw), std::move(stats), std::move(bns)};
}

// Row `row` of a contiguous [2, C]. No operator runs for it: there is one for every parameter of every BatchNorm.
inline Tensor row_of(const Tensor& rows, int64_t row) {
  const int64_t channels = rows.size(1), stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(rows.get(), 1, &channels, &stride, row * channels, &handle));
  return Tensor(handle);
}

template <typename Backend>
TensorList residual_units_backward(const Tensor& dout, const Tensor& x, const TensorList& raw,
                                   const TensorList& bns, const OptionalTensorList& bn_weights,
                                   const OptionalTensorList& bn_biases, const TensorList& weights,
                                   const OptionalTensorList& shortcut_weights, const BoolList& training,
                                   const std::vector<double>& eps, double slope, const IntList& strides,
                                   const IntList& paddings, const IntList& dilations, const IntList& groups,
                                   const IntList& shortcut_strides, const IntList& lengths,
                                   const BoolList& output_mask, const BoolList& combined, bool reuse_raw) {
  const size_t n = weights.size(), count = lengths.size();
  const OptionalTensorList none(n);
  const std::vector<Unit> units =
      make_units(bn_weights, bn_biases, none, none, weights, none, shortcut_weights, OptionalTensorList(count),
                 training, eps, slope, strides, paddings, dilations, groups, shortcut_strides, lengths,
                 {});
  RF_CHECK(raw.size() == n - 1 && bns.size() == n, "expected ", n - 1, " raw outputs and ", n,
           " bns, but got ", raw.size(), " and ", bns.size());
  RF_CHECK(output_mask.size() == 4 * n + 2 * count + 1, "expected output_mask of ", 4 * n + 2 * count + 1,
           " values, but got ", output_mask.size());
  RF_CHECK(combined.size() == n + count, "expected combined of ", n + count, " values, but got ",
           combined.size());

  // Of the output_mask, by where they begin.
  const size_t gammas = 1, betas = gammas + n, convolutions = betas + n, biases = convolutions + n,
               shortcuts = biases + n, shortcut_biases = shortcuts + count;
  const auto any = [&](size_t first, size_t size) {
    return std::find(output_mask.begin() + first, output_mask.begin() + first + size, true) !=
           output_mask.begin() + first + size;
  };

  Tensor dx = dout;
  bool needed = true;
  OptionalTensorList gradients(output_mask.size());
  for (size_t u = count, end = n; u-- > 0;) {
    const Unit& unit = units[u];
    const size_t size = unit.size(), begin = end - size;
    // Whether anything that the unit's input depends on needs a gradient.
    bool below = output_mask[0] || any(shortcuts, u) || any(shortcut_biases, u);
    for (const size_t kind : {gammas, betas, convolutions, biases}) below = below || any(kind, begin);
    BoolList mask{below};
    for (size_t i = begin; i < end; ++i) mask.push_back(output_mask[gammas + i] || output_mask[betas + i]);
    for (const size_t kind : {convolutions, biases})
      for (size_t i = begin; i < end; ++i) mask.push_back(output_mask[kind + i]);
    for (const size_t kind : {shortcuts, shortcut_biases}) mask.push_back(output_mask[kind + u]);
    BoolList both(combined.begin() + begin, combined.begin() + end);
    if (unit.projects) both.push_back(combined[n + u]);

    const Tensor& h = begin == 0 ? x : raw[begin - 1];
    Backend backend(unit, h, both);
    auto of_unit = residual_unit_backward(
        backend, unit, needed ? std::optional<Tensor>(dx) : std::nullopt, h,
        TensorList(raw.begin() + begin, raw.begin() + end - 1),
        TensorList(bns.begin() + begin, bns.begin() + end), UnitMask(mask, size), begin > 0 && reuse_raw, reuse_raw);
    auto& [unit_dx, unit_sums, unit_dweights, unit_dbiases, dshortcut_weight, dshortcut_bias] = of_unit;
    for (size_t i = begin; i < end; ++i) {
      for (const size_t kind : {gammas, betas})
        if (output_mask[kind + i]) gradients[kind + i] = row_of(unit_sums[i - begin], kind == gammas ? 1 : 0);
      gradients[convolutions + i] = std::move(unit_dweights[i - begin]);
      gradients[biases + i] = std::move(unit_dbiases[i - begin]);
    }
    gradients[shortcuts + u] = std::move(dshortcut_weight);
    gradients[shortcut_biases + u] = std::move(dshortcut_bias);
    dx = std::move(unit_dx);
    if (reuse_raw && end < n) release(raw[end - 1]);  // this unit's output, which the gradient of was written over
    needed = below;
    end = begin;
  }
  if (output_mask[0]) gradients[0] = std::move(dx);
  TensorList wanted;
  for (size_t i = 0; i < gradients.size(); ++i)
    if (output_mask[i]) wanted.push_back(std::move(*gradients[i]));
  return wanted;
}

}  // namespace resnet_fused
