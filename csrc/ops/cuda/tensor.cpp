#include "tensor.h"

#include "primitives.h"

#include "kernels/cuda/index.h"

#ifdef RF_EMULATE
#include "emulated_memory.h"
#endif

namespace resnet_fused {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

ScalarType scalar_type(DType dtype) {
  return dtype == DType::float32    ? ScalarType::Float
         : dtype == DType::bfloat16 ? ScalarType::BFloat16
                                    : ScalarType::Half;
}

int32_t shim_dtype(DType dtype) {
  return dtype == DType::float32    ? aoti_torch_dtype_float32()
         : dtype == DType::bfloat16 ? aoti_torch_dtype_bfloat16()
                                    : aoti_torch_dtype_float16();
}

const char* name_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  for (const DType dtype : kDTypes)
    if (type == scalar_type(dtype)) return dtype_name(dtype);
  return type == ScalarType::Double ? "float64" : torch::headeronly::toString(type);
}

bool has_dtype(const Tensor& tensor, DType dtype) { return tensor.scalar_type() == scalar_type(dtype); }

DType check_dtype(const Tensor& tensor, const char* name) {
  for (const DType dtype : kDTypes)
    if (has_dtype(tensor, dtype)) return dtype;
  raise("expected ", name, " to have dtype float32, bfloat16 or float16, but got ", name_of(tensor));
}

void check_device(const Tensor& tensor, const char* name) {
  RF_CHECK(on_device(tensor), "expected ", name, " to be on ", kDevice);
}

// Where a Target lives: of a tensor that the kernels read or write beside the one that the Target is of.
void check_same_device(const Tensor& tensor, const char* name) {
  check_device(tensor, name);
  RF_CHECK(on_target(tensor), "Expected all tensors to be on the same device, but found ", name,
           " on another device, cuda:", tensor.get_device_index());
}

Tensor empty_strided(int64_t dimensions, const int64_t* sizes, const int64_t* strides, DType dtype,
                     [[maybe_unused]] const Tensor& like) {
#ifdef RF_EMULATE
  return emulator::empty_strided(dimensions, sizes, strides, shim_dtype(dtype), element_size(dtype));
#else
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides, shim_dtype(dtype),
                                                  device_type(), like.get_device_index(), &handle));
  return Tensor(handle);
#endif
}

}  // namespace

const char* dtype_name(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::bfloat16 ? "bfloat16" : "float16";
}

Activation check_activation(const Tensor& tensor, const char* name) {
  check_device(tensor, name);
  const DType dtype = check_dtype(tensor, name);
  const auto sizes = tensor.sizes();
  RF_CHECK(sizes.size() == 4, "expected 4D ", name, " (got ", sizes.size(), "D ", name, ")");
  const Activation a{sizes[0], sizes[1], sizes[2], sizes[3], dtype, tensor};
  const auto strides = tensor.strides();
  // The stride of a dimension of size 1 says nothing.
  const bool dense = (a.c <= 1 || strides[1] == 1) && (a.w <= 1 || strides[3] == a.c) &&
                     (a.h <= 1 || strides[2] == a.w * a.c) && (a.n <= 1 || strides[0] == a.h * a.w * a.c);
  RF_CHECK(dense || a.numel() == 0, "expected ", name,
           " to be dense in channels_last memory format, but got size ", to_string(sizes), " with strides ",
           to_string(strides));
  RF_CHECK(a.pixels() < (int64_t{1} << 31), "expected ", name,
           " to have less than 2^31 pixels, but got size ", to_string(sizes));
  return a;
}

Activation check_activation_like(const Tensor& tensor, const char* name, const Activation& expected,
                                 const char* like) {
  const Activation a = check_activation(tensor, name);
  RF_CHECK(a.dtype == expected.dtype, "expected ", name, " to have the dtype of ", like, ", ",
           dtype_name(expected.dtype), ", but got ", dtype_name(a.dtype));
  const int64_t want[] = {expected.n, expected.c, expected.h, expected.w};
  RF_CHECK(a.n == expected.n && a.c == expected.c && a.h == expected.h && a.w == expected.w, "expected ",
           name, " of size ", to_string(IntHeaderOnlyArrayRef(want, 4)), " (", like, "), but got ",
           to_string(tensor.sizes()));
  RF_CHECK(tensor.get_device_index() == expected.tensor.get_device_index(), "expected ", name,
           " to be on the device of ", like);
  return a;
}

Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 ? tensor
                                                                        : torch::stable::clone(tensor);
}

Tensor check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  check_same_device(tensor, name);
  RF_CHECK(has_dtype(tensor, DType::float32), "expected ", name, " to have dtype float32, but got ",
           name_of(tensor));
  const auto sizes = tensor.sizes();
  RF_CHECK(sizes.size() == 2 && sizes[0] == rows && sizes[1] == columns, "expected ", name, " of size [",
           rows, ", ", columns, "], but got ", to_string(sizes));
  // Its rows are read 16 bytes at a time.
  return aligned(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
}

int64_t check_columns(const Tensor& matrix, const char* name) {
  const auto sizes = matrix.sizes();
  RF_CHECK(sizes.size() == 2, "expected 2D ", name, " (got ", sizes.size(), "D ", name, ")");
  return sizes[1];
}

