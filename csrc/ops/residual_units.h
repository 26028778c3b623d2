// Residual units that run one after another, by one operator: what it costs to get from Python to the
// kernels, and autograd's bookkeeping, is then paid once for all of them. The operators are those of every
// backend.
#pragma once

#include <algorithm>
#include <iterator>

#include "residual_unit.h"

// Everything of convolutions and BatchNorms is listed over all units. x, dout and raw are dense channels_last, and so are out
// and dx.
//
// parameters: the BatchNorms' weights, then their biases; those of the convolutions; of the shortcuts, one entry per unit.
// options: float64 on the CPU, what is the same in every call; so many lists would take longer to pass than a small unit's
//   kernels run. See UnitOptions.
// running_stats: the BatchNorms' running means, then their variances. momenta: with which those of the BatchNorms in training
//   are updated; empty: they are not. 1 is added to batches_tracked.
// raw: what every convolution but the last gave, the units' sums included. stats: of what each BatchNorm reads, of size 0
//   where it came as an argument or is not needed. bns: the rows of each BatchNorm.
// bns, in backward: of each BatchNorm what forward gave or, on the CPU, the statistics that it was made of, which are half
//   as much; the BatchNorms' parameters and eps are read for these only.
// reuse_raw: nobody reads raw afterwards. Gradients may be written over it, and it is left empty.
// gradients: those that the options ask for, of x and of the parameters, in this order; those of a BatchNorm (in the acc
//   dtype) are rows of one tensor, the bias' first.
#define RF_UNITS_FORWARD_SCHEMA                                                                                    \
  "residual_units_forward(Tensor x, Tensor? x_stats, Tensor?[] parameters, Tensor options,"                        \
  " Tensor(a!)?[] running_stats, float[] momenta, Tensor(b!)[] batches_tracked, bool want_stats, bool want_raw,"   \
  " bool want_bns) -> (Tensor out, Tensor out_stats, Tensor[] raw, Tensor[] stats, Tensor[] bns)"
#define RF_UNITS_BACKWARD_SCHEMA                                                                                   \
  "residual_units_backward(Tensor dout, Tensor x, Tensor(a!)[] raw, Tensor[] bns, Tensor?[] parameters,"           \
  " Tensor options, bool reuse_raw) -> Tensor[] gradients"

namespace resnet_fused {

// The numbers of `options`, one after the other:
//   the number of units; of each unit: the number of its convolutions, the shortcut's stride (a pair);
//   the slope; of each convolution: training and eps of its BatchNorm, stride, padding, dilation (pairs), groups;
//   in backward: output_mask, whether x, then each parameter needs a gradient; combined: of each convolution, then of each
//     shortcut, whether preact_conv_backward_1x1 makes both of its gradients, where both are needed.
class UnitOptions {
 public:
  explicit UnitOptions(const Tensor& options) : options_(options) {
    RF_CHECK(options.is_cpu() && options.scalar_type() == torch::headeronly::ScalarType::Double && options.dim() == 1 &&
                 options.is_contiguous(),
             "expected options to be a contiguous float64 vector on the CPU");
    next_ = static_cast<const double*>(options.const_data_ptr());
    end_ = next_ + options.size(0);
  }
  double number() {
    RF_CHECK(next_ < end_, "expected more than ", options_.size(0), " options");
    return *next_++;
  }
  int64_t integer() { return static_cast<int64_t>(number()); }
  std::vector<int64_t> pair() {
    const int64_t first = integer();
    return {first, integer()};
  }
  std::vector<bool> flags(size_t count) {
    std::vector<bool> flags(count);
    for (size_t i = 0; i < count; ++i) flags[i] = number() != 0;
    return flags;
  }
  void finish() const { RF_CHECK(next_ == end_, "expected ", end_ - next_, " options less"); }

