// The per-channel steps between the passes. In double: [C] each, so that only the results are rounded.
#include "index.h"
#include "kernels/cuda_kernels.h"
#include "rows.h"

namespace resnet_fused {
namespace cuda {

int64_t rows_partial_floats(int64_t pixels, int64_t channels, int element_bytes, int multiprocessors) {
  // Enough for both ways of reading.
  const RowsShape wide = rows_shape(pixels, channels, 16 / element_bytes, multiprocessors, true);
  const RowsShape narrow = rows_shape(pixels, channels, 1, multiprocessors, true);
  return partial_floats(wide.groups > narrow.groups ? wide.groups : narrow.groups, 2 * channels);
}

namespace {

constexpr int kThreads = 128;

__device__ double read(const ParameterVector& v, int64_t i) {
  const int64_t at = i * v.stride;
  if (v.type == ParameterType::float32) return static_cast<const float*>(v.data)[at];
  if (v.type == ParameterType::bfloat16) return to_float(static_cast<const bfloat16*>(v.data)[at]);
  return to_float(static_cast<const float16*>(v.data)[at]);
}

__device__ void write(const ParameterVector& v, int64_t i, double value) {
  const int64_t at = i * v.stride;
  const float single = static_cast<float>(value);
  if (v.type == ParameterType::float32)
    static_cast<float*>(v.data)[at] = single;
  else if (v.type == ParameterType::bfloat16)
    static_cast<bfloat16*>(v.data)[at] = from_float<bfloat16>(single);
  else
    static_cast<float16*>(v.data)[at] = from_float<float16>(single);
}

__global__ void __launch_bounds__(kThreads)
    finalize_forward_kernel(const __grid_constant__ FinalizeForwardParams p) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= p.channels) return;
  const double mean = p.stats ? p.stats[c] : read(p.running_mean, c);
  // An empty batch has no statistics; whatever stands here is applied to nothing.
  const double var = !p.stats      ? read(p.running_var, c)
                     : p.count > 0 ? p.stats[p.channels + c] / static_cast<double>(p.count)
                                   : 0.0;
  const double invstd = 1.0 / sqrt(var + p.eps);
  const float scale = static_cast<float>(p.weight.data ? read(p.weight, c) * invstd : invstd);
  const float rounded_mean = static_cast<float>(mean);
  p.bn[c] = rounded_mean;
  p.bn[p.channels + c] = static_cast<float>(invstd);
  p.bn[2 * p.channels + c] = scale;
  // From the rounded scale and mean, as x*scale + shift uses them.
  p.bn[3 * p.channels + c] =
      static_cast<float>((p.bias.data ? read(p.bias, c) : 0.0) - static_cast<double>(rounded_mean) * scale);
}

__global__ void __launch_bounds__(kThreads)
    update_running_stats_kernel(const __grid_constant__ UpdateRunningStatsParams p) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= p.channels) return;
  const double var = p.stats[p.channels + c] / static_cast<double>(p.count - 1);
  write(p.running_mean, c, (1.0 - p.momentum) * read(p.running_mean, c) + p.momentum * p.stats[c]);
  write(p.running_var, c, (1.0 - p.momentum) * read(p.running_var, c) + p.momentum * var);
}

__global__ void __launch_bounds__(kThreads)
    finalize_backward_kernel(const __grid_constant__ FinalizeBackwardParams p) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= p.channels) return;
  const double scale = p.bn[2 * p.channels + c], invstd = p.bn[p.channels + c];
  const bool centre = p.training && p.count > 0;
  const double weight = centre ? 1.0 / static_cast<double>(p.count) : 0.0;
  p.coefficients[c] = static_cast<float>(scale);
  p.coefficients[p.channels + c] =
      centre ? static_cast<float>(-scale * invstd * p.sums[p.channels + c] * weight) : 0.0f;
  p.coefficients[2 * p.channels + c] = centre ? static_cast<float>(-scale * p.sums[c] * weight) : 0.0f;
  p.coefficients[3 * p.channels + c] = p.bn[c];
}

dim3 grid(int64_t channels) { return dim3(static_cast<unsigned>(divide_up(channels, kThreads))); }

}  // namespace

cudaError_t finalize_forward(const FinalizeForwardParams& p, Stream stream) {
  return launch<finalize_forward_kernel>(grid(p.channels), kThreads, 0, stream, p);
}

cudaError_t update_running_stats(const UpdateRunningStatsParams& p, Stream stream) {
  return launch<update_running_stats_kernel>(grid(p.channels), kThreads, 0, stream, p);
}

cudaError_t finalize_backward(const FinalizeBackwardParams& p, Stream stream) {
  return launch<finalize_backward_kernel>(grid(p.channels), kThreads, 0, stream, p);
}

}  // namespace cuda
}  // namespace resnet_fused
