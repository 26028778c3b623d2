// The SIMD levels by name and number, and which of them this CPU can run. Torch-free and header-only: the
// operator library and the small module _C must give the same answer without being linked to each other.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace resnet_fused {

constexpr const char* kLevelNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "avx512_amx"};

// The number of levels that this build has: setup.py compiles the x86 variants on x86-64 only.
#if defined(__x86_64__)
constexpr int kBuiltLevels = 5;
#else
constexpr int kBuiltLevels = 1;
#endif

#if defined(__x86_64__)
// Whether there are matrix tiles for bf16, and Linux lets this process use them: it has to be asked, since their 8 KB are saved
// for a thread only then.
inline bool detect_matrix_tiles() {
#if defined(__linux__)
  unsigned int eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned int kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (edx & kAmxBf16) && (edx & kAmxTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The highest level whose instructions the CPU has and whose registers the operating system saves (the
// compiler's run-time library reads both, cpuid and xgetbv). Each list is what setup.py's flags let the
// compiler use.
inline int detect_simd_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
#if defined(RF_EMULATE_AVX512)  // tests/avx512_emulator.h
  return 4;
#endif
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))) {
    return 1;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return 2;
  return detect_matrix_tiles() ? 4 : 3;
#else
  return 0;
#endif
}

}  // namespace resnet_fused
