// What every operator wrapper needs: checks with PyTorch's wording, output tensors, torch's thread pool.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../kernels/cpu_kernels.h"
#include "errors.h"
#include "pool.h"

namespace resnet_fused {

using torch::stable::Tensor;

// "float32", as Python prints it without "torch."
const char* dtype_name(const Tensor& tensor);
const char* dtype_name(DType dtype);

// The acc dtype of an activation dtype, and the sizes in bytes.
constexpr DType acc_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }
constexpr int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}
constexpr int index_of(DType dtype) { return static_cast<int>(dtype); }
// False where the dtype is none of DType's.
bool has_dtype(const Tensor& tensor, DType dtype);

// A checked activation: on the CPU, 4-D, a supported dtype, dense channels_last.
struct Activation {
  int64_t n, c, h, w;
  DType dtype;
  const void* data;

  int64_t pixels() const { return n * h * w; }
  int64_t numel() const { return n * c * h * w; }
};

Activation check_activation(const Tensor& tensor, const char* name);
// The same, and of the given size and dtype; `like` names the tensor that set them.
Activation check_activation_like(const Tensor& tensor, const char* name, const Activation& expected,
                                 const char* like);
// The same of uint8, a byte per element of the expected activation.
void check_bytes_like(const Tensor& tensor, const char* name, const Activation& expected, const char* like);
inline const void* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// A per-channel matrix [rows, columns] in the acc dtype of an activation dtype, contiguous.
Tensor check_acc(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, DType dtype);

// Uninitialised outputs. Activations are channels_last and come from the pool (pool.h) when large.
Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, DType dtype);
Tensor empty_bytes(int64_t n, int64_t c, int64_t h, int64_t w);  // the same of uint8
Tensor empty_matrix(int64_t rows, int64_t columns, DType dtype);
Tensor empty_vector(int64_t length, DType dtype);
Tensor zeros_matrix(int64_t rows, int64_t columns, DType dtype);

// torch's own threads. Tasks are coarse: grain 1.
Parallel torch_parallel();

}  // namespace resnet_fused
