// The register tile of the three convolution kernels: how products are formed, and sums of them over taps and channels.
#pragma once

#include "../cpu_kernels.h"
#include "simd.h"

namespace resnet_fused {
namespace RF_VARIANT {

// A mode is how products are formed. Unit: what one multiply reads of the input (a value, or a pair of bf16 values).
template <typename S> struct ModeOne {
  typedef S Unit;
  typedef S A;
  typedef Vec<S> UnitVec;
  static constexpr int kUnitChannels = 1;
  RF_INLINE Vec<S> fma(Vec<S> acc, S unit, Vec<S> w) { return acc + splat<S>(unit) * w; }
};
typedef ModeOne<float> ModeF32;
typedef ModeOne<double> ModeF64;
#if RF_LEVEL >= 3
// vdpbf16ps: acc[i] += u.lo * w[i].lo + u.hi * w[i].hi, accumulated in float32.
struct ModeBf16Pair {
  typedef uint32_t Unit;
  typedef float A;
  typedef vuint32 UnitVec;
  static constexpr int kUnitChannels = 2;
  RF_INLINE vfloat fma(vfloat acc, uint32_t unit, vuint32 w) {
    return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)unit), (__m512bh)w);
  }
};
#endif

template <typename M> constexpr int kBlock = RF_VECTOR_BYTES / sizeof(typename M::Unit);  // units in a vector
template <typename M> RF_INLINE typename M::UnitVec load_units(const typename M::Unit* p) {
  typename M::UnitVec v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Which mode multiplies activations of type T at this level.
template <typename T> struct ModeOf { typedef ModeF32 type; };
template <> struct ModeOf<double> { typedef ModeF64 type; };
#if RF_LEVEL >= 3
template <> struct ModeOf<bf16> { typedef ModeBf16Pair type; };
#endif

// Pixels in a register tile: as many accumulators as the register file holds beside the operands.
constexpr int kTilePixels = RF_VECTOR_REGISTERS == 32 ? 14 : 6;

template <typename M> struct TileInput {
  const int64_t* tap_offsets;  // in units, relative to the tile's first pixel
  int64_t taps;
  int64_t block_stride;        // units from one channel block to the next
  int64_t in_units;
};

// Whether the two vectors of a whole block of output channels are the even and the odd ones: as words of bf16 hold them.
template <typename M> constexpr bool kPairedOutputs = M::kUnitChannels == 2;

// One step of the reduction: an input unit of every pixel times the weights of every vector.
template <typename M, int NP, int NV>
RF_INLINE void multiply_unit(Vec<typename M::A> (&acc)[NP][NV], const typename M::Unit* a, const typename M::Unit* w) {
  constexpr int B = kBlock<M>, L = kLanes<typename M::A>;
  typename M::UnitVec wv[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) wv[v] = load_units<M>(w + v * L);
#pragma GCC unroll 16
  for (int p = 0; p < NP; ++p) {
    const typename M::Unit unit = a[p * B];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[p][v] = M::fma(acc[p][v], unit, wv[v]);
  }
}

// The same for `units` channel units under one tap; a and w move on.
template <typename M, int NP, int NV>
RF_INLINE void multiply_units(Vec<typename M::A> (&acc)[NP][NV], const typename M::Unit*& a, const typename M::Unit*& w,
                              int64_t units, int64_t block_stride) {
  constexpr int B = kBlock<M>, L = kLanes<typename M::A>;
  for (; units >= B; units -= B, a += block_stride, w += B * NV * L)
#pragma GCC unroll 4
    for (int unit = 0; unit < B; ++unit) multiply_unit<M, NP, NV>(acc, a + unit, w + unit * NV * L);
  for (; units > 0; --units, ++a, w += NV * L) multiply_unit<M, NP, NV>(acc, a, w);
}

// Calls f(accumulator, its place) for all of a register tile.
template <typename V, int NP, int NV, typename F> RF_INLINE void for_each_sum(V (&acc)[NP][NV], const F& f) {
#pragma GCC unroll 16
  for (int p = 0; p < NP; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) f(acc[p][v], p * NV + v);
}

// Terms that one accumulator adds up; a longer sum is one of parts. Its error grows with the root of (terms of a part + parts),
// not of all terms. Pairs of bf16 need none of it: their result keeps 8 bits.
constexpr int64_t kPartTerms = 256;
template <typename M> constexpr bool kSumsInParts = M::kUnitChannels == 1;

// sums[pixel][vector] = sum over taps and channel units of in * weight, in parts.
template <typename M, int NP, int NV>
__attribute__((noinline)) void sum_parts(const TileInput<M>& t, const typename M::Unit* in, const typename M::Unit* w,
                                         typename M::A* sums) {
  typedef Vec<typename M::A> V;
  constexpr int B = kBlock<M>, L = kLanes<typename M::A>;
  static_assert(kPartTerms % B == 0, "a part of one tap ends where a block of channels does");
  V acc[NP][NV];
  for_each_sum(acc, [&](V& sum, int i) __attribute__((always_inline)) { store(sums + i * L, sum = V{}); });
  const auto end_part = [&]() __attribute__((always_inline)) {
    __asm__ volatile("" ::: "memory");  // sums stay there: GCC would carry them through the loop, beside acc
    for_each_sum(acc, [&](V& sum, int i) __attribute__((always_inline)) {
      store(sums + i * L, load(sums + i * L) + sum);
      sum = V{};
    });
  };
  int64_t room = kPartTerms;  // terms that the part still takes: a block at least
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const typename M::Unit* a = in + t.tap_offsets[tap];
    for (int64_t left = t.in_units; left > 0;) {
      const int64_t units = left > room ? room & -int64_t(B) : left;
      multiply_units<M, NP, NV>(acc, a, w, units, t.block_stride);
      left -= units;
      room -= units;
      if (room >= B) continue;
      end_part();
      room = kPartTerms;
    }
  }
  end_part();
}

