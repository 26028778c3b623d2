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
// raw: what every convolution but the last gave, the units' sums included. stats: of what each BatchNorm
// reads, of
//   size 0 where it came as an argument or is not needed.
// output_mask: x; the BatchNorms, weights and biases in order; the shortcuts' weights; the shortcuts' biases.
// combined: of each convolution, then of each shortcut, whether preact_conv_backward_1x1 makes both of its
// gradients,
//   where both are needed.
#define RF_UNITS_FORWARD_SCHEMA                                                                             \
  "residual_units_forward(Tensor x, Tensor? x_stats, Tensor?[] bn_weights, Tensor?[] bn_biases,"            \
  " Tensor?[] running_means, Tensor?[] running_vars, Tensor[] weights, Tensor?[] biases,"                   \
  " Tensor?[] shortcut_weights, Tensor?[] shortcut_biases, bool[] training, float[] eps,"                   \
  " float negative_slope, int[] strides, int[] paddings, int[] dilations, int[] groups,"                    \
  " int[] shortcut_strides, int[] lengths, bool want_stats, bool want_raw)"                                 \
  " -> (Tensor out, Tensor out_stats, Tensor[] raw, Tensor[] stats, Tensor[] bns)"
#define RF_UNITS_BACKWARD_SCHEMA                                                                            \
  "residual_units_backward(Tensor dout, Tensor x, Tensor[] raw, Tensor[] bns, Tensor[] weights,"            \
  " Tensor?[] shortcut_weights, bool[] training, float negative_slope, int[] strides, int[] paddings,"      \
  " int[] dilations, int[] groups, int[] shortcut_strides, int[] lengths, bool[] output_mask,"              \
  " bool[] combined) -> (Tensor dx, Tensor[] sums, Tensor[] dweights, Tensor[] dbiases,"                    \
  " Tensor[] dshortcut_weights, Tensor[] dshortcut_biases)"

