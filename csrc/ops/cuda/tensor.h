// What every wrapper of this directory needs: checks with PyTorch's wording, output tensors, dispatch on
// dtype.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../errors.h"
#include "../geometry.h"
#include "kernels/cuda_kernels.h"
#include "target.h"

namespace resnet_fused {
namespace cuda {

using torch::stable::Tensor;

using DType = ParameterType;  // activations have the same three types
constexpr int element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
const char* dtype_name(DType dtype);

// f(T{}) with the element type of a dtype.
template <typename F> auto with_type(DType dtype, F&& f) {
  if (dtype == DType::float32) return f(float{});
  if (dtype == DType::bfloat16) return f(bfloat16{});
  return f(float16{});
}

// A checked activation: 4-D, a supported dtype, dense channels_last.
struct Activation {
  int64_t n, c, h, w;
  DType dtype;
  Tensor tensor;

  int64_t pixels() const { return n * h * w; }
  int64_t numel() const { return n * c * h * w; }
  const void* data() const { return tensor.const_data_ptr(); }
};

Activation check_activation(const Tensor& tensor, const char* name);
Activation check_activation_like(const Tensor& tensor, const char* name, const Activation& expected,
                                 const char* like);
// A copy where the data does not begin at a multiple of 16 bytes: convolutions copy 16 bytes at a time.
Tensor aligned(const Tensor& tensor);

inline const void* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}
inline const float* float_data(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}
inline const float* float_data(const std::optional<Tensor>& tensor) {
  return tensor ? float_data(*tensor) : nullptr;
}
inline float* mutable_floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// float32 [rows, columns], contiguous.
Tensor check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns);
int64_t check_columns(const Tensor& matrix, const char* name);
// A vector of `length` parameters of float32, bfloat16 or float16; none: no data.
ParameterVector check_vector(const std::optional<Tensor>& tensor, const char* name, int64_t length);

// Uninitialised, on the device of `like`.
Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, DType dtype, const Tensor& like);
Tensor empty_matrix(int64_t rows, int64_t columns, const Tensor& like);
Tensor empty_vector(int64_t length, const Tensor& like, DType dtype = DType::float32);
Tensor zeros_matrix(int64_t rows, int64_t columns, const Tensor& like);
// Room for the partial results of a primitive that reduces over all pixels.
Tensor partial_for(const Activation& a, Stream stream);

// ---- convolutions

DType check_parameter_dtype(const Tensor& parameter, const char* name, DType activation);
// Raises where the weight does not fit, and for what the kernels do not take.
ConvGeometry check_convolution(const Activation& x, const Tensor& weight, const ConvolutionOptions& options);
Activation check_output_like(const Tensor& tensor, const char* name, const ConvGeometry& g,
                             const Activation& x);
// The bias as contiguous float32.
std::optional<Tensor> check_bias(const std::optional<Tensor>& bias, int64_t length, DType activation);
// The weight as a dense [k, r, s, c] of the activation dtype: itself, or a copy by one launch.
Tensor packed_weight(const Tensor& weight, const ConvGeometry& g, DType dtype, const Target& target);
// dbias, in the weight's dtype as the bias is: the first of the two sums.
Tensor first_row(const Tensor& sums, DType dtype);
inline bool is_empty(const ConvGeometry& g) { return g.n == 0 || g.k == 0; }

}  // namespace cuda
}  // namespace resnet_fused
