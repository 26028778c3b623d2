// The per-channel steps between the passes (finalize.h), a launch each.
#include "finalize.h"
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

__global__ void __launch_bounds__(kThreads)
    finalize_forward_kernel(const __grid_constant__ FinalizeForwardParams p) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c < p.channels) finalize_forward_channel(p, c);
}

__global__ void __launch_bounds__(kThreads)
    update_running_stats_kernel(const __grid_constant__ UpdateRunningStatsParams p) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c < p.channels) update_running_stats_channel(p, c);
}

// A row of blocks for each BatchNorm.
__global__ void __launch_bounds__(kThreads) update_unit_kernel(const __grid_constant__ UpdateUnitParams p) {
  const int i = static_cast<int>(blockIdx.y);
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < p.counters && c == 0) ++*p.counter[i];
  if (i < p.norms && c < p.norm[i].channels) update_running_stats_channel(p.norm[i], c);
}

__global__ void __launch_bounds__(kThreads)
    finalize_backward_kernel(const __grid_constant__ FinalizeBackwardParams p) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= p.channels) return;
  finalize_backward_channel(p, c, 0, p.sums[c]);
  finalize_backward_channel(p, c, 1, p.sums[p.channels + c]);
}

dim3 grid(int64_t channels) { return dim3(static_cast<unsigned>(divide_up(channels, kThreads))); }

}  // namespace

cudaError_t finalize_forward(const FinalizeForwardParams& p, Stream stream) {
  return launch<finalize_forward_kernel>(grid(p.channels), kThreads, 0, stream, p);
}

cudaError_t update_running_stats(const UpdateRunningStatsParams& p, Stream stream) {
  return launch<update_running_stats_kernel>(grid(p.channels), kThreads, 0, stream, p);
}

cudaError_t update_running_stats_of_unit(const UpdateUnitParams& p, Stream stream) {
  int64_t channels = 1;
  for (int i = 0; i < p.norms; ++i)
    if (p.norm[i].channels > channels) channels = p.norm[i].channels;
  dim3 blocks = grid(channels);
  blocks.y = static_cast<unsigned>(p.norms > p.counters ? p.norms : p.counters);
  return blocks.y == 0 ? cudaSuccess : launch<update_unit_kernel>(blocks, kThreads, 0, stream, p);
}

cudaError_t finalize_backward(const FinalizeBackwardParams& p, Stream stream) {
  return launch<finalize_backward_kernel>(grid(p.channels), kThreads, 0, stream, p);
}

}  // namespace cuda
}  // namespace resnet_fused
