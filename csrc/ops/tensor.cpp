#include "tensor.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace resnet_fused {

using torch::headeronly::ScalarType;

const char* dtype_name(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::float64 ? "float64" : "bfloat16";
}

const char* dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return torch::headeronly::toString(tensor.scalar_type());
  }
}

namespace {

int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

DType check_dtype(const Tensor& tensor, const char* name) {
  const int32_t code = dtype_code(tensor);
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float64})
    if (code == shim_dtype(dtype)) return dtype;
  raise("expected ", name, " to have dtype float32, float64 or bfloat16, but got ", dtype_name(tensor));
}

void check_device(const Tensor& tensor, const char* name) {
  RF_CHECK(tensor.is_cpu(), "expected ", name, " to be on the CPU, but it is on ",
           tensor.is_cuda() ? "cuda:" : "device index ", tensor.get_device_index());
}

}  // namespace

bool has_dtype(const Tensor& tensor, DType dtype) { return dtype_code(tensor) == shim_dtype(dtype); }

namespace {

// The sizes and dense channels_last strides of a tensor whose dtype has been checked.
Activation check_layout(const Tensor& tensor, const char* name, DType dtype) {
  const auto sizes = tensor.sizes();
  RF_CHECK(sizes.size() == 4, "expected 4D ", name, " (got ", sizes.size(), "D ", name, ")");
  const Activation a{sizes[0], sizes[1], sizes[2], sizes[3], dtype, tensor.const_data_ptr()};
  const auto strides = tensor.strides();
  // The stride of a dimension of size 1 says nothing.
  const bool dense = (a.c <= 1 || strides[1] == 1) && (a.w <= 1 || strides[3] == a.c) &&
                     (a.h <= 1 || strides[2] == a.w * a.c) && (a.n <= 1 || strides[0] == a.h * a.w * a.c);
  RF_CHECK(dense || a.numel() == 0, "expected ", name,
           " to be dense in channels_last memory format, but got size ", to_string(sizes), " with strides ",
           to_string(strides));
  return a;
}

void check_size(const Tensor& tensor, const char* name, const Activation& a, const Activation& expected,
                const char* like) {
  const int64_t want[] = {expected.n, expected.c, expected.h, expected.w};
  RF_CHECK(a.n == expected.n && a.c == expected.c && a.h == expected.h && a.w == expected.w, "expected ",
           name, " of size ", to_string(IntHeaderOnlyArrayRef(want, 4)), " (", like, "), but got ",
           to_string(tensor.sizes()));
}

}  // namespace

Activation check_activation(const Tensor& tensor, const char* name) {
  check_device(tensor, name);
  return check_layout(tensor, name, check_dtype(tensor, name));
}

Activation check_activation_like(const Tensor& tensor, const char* name, const Activation& expected,
                                 const char* like) {
  const Activation a = check_activation(tensor, name);
  RF_CHECK(a.dtype == expected.dtype, "expected ", name, " to have the dtype of ", like, ", ",
           dtype_name(expected.dtype), ", but got ", dtype_name(a.dtype));
  check_size(tensor, name, a, expected, like);
  return a;
}

void check_bytes_like(const Tensor& tensor, const char* name, const Activation& expected, const char* like) {
  check_device(tensor, name);
  RF_CHECK(tensor.scalar_type() == ScalarType::Byte, "expected ", name, " to have dtype uint8, but got ",
           dtype_name(tensor));
  check_size(tensor, name, check_layout(tensor, name, expected.dtype), expected, like);
}

Tensor check_acc(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, DType dtype) {
  check_device(tensor, name);
  const DType acc = acc_dtype(dtype);
  RF_CHECK(has_dtype(tensor, acc), "expected ", name, " to have dtype ", dtype_name(acc), ", but got ",
           dtype_name(tensor));
  const auto sizes = tensor.sizes();
  RF_CHECK(sizes.size() == 2 && sizes[0] == rows && sizes[1] == columns, "expected ", name, " of size [",
           rows, ", ", columns, "], but got ", to_string(sizes));
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor empty_activation(int64_t n, int64_t c, int64_t h, int64_t w, DType dtype) {
  const int64_t sizes[] = {n, c, h, w};
  // As torch.empty(memory_format=channels_last) has them, sizes 0 included.
  const int64_t strides[] = {h * w * c, 1, w * c, c};
  return empty_strided(4, sizes, strides, dtype);
}

Tensor empty_bytes(int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t sizes[] = {n, c, h, w};
  const int64_t strides[] = {h * w * c, 1, w * c, c};
  return empty_strided_bytes(4, sizes, strides);
}

Tensor empty_matrix(int64_t rows, int64_t columns, DType dtype) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns > 0 ? columns : 1, 1};
  return empty_strided(2, sizes, strides, dtype);
}

Tensor empty_vector(int64_t length, DType dtype) {
  const int64_t one = 1;
  return empty_strided(1, &length, &one, dtype);
}

Tensor zeros_matrix(int64_t rows, int64_t columns, DType dtype) {
  const Tensor out = empty_matrix(rows, columns, dtype);
  if (rows * columns > 0) std::memset(out.mutable_data_ptr(), 0, rows * columns * element_size(dtype));
  return out;
}

namespace {

// OpenMP's threads do not survive a fork: where the parent had started them, a parallel region of the child
// waits for them for ever. Work is then done by the child's own thread; the results are the same.
std::atomic<bool> threads_started{false};
std::atomic<bool> threads_lost{false};
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { threads_lost = threads_started.load(); });

void run_on_torch_threads(int64_t tasks, void (*task)(int64_t, void*), void* context) {
  if (tasks == 1 || threads_lost.load(std::memory_order_relaxed)) {
    for (int64_t i = 0; i < tasks; ++i) task(i, context);
    return;
  }
  threads_started.store(true, std::memory_order_relaxed);
  // Every thread begins with a share of its own, the same in every call, so that it meets in its cache what it wrote in the
  // call before; then it takes what is left of the others' shares, for threads are not equally fast.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int64_t kMostShares = 256;
  Share shares[kMostShares];
  const int64_t count = std::min({int64_t(torch::stable::get_num_threads()), tasks, kMostShares});
  for (int64_t i = 0; i < count; ++i) {
    shares[i].next.store(i * tasks / count, std::memory_order_relaxed);
    shares[i].end = (i + 1) * tasks / count;
  }
  torch::stable::parallel_for(0, count, 1, [task, context, count, &shares](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; ++first)
      for (int64_t i = 0; i < count; ++i) {
        Share& share = shares[(first + i) % count];
        for (int64_t index; (index = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
          task(index, context);
      }
  });
}

}  // namespace

Parallel torch_parallel() { return Parallel{&run_on_torch_threads}; }

}  // namespace resnet_fused