// What follows the sums of a tile of NP pixels and NV vectors of output channels from `channel`. Epilogue:
//   channels                                                                    number of output channels
//   pixel_step                                                                  pixels of the image from one of the tile to the next
//   vector<NP>(Vec<A>(&column)[NP], channel, pixel, done)                       one whole vector of channels
//   pair<NP>(Vec<A>(&column)[NP][2], channel, pixel, done)                      two of them, as even and odd channels, instead
//                                                                               (kPairedOutputs)
//   lanes(A* column, pixels, channel, pixel, done)                              the channels that are left, [pixel][lane]
// `done` is the caller's own number.
template <typename M, int NP, int NV, typename Epilogue>
RF_INLINE void finish_tile(Vec<typename M::A> (&acc)[NP][NV], const Epilogue& epilogue, int64_t channel, int64_t pixel,
                           int64_t done) {
  typedef typename M::A A;
  constexpr int L = kLanes<A>;
  if constexpr (kPairedOutputs<M> && NV == 2)
    if (channel + 2 * L <= epilogue.channels) return epilogue.template pair<NP>(acc, channel, pixel, done);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const int64_t k = channel + v * L;
    if (k + L <= epilogue.channels) {
      Vec<A> column[NP];
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) column[p] = acc[p][v];
      epilogue.template vector<NP>(column, k, pixel, done);
    } else if (k < epilogue.channels) {
      A column[NP * L];
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) store(column + p * L, acc[p][v]);
      epilogue.lanes(column, NP, k, pixel, done);
    }
  }
}

// acc[pixel][vector] = sum over taps and channel units of in * weight, for NP pixels from `pixel` and NV vectors of output
// channels from `channel`; then the epilogue, while the sums are in registers.
template <typename M, int NP, int NV, typename Epilogue>
__attribute__((noinline)) void conv_tile(const TileInput<M>& t, const typename M::Unit* in, const typename M::Unit* w,
                                         const Epilogue& epilogue, int64_t channel, int64_t pixel, int64_t done) {
  typedef typename M::A A;
  constexpr int L = kLanes<A>;
  Vec<A> acc[NP][NV];
  bool summed = false;
  if constexpr (kSumsInParts<M>) {
    if (t.taps * t.in_units > kPartTerms) {
      A sums[NP * NV * L];
      sum_parts<M, NP, NV>(t, in, w, sums);
      for_each_sum(acc, [&](Vec<A>& sum, int i) __attribute__((always_inline)) { sum = load(sums + i * L); });
      summed = true;
    }
  }
  if (!summed) {
    for_each_sum(acc, [](Vec<A>& sum, int) __attribute__((always_inline)) { sum = Vec<A>{}; });
    for (int64_t tap = 0; tap < t.taps; ++tap) {
      const typename M::Unit* a = in + t.tap_offsets[tap];
      multiply_units<M, NP, NV>(acc, a, w, t.in_units, t.block_stride);
    }
  }
  finish_tile<M, NP, NV>(acc, epilogue, channel, pixel, done);
}

template <typename M, typename Epilogue>
using ConvTile = void (*)(const TileInput<M>&, const typename M::Unit*, const typename M::Unit*, const Epilogue&, int64_t,
                          int64_t, int64_t);

template <typename M, typename E, int NV> static ConvTile<M, E> conv_tile_of(int pixels) {
  switch (pixels) {
    case 1: return conv_tile<M, 1, NV, E>;
    case 2: return conv_tile<M, 2, NV, E>;
    case 3: return conv_tile<M, 3, NV, E>;
    case 4: return conv_tile<M, 4, NV, E>;
    case 5: return conv_tile<M, 5, NV, E>;
#if RF_VECTOR_REGISTERS == 32
    case 6: return conv_tile<M, 6, NV, E>;
    case 7: return conv_tile<M, 7, NV, E>;
    case 8: return conv_tile<M, 8, NV, E>;
    case 9: return conv_tile<M, 9, NV, E>;
    case 10: return conv_tile<M, 10, NV, E>;
    case 11: return conv_tile<M, 11, NV, E>;
    case 12: return conv_tile<M, 12, NV, E>;
    case 13: return conv_tile<M, 13, NV, E>;
#endif
    default: return conv_tile<M, kTilePixels, NV, E>;
  }
}
template <typename M, typename E> static ConvTile<M, E> conv_tile_of(int pixels, int vectors) {
  return vectors == 2 ? conv_tile_of<M, E, 2>(pixels) : conv_tile_of<M, E, 1>(pixels);
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
