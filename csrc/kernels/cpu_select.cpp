// Picks the table of CPU kernels at run time. Compiled without -m flags: it runs before the level is known.
#include <atomic>
#include <stdexcept>
#include <stdlib.h>
#include <string.h>
#include <string>

#include "cpu_kernels.h"
#include "cpu_levels.h"

namespace resnet_fused {

static_assert(sizeof(kLevelNames) / sizeof(kLevelNames[0]) == kLevels);

namespace generic {
const CpuKernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const CpuKernels& kernels();
}
namespace avx512 {
const CpuKernels& kernels();
}
namespace avx512_bf16 {
const CpuKernels& kernels();
}
namespace avx512_amx {
void add_kernels(CpuKernels& table);
}
#endif

namespace {

constexpr const char* kLevelVariable = "RESNET_FUSED_CPU_LEVEL";

#if defined(__x86_64__)
const CpuKernels& matrix_tiles_table() {
  static const CpuKernels table = [] {
    CpuKernels kernels = avx512_bf16::kernels();
    avx512_amx::add_kernels(kernels);
    return kernels;
  }();
  return table;
}
#endif

const CpuKernels& table(int level) {
#if defined(__x86_64__)
  if (level >= 4) return matrix_tiles_table();
  if (level == 3) return avx512_bf16::kernels();
  if (level == 2) return avx512::kernels();
  if (level == 1) return avx2::kernels();
#endif
  return generic::kernels();
}

int clip(int level) { return level < 0 || level > max_simd_level() ? max_simd_level() : level; }

// The level that RESNET_FUSED_CPU_LEVEL asks for, -1 (automatic) where it is unset or empty.
int level_from_environment() {
  const char* value = getenv(kLevelVariable);
  if (value == nullptr || *value == '\0') return -1;
  std::string known;
  for (int level = 0; level < kLevels; ++level) {
    if (strcmp(value, kLevelNames[level]) == 0) return level;
    known += (level ? ", " : "") + std::string(kLevelNames[level]);
  }
  throw std::runtime_error(std::string(kLevelVariable) + " should be one of " + known + ", but got '" + value +
                           "'");
}

// Null until the first use. Threads that meet at the first use all store the same table.
std::atomic<const CpuKernels*> current{nullptr};

}  // namespace

int max_simd_level() {
  static const int level = detect_simd_level();
  return level;
}

// An unknown value in RESNET_FUSED_CPU_LEVEL raises at every operator call, rather than run at a level not
// asked for; a level above what this CPU can run is clipped.
const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = current.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = &table(clip(level_from_environment()));
    const CpuKernels* expected = nullptr;  // a set_simd_level() that came in between stays in force
    if (!current.compare_exchange_strong(expected, kernels, std::memory_order_acq_rel)) kernels = expected;
  }
  return *kernels;
}

int simd_level() { return cpu_kernels().level; }

int set_simd_level(int level) {
  const CpuKernels& kernels = table(clip(level));
  current.store(&kernels, std::memory_order_release);
  return kernels.level;
}

const char* simd_level_name(int level) {
  return level >= 0 && level < kLevels ? kLevelNames[level] : "unknown";
}

}  // namespace resnet_fused
