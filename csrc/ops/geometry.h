// Whether an input, a weight and a convolution's options fit, with the wording of torch.nn.functional.conv2d;
// for the wrappers of every backend.
#pragma once

#include <vector>

#include "../kernels/conv_geometry.h"
#include "errors.h"

namespace resnet_fused {

struct ConvolutionOptions {
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
  int64_t groups;
};

inline void check_pair(const std::vector<int64_t>& values, const char* name) {
  RF_CHECK(values.size() == 2, "expected ", name, " to be 2 integers, but got ",
           to_string(IntHeaderOnlyArrayRef(values.data(), values.size())));
}

// Geometry of a convolution of an input [n, c, h, w]; raises where it does not fit the weight w.
inline ConvGeometry check_geometry(IntHeaderOnlyArrayRef input, IntHeaderOnlyArrayRef w,
                                   const ConvolutionOptions& options) {
  check_pair(options.stride, "stride");
  check_pair(options.padding, "padding");
  check_pair(options.dilation, "dilation");
  RF_CHECK(options.groups == 1, "expected groups to be 1, but got ", options.groups,
           ": grouped convolutions take the unfused path");
  RF_CHECK(w.size() == 4, "expected 4D weight (got ", w.size(), "D weight)");
  RF_CHECK(w[1] == input[1], "Given groups=1, weight of size ", to_string(w), ", expected input",
           to_string(input), " to have ", w[1], " channels, but got ", input[1], " channels instead");
  RF_CHECK(options.stride[0] > 0 && options.stride[1] > 0, "non-positive stride is not supported");
  RF_CHECK(options.padding[0] >= 0 && options.padding[1] >= 0, "negative padding is not supported");
  RF_CHECK(options.dilation[0] > 0 && options.dilation[1] > 0, "dilation should be greater than zero");
  RF_CHECK(input[1] > 0 && input[2] > 0 && input[3] > 0 && w[2] > 0 && w[3] > 0,
           "expected non-empty images and kernels (only the batch may be empty), but got input of size ",
           to_string(input), " and weight of size ", to_string(w));
  ConvGeometry g{};
  g.n = input[0], g.c = input[1], g.h = input[2], g.w = input[3];
  g.k = w[0], g.r = w[2], g.s = w[3];
  g.stride_h = options.stride[0], g.stride_w = options.stride[1];
  g.pad_h = options.padding[0], g.pad_w = options.padding[1];
  g.dilation_h = options.dilation[0], g.dilation_w = options.dilation[1];
  g.groups = 1;
  g.p = conv_output_size(g.h, g.r, g.stride_h, g.pad_h, g.dilation_h);
  g.q = conv_output_size(g.w, g.s, g.stride_w, g.pad_w, g.dilation_w);
  RF_CHECK(g.p > 0 && g.q > 0, "Calculated padded input size per channel: (", g.h + 2 * g.pad_h, " x ",
           g.w + 2 * g.pad_w, "). Kernel size: (", g.dilation_h * (g.r - 1) + 1, " x ",
           g.dilation_w * (g.s - 1) + 1, "). Kernel size can't be greater than actual input size");
  return g;
}

}  // namespace resnet_fused