namespace resnet_fused {

// The units of the operators' lists. BatchNorms' lists are empty in backward: bns hold what it needs.
inline std::vector<Unit> make_units(const OptionalTensorList& bn_weights, const OptionalTensorList& bn_biases,
                                    const OptionalTensorList& running_means,
                                    const OptionalTensorList& running_vars, const TensorList& weights,
                                    const OptionalTensorList& biases, const OptionalTensorList& shortcut_weights,
                                    const OptionalTensorList& shortcut_biases, const BoolList& training,
                                    const std::vector<double>& eps, double slope, const IntList& strides,
                                    const IntList& paddings, const IntList& dilations, const IntList& groups,
                                    const IntList& shortcut_strides, const IntList& lengths) {
  const size_t n = weights.size(), count = lengths.size();
  int64_t total = 0;
  for (const int64_t length : lengths) {
    RF_CHECK(length > 0, "expected at least one convolution in each unit, but got ", length);
    total += length;
  }
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
      unit.norms.push_back(
          {bn_weights[i], bn_biases[i], running_means[i], running_vars[i], training[i], eps[i]});
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
                                   const IntList& shortcut_strides, const IntList& lengths, bool want_stats,
                                   bool want_raw) {
  const std::vector<Unit> units =
      make_units(bn_weights, bn_biases, running_means, running_vars, weights, biases, shortcut_weights,
                 shortcut_biases, training, eps, slope, strides, paddings, dilations, groups, shortcut_strides,
                 lengths);
  const BoolList none;
  Tensor h = x;
  std::optional<Tensor> h_stats = x_stats;
  TensorList raw, stats, bns;
  for (size_t u = 0; u < units.size(); ++u) {
    const bool last = u + 1 == units.size();
    Backend backend(units[u], h, none);
    auto [y, y_stats, unit_raw, unit_stats, unit_bns] = residual_unit_forward(
        backend, units[u], h, h_stats, last ? want_stats : units[u + 1].norms[0].training, want_raw);
    // Those of a later unit's input are an output of the operator, not an argument of it.
    if (u > 0 && units[u].norms[0].training) unit_stats[0] = std::move(*h_stats);
    append(raw, std::move(unit_raw)), append(stats, std::move(unit_stats)), append(bns, std::move(unit_bns));
    h = std::move(y), h_stats = std::move(y_stats);
    if (!last && want_raw) raw.push_back(h);
  }
  return {std::move(h), std::move(*h_stats), std::move(raw), std::move(stats), std::move(bns)};
}

using UnitsBackward = std::tuple<Tensor, TensorList, TensorList, TensorList, TensorList, TensorList>;

template <typename Backend>
UnitsBackward residual_units_backward(const Tensor& dout, const Tensor& x, const TensorList& raw,
                                      const TensorList& bns, const TensorList& weights,
                                      const OptionalTensorList& shortcut_weights, const BoolList& training,
                                      double slope, const IntList& strides, const IntList& paddings,
                                      const IntList& dilations, const IntList& groups,
                                      const IntList& shortcut_strides, const IntList& lengths,
                                      const BoolList& output_mask, const BoolList& combined) {
  const size_t n = weights.size(), count = lengths.size();
  const OptionalTensorList none(n);
  const std::vector<Unit> units =
      make_units(none, none, none, none, weights, none, shortcut_weights, OptionalTensorList(count), training,
                 std::vector<double>(n), slope, strides, paddings, dilations, groups, shortcut_strides, lengths);
  RF_CHECK(raw.size() == n - 1 && bns.size() == n, "expected ", n - 1, " raw outputs and ", n,
           " bns, but got ", raw.size(), " and ", bns.size());
  RF_CHECK(output_mask.size() == 3 * n + 2 * count + 1, "expected output_mask of ", 3 * n + 2 * count + 1,
           " values, but got ", output_mask.size());
  RF_CHECK(combined.size() == n + count, "expected combined of ", n + count, " values, but got ",
           combined.size());

  Tensor dx = dout;
  bool needed = true;
  // From the last unit to the first: filled backwards and turned in the end.
  TensorList sums, dweights, dbiases, dshortcut_weights, dshortcut_biases;
  const auto append_backwards = [](TensorList& to, TensorList&& from) {
    std::reverse(from.begin(), from.end());
    append(to, std::move(from));
  };
  for (size_t u = count, end = n; u-- > 0;) {
    const Unit& unit = units[u];
    const size_t size = unit.size(), begin = end - size;
    // Whether anything that the unit's input depends on needs a gradient.
    bool below = output_mask[0];
    for (size_t part = 0; part < 3; ++part)
      for (size_t i = 0; i < begin; ++i) below = below || output_mask[1 + part * n + i];
    for (size_t part = 0; part < 2; ++part)
      for (size_t i = 0; i < u; ++i) below = below || output_mask[1 + 3 * n + part * count + i];
    BoolList mask{below};
    for (size_t part = 0; part < 3; ++part)
      mask.insert(mask.end(), output_mask.begin() + 1 + part * n + begin,
                  output_mask.begin() + 1 + part * n + end);
    for (size_t part = 0; part < 2; ++part) mask.push_back(output_mask[1 + 3 * n + part * count + u]);
    BoolList both(combined.begin() + begin, combined.begin() + end);
    if (unit.projects) both.push_back(combined[n + u]);

    const Tensor& h = begin == 0 ? x : raw[begin - 1];
    Backend backend(unit, h, both);
    auto of_unit = residual_unit_backward(
        backend, unit, needed ? std::optional<Tensor>(dx) : std::nullopt, h,
        TensorList(raw.begin() + begin, raw.begin() + end - 1),
        TensorList(bns.begin() + begin, bns.begin() + end), UnitMask(mask, size));
    auto& [unit_dx, unit_sums, unit_dweights, unit_dbiases, dshortcut_weight, dshortcut_bias] = of_unit;
    append_backwards(sums, std::move(unit_sums));
    append_backwards(dweights, std::move(unit_dweights));
    append_backwards(dbiases, std::move(unit_dbiases));
    dshortcut_weights.push_back(std::move(dshortcut_weight));
    dshortcut_biases.push_back(std::move(dshortcut_bias));
    dx = std::move(unit_dx);
    needed = below;
    end = begin;
  }
  for (TensorList* list : {&sums, &dweights, &dbiases, &dshortcut_weights, &dshortcut_biases})
    std::reverse(list->begin(), list->end());
  return {std::move(dx), std::move(sums),
          std::move(dweights), std::move(dbiases),
          std::move(dshortcut_weights), std::move(dshortcut_biases)};
}

}  // namespace resnet_fused
