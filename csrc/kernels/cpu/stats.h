// Mean and sum of squared deviations of a work unit, and their merge over all units.
#pragma once

#include <math.h>

#include "channel_blocks.h"

namespace resnet_fused {
namespace RF_VARIANT {

// A unit's (count, mean, M2), as deviations from a centre near the mean: at mean 1e6 and deviation 1 the mean
// alone would be known to 0.06 only, and with it M2.
template <typename A> struct UnitStats {
  int64_t count = 0;
  A center[kGroupSlots];
  A sum[kGroupSlots];  // of x - center
  A m2[kGroupSlots];
};

// total[v] = sum over the tile's rows of term(value, v): 16 rows at a time in eight vectors of accumulators,
// which are added pairwise. Adding 64 numbers one after the other in fp32 would lose more than torch.var
// does.
constexpr int64_t kChunkRows = 16;

template <typename T, typename B, typename F>
RF_INLINE void sum_tile(const T* x, int64_t stride, int64_t rows, const B& block, Vec<Acc<T>>* total,
                        const F& term) {
  typedef Vec<Acc<T>> V;
  constexpr int N = B::kCount;
  constexpr int U = 8 / N;
  static_assert(U == 2 || U == 4 || U == 8);
  for (int v = 0; v < N; ++v) total[v] = V{};
  for (int64_t begin = 0; begin < rows; begin += kChunkRows) {
    const int64_t end = rows - begin < kChunkRows ? rows : begin + kChunkRows;
    V sum[U][N] = {};
    int64_t p = begin;
    for (; p + U <= end; p += U)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        V values[N];
        block.load(x + (p + u) * stride, values);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) sum[u][v] += term(values[v], v);
      }
    for (; p < end; ++p) {
      V values[N];
      block.load(x + p * stride, values);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sum[0][v] += term(values[v], v);
    }
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      if constexpr (U == 8) {
        total[v] += ((sum[0][v] + sum[4][v]) + (sum[1][v] + sum[5][v])) +
                    ((sum[2][v] + sum[6][v]) + (sum[3][v] + sum[7][v]));
      } else if constexpr (U == 4) {
        total[v] += (sum[0][v] + sum[2][v]) + (sum[1][v] + sum[3][v]);
      } else {
        total[v] += sum[0][v] + sum[1][v];
      }
    }
  }
}

// An infinite mean as a centre would make every deviation NaN, and the mean with it.
template <typename V> RF_INLINE V finite_or_zero(V value) {
  return select<V>(value - value == V{}, value, V{});
}

