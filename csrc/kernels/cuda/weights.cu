// Weights as the convolution kernels read them: a copy to a dense [k, r, s, c] that also rounds; alone, or with all
// else that comes before a unit's first convolution.
#include "finalize.h"
#include "index.h"
#include "kernels/cuda_kernels.h"

namespace resnet_fused {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Eight channels by a thread: a convolution's are a multiple of 8 (conv_supported).
constexpr int kPacked = 8;

template <typename T, typename From>
__device__ __forceinline__ void pack_channels(const From* from, int64_t stride, T* to) {
  float value[kPacked];
  if (stride == 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    load8(from, value);
  } else {
#pragma unroll
    for (int j = 0; j < kPacked; ++j) value[j] = to_float(from[j * stride]);
  }
  store8(to, value);
}

template <typename T> __device__ __forceinline__ void pack_block(const PackWeightParams& p, int64_t block) {
  const int32_t i = static_cast<int32_t>(block * kThreads + threadIdx.x);
  const int32_t chunks = static_cast<int32_t>(p.c) / kPacked, width = static_cast<int32_t>(p.s);
  const int32_t height = static_cast<int32_t>(p.r);
  const int32_t pixel = i / chunks, c = (i - pixel * chunks) * kPacked, row = pixel / width, s = pixel - row * width;
  const int32_t k = row / height, r = row - k * height;
  if (k >= p.k) return;
  const int64_t at = k * p.stride_k + c * p.stride_c + r * p.stride_r + s * p.stride_s;
  T* const to = static_cast<T*>(p.packed) + int64_t{i} * kPacked;
  if (p.type == ParameterType::float32)
    pack_channels(static_cast<const float*>(p.weight) + at, p.stride_c, to);
  else
    pack_channels(static_cast<const T*>(p.weight) + at, p.stride_c, to);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackWeightParams p) {
  pack_block<T>(p, blockIdx.x);
}

// Blocks for each weight, for each BatchNorm, and for the counters, one after the other.
constexpr int kBeginParts = kUnitWeights + kUnitNorms + 1;
struct BeginParams {
  BeginUnitParams unit;
  int32_t parts;
  int32_t end[kBeginParts];  // one past a part's last block
};

template <typename T>
__global__ void __launch_bounds__(kThreads) begin_kernel(const __grid_constant__ BeginParams p) {
  const int block = static_cast<int>(blockIdx.x);
  int part = 0;
  while (part + 1 < p.parts && block >= p.end[part]) ++part;
  const int64_t in_part = block - (part > 0 ? p.end[part - 1] : 0);
  const int64_t at = in_part * kThreads + threadIdx.x;
  const BeginUnitParams& unit = p.unit;
  if (part < unit.weights) {
    pack_block<T>(unit.weight[part], in_part);
  } else if (part < unit.weights + unit.norms) {
    const FinalizeForwardParams& norm = unit.norm[part - unit.weights];
    if (at < norm.channels) finalize_forward_channel(norm, at);
  } else if (at < unit.counters_count) {
    unit.counters[at] = 0;
  }
}

int64_t blocks_of(const PackWeightParams& p) { return divide_up(p.k * p.r * p.s * p.c, kPacked * kThreads); }

}  // namespace

template <typename T> cudaError_t begin_unit(const BeginUnitParams& unit, Stream stream) {
  BeginParams p{};
  p.unit = unit;
  int64_t blocks = 0;
  const auto add = [&](int64_t more) { blocks += more, p.end[p.parts++] = static_cast<int32_t>(blocks); };
  for (int i = 0; i < unit.weights; ++i) add(blocks_of(unit.weight[i]));
  for (int i = 0; i < unit.norms; ++i) add(divide_up(unit.norm[i].channels, kThreads));
  if (unit.counters_count > 0) add(divide_up(unit.counters_count, kThreads));
  if (blocks == 0) return cudaSuccess;
  return launch<begin_kernel<T>>(dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, p);
}
template cudaError_t begin_unit<RF_DTYPE>(const BeginUnitParams&, Stream);

template <typename T> cudaError_t pack_weight(const PackWeightParams& p, Stream stream) {
  const int64_t blocks = blocks_of(p);
  return launch<pack_kernel<T>>(dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, p);
}
template cudaError_t pack_weight<RF_DTYPE>(const PackWeightParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
