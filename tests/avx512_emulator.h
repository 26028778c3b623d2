// The AVX-512 and AMX instructions that the CPU kernels name, in loops over lanes: their levels avx512, avx512_bf16 and avx512_amx
// on a CPU without them.
// After the definitions in Intel's Intrinsics Guide; products of bfloat16 take denormals as 0 and give none.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>

namespace emulated {

typedef float F32 __attribute__((vector_size(64)));
typedef double F64 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));
typedef uint16_t U16Half __attribute__((vector_size(32)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint64_t U64 __attribute__((vector_size(64)));
typedef uint8_t U8Quarter __attribute__((vector_size(16)));

#define EMULATED static __attribute__((noinline, unused))

// lane(i) where the mask has a 1, else 0.
template <typename V, typename L> static inline __attribute__((always_inline)) V lanes(uint64_t mask, const L& lane) {
  V v = {};
  constexpr int n = sizeof(V) / sizeof(v[0]);
  for (int i = 0; i < n; ++i)
    if (mask >> i & 1) v[i] = lane(i);
  return v;
}
// Reads, and writes, no byte of a lane that is masked out.
template <typename V> EMULATED V read(uint64_t mask, const void* p) {
  V v = {};
  constexpr int n = sizeof(V) / sizeof(v[0]);
  for (int i = 0; i < n; ++i)
    if (mask >> i & 1) {
      typename std::remove_reference<decltype(v[0])>::type lane;
      memcpy(&lane, static_cast<const char*>(p) + i * sizeof lane, sizeof lane);
      v[i] = lane;
    }
  return v;
}
template <typename V> EMULATED void write(void* p, uint64_t mask, V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  for (int i = 0; i < n; ++i)
    if (mask >> i & 1) {
      const auto lane = v[i];
      memcpy(static_cast<char*>(p) + i * sizeof lane, &lane, sizeof lane);
    }
}
constexpr uint64_t kAll = ~uint64_t(0);

static inline float flushed(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  memcpy(&v, &bits, 4);
  return v;
}
static inline uint16_t to_bf16(float v) {
  v = flushed(v);
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (v != v) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float v;
  memcpy(&v, &bits, 4);
  return flushed(v);
}

EMULATED __m512i permutexvar16(uint64_t mask, __m512i order, __m512i a) {
  const U16 at = (U16)order, from = (U16)a;
  return (__m512i)lanes<U16>(mask, [&](int i) { return from[at[i] & 31]; });
}
EMULATED __m512i permutex2var16(uint64_t mask, __m512i a, __m512i order, __m512i b) {
  const U16 at = (U16)order, first = (U16)a, second = (U16)b;
  return (__m512i)lanes<U16>(mask, [&](int i) { return at[i] & 32 ? second[at[i] & 31] : first[at[i] & 31]; });
}
EMULATED __m512 permutex2var32(uint64_t mask, __m512 a, __m512i order, __m512 b) {
  const U32 at = (U32)order;
  const F32 first = (F32)a, second = (F32)b;
  return (__m512)lanes<F32>(mask, [&](int i) { return at[i] & 16 ? second[at[i] & 15] : first[at[i] & 15]; });
}
EMULATED __m512bh to_bf16(uint64_t mask, __m512 high, __m512 low) {
  const F32 h = (F32)high, l = (F32)low;
  return (__m512bh)lanes<U16>(mask, [&](int i) { return to_bf16(i < 16 ? l[i] : h[i - 16]); });
}
EMULATED __m256bh to_bf16(__m512 a) {
  const F32 v = (F32)a;
  return (__m256bh)lanes<U16Half>(kAll, [&](int i) { return to_bf16(v[i]); });
}
EMULATED __m512 dot(__m512 sum, __m512bh a, __m512bh b) {
  const F32 before = (F32)sum;
  const U16 x = (U16)a, y = (U16)b;
  return (__m512)lanes<F32>(kAll, [&](int i) {
    const float odd = flushed(__builtin_fmaf(from_bf16(x[2 * i + 1]), from_bf16(y[2 * i + 1]), flushed(before[i])));
    return flushed(__builtin_fmaf(from_bf16(x[2 * i]), from_bf16(y[2 * i]), odd));
  });
}
EMULATED __m512 shuffle(uint64_t mask, __m512 a, __m512 b, int how) {
  const F32 x = (F32)a, y = (F32)b;
  return (__m512)lanes<F32>(mask, [&](int i) {
    const int from = i / 4 * 4 + (how >> 2 * (i % 4) & 3);
    return i % 4 < 2 ? x[from] : y[from];
  });
}
EMULATED __m512 shuffle_quarters(uint64_t mask, __m512 a, __m512 b, int how) {
  const F32 x = (F32)a, y = (F32)b;
  return (__m512)lanes<F32>(mask, [&](int i) {
    const int from = (how >> 2 * (i / 4) & 3) * 4 + i % 4;
    return i < 8 ? x[from] : y[from];
  });
}
EMULATED __m512 unpack(uint64_t mask, __m512 a, __m512 b, int half) {
  const F32 x = (F32)a, y = (F32)b;
  return (__m512)lanes<F32>(mask, [&](int i) {
    const int from = i / 4 * 4 + half * 2 + i % 4 / 2;
    return i % 2 ? y[from] : x[from];
  });
}
EMULATED __m512 max(uint64_t mask, __m512 a, __m512 b) {
  const F32 x = (F32)a, y = (F32)b;
  return (__m512)lanes<F32>(mask, [&](int i) { return x[i] > y[i] ? x[i] : y[i]; });
}
EMULATED __m512 add(__m512 otherwise, uint64_t mask, __m512 a, __m512 b) {
  const F32 x = (F32)a, y = (F32)b, z = (F32)otherwise;
  return (__m512)lanes<F32>(kAll, [&](int i) { return mask >> i & 1 ? x[i] + y[i] : z[i]; });
}
EMULATED __mmask16 compare(__m512 a, __m512 b, int how) {
  const F32 x = (F32)a, y = (F32)b;
  if (how != _CMP_NLE_UQ) __builtin_trap();
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned(!(x[i] <= y[i])) << i;
  return __mmask16(mask);
}
EMULATED __m512i insert(uint64_t mask, __m512i a, __m256i b, int at) {
  typedef uint64_t Half __attribute__((vector_size(32)));
  const U64 x = (U64)a;
  const Half y = (Half)b;
  return (__m512i)lanes<U64>(mask, [&](int i) { return i / 4 == at ? y[i % 4] : x[i]; });
}
EMULATED __m256i extract(uint64_t mask, __m512i a, int at) {
  typedef uint64_t Half __attribute__((vector_size(32)));
  const U64 x = (U64)a;
  return (__m256i)lanes<Half>(mask, [&](int i) { return x[4 * at + i]; });
}
EMULATED __m512i widen(__m256i a) {
  __m512i v = {};
  memcpy(&v, &a, sizeof a);
  return v;
}
template <typename To, typename From, typename In> EMULATED To convert(uint64_t mask, In a) {
  const From x = (From)a;
  return lanes<To>(mask, [&](int i) { return x[i]; });
}

}  // namespace emulated

#define _mm512_permutexvar_epi16(order, a) emulated::permutexvar16(emulated::kAll, order, a)
#define _mm512_maskz_permutexvar_epi16(k, order, a) emulated::permutexvar16(k, order, a)
#define _mm512_maskz_permutex2var_epi16(k, a, order, b) emulated::permutex2var16(k, a, order, b)
#define _mm512_maskz_permutex2var_ps(k, a, order, b) emulated::permutex2var32(k, a, order, b)
#define _mm512_cvtne2ps_pbh(a, b) emulated::to_bf16(emulated::kAll, a, b)
#define _mm512_maskz_cvtne2ps_pbh(k, a, b) emulated::to_bf16(uint64_t(k), a, b)
#define _mm512_cvtneps_pbh(a) emulated::to_bf16(a)
#define _mm512_dpbf16_ps(sum, a, b) emulated::dot(sum, a, b)
#undef _mm512_maskz_shuffle_ps
#undef _mm512_maskz_shuffle_f32x4
#undef _mm512_cmp_ps_mask
#undef _mm512_maskz_inserti64x4
#undef _mm512_maskz_extracti64x4_epi64
#define _mm512_maskz_shuffle_ps(k, a, b, how) emulated::shuffle(k, a, b, how)
#define _mm512_maskz_shuffle_f32x4(k, a, b, how) emulated::shuffle_quarters(k, a, b, how)
#define _mm512_maskz_unpacklo_ps(k, a, b) emulated::unpack(k, a, b, 0)
#define _mm512_maskz_unpackhi_ps(k, a, b) emulated::unpack(k, a, b, 1)
#define _mm512_maskz_max_ps(k, a, b) emulated::max(k, a, b)
#define _mm512_mask_add_ps(otherwise, k, a, b) emulated::add(otherwise, k, a, b)
#define _mm512_cmp_ps_mask(a, b, how) emulated::compare(a, b, how)
#define _mm512_maskz_mov_ps(k, a) ((__m512)emulated::convert<emulated::F32, emulated::F32>(k, a))
#define _mm512_kunpackw(a, b) __mmask32(uint32_t(a) << 16 | (uint32_t(b) & 0xffffu))
#define _mm512_set1_epi32(value) ((__m512i)(emulated::U32{} + uint32_t(value)))
#define _mm512_castsi256_si512(a) emulated::widen(a)
#define _mm512_maskz_inserti64x4(k, a, b, at) emulated::insert(k, a, b, at)
#define _mm512_maskz_extracti64x4_epi64(k, a, at) emulated::extract(k, a, at)
#define _mm512_maskz_cvtepu16_epi32(k, a) ((__m512i)emulated::convert<emulated::U32, emulated::U16Half>(k, a))
#define _mm512_maskz_cvtepu8_epi32(k, a) ((__m512i)emulated::convert<emulated::U32, emulated::U8Quarter>(k, a))
#define _mm512_maskz_cvtepu8_epi64(k, a) ((__m512i)emulated::convert<emulated::U64, emulated::U8Quarter>(k, a))
#define _mm512_maskz_cvtepi32_epi16(k, a) ((__m256i)emulated::convert<emulated::U16Half, emulated::U32>(k, a))
#define _mm512_maskz_cvtepi32_epi8(k, a) ((__m128i)emulated::convert<emulated::U8Quarter, emulated::U32>(k, a))
#define _mm512_maskz_cvtepi64_epi8(k, a) ((__m128i)emulated::convert<emulated::U8Quarter, emulated::U64>((k) & 0xff, a))
#define _mm512_maskz_loadu_epi16(k, p) ((__m512i)emulated::read<emulated::U16>(k, p))
#define _mm256_maskz_loadu_epi16(k, p) ((__m256i)emulated::read<emulated::U16Half>(k, p))
#define _mm512_maskz_loadu_ps(k, p) ((__m512)emulated::read<emulated::F32>(k, p))
#define _mm512_maskz_loadu_pd(k, p) ((__m512d)emulated::read<emulated::F64>(k, p))
#define _mm512_mask_storeu_ps(p, k, v) emulated::write(p, k, (emulated::F32)(v))
#define _mm512_mask_storeu_pd(p, k, v) emulated::write(p, k, (emulated::F64)(v))
#define _mm512_mask_storeu_epi16(p, k, v) emulated::write(p, k, (emulated::U16)(v))
#define _mm512_mask_cvtepi32_storeu_epi16(p, k, v) \
  emulated::write(p, k, emulated::convert<emulated::U16Half, emulated::U32>(emulated::kAll, v))
#define _mm512_storeu_si512(p, v) emulated::write(p, emulated::kAll, (emulated::U64)(v))
#define _mm512_load_si512(p) ((__m512i)emulated::read<emulated::U64>(emulated::kAll, p))

// A streamed store faults where it is not aligned.
#define _mm512_stream_si512(p, v) emulated::stream(p, (emulated::U64)(v))
#define _mm512_stream_ps(p, v) emulated::stream(p, (emulated::F32)(v))
#define _mm512_stream_pd(p, v) emulated::stream(p, (emulated::F64)(v))
namespace emulated {
template <typename V> EMULATED void stream(void* p, V v) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
  memcpy(p, &v, sizeof v);
}
}  // namespace emulated