ParameterVector check_vector(const std::optional<Tensor>& tensor, const char* name, int64_t length) {
  if (!tensor) return {nullptr, 0, DType::float32};
  check_same_device(*tensor, name);
  RF_CHECK(tensor->dim() == 1 && tensor->size(0) == length, name, " should contain ", length,
           " elements not ", tensor->numel());
  return {tensor->mutable_data_ptr(), tensor->stride(0), check_dtype(*tensor, name)};
}

Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, DType dtype, const Tensor& like) {
  const int64_t sizes[] = {n, c, h, w};
  // As torch.empty(memory_format=channels_last) has them, sizes 0 included.
  const int64_t strides[] = {h * w * c, 1, w * c, c};
  return empty_strided(4, sizes, strides, dtype, like);
}

Tensor empty_matrix(int64_t rows, int64_t columns, const Tensor& like) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns > 0 ? columns : 1, 1};
  return empty_strided(2, sizes, strides, DType::float32, like);
}

Tensor empty_vector(int64_t length, const Tensor& like, DType dtype) {
  const int64_t one = 1;
  return empty_strided(1, &length, &one, dtype, like);
}

Tensor zeros_matrix(int64_t rows, int64_t columns, const Tensor& like) {
  Tensor out = empty_matrix(rows, columns, like);
  torch::stable::zero_(out);
  return out;
}

Tensor partial_for(const Activation& a, Stream stream) {
  return empty_vector(rows_partial_floats(a.pixels(), a.c, element_size(a.dtype), stream.multiprocessors),
                      a.tensor);
}

DType check_parameter_dtype(const Tensor& parameter, const char* name, DType activation) {
  check_same_device(parameter, name);
  if (has_dtype(parameter, activation)) return activation;
  RF_CHECK(has_dtype(parameter, DType::float32), "expected ", name, " to have dtype ", dtype_name(activation),
           activation == DType::float32 ? "" : " or float32", ", but got ", name_of(parameter));
  return DType::float32;
}

ConvGeometry check_convolution(const Activation& x, const Tensor& weight, const ConvolutionOptions& options) {
  check_parameter_dtype(weight, "weight", x.dtype);
  const int64_t input[] = {x.n, x.c, x.h, x.w};
  const ConvGeometry g = check_geometry(IntHeaderOnlyArrayRef(input, 4), weight.sizes(), options);
  RF_CHECK(conv_supported(g),
           "the CUDA kernels take 1x1 and 3x3 convolutions with stride 1 or 2 whose channels are "
           "multiples of 8, at most 4096, but got input of size ",
           to_string(IntHeaderOnlyArrayRef(input, 4)), ", weight of size ", to_string(weight.sizes()),
           " and stride (", g.stride_h, ", ", g.stride_w, ")");
  return g;
}

Activation check_output_like(const Tensor& tensor, const char* name, const ConvGeometry& g,
                             const Activation& x) {
  const Activation output{g.n, g.k, g.p, g.q, x.dtype, x.tensor};
  return check_activation_like(tensor, name, output, "the convolution's output");
}

std::optional<Tensor> check_bias(const std::optional<Tensor>& bias, int64_t length, DType activation) {
  if (!bias) return std::nullopt;
  const DType dtype = check_parameter_dtype(*bias, "bias", activation);
  RF_CHECK(bias->dim() == 1 && bias->size(0) == length, "expected bias to be 1-dimensional with ", length,
           " elements, but got bias of size ", to_string(bias->sizes()), " instead");
  if (dtype != DType::float32) return torch::stable::to(*bias, ScalarType::Float);
  return bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
}

bool is_packed(const Tensor& weight, const ConvGeometry& g, DType dtype) {
  const auto strides = weight.strides();
  const bool dense = (g.c <= 1 || strides[1] == 1) && (g.s <= 1 || strides[3] == g.c) &&
                     (g.r <= 1 || strides[2] == g.s * g.c) && (g.k <= 1 || strides[0] == g.r * g.s * g.c);
  return dense && has_dtype(weight, dtype) &&
         reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0;
}

PackWeightParams pack_params(const Tensor& weight, const ConvGeometry& g, DType dtype, void* packed) {
  const auto strides = weight.strides();
  return {g.k,
                                g.c,
                                g.r,
                                g.s,
                                strides[0],
                                strides[1],
                                strides[2],
                                strides[3],
                                weight.const_data_ptr(),
                                check_parameter_dtype(weight, "weight", dtype),
                                packed};
}

Tensor zero_counters(int64_t count, DType dtype, const Tensor& like, const Target& target) {
  const Tensor counters = empty_vector(count, like);
  if (count == 0) return counters;
  BeginUnitParams params{};
  params.counters = counters_of(counters), params.counters_count = count;
  with_type(dtype, [&](auto type) { check(begin_unit<decltype(type)>(params, target.stream())); });
  return counters;
}

Tensor packed_weight(const Tensor& weight, const ConvGeometry& g, DType dtype, const Target& target) {
  if (is_packed(weight, g, dtype)) return weight;
  const Tensor packed = empty_activation(g.k, g.c, g.r, g.s, dtype, weight);
  const PackWeightParams params = pack_params(weight, g, dtype, packed.mutable_data_ptr());
  with_type(dtype, [&](auto type) { check(pack_weight<decltype(type)>(params, target.stream())); });
  return packed;
}

Tensor first_row(const Tensor& sums, DType dtype) {
  const Tensor row = torch::stable::select(sums, 0, 0);
  // A copy either way: an operator's result has a storage of its own.
  return dtype == DType::float32 ? torch::stable::clone(row) : torch::stable::to(row, scalar_type(dtype));
}

}  // namespace cuda
}  // namespace resnet_fused
