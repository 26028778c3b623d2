// Weights as the register tiles read them: [output block][tap][input unit][output lane], in any layout of the tensor.
#pragma once

#include "conv_engine.h"
#include "transpose.h"

namespace resnet_fused {
namespace RF_VARIANT {

// Channels of a block that is read at once: with all taps of a vector of outputs it stays in the L1 cache, however far apart
// its values lie in the tensor.
constexpr int kPackChannels = 32;

// A block of output channels is one or two vectors wide.
template <typename A> constexpr int64_t kOutBlock = 2 * kLanes<A>;

// Rows of weights lie pages apart, where no prefetcher of the CPU follows. So what is read so many bytes, or rows, later is
// asked for (into the L2 cache: rows a power of two apart share a set of the L1 cache).
constexpr int64_t kPackAheadBytes = 512, kPackAheadRows = 16;
RF_INLINE void prefetch_weights(const void* p) { __builtin_prefetch(p, 0, 2); }
// How far ahead in a row of `channels`: behind its end follows, with one tap, the row of the next output, which is read as well;
// then it is the row of the next block.
template <typename S> RF_INLINE int64_t pack_ahead(int64_t channel, int64_t channels, int64_t out_stride) {
  constexpr int64_t kAhead = kPackAheadBytes / int64_t(sizeof(S));
  return channel + kAhead >= channels && out_stride == channels ? kAhead + (kOutBlock<float> - 1) * out_stride : kAhead;
}

// Whole vectors of outputs, where inputs or outputs are neighbours in memory, go from there to their place by way of registers:
// by pack_vector, or in pairs of channels by pack_pairs.
#if RF_LEVEL >= 1
// A vector of outputs, [unit][lane] of `channels` input channels of one tap; in_stride or out_stride is 1.
template <typename T, typename S>
RF_INLINE void pack_vector(float* out, int64_t width, const S* from, int64_t channels, int64_t in_stride, int64_t out_stride) {
  constexpr int64_t L = kLanes<float>;
  const auto value = [](vfloat v) __attribute__((always_inline)) { return sizeof(S) == sizeof(T) ? v : rounded<T>(v); };
  if (out_stride == 1) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      prefetch_weights(from + (channel + kPackAheadRows) * in_stride);
      store(out + channel * width, value(load(from + channel * in_stride)));
    }
    return;
  }
  for (int64_t channel = 0; channel < channels; channel += L) {
    const int64_t valid = min64(L, channels - channel), ahead = pack_ahead<S>(channel, channels, out_stride);
    Row rows[L];
#pragma GCC unroll 16
    for (int64_t lane = 0; lane < L; ++lane) {
      const S* const line = from + lane * out_stride + channel;
      prefetch_weights(line + ahead);
      rows[lane] = (Row)value(valid == L ? load(line) : load_partial(line, int(valid)));
    }
    transpose(rows);
    if (valid == L) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) store(out + (channel + i) * width, (vfloat)rows[i]);
    } else {
      for (int64_t i = 0; i < valid; ++i) store(out + (channel + i) * width, (vfloat)rows[i]);
    }
  }
}
#endif

// How taps lie where they are neighbours in memory, as in NCHW: `span` values from `first` on, of which value i is tap at[i], or
// none that is used where that is negative.
constexpr int64_t kMostTapSpan = 64;
struct TapSpan {
  int64_t first, span;
  int8_t at[kMostTapSpan];
};
// False: they are no neighbours, or channels are.
RF_INLINE bool find_tap_span(TapSpan& t, const WeightLayout& layout, int64_t in_stride, int64_t out_stride, int64_t taps,
                             const int32_t* taps_r, const int32_t* taps_s) {
  if (RF_LEVEL < 1 || in_stride == 1 || out_stride == 1 || taps == 0 || taps > kMostTapSpan) return false;
  const auto place = [&](int64_t tap) { return taps_r[tap] * layout.stride_r + taps_s[tap] * layout.stride_s; };
  int64_t last = t.first = place(0);
  for (int64_t tap = 1; tap < taps; ++tap) {
    t.first = min64(t.first, place(tap));
    last = max64(last, place(tap));
  }
  t.span = last - t.first + 1;
  if (t.span > kMostTapSpan) return false;
  memset(t.at, -1, sizeof t.at);
  for (int64_t tap = 0; tap < taps; ++tap) {
    int8_t& at = t.at[place(tap) - t.first];
    if (at >= 0) return false;  // of an expanded tensor
    at = int8_t(tap);
  }
  return true;
}

