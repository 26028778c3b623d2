#include "reduction.h"

#include "finalize.h"
#include "index.h"
#include "weight_merge.h"

namespace resnet_fused {
namespace cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kLanes = 8;

struct MergeParams {
  const float* partial;
  float* out;  // [blocks, ...]
  int64_t groups, groups_per_block;
  int64_t columns;  // of statistics: channels
  int64_t rows_per_group, rows;
  const float* counts;  // instead of these two
  float* counts_out;
  FinalizeForwardParams next;     // of statistics
  FinalizeBackwardParams centre;  // of sums
};

__global__ void __launch_bounds__(kColumns* kLanes)
    merge_stats_kernel(const __grid_constant__ MergeParams p) {
  RF_SHARED_MEMORY(shared);
  float (*const cell)[kLanes][kColumns] =
      reinterpret_cast<float (*)[kLanes][kColumns]>(shared);  // [n, mean, m2]
  const int lane = threadIdx.x / kColumns, in_tile = threadIdx.x % kColumns;
  const int64_t column = int64_t{blockIdx.y} * kColumns + in_tile;
  const Piece groups = piece_of(blockIdx.x, p.groups_per_block, p.groups);
  float n = 0.0f, mean = 0.0f, m2 = 0.0f;
  if (column < p.columns)
    merge_groups(n, mean, m2, lane, groups.count, kLanes,
                 [&](int64_t i, float& of_n, float& of_mean, float& of_m2) {
                   const int64_t group = groups.first + i;
                   const float* const at = p.partial + group * 2 * p.columns + column;
                   of_n = p.counts ? p.counts[group]
                                   : static_cast<float>(piece_of(group, p.rows_per_group, p.rows).count);
                   of_mean = at[0], of_m2 = at[p.columns];
                 });
  cell[0][lane][in_tile] = n, cell[1][lane][in_tile] = mean, cell[2][lane][in_tile] = m2;
  __syncthreads();
  if (lane == 0 && column < p.columns) {
    for (int i = 1; i < kLanes; ++i)
      merge_moments(n, mean, m2, cell[0][i][in_tile], cell[1][i][in_tile], cell[2][i][in_tile]);
    float* const out = p.out + int64_t{blockIdx.x} * 2 * p.columns + column;
    out[0] = mean;
    out[p.columns] = m2;
    if (p.counts_out && column == 0) p.counts_out[blockIdx.x] = n;
    if (p.next.bn) finalize_forward_channel(p.next, column, true, mean, m2);
  }
}

__global__ void __launch_bounds__(kColumns* kLanes) merge_sums_kernel(const __grid_constant__ MergeParams p) {
  RF_SHARED_MEMORY(shared);
  float (*const cell)[kColumns] = reinterpret_cast<float (*)[kColumns]>(shared);
  const int lane = threadIdx.x / kColumns, in_tile = threadIdx.x % kColumns;
  const int64_t column = int64_t{blockIdx.y} * kColumns + in_tile;
  const Piece groups = piece_of(blockIdx.x, p.groups_per_block, p.groups);
  float total = 0.0f;
  if (column < p.columns)
#pragma unroll 8
    for (int64_t i = lane; i < groups.count; i += kLanes)
      total += p.partial[(groups.first + i) * p.columns + column];
  cell[lane][in_tile] = total;
  __syncthreads();
  if (lane == 0 && column < p.columns) {
    for (int i = 1; i < kLanes; ++i) total += cell[i][in_tile];
    p.out[int64_t{blockIdx.x} * p.columns + column] = total;
    if (p.centre.coefficients) {
      const int which = column >= p.centre.channels;
      finalize_backward_channel(p.centre, column - which * p.centre.channels, which, total);
    }
  }
}

__global__ void __launch_bounds__(kMergeThreads)
    merge_weight_kernel(const __grid_constant__ WeightMerge p) {
  RF_SHARED_MEMORY(shared);
  merge_weight_block(p, blockIdx.x, shared);
}

// In one step, or in two with the results of the first behind the partial results. Blocks of groups, of which there
// can be more than the 65535 of a grid's second dimension, are its first.
template <auto kernel>
cudaError_t merge(MergeParams p, float* partial, float* out, int64_t floats_per_group, int cells,
                  Stream stream) {
  const FinalizeForwardParams next = p.next;
  const FinalizeBackwardParams centre = p.centre;
  p.next.bn = p.centre.coefficients = nullptr;  // in the last step only
  const size_t shared = size_t{sizeof(float)} * cells * kLanes * kColumns;
  const unsigned tiles = static_cast<unsigned>(divide_up(p.columns, kColumns));
  const int64_t blocks = merge_blocks(p.groups);
  p.partial = partial;
  if (blocks > 1) {
    p.out = partial + p.groups * floats_per_group;
    p.groups_per_block = kGroupsPerBlock;
    if (p.counts) p.counts_out = const_cast<float*>(p.counts) + p.groups;
    const cudaError_t error =
        launch<kernel>(dim3(static_cast<unsigned>(blocks), tiles), kColumns * kLanes, shared, stream, p);
    if (error != cudaSuccess) return error;
    p.partial = p.out;
    p.groups = blocks;
    p.rows_per_group *= kGroupsPerBlock;
    p.counts = p.counts_out;
    p.counts_out = nullptr;
  }
  p.out = out;
  p.groups_per_block = p.groups;
  p.next = next, p.centre = centre;
  return launch<kernel>(dim3(1, tiles), kColumns * kLanes, shared, stream, p);
}

}  // namespace

int64_t partial_floats(int64_t groups, int64_t columns) {
  const int64_t blocks = merge_blocks(groups);
  return (groups + (blocks > 1 ? blocks : 0)) * columns;
}

cudaError_t merge_stats(float* partial, float* counts, int64_t groups, int64_t channels,
                        int64_t rows_per_group, int64_t rows, float* stats, const FinalizeForwardParams& next,
                        Stream stream) {
  MergeParams p{};
  p.groups = groups, p.columns = channels, p.rows_per_group = rows_per_group, p.rows = rows;
  p.counts = counts, p.next = next;
  return merge<merge_stats_kernel>(p, partial, stats, 2 * channels, 3, stream);
}

cudaError_t merge_sums(float* partial, int64_t groups, int64_t columns, float* sums,
                       const FinalizeBackwardParams& centre, Stream stream) {
  MergeParams p{};
  p.groups = groups, p.columns = columns, p.centre = centre;
  return merge<merge_sums_kernel>(p, partial, sums, columns, 1, stream);
}

cudaError_t merge_weight(const WeightMerge& p, Stream stream) {
  return launch<merge_weight_kernel>(dim3(static_cast<unsigned>(weight_merge_blocks(p))), kMergeThreads,
                                     kMergeShared, stream, p);
}

}  // namespace cuda
}  // namespace resnet_fused
