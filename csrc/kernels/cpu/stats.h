// Mean and sum of squared deviations of a work unit, and their merge over all units.
#pragma once

#include <math.h>

#include "channel_blocks.h"

namespace resnet_fused {
namespace RF_VARIANT {

// A unit's (count, mean, M2), as deviations from a centre near the mean: at mean 1e6 and deviation 1 the mean alone would be
// known to 0.06 only, and with it M2.
template <typename A> struct UnitStats {
  int64_t count = 0;
  A center[kGroupSlots];
  A sum[kGroupSlots];  // of x - center
  A m2[kGroupSlots];
};

// total[v] = sum over the tile's pixels of term(value, v). Sums of 16 pixels, then of those: adding 64 numbers one after the
// other in fp32 would lose more than torch.var does.
constexpr int64_t kChunkPixels = 16;

template <typename T, typename B, typename F>
RF_INLINE void sum_tile(const T* x, int64_t stride, int64_t pixels, const B& block, Vec<Acc<T>>* total, const F& term) {
  typedef Vec<Acc<T>> V;
  constexpr int U = kUnroll<B::V>;
  for (int v = 0; v < B::V; ++v) total[v] = V{};
  for (int64_t begin = 0; begin < pixels; begin += kChunkPixels) {
    const int64_t end = pixels - begin < kChunkPixels ? pixels : begin + kChunkPixels;
    V sum[U][B::V] = {};
    int64_t p = begin;
    for (; p + U <= end; p += U)
      for (int u = 0; u < U; ++u)
        for (int v = 0; v < B::V; ++v) sum[u][v] += term(block.load(x + (p + u) * stride, v), v);
    for (; p < end; ++p)
      for (int v = 0; v < B::V; ++v) sum[0][v] += term(block.load(x + p * stride, v), v);
    for (int v = 0; v < B::V; ++v) {
      for (int u = 1; u < U; ++u) sum[0][v] += sum[u][v];
      total[v] += sum[0][v];
    }
  }
}

// Adds a tile to a block's slots. `x` is its first channel, in L1; `count` is what the slots hold before.
template <typename T, typename B>
void add_tile(const T* x, int64_t stride, int64_t pixels, int64_t count, Acc<T>* center_slots, Acc<T>* sum_slots,
              Acc<T>* m2_slots, B block) {
  typedef Acc<T> A;
  typedef Vec<A> V;
  constexpr int L = kLanes<A>;
  const A n = static_cast<A>(pixels);
  const V inverse = splat<A>(A(1) / n);
  V center[B::V], sum[B::V], squares[B::V], offset[B::V];
  if (count == 0) {
    sum_tile(x, stride, pixels, block, sum, [](V value, int) { return value; });
    for (int v = 0; v < B::V; ++v) {
      const V mean = sum[v] * inverse;
      center[v] = select<V>(mean - mean == V{}, mean, V{});  // an infinite mean stays one instead of becoming NaN
      store(center_slots + v * L, center[v]);
    }
  } else {
    for (int v = 0; v < B::V; ++v) center[v] = load(center_slots + v * L);
  }
  sum_tile(x, stride, pixels, block, sum, [&](V value, int v) { return value - center[v]; });
  for (int v = 0; v < B::V; ++v) offset[v] = sum[v] * inverse;
  sum_tile(x, stride, pixels, block, squares, [&](V value, int v) {
    const V d = value - center[v] - offset[v];
    return d * d;
  });
  for (int v = 0; v < B::V; ++v) {
    V m2 = squares[v];
    if (count > 0) {
      // Chan, Golub and LeVeque 1979, with the sums kept instead of the means: an infinite sum then stays one.
      const A before = static_cast<A>(count);
      const V old = load(sum_slots + v * L);
      const V delta = offset[v] - old * splat<A>(A(1) / before);
      m2 += load(m2_slots + v * L) + delta * delta * splat<A>(before * n / (before + n));
      sum[v] += old;
    }
    store(sum_slots + v * L, sum[v]);
    store(m2_slots + v * L, m2);
  }
}

template <typename T, typename B>
RF_INLINE void add_tile(const T* x, int64_t stride, int64_t pixels, UnitStats<Acc<T>>& stats, int64_t slot, B block) {
  add_tile(x, stride, pixels, stats.count, stats.center + slot, stats.sum + slot, stats.m2 + slot, block);
}

// partial: [ranges, 3, channels]: centre, sum of deviations from it, M2.
template <typename A>
RF_INLINE void write_partial(const UnitStats<A>& stats, A* partial, const Units& units, int64_t unit) {
  A* out = partial + units.range(unit) * 3 * units.channels + units.first_channel(unit);
  const int64_t channels = units.group_channels(unit);
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t slot = slot_of<A>(c, channels);
    out[c] = stats.center[slot];
    out[units.channels + c] = stats.sum[slot];
    out[2 * units.channels + c] = stats.m2[slot];
  }
}

// The units' means and M2 -> stats [2, channels], in two passes over the (few) units and in double.
template <typename A> struct StatsReduction {
  const A* partial;
  int64_t ranges, channels, pixels, unit_pixels;
  A* stats;

  int64_t count(int64_t range) const {
    const int64_t rest = pixels - range * unit_pixels;
    return rest < unit_pixels ? rest : unit_pixels;
  }

  static void task(int64_t index, void* context) {
    const StatsReduction& r = *static_cast<const StatsReduction*>(context);
    const int64_t c0 = index * kReduceChannels;
    const int64_t n = r.channels - c0 < kReduceChannels ? r.channels - c0 : kReduceChannels;
    double mean[kReduceChannels] = {}, m2[kReduceChannels] = {};
    for (int64_t u = 0; u < r.ranges; ++u) {
      const A* center = r.partial + 3 * u * r.channels + c0;
      const A* sum = center + r.channels;
      const double count = static_cast<double>(r.count(u));
      for (int64_t c = 0; c < n; ++c) mean[c] += count * center[c] + sum[c];
    }
    for (int64_t c = 0; c < n; ++c) mean[c] /= static_cast<double>(r.pixels);
    for (int64_t u = 0; u < r.ranges; ++u) {
      const A* center = r.partial + 3 * u * r.channels + c0;
      const A* sum = center + r.channels;
      const A* unit_m2 = sum + r.channels;
      const double count = static_cast<double>(r.count(u));
      for (int64_t c = 0; c < n; ++c) {
        const double delta = center[c] - mean[c] + sum[c] / count;
        m2[c] += unit_m2[c] + delta * delta * count;
      }
    }
    for (int64_t c = 0; c < n; ++c) {
      r.stats[c0 + c] = static_cast<A>(mean[c]);
      r.stats[r.channels + c0 + c] = static_cast<A>(m2[c]);
    }
  }
};

}  // namespace RF_VARIANT
}  // namespace resnet_fused