 private:
  const Tensor& options_;
  const double *next_, *end_;
};

// The units of the operators' arguments. Backward has no running statistics.
inline std::vector<Unit> make_units(UnitOptions& options, const OptionalTensorList& parameters,
                                    const OptionalTensorList& running_stats, const std::vector<double>& momenta) {
  const int64_t given = options.integer();
  RF_CHECK(given > 0, "expected at least one unit");
  const size_t count = static_cast<size_t>(given);
  std::vector<size_t> lengths;
  std::vector<std::vector<int64_t>> shortcut_strides;
  size_t n = 0;
  for (size_t u = 0; u < count; ++u) {
    const int64_t length = options.integer();
    RF_CHECK(length > 0, "expected at least one convolution in each unit, but got ", length);
    lengths.push_back(static_cast<size_t>(length));
    n += lengths.back();
    shortcut_strides.push_back(options.pair());
  }
  const size_t shortcuts = 4 * n, shortcut_biases = shortcuts + count;
  RF_CHECK(parameters.size() == shortcut_biases + count, "expected ", shortcut_biases + count, " parameters of ", n,
           " convolutions in ", count, " units, but got ", parameters.size());
  RF_CHECK(running_stats.empty() || running_stats.size() == 2 * n, "expected ", 2 * n,
           " running statistics or none, but got ", running_stats.size());
  RF_CHECK(momenta.empty() || momenta.size() == n, "expected ", n, " momenta or none, but got ", momenta.size());
  const double slope = options.number();
  std::vector<Unit> units;
  units.reserve(count);
  for (size_t u = 0, i = 0; u < count; ++u) {
    Unit unit{{}, {}, parameters[shortcuts + u].has_value(), slope};
    unit.norms.reserve(lengths[u]);
    unit.convolutions.reserve(lengths[u] + 1);
    for (const size_t end = i + lengths[u]; i < end; ++i) {
      const bool training = options.number() != 0;
      const double eps = options.number();
      unit.norms.push_back({parameters[i], parameters[n + i],
                            running_stats.empty() ? std::nullopt : running_stats[i],
                            running_stats.empty() ? std::nullopt : running_stats[n + i], training, eps,
                            momenta.empty() ? std::nullopt : std::optional<double>(momenta[i])});
      RF_CHECK(parameters[2 * n + i], "expected a weight of every convolution");
      auto stride = options.pair(), padding = options.pair(), dilation = options.pair();
      unit.convolutions.push_back({*parameters[2 * n + i], parameters[3 * n + i], std::move(stride), std::move(padding),
                                   std::move(dilation), options.integer()});
    }
    if (unit.projects)
      unit.convolutions.push_back({*parameters[shortcuts + u], parameters[shortcut_biases + u],
                                   std::move(shortcut_strides[u]), {0, 0}, {1, 1}, 1});
    units.push_back(std::move(unit));
  }
  return units;
}

template <typename T>
void append(std::vector<T>& to, std::vector<T>&& from) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

// The operator. Backend(unit, x, combined, carry; none in forward) as in residual_unit.h.
template <typename Backend>
UnitForward residual_units_forward(const Tensor& x, const std::optional<Tensor>& x_stats,
                                   const OptionalTensorList& parameters, const Tensor& options,
                                   const OptionalTensorList& running_stats, const std::vector<double>& momenta,
                                   const TensorList& batches_tracked, bool want_stats, bool want_raw, bool want_bns) {
  UnitOptions numbers(options);
  const std::vector<Unit> units = make_units(numbers, parameters, running_stats, momenta);
  numbers.finish();
  const BoolList none;
  Tensor h = x;
  std::optional<Tensor> h_stats = x_stats;
  TensorList raw, stats, bns;
  RunningStatsUpdates updates;
  for (size_t u = 0; u < units.size(); ++u) {
    const bool last = u + 1 == units.size();
    Backend backend(units[u], h, none, nullptr);
    auto [y, y_stats, unit_raw, unit_stats, unit_bns] = residual_unit_forward(
        backend, units[u], h, h_stats, last ? want_stats : units[u + 1].norms[0].training, want_raw, updates);
    // Those of a later unit's input are an output of the operator, not an argument of it.
    if (u > 0 && units[u].norms[0].training) unit_stats[0] = std::move(*h_stats);
    append(raw, std::move(unit_raw)), append(stats, std::move(unit_stats));
    if (want_bns) append(bns, std::move(unit_bns));
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
TensorList residual_units_backward(const Tensor& dout, const Tensor& x, const TensorList& raw, const TensorList& bns,
                                   const OptionalTensorList& parameters, const Tensor& options, bool reuse_raw) {
  UnitOptions numbers(options);
  const std::vector<Unit> units = make_units(numbers, parameters, {}, {});
  const size_t count = units.size(), n = (parameters.size() - 2 * count) / 4;
  const BoolList output_mask = numbers.flags(parameters.size() + 1), combined = numbers.flags(n + count);
  numbers.finish();
  RF_CHECK(raw.size() + 1 == n && bns.size() == n, "expected ", n - 1, " raw outputs and ", n, " bns, but got ",
           raw.size(), " and ", bns.size());

  // Of the output_mask, by where they begin.
  const size_t gammas = 1, betas = gammas + n, convolutions = betas + n, biases = convolutions + n,
               shortcuts = biases + n, shortcut_biases = shortcuts + count;
  const auto any = [&](size_t first, size_t size) {
    return std::find(output_mask.begin() + first, output_mask.begin() + first + size, true) !=
           output_mask.begin() + first + size;
  };

  typename Backend::Carry carry;
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
    Backend backend(unit, h, both, &carry);
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
    if (reuse_raw && end < n) carry.release(raw[end - 1]);  // this unit's output, which the gradient of was written over
    needed = below;
    end = begin;
  }
  carry.finish();
  if (output_mask[0]) gradients[0] = std::move(dx);
  TensorList wanted;
  for (size_t i = 0; i < gradients.size(); ++i)
    if (output_mask[i]) wanted.push_back(std::move(*gradients[i]));
  return wanted;
}

}  // namespace resnet_fused