// Adds a tile to a block's slots. `x` is its first channel, in L1; `count` is what the slots hold before.
template <typename T, typename B>
void add_tile(const T* x, int64_t stride, int64_t rows, int64_t count, Acc<T>* center_slots,
              Acc<T>* sum_slots, Acc<T>* m2_slots, B block) {
  typedef Acc<T> A;
  typedef Vec<A> V;
  constexpr int N = B::kCount;
  const A n = static_cast<A>(rows);
  // sum / n to the last bit: in a constant channel every mean below must be exact, or M2 would not be 0.
  const auto over_n = [n, rows](V value) {
    return rows == kTileRows ? value * splat<A>(A(1) / kTileRows) : value / splat<A>(n);
  };
  V center[N], sum[N], offset[N], mean[N], m2[N];
  if (count == 0) {
    sum_tile(x, stride, rows, block, sum, [](V value, int) { return value; });
    for (int v = 0; v < N; ++v) center[v] = finite_or_zero(over_n(sum[v]));
  } else {
    block.load_slots(center_slots, center);
  }
  sum_tile(x, stride, rows, block, sum, [&](V value, int v) { return value - center[v]; });
  for (int v = 0; v < N; ++v) {
    offset[v] = over_n(sum[v]);
    mean[v] = center[v] + offset[v];
  }
  sum_tile(x, stride, rows, block, m2, [&](V value, int v) {
    const V deviation = value - mean[v];
    return deviation * deviation;
  });
  V old_sum[N], old_m2[N];
  if (count > 0) {
    block.load_slots(sum_slots, old_sum);
    block.load_slots(m2_slots, old_m2);
  }
  for (int v = 0; v < N; ++v) {
    // The deviations were taken from the rounded mean: take n times the square of its error away. Not below
    // 0; and where both overflowed, M2 is infinite as the variance is.
    const V error = offset[v] - (mean[v] - center[v]);
    const V corrected = m2[v] - error * error * splat<A>(n);
    m2[v] = select<V>(corrected >= V{}, corrected, select<V>(corrected < V{}, V{}, m2[v]));
    if (count > 0) {
      // Chan, Golub and LeVeque 1979, with the sums kept instead of the means: an infinite sum then stays
      // one.
      const A before = static_cast<A>(count);
      const V delta = offset[v] - old_sum[v] * splat<A>(A(1) / before);
      m2[v] += old_m2[v] + delta * delta * splat<A>(before * n / (before + n));
      sum[v] += old_sum[v];
    } else {
      // The centre of the tiles that follow is this tile's mean, more exact than the first sum was.
      center[v] = finite_or_zero(mean[v]);
      sum[v] = select<V>(center[v] == mean[v], error * splat<A>(n), sum[v]);
    }
  }
  if (count == 0) block.store_slots(center_slots, center);
  block.store_slots(sum_slots, sum);
  block.store_slots(m2_slots, m2);
}

template <typename T, typename B>
RF_INLINE void add_tile(const T* x, int64_t stride, int64_t rows, UnitStats<Acc<T>>& stats, int64_t slot,
                        B block) {
  add_tile(x, stride, rows, stats.count, stats.center + slot, stats.sum + slot, stats.m2 + slot, block);
}

// partial: [ranges, 3, columns]: centre, sum of deviations from it, M2.
template <typename T>
RF_INLINE void write_partial(const UnitStats<Acc<T>>& stats, Acc<T>* partial, const Units& units,
                             const Unit& unit) {
  Acc<T>* out = partial + unit.range * 3 * units.columns + unit.first_column;
  scatter_slots<T>(stats.center, unit.columns, out);
  scatter_slots<T>(stats.sum, unit.columns, out + units.columns);
  scatter_slots<T>(stats.m2, unit.columns, out + 2 * units.columns);
}

// The units' means and M2 -> stats [2, channels], in two passes over the (few) partial results and in double.
template <typename A> struct StatsReduction {
  Partials<3, A> partials;
  int64_t channels, pixels;
  A* stats;

  static void task(int64_t index, void* context) {
    const StatsReduction& r = *static_cast<const StatsReduction*>(context);
    const int64_t c0 = index * kReduceChannels;
    const int64_t n = r.channels - c0 < kReduceChannels ? r.channels - c0 : kReduceChannels;
    const int64_t count = r.partials.count();
    double mean[kReduceChannels] = {}, m2[kReduceChannels] = {};
    for (int64_t i = 0; i < count; ++i) {
      const A* center = r.partials.row(i) + c0;
      const A* sum = center + r.partials.stride(i);
      const double pixels = static_cast<double>(r.partials.pixels(i));
      for (int64_t c = 0; c < n; ++c) mean[c] += pixels * center[c] + sum[c];
    }
    for (int64_t c = 0; c < n; ++c) mean[c] /= static_cast<double>(r.pixels);
    for (int64_t i = 0; i < count; ++i) {
      const A* center = r.partials.row(i) + c0;
      const A* sum = center + r.partials.stride(i);
      const A* unit_m2 = sum + r.partials.stride(i);
      const double pixels = static_cast<double>(r.partials.pixels(i)), inverse = 1.0 / pixels;
      for (int64_t c = 0; c < n; ++c) {
        const double delta = center[c] - mean[c] + sum[c] * inverse;
        m2[c] += unit_m2[c] + delta * delta * pixels;
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
