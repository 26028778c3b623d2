// The one description of a 2-D convolution's shape, shared by the CPU and the CUDA kernels. Torch-free.
#pragma once

#include <stdint.h>

namespace resnet_fused {

// x: [n, c, h, w], weight: [k, c / groups, r, s], y: [n, k, p, q]; activations are channels_last in memory.
struct ConvGeometry {
  int64_t n, c, h, w;
  int64_t k, r, s;
  int64_t p, q;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  int64_t groups;
};

// Length of one output dimension, as torch.nn.Conv2d defines it; can be <= 0 where the kernel does not fit.
constexpr int64_t conv_output_size(int64_t input, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = input + 2 * padding - (dilation * (kernel - 1) + 1);
  return span < 0 ? 0 : span / stride + 1;
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

}  // namespace resnet_fused