#if RF_LEVEL >= 1
// Whole vectors of outputs, [tap, tap_step apart][unit][vector][lane], each output's taps read together. `paired`: the order
// that kPairedOutputs tells.
template <typename M, typename T, typename S>
static void pack_taps(typename M::Unit* out, int64_t tap_step, const S* from, int64_t channels, int64_t in_stride,
                      int64_t out_stride, int vectors, bool paired, const TapSpan& t) {
  constexpr int64_t L = kLanes<float>;
  const int64_t lane_step = paired ? 2 * out_stride : out_stride, vector_step = paired ? out_stride : L * out_stride;
  // Where outputs are further apart than inputs, each has a run of memory of its own.
  const int64_t ahead = in_stride < out_stride ? kPackAheadBytes / int64_t(sizeof(S)) : 2 * M::kUnitChannels * in_stride;
  from += t.first;
  for (int64_t channel = 0; channel < channels; channel += M::kUnitChannels, from += M::kUnitChannels * in_stride)
    for (int v = 0; v < vectors; ++v, out += L) {
      const S* const lines = from + v * vector_step;
      for (int64_t first = 0; first < t.span; first += L) {
        const int n = int(min64(L, t.span - first));
        if (M::kUnitChannels == 1 && n <= 2) {  // as the ninth of 8 lanes
          for (int64_t i = first; i < t.span; ++i)
            if (t.at[i] >= 0) {
              float lanes[L];
              for (int64_t lane = 0; lane < L; ++lane) lanes[lane] = load1(lines + lane * lane_step + i);
              const vfloat line = load(lanes), value = sizeof(S) == sizeof(T) ? line : rounded<T>(line);
              memcpy(out + t.at[i] * tap_step, &value, sizeof value);
            }
          continue;
        }
        Row rows[L];
#pragma GCC unroll 16
        for (int64_t lane = 0; lane < L; ++lane) {
          const S* const line = lines + lane * lane_step + first;
          prefetch_weights(line + ahead);
          const auto value = [&](const S* p) __attribute__((always_inline)) { return n == L ? load(p) : load_partial(p, n); };
          if constexpr (M::kUnitChannels == 2) {
#if RF_LEVEL >= 3
            rows[lane] = (Row)pair_lanes(value(line), channel + 1 < channels ? value(line + in_stride) : vfloat{});
#endif
          } else {
            rows[lane] = (Row)(sizeof(S) == sizeof(T) ? value(line) : rounded<T>(value(line)));
          }
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i)
          if (i < n && t.at[first + i] >= 0) memcpy(out + t.at[first + i] * tap_step, &rows[i], sizeof rows[i]);
      }
    }
}
#endif

