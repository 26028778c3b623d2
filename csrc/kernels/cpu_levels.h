// The SIMD levels by name and number, and which of them this CPU can run. Torch-free and header-only: the
// operator library and the small module _C must give the same answer without being linked to each other.
#pragma once

namespace resnet_fused {

constexpr const char* kLevelNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};

// The number of levels that this build has: setup.py compiles the x86 variants on x86-64 only.
#if defined(__x86_64__)
constexpr int kBuiltLevels = 4;
#else
constexpr int kBuiltLevels = 1;
#endif

// The highest level whose instructions the CPU has and whose registers the operating system saves (the
// compiler's run-time library reads both, cpuid and xgetbv). Each list is what setup.py's flags let the
// compiler use.
inline int detect_simd_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
#if defined(RF_EMULATE_AVX512)  // tests/avx512_emulator.h
  return 3;
#endif
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))) {
    return 1;
  }
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

}  // namespace resnet_fused
