// As many vectors as they have lanes, turned over in registers.
#pragma once

#include "simd.h"

namespace resnet_fused {
namespace RF_VARIANT {

#if RF_LEVEL >= 2
// As many rows as lanes, 16, transposed in place: pairs of rows, then of pairs, then of quarters of vectors.
RF_INLINE void transpose(__m512 (&v)[16]) {
  constexpr __mmask16 kAll = 0xffff;  // GCC 12 takes the unmasked names for reads of uninitialised vectors
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_maskz_unpacklo_ps(kAll, v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_maskz_unpackhi_ps(kAll, v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {  // v[4 i + j]: lane j of each quarter, of rows 4 i to 4 i + 3
#pragma GCC unroll 16
    for (int j = 0; j < 2; ++j) {
      v[4 * i + 2 * j] = _mm512_maskz_shuffle_ps(kAll, t[4 * i + j], t[4 * i + 2 + j], 0x44);
      v[4 * i + 2 * j + 1] = _mm512_maskz_shuffle_ps(kAll, t[4 * i + j], t[4 * i + 2 + j], 0xee);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {  // lane j of each quarter q is row 4 q + j of the result
    const __m512 low02 = _mm512_maskz_shuffle_f32x4(kAll, v[j], v[4 + j], 0x88), low13 = _mm512_maskz_shuffle_f32x4(kAll, v[j], v[4 + j], 0xdd);
    const __m512 high02 = _mm512_maskz_shuffle_f32x4(kAll, v[8 + j], v[12 + j], 0x88);
    const __m512 high13 = _mm512_maskz_shuffle_f32x4(kAll, v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_maskz_shuffle_f32x4(kAll, low02, high02, 0x88);
    t[8 + j] = _mm512_maskz_shuffle_f32x4(kAll, low02, high02, 0xdd);
    t[4 + j] = _mm512_maskz_shuffle_f32x4(kAll, low13, high13, 0x88);
    t[12 + j] = _mm512_maskz_shuffle_f32x4(kAll, low13, high13, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}
typedef __m512 Row;
#elif RF_LEVEL == 1
// 8 rows of 8 lanes.
RF_INLINE void transpose(__m256 (&v)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // v[4 i + j]: lane j of each half, of rows 4 i to 4 i + 3
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      v[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0x44);
      v[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(v[j], v[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(v[j], v[4 + j], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}
typedef __m256 Row;
#endif

}  // namespace RF_VARIANT
}  // namespace resnet_fused