// Values [channel][lane] of one tap, as they are used: rounded to the activation dtype. Lanes beyond `lanes` are 0.
template <typename T> struct WeightBlock {
  typedef Acc<T> A;
  static constexpr int L = kLanes<A>;
  alignas(RF_VECTOR_BYTES) A values[kPackChannels][L];

  RF_INLINE_METHOD Vec<A> row(int64_t channel) const { return load(values[channel]); }

  void read(const void* weight, const WeightLayout& layout, int64_t at, int64_t channels, int64_t lanes, int64_t in_stride,
            int64_t out_stride) {
    if (layout.is_acc)
      read_from<A>(static_cast<const A*>(weight) + at, channels, lanes, in_stride, out_stride);
    else
      read_from<T>(static_cast<const T*>(weight) + at, channels, lanes, in_stride, out_stride);
  }

 private:
  template <typename S>
  void read_from(const S* from, int64_t channels, int64_t lanes, int64_t in_stride, int64_t out_stride) {
#if RF_LEVEL >= 1
    if constexpr (sizeof(A) == 4)
      if (lanes == L && (in_stride == 1 || out_stride == 1))
        return pack_vector<T>(values[0], L, from, channels, in_stride, out_stride);
#endif
    if (out_stride == 1 && lanes == L) {
      for (int64_t channel = 0; channel < channels; ++channel)
        store(values[channel], sizeof(S) == sizeof(T) ? load(from + channel * in_stride)
                                                      : rounded<T>(load(from + channel * in_stride)));
      return;
    }
    if (lanes < L) memset(values, 0, sizeof values);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const S* const line = from + lane * out_stride;
      if (in_stride == 1)
        for (int64_t channel = 0; channel < channels; ++channel) values[channel][lane] = load1(line + channel);
      else
        for (int64_t channel = 0; channel < channels; ++channel) values[channel][lane] = load1(line + channel * in_stride);
    }
    if constexpr (sizeof(S) != sizeof(T))
      for (int64_t channel = 0; channel < channels; ++channel) store(values[channel], rounded<T>(row(channel)));
  }
};

// Those of all taps; `at`: of the first channel and output.
template <typename T>
static void read_taps(WeightBlock<T>* blocks, const void* weight, const WeightLayout& layout, int64_t at, int64_t channels,
                      int64_t lanes, int64_t in_stride, int64_t out_stride, int64_t taps, const int32_t* taps_r,
                      const int32_t* taps_s) {
#if RF_LEVEL >= 1
  if constexpr (sizeof(Acc<T>) == sizeof(float)) {
    TapSpan span;
    if (lanes == kLanes<float> && find_tap_span(span, layout, in_stride, out_stride, taps, taps_r, taps_s)) {
      const auto read_from = [&](const auto* from) {
        pack_taps<ModeF32, T>(blocks[0].values[0], sizeof *blocks / sizeof(float), from + at, channels, in_stride, out_stride, 1,
                              false, span);
      };
      layout.is_acc ? read_from(static_cast<const Acc<T>*>(weight)) : read_from(static_cast<const T*>(weight));
      return;
    }
  }
#endif
  for (int64_t tap = 0; tap < taps; ++tap)
    blocks[tap].read(weight, layout, at + taps_r[tap] * layout.stride_r + taps_s[tap] * layout.stride_s, channels, lanes, in_stride,
                     out_stride);
}

struct PackLayout {
  int64_t in_channels, out_channels;
  int64_t in_units;   // channel units, padded to whole units; more than a matrix tile's, to whole tiles
  int64_t taps;
  int64_t out_blocks;
};
template <typename M> static PackLayout make_pack(int64_t in_channels, int64_t out_channels, int64_t taps) {
  const int64_t units = divide_up(in_channels, M::kUnitChannels);
  const bool tiled = RF_LEVEL >= 4 && M::kUnitChannels == 2 && units > kBlock<M>;
  return PackLayout{in_channels, out_channels, tiled ? round_up(units, kBlock<M>) : units, taps,
                    divide_up(out_channels, kOutBlock<typename M::A>)};
}
// Vectors per unit of an output block: the last block may be narrow.
template <typename M> RF_INLINE int pack_vectors(const PackLayout& pack, int64_t out_block) {
  typedef typename M::A A;
  return pack.out_channels - out_block * kOutBlock<A> > kLanes<A> ? 2 : 1;
}
template <typename M> static int64_t pack_units(const PackLayout& pack) {
  return pack.out_blocks * pack.taps * pack.in_units * kOutBlock<typename M::A>;
}
template <typename M> RF_INLINE int64_t pack_block_offset(const PackLayout& pack, int64_t out_block) {
  return out_block * pack.taps * pack.in_units * kOutBlock<typename M::A>;
}

