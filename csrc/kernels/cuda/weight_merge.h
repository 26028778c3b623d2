// The partial results of a weight gradient added in order and stored as the weight is, by blocks of 256 threads; in a
// launch of its own or beside preact_apply.
#pragma once

#include "index.h"
#include "kernels/cuda_kernels.h"

namespace resnet_fused {
namespace cuda {

constexpr int kMergeColumns = 32;
constexpr int kMergeLanes = 8;
constexpr int kMergeThreads = kMergeColumns * kMergeLanes;
constexpr size_t kMergeShared = sizeof(float) * kMergeThreads;

// With fewer groups than lanes every thread has a column of its own.
inline int64_t weight_merge_blocks(const WeightMerge& p) {
  return divide_up(p.columns, p.groups < kMergeLanes ? kMergeThreads : kMergeColumns);
}

#if defined(__CUDACC__) || defined(RF_EMULATE)

__device__ __forceinline__ void store_weight(const WeightOutput& w, int64_t column, float value) {
  // A weight has less than 2^31 elements: kMaxChannels in and out, nine taps.
  const int32_t i = static_cast<int32_t>(column), tap = i / w.c, k = tap / w.taps, in_k = tap - k * w.taps;
  const int32_t c = i - tap * w.c, r = in_k / w.s, s = in_k - r * w.s;
  const int64_t at = k * w.stride_k + c * w.stride_c + r * w.stride_r + s * w.stride_s;
  if (w.type == ParameterType::float32)
    static_cast<float*>(w.data)[at] = value;
  else if (w.type == ParameterType::bfloat16)
    static_cast<bfloat16*>(w.data)[at] = from_float<bfloat16>(value);
  else
    static_cast<float16*>(w.data)[at] = from_float<float16>(value);
}

// shared: kMergeShared bytes.
__device__ __forceinline__ void merge_weight_block(const WeightMerge& p, int64_t block, char* shared) {
  if (p.groups < kMergeLanes) {
    const int64_t own = block * kMergeThreads + threadIdx.x;
    if (own >= p.columns) return;
    float total = 0.0f;
    for (int64_t i = 0; i < p.groups; ++i) total += p.partial[i * p.columns + own];
    store_weight(p.weight, own, total);
    return;
  }
  float (*const cell)[kMergeColumns] = reinterpret_cast<float (*)[kMergeColumns]>(shared);
  const int lane = threadIdx.x / kMergeColumns, in_tile = threadIdx.x % kMergeColumns;
  const int64_t column = block * kMergeColumns + in_tile;
  float total = 0.0f;
  if (column < p.columns)
#pragma unroll 8
    for (int64_t i = lane; i < p.groups; i += kMergeLanes) total += p.partial[i * p.columns + column];
  cell[lane][in_tile] = total;
  __syncthreads();
  if (lane == 0 && column < p.columns) {
    for (int i = 1; i < kMergeLanes; ++i) total += cell[i][in_tile];
    store_weight(p.weight, column, total);
  }
}

#endif

}  // namespace cuda
}  // namespace resnet_fused
