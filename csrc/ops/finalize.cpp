// The per-channel steps between the passes: statistics -> BN's scale and shift, reductions -> the
// coefficients of dx, and the running statistics. [C] each: scalar code, in double, so that only the results
// are rounded.
#include <cmath>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "primitives.h"

namespace resnet_fused {
namespace {

using torch::headeronly::ScalarType;

template <typename T> double read_as(const void* data, int64_t i) {
  return static_cast<double>(static_cast<const T*>(data)[i]);
}
template <typename T> void write_as(void* data, int64_t i, double value) {
  // float in between for the 16-bit types: their constructors take nothing wider.
  if constexpr (sizeof(T) == 2)
    static_cast<T*>(data)[i] = static_cast<T>(static_cast<float>(value));
  else
    static_cast<T*>(data)[i] = static_cast<T>(value);
}

// A vector of C numbers of any floating dtype, read and written as double.
class Vector {
 public:
  Vector(const Tensor& tensor, const char* name, int64_t channels) : data_(nullptr), stride_(0) {
    RF_CHECK(tensor.is_cpu(), "expected ", name, " to be on the CPU");
    const auto sizes = tensor.sizes();
    RF_CHECK(sizes.size() == 1 && sizes[0] == channels, name, " should contain ", channels, " elements not ",
             tensor.numel());
    switch (tensor.scalar_type()) {
      case ScalarType::Float: set<float>(); break;
      case ScalarType::Double: set<double>(); break;
      case ScalarType::BFloat16: set<torch::headeronly::BFloat16>(); break;
      case ScalarType::Half: set<torch::headeronly::Half>(); break;
      default: raise("expected ", name, " to have a floating point dtype, but got ", dtype_name(tensor));
    }
    data_ = tensor.mutable_data_ptr();
    stride_ = tensor.stride(0);
  }

  double operator[](int64_t c) const { return read_(data_, c * stride_); }
  void set(int64_t c, double value) { write_(data_, c * stride_, value); }

 private:
  template <typename T> void set() {
    read_ = &read_as<T>;
    write_ = &write_as<T>;
  }

