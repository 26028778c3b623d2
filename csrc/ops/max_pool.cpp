// Max pooling that keeps for backward which position of each window was the largest, one byte per output.
#include "geometry.h"
#include "tensor.h"

namespace resnet_fused {
namespace {

constexpr int64_t kMostPositions = 256;  // of a window: an offset is a byte

ConvGeometry geometry_of(int64_t n, int64_t c, int64_t h, int64_t w, const std::vector<int64_t>& kernel_size,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  check_pair(kernel_size, "kernel_size");
  check_pair(stride, "stride");
  check_pair(padding, "padding");
  ConvGeometry g{};
  g.n = n, g.c = g.k = c, g.h = h, g.w = w;
  g.r = kernel_size[0], g.s = kernel_size[1];
  g.stride_h = stride[0], g.stride_w = stride[1];
  g.pad_h = padding[0], g.pad_w = padding[1];
  g.dilation_h = g.dilation_w = g.groups = 1;
  RF_CHECK(g.r > 0 && g.s > 0 && g.r <= kMostPositions && g.s <= kMostPositions && g.r * g.s <= kMostPositions,
           "expected kernel_size of 1 to ", kMostPositions, " positions, but got (", g.r, ", ", g.s, ")");
  RF_CHECK(g.stride_h > 0 && g.stride_w > 0, "stride should be greater than zero, but got dH: ", g.stride_h,
           " dW: ", g.stride_w);
  // Every window then has a position inside.
  RF_CHECK(g.pad_h >= 0 && g.pad_w >= 0 && g.pad_h <= g.r / 2 && g.pad_w <= g.s / 2,
           "padding should be from 0 to half of the kernel size, but got padding (", g.pad_h, ", ", g.pad_w,
           ") and kernel_size (", g.r, ", ", g.s, ")");
  g.p = conv_output_size(h, g.r, g.stride_h, g.pad_h, 1);
  g.q = conv_output_size(w, g.s, g.stride_w, g.pad_w, 1);
  RF_CHECK(g.p > 0 && g.q > 0, "Given input size: (", c, "x", h, "x", w, "). Calculated output size: (", c, "x",
           g.p, "x", g.q, "). Output size is too small");
  return g;
}

std::tuple<Tensor, Tensor> max_pool_forward(const Tensor& x, const std::vector<int64_t>& kernel_size,
                                            const std::vector<int64_t>& stride,
                                            const std::vector<int64_t>& padding) {
  const Activation input = check_activation(x, "input");
  MaxPoolParams params{};
  params.g = geometry_of(input.n, input.c, input.h, input.w, kernel_size, stride, padding);
  const Tensor y = empty_activation(input.n, input.c, params.g.p, params.g.q, input.dtype);
  const Tensor offsets = empty_bytes(input.n, input.c, params.g.p, params.g.q);
  if (input.numel() == 0) return {y, offsets};
  params.x = input.data;
  params.y = y.mutable_data_ptr();
  params.offsets = static_cast<uint8_t*>(offsets.mutable_data_ptr());
  params.parallel = torch_parallel();
  cpu_kernels().max_pool_forward[index_of(input.dtype)](params);
  return {y, offsets};
}

Tensor max_pool_backward(const Tensor& dy, const Tensor& offsets, const std::vector<int64_t>& input_size,
                         const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding) {
  const Activation gradient = check_activation(dy, "dy");
  check_bytes_like(offsets, "offsets", gradient, "dy");
  check_pair(input_size, "input_size");
  MaxPoolParams params{};
  params.g = geometry_of(gradient.n, gradient.c, input_size[0], input_size[1], kernel_size, stride, padding);
  RF_CHECK(gradient.h == params.g.p && gradient.w == params.g.q, "expected dy of size [", gradient.n, ", ",
           gradient.c, ", ", params.g.p, ", ", params.g.q, "] (y), but got ", to_string(dy.sizes()));
  const Tensor dx = empty_activation(gradient.n, gradient.c, params.g.h, params.g.w, gradient.dtype);
  if (gradient.numel() == 0) return dx;
  params.dy = gradient.data;
  params.taken = static_cast<const uint8_t*>(offsets.const_data_ptr());
  params.dx = dx.mutable_data_ptr();
  params.parallel = torch_parallel();
  cpu_kernels().max_pool_backward[index_of(gradient.dtype)](params);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def(
      "max_pool_forward(Tensor x, int[] kernel_size, int[] stride, int[] padding)"
      " -> (Tensor y, Tensor offsets)");
  m.def(
      "max_pool_backward(Tensor dy, Tensor offsets, int[] input_size, int[] kernel_size, int[] stride,"
      " int[] padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("max_pool_forward", TORCH_BOX(&max_pool_forward));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
}

}  // namespace resnet_fused
