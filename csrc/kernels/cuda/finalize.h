// The per-channel steps between the passes, one channel at a time. In double: [C] each, so that only the results
// are rounded.
#pragma once

#include "kernels/cuda_kernels.h"

namespace resnet_fused {
namespace cuda {

#if defined(__CUDACC__) || defined(RF_EMULATE)

__device__ __forceinline__ double read_parameter(const ParameterVector& v, int64_t i) {
  const int64_t at = i * v.stride;
  if (v.type == ParameterType::float32) return static_cast<const float*>(v.data)[at];
  if (v.type == ParameterType::bfloat16) return to_float(static_cast<const bfloat16*>(v.data)[at]);
  return to_float(static_cast<const float16*>(v.data)[at]);
}

__device__ __forceinline__ void write_parameter(const ParameterVector& v, int64_t i, double value) {
  const int64_t at = i * v.stride;
  const float single = static_cast<float>(value);
  if (v.type == ParameterType::float32)
    static_cast<float*>(v.data)[at] = single;
  else if (v.type == ParameterType::bfloat16)
    static_cast<bfloat16*>(v.data)[at] = from_float<bfloat16>(single);
  else
    static_cast<float16*>(v.data)[at] = from_float<float16>(single);
}

// From the statistics of channel c, or where p.stats is null from the running ones.
__device__ __forceinline__ void finalize_forward_channel(const FinalizeForwardParams& p, int64_t c,
                                                         bool batch, float batch_mean, float batch_m2) {
  const double mean = batch ? batch_mean : read_parameter(p.running_mean, c);
  // An empty batch has no statistics; whatever stands here is applied to nothing.
  const double var = !batch        ? read_parameter(p.running_var, c)
                     : p.count > 0 ? batch_m2 / static_cast<double>(p.count)
                                   : 0.0;
  const double invstd = 1.0 / sqrt(var + p.eps);
  const float scale = static_cast<float>(p.weight.data ? read_parameter(p.weight, c) * invstd : invstd);
  const float rounded_mean = static_cast<float>(mean);
  p.bn[c] = rounded_mean;
  p.bn[p.channels + c] = static_cast<float>(invstd);
  p.bn[2 * p.channels + c] = scale;
  // From the rounded scale and mean, as x*scale + shift uses them.
  p.bn[3 * p.channels + c] = static_cast<float>((p.bias.data ? read_parameter(p.bias, c) : 0.0) -
                                                static_cast<double>(rounded_mean) * scale);
}

__device__ __forceinline__ void finalize_forward_channel(const FinalizeForwardParams& p, int64_t c) {
  finalize_forward_channel(p, c, p.stats != nullptr, p.stats ? p.stats[c] : 0.0f,
                           p.stats ? p.stats[p.channels + c] : 0.0f);
}

__device__ __forceinline__ void update_running_stats_channel(const UpdateRunningStatsParams& p, int64_t c) {
  const double var = p.stats[p.channels + c] / static_cast<double>(p.count - 1);
  write_parameter(p.running_mean, c,
                  (1.0 - p.momentum) * read_parameter(p.running_mean, c) + p.momentum * p.stats[c]);
  write_parameter(p.running_var, c,
                  (1.0 - p.momentum) * read_parameter(p.running_var, c) + p.momentum * var);
}

// One of the two sums' part: which 0, of dz: A and C; 1, of dz*xhat: B and the mean.
__device__ __forceinline__ void finalize_backward_channel(const FinalizeBackwardParams& p, int64_t c, int which,
                                                          float sum) {
  const double scale = p.bn[2 * p.channels + c];
  const bool centre = p.training && p.count > 0;
  const double weight = centre ? 1.0 / static_cast<double>(p.count) : 0.0;
  if (which == 0) {
    p.coefficients[c] = static_cast<float>(scale);
    p.coefficients[2 * p.channels + c] = centre ? static_cast<float>(-scale * sum * weight) : 0.0f;
  } else {
    const double invstd = p.bn[p.channels + c];
    p.coefficients[p.channels + c] = centre ? static_cast<float>(-scale * invstd * sum * weight) : 0.0f;
    p.coefficients[3 * p.channels + c] = p.bn[c];
  }
}

#endif

}  // namespace cuda
}  // namespace resnet_fused