#if RF_LEVEL >= 3
// 32 neighbours in memory, or the first n, as bfloat16.
RF_INLINE vuint32 load_halves(const float* p, int64_t n) {
  constexpr int64_t L = kLanes<float>;
  if (n >= 2 * L) return pack_halves(load(p), load(p + L));
  return pack_halves(n >= L ? load(p) : load_partial(p, int(n)), n > L ? load_partial(p + L, int(n - L)) : vfloat{});
}
RF_INLINE vuint32 load_halves(const bf16* p, int64_t n) {
  return n >= kWordChannels ? load_words(p) : (vuint32)_mm512_maskz_loadu_epi16(first_halves(n), p);
}

// 32 outputs, [pair of input channels][even outputs, odd outputs] of `channels` input channels of one tap.
template <typename S>
RF_INLINE void pack_pairs(uint32_t* out, const S* from, int64_t channels, int64_t in_stride, int64_t out_stride) {
  constexpr int64_t L = kLanes<float>, kWidth = kWordChannels, kLineValues = 64 / int64_t(sizeof(S));
  if (out_stride == 1) {
    for (int64_t channel = 0; channel < channels; channel += 2, out += kWidth) {
      const S* const line = from + channel * in_stride;
      for (int64_t i = 0; i < 2; ++i)
        for (int64_t at = 0; at < kWidth; at += kLineValues) prefetch_weights(line + (kPackAheadRows + i) * in_stride + at);
      const vuint32 low = load_halves(line, kWidth), high = channel + 1 < channels ? load_halves(line + in_stride, kWidth) : vuint32{};
      const vuint32 even = (low & 0xffffu) | high << 16, odd = low >> 16 | (high & 0xffff0000u);
      memcpy(out, &even, sizeof even);
      memcpy(out + L, &odd, sizeof odd);
    }
    return;
  }
  for (int64_t channel = 0; channel < channels; channel += kWidth) {
    const int64_t valid = min64(kWidth, channels - channel), pairs = divide_up(valid, 2);
    const int64_t ahead = pack_ahead<S>(channel, channels, out_stride);
    for (int64_t odd = 0; odd < 2; ++odd) {
      __m512 rows[L];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < L; ++lane) {
        const S* const line = from + (2 * lane + odd) * out_stride + channel;
        for (int64_t at = 0; at < kWidth; at += kLineValues) prefetch_weights(line + ahead + at);
        rows[lane] = (__m512)load_halves(line, valid);
      }
      transpose(rows);
      uint32_t* const to = out + channel / 2 * kWidth + odd * L;
      if (pairs == L) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i) memcpy(to + i * kWidth, &rows[i], sizeof rows[i]);
      } else {
        for (int64_t i = 0; i < pairs; ++i) memcpy(to + i * kWidth, &rows[i], sizeof rows[i]);
      }
    }
  }
}
#endif

// Whole output blocks of one tap of weights in dtype S; false: not for this mode, layout or SIMD level.
template <typename M, typename T, typename S>
static bool pack_neighbours(typename M::Unit* out, const S* from, int64_t channels, int64_t in_stride, int64_t out_stride,
                            int vectors) {
  if (in_stride != 1 && out_stride != 1) return false;
#if RF_LEVEL >= 3
  if constexpr (kPairedOutputs<M>) {
    if (vectors != 2) return false;
    pack_pairs(out, from, channels, in_stride, out_stride);
    return true;
  }
#endif
#if RF_LEVEL >= 1
  if constexpr (M::kUnitChannels == 1 && sizeof(typename M::A) == sizeof(float)) {
    for (int v = 0; v < vectors; ++v)
      pack_vector<T>(out + v * kLanes<float>, vectors * kLanes<float>, from + v * kLanes<float> * out_stride, channels,
                     in_stride, out_stride);
    return true;
  }
#endif
  return false;
}

