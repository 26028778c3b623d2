// Partial results of tiles merged in a fixed order: statistics by Chan's formula, sums by addition.
// Torch-free.
#pragma once

#include "kernels/cuda_kernels.h"

namespace resnet_fused {
namespace cuda {

// Floats of a buffer of `groups` partial results, with room behind them for the first of two steps.
int64_t partial_floats(int64_t groups, int64_t columns);

// partial [groups, 2, channels] of (mean, M2), each of counts[group] rows; without counts, each of
// `rows_per_group` rows, the last of what is left of `rows`. counts too has room for the first of two steps.
cudaError_t merge_stats(float* partial, float* counts, int64_t groups, int64_t channels,
                        int64_t rows_per_group, int64_t rows, float* stats, Stream);

// partial [groups, columns] -> columns.
cudaError_t merge_sums(float* partial, int64_t groups, int64_t columns, float* sums, Stream);

// partial [groups, k, r, s, c] -> a weight of any strides and type.
struct WeightOutput {
  void* data;
  ParameterType type;
  int64_t stride_k, stride_c, stride_r, stride_s;
  int32_t c, s, taps;
};
cudaError_t merge_weight(float* partial, int64_t groups, int64_t columns, const WeightOutput& weight, Stream);

#if defined(__CUDACC__) || defined(RF_EMULATE)

// (n, mean, m2) becomes that of both (Chan, Golub and LeVeque 1983, eq. 2.1). Nothing changes where n_b is 0.
__device__ __forceinline__ void merge_moments(float& n, float& mean, float& m2, float n_b, float mean_b,
                                              float m2_b) {
  if (n_b == 0.0f) return;
  if (n == 0.0f) {
    n = n_b, mean = mean_b, m2 = m2_b;
    return;
  }
  const float total = n + n_b, delta = mean_b - mean;
  mean += delta * (n_b / total);
  m2 += m2_b + delta * delta * (n * (n_b / total));
  n = total;
}

// M2 of n values from the sums of d and d*d, d the deviations from about the mean (eq. 1.7). Where the
// squares overflow the correction may too, and inf - inf is no number.
__device__ __forceinline__ float corrected_m2(float squares, float residue, float n) {
  const float m2 = squares > 3.4e38f ? squares : squares - residue * (residue / n);
  return m2 < 0.0f ? 0.0f : m2;
}

#endif

}  // namespace cuda
}  // namespace resnet_fused
