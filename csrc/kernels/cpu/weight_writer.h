// How sums become dweight, in any layout of the tensor.
#pragma once

#include "conv_engine.h"
#include "transpose.h"

namespace resnet_fused {
namespace RF_VARIANT {

// The first `lanes` of a vector into dweight, `step` apart, rounded to its dtype: acc or T.
template <typename T>
RF_INLINE void write_weight(void* dweight, bool is_acc, int64_t at, int64_t step, Vec<Acc<T>> value, int64_t lanes) {
  if (step == 1 && lanes == kLanes<Acc<T>>) {
    if (is_acc)
      store(static_cast<Acc<T>*>(dweight) + at, value);
    else
      store(static_cast<T*>(dweight) + at, value);
    return;
  }
  Acc<T> lane_value[kLanes<Acc<T>>];
  store(lane_value, value);
  for (int64_t lane = 0; lane < lanes; ++lane, at += step) {
    if (is_acc)
      static_cast<Acc<T>*>(dweight)[at] = lane_value[lane];
    else
      store1(static_cast<T*>(dweight) + at, lane_value[lane]);
  }
}

// Whether dweight is stored in the dtype that it is summed in.
template <typename T> RF_INLINE bool is_unrounded(const WeightLayout& layout) {
  return layout.is_acc || sizeof(T) == sizeof(Acc<T>);
}

// Of one output at a time, vectors of input channels under all taps.
template <typename T> class WeightWriter {
 public:
  typedef Acc<T> A;
  static constexpr int64_t L = kLanes<A>;

  // may_stream: each weight is written once.
  WeightWriter(const PreactConvWgradParams& params, bool may_stream)
      : g(params.g), layout(params.weight_layout), dweight(params.dweight),
        neighbours(g.r * g.s > 1 && layout.stride_s == 1 && layout.stride_r == g.s && layout.stride_c == g.r * g.s),
        streamed(may_stream && can_stream()) {}

  // Sums of input channels, `vectors` blocks of them from `block` on, as [tap, tap_step apart][vector, vector_step apart][lane].
  RF_INLINE_METHOD void write(int64_t k, int64_t block, int vectors, const A* sums, int64_t tap_step, int64_t vector_step) const {
    const int64_t base = k * layout.stride_k + block * L * layout.stride_c;
    if (neighbours) {
      const int64_t channels = min64(vectors * L, g.c - block * L);
      if (!is_unrounded<T>(layout)) return turn_taps(static_cast<T*>(dweight) + base, channels, sums, tap_step, vector_step);
      if (!streamed) return turn_taps(static_cast<A*>(dweight) + base, channels, sums, tap_step, vector_step);
      alignas(64) A lines[2 * L * kMostStreamedTaps];
      turn_taps(lines, channels, sums, tap_step, vector_step);
      for (int64_t i = 0; i < channels * g.r * g.s; i += L) stream(static_cast<A*>(dweight) + base + i, load(lines + i));
      return;
    }
    for (int64_t r = 0; r < g.r; ++r)
      for (int64_t s = 0; s < g.s; ++s, sums += tap_step)  // neighbours in memory one after the other
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = base + r * layout.stride_r + s * layout.stride_s + v * L * layout.stride_c;
          const Vec<A> sum = load(sums + v * vector_step);
          if (streamed)
            stream(static_cast<A*>(dweight) + at, sum);
          else
            write_weight<T>(dweight, layout.is_acc, at, layout.stride_c, sum, min64(L, g.c - (block + v) * L));
        }
  }
  // At the end of a task.
  void finish() const {
    if (streamed) stream_fence();
  }

 private:
  // dweight goes past the caches, in whole lines: it is not read before the optimizer's step, and by then gone from them.
  static constexpr int64_t kStreamedBytes = int64_t(1) << 20, kMostStreamedTaps = 25;

  const ConvGeometry& g;
  const WeightLayout& layout;
  void* const dweight;
  const bool neighbours;  // a channel's taps are, as in NCHW
  const bool streamed;

  bool can_stream() const {
    const int64_t taps = g.r * g.s, line = 64 / int64_t(sizeof(A));
    const bool lines = neighbours ? taps <= kMostStreamedTaps
                                  : layout.stride_c == 1 && (g.r == 1 || layout.stride_r % line == 0) &&
                                        (g.s == 1 || layout.stride_s % line == 0);
    return kCanStream<A> && is_unrounded<T>(layout) && lines && g.c % line == 0 && layout.stride_k % line == 0 &&
           reinterpret_cast<uintptr_t>(dweight) % 64 == 0 && g.k * g.c * taps * int64_t(sizeof(A)) >= kStreamedBytes;
  }

  // One channel after the other, each with all its taps.
  template <typename S>
  RF_INLINE_METHOD void turn_taps(S* to, int64_t channels, const A* sums, int64_t tap_step, int64_t vector_step) const {
    for (; channels > 0; channels -= L, to += L * g.r * g.s, sums += vector_step)
      turn_vector(to, min64(L, channels), sums, tap_step);
  }
  template <typename S> RF_INLINE_METHOD void turn_vector(S* to, int64_t lanes, const A* sums, int64_t tap_step) const {
    const int64_t taps = g.r * g.s;
    for (int64_t first = 0; first < taps; first += L) {
      const int n = int(min64(L, taps - first));
#if RF_LEVEL >= 1
      if constexpr (sizeof(A) == sizeof(float))
        if (n > 2) {
          Row rows[L];
#pragma GCC unroll 16
          for (int64_t i = 0; i < L; ++i) rows[i] = i < n ? (Row)load(sums + (first + i) * tap_step) : Row{};
          transpose(rows);
#pragma GCC unroll 16
          for (int64_t lane = 0; lane < L; ++lane)
            if (lane < lanes) {
              if (n == L)
                store(to + lane * taps + first, (vfloat)rows[lane]);
              else
                store_partial(to + lane * taps + first, (vfloat)rows[lane], n);
            }
          continue;
        }
#endif
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t tap = first; tap < first + n; ++tap) store1(to + lane * taps + tap, sums[tap * tap_step + lane]);
    }
  }
};

}  // namespace RF_VARIANT
}  // namespace resnet_fused