// Packs [tap][in unit][out lane] of one output block, a whole one in the order that kPairedOutputs tells. taps_r/taps_s:
// the kernel position of every tap.
template <typename M, typename T>
static void pack_block(typename M::Unit* out, const PackLayout& pack, int64_t out_block, const void* weight,
                       const WeightLayout& layout, int64_t in_stride, int64_t out_stride, const int32_t* taps_r,
                       const int32_t* taps_s) {
  typedef typename M::A A;
  constexpr int L = kLanes<A>, kUnits = kPackChannels / M::kUnitChannels;
  const int vectors = pack_vectors<M>(pack, out_block);
  const int64_t width = vectors * L, filled = divide_up(pack.in_channels, M::kUnitChannels);
  for (int64_t tap = 0; filled < pack.in_units && tap < pack.taps; ++tap)
    memset(out + (tap * pack.in_units + filled) * width, 0, size_t((pack.in_units - filled) * width) * sizeof(*out));
  if (pack.out_channels - out_block * kOutBlock<A> >= width) {
#if RF_LEVEL >= 1
    if constexpr (sizeof(A) == sizeof(float)) {
      TapSpan span;
      if (find_tap_span(span, layout, in_stride, out_stride, pack.taps, taps_r, taps_s)) {
        const auto pack_from = [&](const auto* from) {
          pack_taps<M, T>(out, pack.in_units * width, from + out_block * kOutBlock<A> * out_stride, pack.in_channels, in_stride,
                          out_stride, vectors, kPairedOutputs<M> && vectors == 2, span);
        };
        layout.is_acc ? pack_from(static_cast<const A*>(weight)) : pack_from(static_cast<const T*>(weight));
        return;
      }
    }
#endif
    bool packed = true;
    for (int64_t tap = 0; packed && tap < pack.taps; ++tap) {
      const int64_t at = taps_r[tap] * layout.stride_r + taps_s[tap] * layout.stride_s + out_block * kOutBlock<A> * out_stride;
      typename M::Unit* const to = out + tap * pack.in_units * width;
      packed = layout.is_acc ? pack_neighbours<M, T>(to, static_cast<const A*>(weight) + at, pack.in_channels, in_stride,
                                                     out_stride, vectors)
                             : pack_neighbours<M, T>(to, static_cast<const T*>(weight) + at, pack.in_channels, in_stride,
                                                     out_stride, vectors);
    }
    if (packed) return;
  }
  WeightBlock<T> block;
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = out_block * kOutBlock<A> + v * L, lanes = min64(L, pack.out_channels - first);
    for (int64_t unit0 = 0; unit0 < filled; unit0 += kUnits) {
      const int64_t units = min64(kUnits, filled - unit0), channel0 = unit0 * M::kUnitChannels;
      const int64_t channels = min64(kPackChannels, pack.in_channels - channel0);
      for (int64_t tap = 0; tap < pack.taps; ++tap) {
        block.read(weight, layout,
                   taps_r[tap] * layout.stride_r + taps_s[tap] * layout.stride_s + first * out_stride + channel0 * in_stride,
                   channels, lanes, in_stride, out_stride);
        typename M::Unit* const to = out + (tap * pack.in_units + unit0) * width + v * L;
        for (int64_t unit = 0; unit < units; ++unit) {
          if constexpr (M::kUnitChannels == 1) {
            store(to + unit * width, block.row(unit));
          } else {
            const vuint32 low = (vuint32)block.row(2 * unit);
            const vuint32 high = 2 * unit + 1 < channels ? (vuint32)block.row(2 * unit + 1) : vuint32{};
            const vuint32 pair = low >> 16 | (high & 0xffff0000u);
            memcpy(to + unit * width, &pair, sizeof pair);
          }
        }
      }
    }
  }
#if RF_LEVEL >= 3
  if constexpr (kPairedOutputs<M>)
    if (pack.out_channels - out_block * kOutBlock<A> >= kOutBlock<A>)
      for (int64_t unit = 0; unit < pack.taps * pack.in_units; ++unit, out += width) {
        const vfloat low = (vfloat)load_units<M>(out), high = (vfloat)load_units<M>(out + L);
        const vfloat even = permute(low, high, kEvenLanes), odd = permute(low, high, kEvenLanes + 1);
        memcpy(out, &even, sizeof even);
        memcpy(out + L, &odd, sizeof odd);
      }
#endif
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
