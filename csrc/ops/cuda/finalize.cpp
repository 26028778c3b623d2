// The per-channel steps between the passes, one launch each.
#include "tensor.h"

namespace resnet_fused {
namespace cuda {
namespace {

void check_count(int64_t count) { RF_CHECK(count >= 0, "expected a count >= 0, but got ", count); }

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
  FinalizeForwardParams params{};
  if (stats) {
    batch = check_matrix(*stats, "stats", 2, channels);
    params.stats = float_data(batch);
  } else {
    params.running_mean = check_vector(running_mean, "running_mean", channels);
    params.running_var = check_vector(running_var, "running_var", channels);
  }
  params.channels = channels, params.count = count, params.eps = eps;
  params.weight = check_vector(weight, "weight", channels);
  params.bias = check_vector(bias, "bias", channels);
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

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) {
  m.def(
      "finalize_forward(Tensor? stats, int count, Tensor? running_mean, Tensor? running_var, Tensor? weight,"
      " Tensor? bias, float eps) -> Tensor");
  m.def(
      "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor stats,"
      " int count, float momentum) -> ()");
  m.def("finalize_backward(Tensor sums, Tensor bn, int count, bool training) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) {
  m.impl("finalize_forward", TORCH_BOX(&finalize_forward_op));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats_op));
  m.impl("finalize_backward", TORCH_BOX(&finalize_backward_op));
}

}  // namespace cuda
}  // namespace resnet_fused
