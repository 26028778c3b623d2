// What happens to the input gradient of a convolution on its way from the register tile to memory: the ReLU's mask, dz_in,
// the rounding and BatchNorm's two sums.
#pragma once

#include "conv_engine.h"

namespace resnet_fused {
namespace RF_VARIANT {

template <typename T> struct DgradEpilogue {
  typedef Acc<T> A;
  int64_t channels;
  const T* x;
  const A* bn;  // mean, invstd, scale, shift
  A slope;
  bool relu;
  const T* dz_in;
  bool replaces;  // dz_in, whose values leave the sums
  T* dz;
  bool streamed;
  T* lines;
  A* sum_dz;
  A* sum_dz_xhat;
  int64_t pixel_step;  // neighbours of a phase are a stride apart
  const A* slots;      // of bn, where outputs are paired

  template <int NP> RF_INLINE_METHOD void vector(Vec<A> (&column)[NP], int64_t c, int64_t pixel, int64_t) const {
    const Vec<A> mean = load(bn + c), invstd = load(bn + channels + c);
    const Vec<A> scale = load(bn + 2 * channels + c), shift = load(bn + 3 * channels + c), slopes = splat<A>(slope);
    const T* const first = x + pixel * channels + c;
    const int64_t step = pixel_step * channels;
    // The mask leaves x - mean behind for the reductions: x is read once.
    Vec<A> centred[NP];
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) {
      const Vec<A> value = load(first + p * step);
      column[p] = activate_grad<A>(preact(value, scale, shift), column[p], slopes, relu);
      centred[p] = value - mean;
    }
    Vec<A> sum = {}, sum_xhat = {};
    if (dz_in) {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) {
        const Vec<A> before = load(dz_in + pixel * channels + c + p * step);
        column[p] += before;
        if (replaces) {
          sum -= before;
          sum_xhat -= before * centred[p];
        }
      }
    }
    store_column<T>(dz + pixel * channels, c, step, column, streamed, lines);
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) {
      sum += column[p];
      sum_xhat += column[p] * centred[p];
    }
    store(sum_dz + c, load(sum_dz + c) + sum);
    store(sum_dz_xhat + c, load(sum_dz_xhat + c) + sum_xhat * invstd);
  }

#if RF_LEVEL >= 3
  // The sums stay in slots.
  template <int NP> RF_INLINE_METHOD void pair(vfloat (&column)[NP][2], int64_t c, int64_t pixel, int64_t) const {
    constexpr int L = kLanes<float>;
    const auto constant = [&](int64_t row) {
      return EvenOdd{load(slots + row * channels + c), load(slots + row * channels + c + L)};
    };
    const EvenOdd mean = constant(0), invstd = constant(1), scale = constant(2), shift = constant(3);
    const vfloat slopes = splat<float>(slope);
    const __m512i order = kInterleave.vector();
    const int64_t step = pixel_step * channels, begin = pixel * channels + c;
    if (relu) {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) {
        const vuint32 in = load_words(x + begin + p * step);
        column[p][0] = activate_grad<float>(preact(even_channels(in), scale.even, shift.even), column[p][0], slopes, true);
        column[p][1] = activate_grad<float>(preact(odd_channels(in), scale.odd, shift.odd), column[p][1], slopes, true);
      }
    } else {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) {
        const vuint32 in = load_words(x + begin + p * step);
        column[p][0] = activate_grad<float>(preact(even_channels(in), scale.even, shift.even), column[p][0], slopes, false);
        column[p][1] = activate_grad<float>(preact(odd_channels(in), scale.odd, shift.odd), column[p][1], slopes, false);
      }
    }
    EvenOdd sum = {}, sum_xhat = {};
    if (dz_in) {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) {
        const vuint32 beside = load_words(dz_in + begin + p * step);
        column[p][0] += even_channels(beside);
        column[p][1] += odd_channels(beside);
      }
      if (replaces) {
#pragma GCC unroll 16
        for (int p = 0; p < NP; ++p) {
          const vuint32 before = load_words(dz_in + begin + p * step), in = load_words(x + begin + p * step);
          const vfloat even = even_channels(before), odd = odd_channels(before);
          sum.even -= even;
          sum.odd -= odd;
          sum_xhat.even -= even * (even_channels(in) - mean.even);
          sum_xhat.odd -= odd * (odd_channels(in) - mean.odd);
        }
      }
    }
    vuint32 words[NP];
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) words[p] = permute(pack_halves(column[p][0], column[p][1]), order);
    if (streamed) {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) store_words(dz + begin + p * step, words[p], true);
    } else {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) store_words(dz + begin + p * step, words[p], false);
    }
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) {
      const vuint32 in = load_words(x + begin + p * step);
      const vfloat even = even_channels(words[p]), odd = odd_channels(words[p]);
      sum.even += even;
      sum.odd += odd;
      sum_xhat.even += even * (even_channels(in) - mean.even);
      sum_xhat.odd += odd * (odd_channels(in) - mean.odd);
    }
    store(sum_dz + c, load(sum_dz + c) + sum.even);
    store(sum_dz + c + L, load(sum_dz + c + L) + sum.odd);
    store(sum_dz_xhat + c, load(sum_dz_xhat + c) + sum_xhat.even * invstd.even);
    store(sum_dz_xhat + c + L, load(sum_dz_xhat + c + L) + sum_xhat.odd * invstd.odd);
  }
