// From which size on outputs are written past the caches, as operators: it can be read and set from Python (tests set it).
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "../kernels/cpu_kernels.h"
#include "tensor.h"

namespace resnet_fused {
namespace {

int64_t get_bytes() { return stream_bytes(); }

int64_t set_bytes(int64_t bytes) {
  RF_CHECK(bytes >= -1, "expected a number of bytes, or -1 (automatic), but got ", bytes);
  set_stream_bytes(bytes);
  return stream_bytes();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("stream_bytes() -> int");
  m.def("set_stream_bytes(int bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  m.impl("stream_bytes", TORCH_BOX(&get_bytes));
  m.impl("set_stream_bytes", TORCH_BOX(&set_bytes));
}

}  // namespace resnet_fused
