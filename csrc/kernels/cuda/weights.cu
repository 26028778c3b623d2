// Weights as the convolution kernels read them: a copy to a dense [k, r, s, c] that also rounds; alone, or with all
// else that comes before a unit's first convolution.
#include "finalize.h"
#include "index.h"
#include "kernels/cuda_kernels.h"

namespace resnet_fused {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T> __device__ __forceinline__ void pack_block(const PackWeightParams& p, int64_t block) {
  const int64_t i = block * kThreads + threadIdx.x;
  if (i >= p.k * p.r * p.s * p.c) return;
  const int64_t c = i % p.c, s = i / p.c % p.s, r = i / (p.c * p.s) % p.r, k = i / (p.c * p.s * p.r);
  const int64_t at = k * p.stride_k + c * p.stride_c + r * p.stride_r + s * p.stride_s;
  const float value = p.type == ParameterType::float32 ? static_cast<const float*>(p.weight)[at]
                                                       : to_float(static_cast<const T*>(p.weight)[at]);
  static_cast<T*>(p.packed)[i] = from_float<T>(value);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackWeightParams p) {
  pack_block<T>(p, blockIdx.x);
}

// Rows of blocks: one for each weight, for each BatchNorm, and for the counters.
template <typename T>
__global__ void __launch_bounds__(kThreads) begin_kernel(const __grid_constant__ BeginUnitParams p) {
  const int row = static_cast<int>(blockIdx.y);
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row < p.weights) {
    pack_block<T>(p.weight[row], blockIdx.x);
  } else if (row < p.weights + p.norms) {
    const FinalizeForwardParams& norm = p.norm[row - p.weights];
    if (at < norm.channels) finalize_forward_channel(norm, at);
  } else if (at < p.counters_count) {
    p.counters[at] = 0;
  }
}

int64_t blocks_of(const PackWeightParams& p) { return divide_up(p.k * p.r * p.s * p.c, kThreads); }

}  // namespace

template <typename T> cudaError_t begin_unit(const BeginUnitParams& p, Stream stream) {
  const int rows = p.weights + p.norms + (p.counters_count > 0 ? 1 : 0);
  int64_t blocks = divide_up(p.counters_count, kThreads);
  for (int i = 0; i < p.weights; ++i)
    if (blocks_of(p.weight[i]) > blocks) blocks = blocks_of(p.weight[i]);
  for (int i = 0; i < p.norms; ++i)
    if (divide_up(p.norm[i].channels, kThreads) > blocks) blocks = divide_up(p.norm[i].channels, kThreads);
  if (rows == 0 || blocks == 0) return cudaSuccess;
  return launch<begin_kernel<T>>(dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(rows)), kThreads, 0,
                                 stream, p);
}
template cudaError_t begin_unit<RF_DTYPE>(const BeginUnitParams&, Stream);

template <typename T> cudaError_t pack_weight(const PackWeightParams& p, Stream stream) {
  const int64_t blocks = blocks_of(p);
  return launch<pack_kernel<T>>(dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, p);
}
template cudaError_t pack_weight<RF_DTYPE>(const PackWeightParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
