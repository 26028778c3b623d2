// The per-channel steps between the passes, one launch each.
#include <algorithm>

#include "primitives.h"

namespace resnet_fused {
namespace cuda {

static void check_count(int64_t count) { RF_CHECK(count >= 0, "expected a count >= 0, but got ", count); }

FinalizeForwardParams finalize_forward_params(const std::optional<Tensor>& stats, int64_t count,
                                              const std::optional<Tensor>& running_mean,
                                              const std::optional<Tensor>& running_var,
                                              const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps, int64_t channels) {
  check_count(count);
  FinalizeForwardParams params{};
  if (stats) {
    params.stats = float_data(*stats);
  } else {
    params.running_mean = check_vector(running_mean, "running_mean", channels);
    params.running_var = check_vector(running_var, "running_var", channels);
  }
  params.channels = channels, params.count = count, params.eps = eps;
  params.weight = check_vector(weight, "weight", channels);
  params.bias = check_vector(bias, "bias", channels);
  return params;
}

namespace {

Tensor finalize_forward_op(const std::optional<Tensor>& stats, int64_t count,
                           const std::optional<Tensor>& running_mean,
                           const std::optional<Tensor>& running_var, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& bias, double eps) {
  check_count(count);
  RF_CHECK(stats || (running_mean && running_var),
           "expected stats, or running_mean and running_var: there is nothing to normalise with");
  const Tensor& source = stats ? *stats : *running_mean;
  const int64_t channels = stats ? check_columns(*stats, "stats") : running_mean->numel();
  const Target target(source);
  std::optional<Tensor> batch;
  if (stats) batch = check_matrix(*stats, "stats", 2, channels);
  FinalizeForwardParams params =
      finalize_forward_params(batch, count, running_mean, running_var, weight, bias, eps, channels);
  const Tensor bn = empty_matrix(4, channels, source);
  if (channels == 0) return bn;
  params.bn = mutable_floats(bn);
  check(finalize_forward(params, target.stream()));
  return bn;
}

// running = (1 - momentum)*running + momentum*batch, with the unbiased variance (torch.nn.BatchNorm2d).
void update_running_stats_op(const Tensor& running_mean, const Tensor& running_var, const Tensor& stats,
                             int64_t count, double momentum) {
  check_count(count);
  const int64_t channels = check_columns(stats, "stats");
  const Target target(stats);
  const Tensor batch = check_matrix(stats, "stats", 2, channels);
  UpdateRunningStatsParams params{};
  params.channels = channels, params.count = count, params.momentum = momentum;
  params.running_mean = check_vector(running_mean, "running_mean", channels);
  params.running_var = check_vector(running_var, "running_var", channels);
  if (count == 0 || channels == 0) return;
  RF_CHECK(count > 1, "Expected more than 1 value per channel when training, got count ", count);
  params.stats = float_data(batch);
  check(update_running_stats(params, target.stream()));
}

Tensor finalize_backward_op(const Tensor& sums, const Tensor& bn, int64_t count, bool training) {
  check_count(count);
  const int64_t channels = check_columns(bn, "bn");
  const Target target(bn);
  const Tensor rows = check_matrix(bn, "bn", 4, channels);
  const Tensor totals = check_matrix(sums, "sums", 2, channels);
  const Tensor coefficients = empty_matrix(4, channels, bn);
  if (channels == 0) return coefficients;
  const FinalizeBackwardParams params{channels,         count,    float_data(totals),
                                      float_data(rows), training, mutable_floats(coefficients)};
  check(finalize_backward(params, target.stream()));
  return coefficients;
}

}  // namespace

namespace {

// Whether a launch changes what another BatchNorm's update changes too: side by side one of the two would be lost.
bool changes(const UpdateUnitParams& launch, const UpdateRunningStatsParams& norm) {
  for (int i = 0; i < launch.norms; ++i)
    for (const void* there : {launch.norm[i].running_mean.data, launch.norm[i].running_var.data})
      if (there == norm.running_mean.data || there == norm.running_var.data) return true;
  return false;
}
bool changes(const UpdateUnitParams& launch, const int64_t* counter) {
  return std::find(launch.counter, launch.counter + launch.counters, counter) != launch.counter + launch.counters;
}

}  // namespace

// update_running_stats of several BatchNorms, and one more batch for each counter, in order; a launch for every
// kUnitNorms, or for fewer where one occurs twice.
void update_running_stats_of(const std::vector<Tensor>& running_means, const std::vector<Tensor>& running_vars,
                             const std::vector<Tensor>& stats, const std::vector<int64_t>& counts,
                             const std::vector<double>& momenta, const std::vector<Tensor>& batches_tracked) {
  const size_t n = running_means.size(), counters = batches_tracked.size();
  RF_CHECK(running_vars.size() == n && stats.size() == n && counts.size() == n && momenta.size() == n,
           "expected ", n, " running_vars, stats, counts and momenta, but got ", running_vars.size(), ", ",
           stats.size(), ", ", counts.size(), " and ", momenta.size());
  if (n + counters == 0) return;
  const Target target(n > 0 ? stats[0] : batches_tracked[0]);
  std::vector<UpdateRunningStatsParams> norms;
  std::vector<Tensor> kept;
  for (size_t i = 0; i < n; ++i) {
    const int64_t channels = check_columns(stats[i], "stats");
    kept.push_back(check_matrix(stats[i], "stats", 2, channels));
    RF_CHECK(counts[i] > 1, "Expected more than 1 value per channel when training, got count ", counts[i]);
    if (channels == 0) continue;
    norms.push_back({channels, counts[i], float_data(kept.back()),
                     check_vector(running_means[i], "running_mean", channels),
                     check_vector(running_vars[i], "running_var", channels), momenta[i]});
  }
  for (const Tensor& batches : batches_tracked)
    RF_CHECK(on_target(batches) && batches.scalar_type() == torch::headeronly::ScalarType::Long &&
                 batches.numel() == 1,
             "expected num_batches_tracked to be one int64 on ", kDevice);
  for (size_t norm = 0, counter = 0; norm < norms.size() || counter < counters;) {
    UpdateUnitParams params{};
    while (norm < norms.size() && params.norms < kUnitNorms && !changes(params, norms[norm]))
      params.norm[params.norms++] = norms[norm++];
    for (; counter < counters && params.counters < kUnitNorms; ++counter) {
      int64_t* const count = static_cast<int64_t*>(batches_tracked[counter].mutable_data_ptr());
      if (changes(params, count)) break;
      params.counter[params.counters++] = count;
    }
    check(update_running_stats_of_unit(params, target.stream()));
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def(
      "finalize_forward(Tensor? stats, int count, Tensor? running_mean, Tensor? running_var, Tensor? weight,"
      " Tensor? bias, float eps) -> Tensor");
  m.def(
      "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor stats,"
      " int count, float momentum) -> ()");
  m.def(
      "update_running_stats_of_unit(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor[] stats,"
      " int[] counts, float[] momenta, Tensor(c!)[] batches_tracked) -> ()");
  m.def("finalize_backward(Tensor sums, Tensor bn, int count, bool training) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) {
  m.impl("finalize_forward", TORCH_BOX(&finalize_forward_op));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats_op));
  m.impl("update_running_stats_of_unit", TORCH_BOX(&update_running_stats_of));
  m.impl("finalize_backward", TORCH_BOX(&finalize_backward_op));
}

}  // namespace cuda
}  // namespace resnet_fused
