// The instructions that C++ does not have: asynchronous copies, ldmatrix, mma.sync. sm_80 and later.
#pragma once

#include "index.h"
#include "types.h"

namespace resnet_fused {
namespace cuda {

#ifdef RF_EMULATE

using emulator::copy_async;
using emulator::copy_commit;
using emulator::copy_wait;
using emulator::ldmatrix;
using emulator::ldmatrix_transposed;
using emulator::round_tf32;
inline void mma(float* d, const uint32_t* a, const uint32_t* b, bfloat16) {
  emulator::mma_16bit(d, a, b, true);
}
inline void mma(float* d, const uint32_t* a, const uint32_t* b, float16) {
  emulator::mma_16bit(d, a, b, false);
}
inline void mma(float* d, const uint32_t* a, const uint32_t* b, float) { emulator::mma_tf32(d, a, b); }

#elif defined(__CUDACC__)

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// 16 bytes from global to shared memory; zeros if not wanted, and then nothing is read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(wanted ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way.
template <int N> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void ldmatrix(uint32_t* r, const void* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(at))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t* r, const void* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(at))
               : "memory");
}

// To the nearest TF32 number; the matrix unit alone would cut the low bits off.
__device__ __forceinline__ uint32_t round_tf32(uint32_t bits) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(bits)));
  return result;
}

#define RF_MMA(SHAPE, TYPES)                                     \
  asm volatile("mma.sync.aligned." SHAPE ".row.col." TYPES       \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
               "{%0, %1, %2, %3};"                               \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b, bfloat16) {
  RF_MMA("m16n8k16", "f32.bf16.bf16.f32");
}
__device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b, float16) {
  RF_MMA("m16n8k16", "f32.f16.f16.f32");
}
__device__ __forceinline__ void mma(float* d, const uint32_t* a, const uint32_t* b, float) {
  RF_MMA("m16n8k8", "f32.tf32.tf32.f32");
}
#undef RF_MMA

#endif

#if defined(__CUDACC__) || defined(RF_EMULATE)

// ---- fragments out of swizzled tiles. A step of the reduction is 32 bytes: 16 elements, or 8 of float.

template <typename T> __device__ __forceinline__ void round_operands(uint32_t* registers, int count) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < count; ++i) registers[i] = round_tf32(registers[i]);
  }
}

// Left operand, rows [row, row + 16), of a tile stored [m][k].
template <typename T>
__device__ __forceinline__ void load_left(uint32_t* a, const char* tile, int row, int step, int lane) {
  const Place place = ldmatrix_rows_first(lane);
  ldmatrix(a, tile + swizzled(row + place.row, 2 * step + place.chunk));
  round_operands<T>(a, 4);
}

// Two right operands, columns [column, column + 16), of a tile stored [n][k].
template <typename T>
__device__ __forceinline__ void load_right(uint32_t* b, const char* tile, int column, int step, int lane) {
  const Place place = ldmatrix_chunks_first(lane);
  ldmatrix(b, tile + swizzled(column + place.row, 2 * step + place.chunk));
  round_operands<T>(b, 4);
}

// One float of a tile stored [k][columns] in panels of `rows` rows.
__device__ __forceinline__ uint32_t load_word(const char* tile, int rows, int k, int column) {
  return *reinterpret_cast<const uint32_t*>(tile + swizzled_panel(k, column / 4, rows) + (column % 4) * 4);
}

// The same operands of tiles stored [k][m] and [k][n], in panels of `rows` rows. There is no ldmatrix that
// transposes 32-bit elements.
template <typename T>
__device__ __forceinline__ void load_left_transposed(uint32_t* a, const char* tile, int rows, int row,
                                                     int step, int lane) {
  if constexpr (sizeof(T) == 4) {
    const int k = 8 * step + (lane & 3), m = row + (lane >> 2);
    a[0] = load_word(tile, rows, k, m);
    a[1] = load_word(tile, rows, k, m + 8);
    a[2] = load_word(tile, rows, k + 4, m);
    a[3] = load_word(tile, rows, k + 4, m + 8);
    round_operands<T>(a, 4);
  } else {
    const Place place = ldmatrix_chunks_first(lane);
    ldmatrix_transposed(a, tile + swizzled_panel(16 * step + place.row, row / 8 + place.chunk, rows));
  }
}

template <typename T>
__device__ __forceinline__ void load_right_transposed(uint32_t* b, const char* tile, int rows, int column,
                                                      int step, int lane) {
  if constexpr (sizeof(T) == 4) {
    const int k = 8 * step + (lane & 3), n = column + (lane >> 2);
    b[0] = load_word(tile, rows, k, n);
    b[1] = load_word(tile, rows, k + 4, n);
    b[2] = load_word(tile, rows, k, n + 8);
    b[3] = load_word(tile, rows, k + 4, n + 8);
    round_operands<T>(b, 4);
  } else {
    const Place place = ldmatrix_rows_first(lane);
    ldmatrix_transposed(b, tile + swizzled_panel(16 * step + place.row, column / 8 + place.chunk, rows));
  }
}

#endif

}  // namespace cuda
}  // namespace resnet_fused
