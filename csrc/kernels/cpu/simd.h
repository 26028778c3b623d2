// Vectors of the width of the SIMD level this file is compiled for, by GCC/Clang vector extensions: one source for SSE2,
// AVX2, AVX-512 and NEON. Everything is static or in the variant's own namespace: a function with external linkage
// compiled for AVX-512 could be the copy that the linker keeps for all levels.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef RF_VARIANT
#error "compile with -DRF_VARIANT=<name> -DRF_LEVEL=<0..3>"
#endif

#if RF_LEVEL >= 2
#define RF_VECTOR_BYTES 64
#define RF_VECTOR_REGISTERS 32
#elif RF_LEVEL == 1
#define RF_VECTOR_BYTES 32
#define RF_VECTOR_REGISTERS 16
#else
#define RF_VECTOR_BYTES 16
#define RF_VECTOR_REGISTERS 16
#endif

#define RF_INLINE static inline __attribute__((always_inline))
#define RF_INLINE_METHOD inline __attribute__((always_inline))

namespace resnet_fused {
namespace RF_VARIANT {

struct bf16 {
  uint16_t bits;
};

typedef float vfloat __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef int32_t vint32 __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef uint32_t vuint32 __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef int64_t vint64 __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef uint16_t vuint16_half __attribute__((vector_size(RF_VECTOR_BYTES / 2)));

// Acc<T>: what T is computed in. Vec<A>: a vector of A.
template <typename T> struct AccOf { typedef float type; };
template <> struct AccOf<double> { typedef double type; };
template <typename T> using Acc = typename AccOf<T>::type;
template <typename A> struct VecOf;
template <> struct VecOf<float> { typedef vfloat type; typedef vint32 mask; };
template <> struct VecOf<double> { typedef vdouble type; typedef vint64 mask; };
template <typename A> using Vec = typename VecOf<A>::type;
template <typename A> constexpr int kLanes = RF_VECTOR_BYTES / sizeof(A);

template <typename A> RF_INLINE Vec<A> splat(A value) { return value - Vec<A>{}; }

RF_INLINE float bf16_to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest even; NaN becomes a quiet NaN. Integer arithmetic, so that denormals keep their value too.
RF_INLINE bf16 float_to_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (v != v) return bf16{0x7fc0};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Unaligned vector loads and stores that convert between storage and acc.
RF_INLINE vfloat load(const float* p) { vfloat v; memcpy(&v, p, sizeof v); return v; }
RF_INLINE vdouble load(const double* p) { vdouble v; memcpy(&v, p, sizeof v); return v; }
// By name where there is an instruction: GCC 12 converts the halves of a vector apart and joins them.
RF_INLINE vfloat bf16_to_float(vuint16_half bits) {
#if RF_LEVEL >= 2
  const vuint32 wide = (vuint32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#elif RF_LEVEL == 1
  const vuint32 wide = (vuint32)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  const vuint32 wide = __builtin_convertvector(bits, vuint32);
#endif
  return (vfloat)(wide << 16);
}
RF_INLINE vfloat load(const bf16* p) {
  vuint16_half bits;
  memcpy(&bits, p, sizeof bits);
  return bf16_to_float(bits);
}
RF_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
RF_INLINE void store(double* p, vdouble v) { memcpy(p, &v, sizeof v); }
// The bits of v rounded to bf16, in the upper half of each lane.
RF_INLINE vuint32 bf16_bits(vfloat v) {
  const vuint32 bits = (vuint32)v;
  const vuint32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return v == v ? rounded : vuint32{} + 0x7fc00000u;
}
RF_INLINE void store(bf16* p, vfloat v) {
  const vuint16_half half = __builtin_convertvector(bf16_bits(v) >> 16, vuint16_half);
  memcpy(p, &half, sizeof half);
}
// The first n lanes; the others are zero when loaded and left alone when stored.
template <typename T> RF_INLINE Vec<Acc<T>> load_partial(const T* p, int n) {
#if RF_LEVEL >= 2
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) return (vdouble)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  else if constexpr (sizeof(T) == 4) return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  else return bf16_to_float((vuint16_half)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
#else
  T buffer[kLanes<Acc<T>>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}
template <typename T> RF_INLINE void store_partial(T* p, Vec<Acc<T>> v, int n) {
#if RF_LEVEL >= 2
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  else if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  else _mm512_mask_cvtepi32_storeu_epi16(p, static_cast<__mmask16>(mask), (__m512i)(bf16_bits(v) >> 16));
#else
  T buffer[kLanes<Acc<T>>];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}
RF_INLINE float load1(const float* p) { return *p; }
RF_INLINE double load1(const double* p) { return *p; }
RF_INLINE float load1(const bf16* p) { return bf16_to_float(*p); }
RF_INLINE void store1(float* p, float v) { *p = v; }
RF_INLINE void store1(double* p, double v) { *p = v; }
RF_INLINE void store1(bf16* p, float v) { *p = float_to_bf16(v); }

// The value as it is read back after a store: statistics are of the rounded output.
template <typename T> RF_INLINE Vec<Acc<T>> rounded(Vec<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const vuint32 bits = (vuint32)v;
    const vuint32 nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    return v != v ? (vfloat)(vuint32{} + 0x7fc00000u) : (vfloat)nearest;
  } else {
    return v;
  }
}

// Stores v and returns it as stored. At the bf16 level by the CPU's own conversion, which takes denormals as 0, like the
// products that v is a sum of.
RF_INLINE vfloat store_product(float* p, vfloat v) { store(p, v); return v; }
RF_INLINE vdouble store_product(double* p, vdouble v) { store(p, v); return v; }
RF_INLINE vfloat store_product(bf16* p, vfloat v) {
#if RF_LEVEL >= 3
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &half, sizeof half);
  return bf16_to_float((vuint16_half)half);
#else
  v = rounded<bf16>(v);
  store(p, v);
  return v;
#endif
}
RF_INLINE vfloat magnitude(vfloat v) { return (vfloat)((vuint32)v & 0x7fffffffu); }
RF_INLINE vfloat larger(vfloat a, vfloat b) { return b > a ? b : a; }
RF_INLINE float largest_lane(vfloat v) {
  float most = v[0];
  for (int lane = 1; lane < kLanes<float>; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
}

// The activation as it is multiplied. At the bf16 level by the CPU's own conversion, as in a product of pairs.
template <typename T> RF_INLINE Vec<Acc<T>> rounded_activation(Vec<Acc<T>> v) {
#if RF_LEVEL >= 3
  if constexpr (sizeof(T) == 2) return bf16_to_float((vuint16_half)_mm512_cvtneps_pbh((__m512)v));
#endif
  return rounded<T>(v);
}
// Whether whole vectors of T can go to memory past the caches; p must then be aligned to a vector. bf16 goes in pairs of
// vectors (stream_pair): half a line at a time would be slower than through the caches.
template <typename T> constexpr bool kCanStream = RF_LEVEL >= 1 && sizeof(T) >= 4;
template <typename T> constexpr bool kCanStreamPairs = RF_LEVEL >= 2 && sizeof(T) == 2;
RF_INLINE void stream_pair(bf16* p, const bf16* from) {
#if RF_LEVEL >= 2
  __m512i line;
  memcpy(&line, from, sizeof line);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
#else
  memcpy(p, from, 2 * kLanes<float> * sizeof(bf16));
#endif
}
template <typename T> RF_INLINE void stream(T* p, Vec<Acc<T>> v) {
#if RF_LEVEL >= 2
  if constexpr (sizeof(T) == 8) return _mm512_stream_pd(p, (__m512d)v);
  if constexpr (sizeof(T) == 4) return _mm512_stream_ps(p, (__m512)v);
#elif RF_LEVEL == 1
  if constexpr (sizeof(T) == 8) return _mm256_stream_pd(p, (__m256d)v);
  if constexpr (sizeof(T) == 4) return _mm256_stream_ps(p, (__m256)v);
#endif
  store_product(p, v);
}
// Orders streamed stores before what the thread publishes next.
RF_INLINE void stream_fence() {
#if RF_LEVEL >= 1
  _mm_sfence();
#endif
}

template <typename T> RF_INLINE Acc<T> rounded1(Acc<T> v) {
  T buffer;
  store1(&buffer, v);
  return load1(&buffer);
}

// z = x*scale + shift in one rounding at every level, so that the backward mask equals the forward one bit for bit.
// (GCC contracts a*b + c to an FMA only where the target has one; the generic level rounds twice, in both directions alike.)
template <typename V> RF_INLINE V preact(V x, V scale, V shift) { return x * scale + shift; }

template <typename V> RF_INLINE V select(decltype(V{} > V{}) mask, V a, V b) { return mask ? a : b; }

// LeakyReLU; slope 0 gives +0 for every z <= 0 (also -inf), NaN stays NaN.
template <typename A> RF_INLINE Vec<A> activate(Vec<A> z, Vec<A> slope, bool relu) {
  const Vec<A> zero = Vec<A>{};
  return select<Vec<A>>(z <= zero, relu ? zero : z * slope, z);
}
template <typename A> RF_INLINE A activate1(A z, A slope, bool relu) { return z <= 0 ? (relu ? A(0) : z * slope) : z; }
// Its derivative times da: da where z > 0 (and where z is NaN, as max(z, 0) has it in PyTorch), slope*da elsewhere.
template <typename A> RF_INLINE Vec<A> activate_grad(Vec<A> z, Vec<A> da, Vec<A> slope, bool relu) {
  const Vec<A> zero = Vec<A>{};
  return select<Vec<A>>(z <= zero, relu ? zero : da * slope, da);
}
template <typename A> RF_INLINE A activate_grad1(A z, A da, A slope, bool relu) {
  return z <= 0 ? (relu ? A(0) : da * slope) : da;
}

// Chan's merge of (count, mean, M2) pairs: adds b to a. Counts as acc; cb > 0.
template <typename V, typename A> RF_INLINE void merge_stats(A ca, V& mean_a, V& m2_a, A cb, V mean_b, V m2_b) {
  const A total = ca + cb;
  const V delta = mean_b - mean_a;
  mean_a = mean_a + delta * (cb / total);
  m2_a = m2_a + m2_b + delta * delta * (ca * cb / total);
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