// Matrix tiles: what is not configured traps, what lies behind a tile's rows and columns is 0.
namespace emulated {
struct Tiles {
  uint8_t config[64];
  alignas(64) uint8_t at[8][16][64];
};
// One for all objects: the linker keeps one copy of a kernel that several of them have.
inline thread_local Tiles tiles;
static inline int tile_rows(int tile) { return tiles.config[48 + tile]; }
static inline int tile_row_bytes(int tile) {
  uint16_t bytes;
  memcpy(&bytes, tiles.config + 16 + 2 * tile, sizeof bytes);
  if (tiles.config[0] != 1 || bytes == 0 || bytes > 64 || tile_rows(tile) == 0 || tile_rows(tile) > 16) __builtin_trap();
  return bytes;
}
EMULATED void tile_config(const void* config) {
  memcpy(tiles.config, config, sizeof tiles.config);
  memset(tiles.at, 0, sizeof tiles.at);
}
EMULATED void tile_release() { memset(&tiles, 0, sizeof tiles); }
EMULATED void tile_zero(int tile) {
  tile_row_bytes(tile);
  memset(tiles.at[tile], 0, sizeof tiles.at[tile]);
}
EMULATED void tile_load(int tile, const void* from, int64_t step) {
  const int bytes = tile_row_bytes(tile);
  memset(tiles.at[tile], 0, sizeof tiles.at[tile]);
  for (int row = 0; row < tile_rows(tile); ++row) memcpy(tiles.at[tile][row], static_cast<const char*>(from) + row * step, bytes);
}
EMULATED void tile_store(int tile, void* to, int64_t step) {
  const int bytes = tile_row_bytes(tile);
  for (int row = 0; row < tile_rows(tile); ++row) memcpy(static_cast<char*>(to) + row * step, tiles.at[tile][row], bytes);
}
EMULATED void tile_dot(int sums, int left, int right) {
  if (tile_row_bytes(left) != 4 * tile_rows(right) || tile_rows(left) != tile_rows(sums) ||
      tile_row_bytes(right) != tile_row_bytes(sums))
    __builtin_trap();
  for (int row = 0; row < tile_rows(sums); ++row) {
    F32 parts[2] = {}, total;
    U16 words;
    memcpy(&words, tiles.at[left][row], sizeof words);
    for (int k = 0; k < tile_rows(right); ++k) {
      U16 pairs;
      memcpy(&pairs, tiles.at[right][k], sizeof pairs);
      for (int i = 0; i < 16; ++i)
        for (int half = 0; half < 2; ++half)
          parts[half][i] = flushed(__builtin_fmaf(from_bf16(words[2 * k + half]), from_bf16(pairs[2 * i + half]), parts[half][i]));
    }
    memcpy(&total, tiles.at[sums][row], sizeof total);
    for (int i = 0; i < 16; ++i) total[i] = flushed(flushed(total[i]) + flushed(parts[0][i] + parts[1][i]));
    memcpy(tiles.at[sums][row], &total, sizeof total);
  }
}
}  // namespace emulated
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(p) emulated::tile_config(p)
#define _tile_release() emulated::tile_release()
#define _tile_zero(tile) emulated::tile_zero(tile)
#define _tile_loadd(tile, p, step) emulated::tile_load(tile, p, step)
#define _tile_stored(tile, p, step) emulated::tile_store(tile, p, step)
#define _tile_dpbf16ps(sums, left, right) emulated::tile_dot(sums, left, right)
