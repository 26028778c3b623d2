// Partial results of tiles merged in a fixed order: statistics by Chan's formula, sums by addition.
// Torch-free.
#pragma once

#include "index.h"
#include "kernels/cuda_kernels.h"

namespace resnet_fused {
namespace cuda {

// Floats of a buffer of `groups` partial results, with room behind them for the first of two steps.
int64_t partial_floats(int64_t groups, int64_t columns);

// partial [groups, 2, channels] of (mean, M2), each of counts[group] rows; without counts, each of
// `rows_per_group` rows, the last of what is left of `rows`. counts too has room for the first of two steps.
// next: finalized from them too, where its bn is not null.
cudaError_t merge_stats(float* partial, float* counts, int64_t groups, int64_t channels,
                        int64_t rows_per_group, int64_t rows, float* stats, const FinalizeForwardParams& next,
                        Stream);

// partial [groups, columns] -> columns. centre: with columns = 2*channels, finalized from them too, where its
// coefficients are not null.
cudaError_t merge_sums(float* partial, int64_t groups, int64_t columns, float* sums,
                       const FinalizeBackwardParams& centre, Stream);

#if defined(__CUDACC__) || defined(RF_EMULATE)

// (mean, m2) of n values becomes that of n_b more too (Chan, Golub and LeVeque 1983, eq. 2.1); neither is 0. share:
// n_b / (n + n_b), the same for all channels.
__device__ __forceinline__ void merge_moments_by(float n, float share, float& mean, float& m2, float mean_b,
                                                 float m2_b) {
  const float delta = mean_b - mean;
  mean += delta * share;
  m2 += m2_b + delta * delta * (n * share);
}

// (n, mean, m2) becomes that of both. Nothing changes where n_b is 0.
__device__ __forceinline__ void merge_moments(float& n, float& mean, float& m2, float n_b, float mean_b,
                                              float m2_b) {
  if (n_b == 0.0f) return;
  if (n == 0.0f) {
    n = n_b, mean = mean_b, m2 = m2_b;
    return;
  }
  const float total = n + n_b;
  merge_moments_by(n, n_b / total, mean, m2, mean_b, m2_b);
  n = total;
}

// Groups i, i + step, ... below count merged in this order; read(i, n, mean, m2). What is read is on its way before
// the first is merged: one after the other, each would wait for memory.
template <typename Read>
__device__ __forceinline__ void merge_groups(float& n, float& mean, float& m2, int64_t i, int64_t count, int step,
                                             Read&& read) {
  constexpr int kAtOnce = 8;
  for (; i < count; i += kAtOnce * step) {
    float of_n[kAtOnce], of_mean[kAtOnce], of_m2[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      of_n[j] = of_mean[j] = of_m2[j] = 0.0f;
      if (i + j * step < count) read(i + j * step, of_n[j], of_mean[j], of_m2[j]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) merge_moments(n, mean, m2, of_n[j], of_mean[j], of_m2[j]);
  }
}

// M2 of n values from the sums of d and d*d, d the deviations from about the mean (eq. 1.7). Where the
// squares overflow the correction may too, and inf - inf is no number. shift is residue / n.
__device__ __forceinline__ float corrected_m2(float squares, float residue, float shift) {
  const float m2 = squares > 3.4e38f ? squares : squares - residue * shift;
  return m2 < 0.0f ? 0.0f : m2;
}

// ---- merging inside of the kernel that makes the partial results (index.h, merge_segments)

// Whether this block is the last of `blocks` that come to a counter; it then sees what the others wrote before.
// flag: shared memory that nobody uses. The order in which blocks come decides who merges, never what.
__device__ __forceinline__ bool comes_last(uint32_t* counter, uint32_t blocks, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(counter, 1u) == blocks - 1;
  __syncthreads();
  const bool last = *flag != 0;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Partial results of one kernel's blocks. counters: null: merged by a launch of its own.
struct MergeTree {
  Segments segments;
  uint32_t* counters;  // for each column of blocks, one per segment and one
};

// After every thread of the block has written its part of the partial result of `group`. Merges as far as this
// block's turn goes; true in the one block (of a column of blocks) that has merged everything. merge(first, count,
// step) merges the partial results of groups first, first + step, ..., each of them of `step` groups;
// merge.keep(first) writes that in the place of group `first`.
template <typename Merge>
__device__ __forceinline__ bool climb(const MergeTree& tree, int column, int group, int* flag, Merge& merge) {
  if (!tree.counters) return false;
  const Segments& segments = tree.segments;
  uint32_t* const counters = tree.counters + int64_t{column} * (segments.count + 1);
  const int segment = group / segments.each, first = segment * segments.each;
  const int left = segments.groups - first, count = left < segments.each ? left : segments.each;
  if (!comes_last(counters + segment, static_cast<uint32_t>(count), flag)) return false;
  merge(first, count, 1);
  if (segments.count == 1) return true;
  merge.keep(first);
  if (!comes_last(counters + segments.count, static_cast<uint32_t>(segments.count), flag)) return false;
  merge(0, segments.count, segments.each);
  return true;
}

// partial [groups, 2, columns] of two sums, by kThreads threads for kColumns columns from `column` on. Results are
// in a and b of threads below kColumns. cells: 2*kThreads floats of shared memory.
template <int kThreads, int kColumns> struct MergeTwoSums {
  float* partial;
  int64_t columns;
  int column;
  float* cells;
  float a, b;

  __device__ __forceinline__ void operator()(int first, int count, int step) {
    constexpr int kLanes = kThreads / kColumns;
    const int tid = threadIdx.x, lane = tid / kColumns, in_tile = tid % kColumns;
    a = b = 0.0f;
    if (column + in_tile < columns) {
      const float* const at = partial + int64_t{first} * 2 * columns + column + in_tile;
#pragma unroll 8
      for (int i = lane; i < count; i += kLanes) {
        const float* const group = at + int64_t{i} * step * 2 * columns;
        a += group[0];
        b += group[columns];
      }
    }
    cells[tid] = a, cells[kThreads + tid] = b;
    __syncthreads();
    if (lane == 0)
      for (int i = 1; i < kLanes; ++i)
        a += cells[i * kColumns + in_tile], b += cells[kThreads + i * kColumns + in_tile];
    __syncthreads();
  }

  __device__ __forceinline__ void keep(int first) const {
    const int tid = threadIdx.x;
    if (tid >= kColumns || column + tid >= columns) return;
    float* const out = partial + int64_t{first} * 2 * columns + column + tid;
    out[0] = a;
    out[columns] = b;
  }
};

// The same of (mean, M2), where group i is of rows_per_group rows, the last of what is left of `rows`; or, where
// counts is not null, of counts[i]. cells: 3*kThreads floats.
template <int kThreads, int kColumns> struct MergeStats {
  float* partial;
  float* counts;
  int64_t columns, rows_per_group, rows;
  int column;
  float* cells;
  float n, mean, m2;

  __device__ __forceinline__ void operator()(int first, int count, int step) {
    constexpr int kLanes = kThreads / kColumns;
    const int tid = threadIdx.x, lane = tid / kColumns, in_tile = tid % kColumns;
    n = mean = m2 = 0.0f;
    if (column + in_tile < columns)
      merge_groups(n, mean, m2, lane, count, kLanes, [&](int64_t i, float& of_n, float& of_mean, float& of_m2) {
        const int group = first + static_cast<int>(i) * step;
        const float* const at = partial + int64_t{group} * 2 * columns + column + in_tile;
        of_n = counts ? counts[group]
                      : static_cast<float>(piece_of(group / step, rows_per_group * step, rows).count);
        of_mean = at[0], of_m2 = at[columns];
      });
    cells[tid] = n, cells[kThreads + tid] = mean, cells[2 * kThreads + tid] = m2;
    __syncthreads();
    if (lane == 0)
      for (int i = 1; i < kLanes; ++i) {
        const int at = i * kColumns + in_tile;
        merge_moments(n, mean, m2, cells[at], cells[kThreads + at], cells[2 * kThreads + at]);
      }
    __syncthreads();
  }

  __device__ __forceinline__ void keep(int first) const {
    const int tid = threadIdx.x;
    if (tid >= kColumns || column + tid >= columns) return;
    float* const out = partial + int64_t{first} * 2 * columns + column + tid;
    out[0] = mean;
    out[columns] = m2;
    if (counts && tid == 0) counts[first] = n;
  }
};

#endif

}  // namespace cuda
}  // namespace resnet_fused
