// The SIMD level in force, as operators: it can be read and set from Python (tests run every level).
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "../kernels/cpu_kernels.h"
#include "tensor.h"

namespace resnet_fused {
namespace {

int64_t get_level() { return simd_level(); }

int64_t set_level(int64_t level) {
  RF_CHECK(level >= -1 && level < kLevels, "expected a SIMD level from -1 (automatic) to ", kLevels - 1,
           ", but got ", level);
  return set_simd_level(static_cast<int>(level));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("simd_level() -> int");
  m.def("set_simd_level(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&get_level));
  m.impl("set_simd_level", TORCH_BOX(&set_level));
}

}  // namespace resnet_fused
