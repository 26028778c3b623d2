// Weights as the convolution kernels read them: a copy to a dense [k, r, s, c] that also rounds.
#include "index.h"
#include "kernels/cuda_kernels.h"

namespace resnet_fused {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackWeightParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.k * p.r * p.s * p.c) return;
  const int64_t c = i % p.c, s = i / p.c % p.s, r = i / (p.c * p.s) % p.r, k = i / (p.c * p.s * p.r);
  const int64_t at = k * p.stride_k + c * p.stride_c + r * p.stride_r + s * p.stride_s;
  const float value = p.type == ParameterType::float32 ? static_cast<const float*>(p.weight)[at]
                                                       : to_float(static_cast<const T*>(p.weight)[at]);
  static_cast<T*>(p.packed)[i] = from_float<T>(value);
}

}  // namespace

template <typename T> cudaError_t pack_weight(const PackWeightParams& p, Stream stream) {
  const int64_t blocks = divide_up(p.k * p.r * p.s * p.c, kThreads);
  return launch<pack_kernel<T>>(dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, p);
}
template cudaError_t pack_weight<RF_DTYPE>(const PackWeightParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