#endif

  void lanes(const A* column, int np, int64_t c0, int64_t pixel, int64_t) const {
    for (int64_t c = c0; c < channels; ++c) {
      A sum = 0, sum_xhat = 0;
      for (int p = 0; p < np; ++p) {
        const int64_t at = (pixel + p * pixel_step) * channels + c;
        const A value = load1(x + at);
        const A z = preact(value, bn[2 * channels + c], bn[3 * channels + c]);
        A d = activate_grad1<A>(z, column[p * kLanes<A> + (c - c0)], slope, relu);
        const A before = dz_in ? load1(dz_in + at) : A(0);
        if (dz_in) d += before;
        d = rounded1<T>(d);
        store1(dz + at, d);
        if (replaces) {
          sum -= before;
          sum_xhat -= before * (value - bn[c]);
        }
        sum += d;
        sum_xhat += d * (value - bn[c]);
      }
      sum_dz[c] += sum;
      sum_dz_xhat[c] += sum_xhat * bn[channels + c];
    }
  }
};

// An epilogue that adds to `sums` [2, C]. pixels: at most so many in a tile; paired: as kPairedOutputs.
template <typename T>
static DgradEpilogue<T> dgrad_epilogue(const PreactConvDgradParams& params, Acc<T>* sums, int64_t pixels, bool streamed,
                                       bool paired) {
  typedef Acc<T> A;
  const ConvGeometry& g = params.g;
  const size_t line_bytes = size_t(pixels) * 2 * kLanes<A> * sizeof(T);
  const size_t slot_bytes = paired ? size_t(4 * g.c) * sizeof(A) : 0;
  char* const scratch = static_cast<char*>(thread_scratch(kScratchTile, line_bytes + slot_bytes));
  A* const slots = reinterpret_cast<A*>(scratch + line_bytes);
#if RF_LEVEL >= 3
  if constexpr (sizeof(T) == 2)
    if (paired) {
      memcpy(slots, params.bn, slot_bytes);
      for (int64_t row = 0; row < 4; ++row) channels_to_slots(slots + row * g.c, g.c);
    }
#endif
  return {g.c,
          static_cast<const T*>(params.x),
          static_cast<const A*>(params.bn),
          A(params.slope),
          params.slope == 0,
          static_cast<const T*>(params.dz_in),
          params.dz_in_sums != nullptr,
          static_cast<T*>(params.dz),
          streamed,
          reinterpret_cast<T*>(scratch),
          sums,
          sums + g.c,
          g.stride_w,
          slots};
}

// Partial sums [parts][2, C] into `sums`, in their order, whichever thread made them; `stride` from part to part.
template <typename A>
static void add_partial_sums(A* sums, const A* partial, int64_t stride, int64_t parts, int64_t channels, bool paired) {
  memset(sums, 0, size_t(2 * channels) * sizeof(A));
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += partial[part * stride + c];
#if RF_LEVEL >= 3
  if constexpr (sizeof(A) == sizeof(float))
    if (paired)
      for (int64_t row = 0; row < 2; ++row) slots_to_channels(sums + row * channels, channels);
#else
  (void)paired;
#endif
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