  void* data_;
  int64_t stride_;
  double (*read_)(const void*, int64_t);
  void (*write_)(void*, int64_t, double);
};

std::optional<Vector> optional_vector(const std::optional<Tensor>& tensor, const char* name,
                                      int64_t channels) {
  return tensor ? std::optional<Vector>(std::in_place, *tensor, name, channels) : std::nullopt;
}

// Row r of a contiguous acc matrix.
double at(const Tensor& matrix, DType acc, int64_t row, int64_t columns, int64_t c) {
  const void* data = matrix.const_data_ptr();
  const int64_t i = row * columns + c;
  return acc == DType::float64 ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
}

DType acc_of(const Tensor& tensor) {
  return has_dtype(tensor, DType::float64) ? DType::float64 : DType::float32;
}

int64_t check_columns(const Tensor& matrix, const char* name) {
  const auto sizes = matrix.sizes();
  RF_CHECK(sizes.size() == 2, "expected 2D ", name, " (got ", sizes.size(), "D ", name, ")");
  return sizes[1];
}

void check_count(int64_t count) { RF_CHECK(count >= 0, "expected a count >= 0, but got ", count); }

template <typename A>
void fill_bn(A* bn, int64_t channels, const std::optional<Tensor>& stats, int64_t count,
             const std::optional<Vector>& running_mean, const std::optional<Vector>& running_var,
             const std::optional<Vector>& weight, const std::optional<Vector>& bias, double eps) {
  const A* batch = stats ? static_cast<const A*>(stats->const_data_ptr()) : nullptr;
  for (int64_t c = 0; c < channels; ++c) {
    // An empty batch has no statistics; whatever stands here is applied to nothing.
    const double mean = batch ? batch[c] : (*running_mean)[c];
    const double var =
        batch ? (count > 0 ? batch[channels + c] / static_cast<double>(count) : 0.0) : (*running_var)[c];
    const double invstd = 1.0 / std::sqrt(var + eps);
    const A scale = static_cast<A>(weight ? (*weight)[c] * invstd : invstd);
    bn[c] = static_cast<A>(mean);
    bn[channels + c] = static_cast<A>(invstd);
    bn[2 * channels + c] = scale;
    // From the rounded scale and mean, as x*scale + shift uses them: at x = mean the result is then bias to
    // the last bit that shift can hold.
    bn[3 * channels + c] = static_cast<A>((bias ? (*bias)[c] : 0.0) - static_cast<double>(bn[c]) * scale);
  }
}

}  // namespace

Tensor finalize_forward(const std::optional<Tensor>& stats, int64_t count,
                        const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  check_count(count);
  RF_CHECK(stats || (running_mean && running_var),
           "expected stats, or running_mean and running_var: there is nothing to normalise with");
  const int64_t channels = stats ? check_columns(*stats, "stats") : running_mean->numel();
  const DType acc = acc_of(stats ? *stats : *running_mean);
  std::optional<Tensor> batch;
  std::optional<Vector> mean, var;
  if (stats) {
    batch = check_acc(*stats, "stats", 2, channels, acc);
  } else {
    mean = optional_vector(running_mean, "running_mean", channels);
    var = optional_vector(running_var, "running_var", channels);
  }
  const auto gamma = optional_vector(weight, "weight", channels);
  const auto beta = optional_vector(bias, "bias", channels);
  const Tensor bn = empty_matrix(4, channels, acc);
  if (acc == DType::float64)
    fill_bn(static_cast<double*>(bn.mutable_data_ptr()), channels, batch, count, mean, var, gamma, beta, eps);
  else
    fill_bn(static_cast<float*>(bn.mutable_data_ptr()), channels, batch, count, mean, var, gamma, beta, eps);
  return bn;
}

// running = (1 - momentum)*running + momentum*batch, with the unbiased variance (torch.nn.BatchNorm2d).
void update_running_stats(const Tensor& running_mean, const Tensor& running_var, const Tensor& stats,
                          int64_t count, double momentum) {
  check_count(count);
  const int64_t channels = check_columns(stats, "stats");
  const DType acc = acc_of(stats);
  const Tensor batch = check_acc(stats, "stats", 2, channels, acc);
  Vector mean(running_mean, "running_mean", channels);
  Vector var(running_var, "running_var", channels);
  if (count == 0) return;
  RF_CHECK(count > 1, "Expected more than 1 value per channel when training, got count ", count);
  for (int64_t c = 0; c < channels; ++c) {
    const double batch_var = at(batch, acc, 1, channels, c) / static_cast<double>(count - 1);
    mean.set(c, (1.0 - momentum) * mean[c] + momentum * at(batch, acc, 0, channels, c));
    var.set(c, (1.0 - momentum) * var[c] + momentum * batch_var);
  }
}

void update_running_stats_of_unit(const std::vector<Tensor>& running_means, const std::vector<Tensor>& running_vars,
                                  const std::vector<Tensor>& stats, const std::vector<int64_t>& counts,
                                  const std::vector<double>& momenta, const std::vector<Tensor>& batches_tracked) {
  const size_t n = running_means.size();
  RF_CHECK(running_vars.size() == n && stats.size() == n && counts.size() == n && momenta.size() == n,
           "expected ", n, " running_vars, stats, counts and momenta, but got ", running_vars.size(), ", ",
           stats.size(), ", ", counts.size(), " and ", momenta.size());
  for (const Tensor& batches : batches_tracked)
    RF_CHECK(batches.is_cpu() && batches.scalar_type() == ScalarType::Long && batches.numel() == 1,
             "expected num_batches_tracked to be one int64 on the CPU");
  for (const Tensor& batches : batches_tracked) ++*static_cast<int64_t*>(batches.mutable_data_ptr());
  for (size_t i = 0; i < n; ++i)
    update_running_stats(running_means[i], running_vars[i], stats[i], counts[i], momenta[i]);
}

// dx = A*dz + B*(x - mean) + C. The means of dz and of dz*xhat are subtracted only where the statistics were
// the batch's.
Tensor finalize_backward(const Tensor& sums, const Tensor& bn, int64_t count, bool training, bool into_bn) {
  check_count(count);
  const int64_t channels = check_columns(bn, "bn");
  const DType acc = acc_of(bn);
  const Tensor rows = check_acc(bn, "bn", 4, channels, acc);
  const Tensor totals = check_acc(sums, "sums", 2, channels, acc);
  const Tensor coefficients = into_bn ? rows : empty_matrix(4, channels, acc);
  const double weight = training && count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
  const auto fill = [&](auto* out) {
    using A = std::remove_pointer_t<decltype(out)>;
    for (int64_t c = 0; c < channels; ++c) {
      const double mean = at(rows, acc, 0, channels, c), invstd = at(rows, acc, 1, channels, c),
                   scale = at(rows, acc, 2, channels, c);  // read before any of them may be written over
      out[c] = static_cast<A>(scale);
      out[channels + c] = out[2 * channels + c] = A(0);
      if (weight > 0.0) {
        out[channels + c] = static_cast<A>(-scale * invstd * at(totals, acc, 1, channels, c) * weight);
        out[2 * channels + c] = static_cast<A>(-scale * at(totals, acc, 0, channels, c) * weight);
      }
      out[3 * channels + c] = static_cast<A>(mean);
    }
  };
  if (acc == DType::float64)
    fill(static_cast<double*>(coefficients.mutable_data_ptr()));
  else
    fill(static_cast<float*>(coefficients.mutable_data_ptr()));
  return coefficients;
}

static Tensor finalize_backward_op(const Tensor& sums, const Tensor& bn, int64_t count, bool training) {
  return finalize_backward(sums, bn, count, training, false);
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
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

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("finalize_forward", TORCH_BOX(&finalize_forward));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats));
  m.impl("update_running_stats_of_unit", TORCH_BOX(&update_running_stats_of_unit));
  m.impl("finalize_backward", TORCH_BOX(&finalize_backward_op));
}

}  // namespace resnet_fused
