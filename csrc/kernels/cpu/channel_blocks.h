// How the element-wise and per-channel kernels walk an activation [pixels, channels]: work units of a size that depends on the
// shape only, tiles of pixels that stay in the L1 cache, and blocks of a few vectors of channels, whose constants and
// accumulators stay in registers while a loop runs over a tile's pixels.
#pragma once

#include "../cpu_kernels.h"
#include "simd.h"

namespace resnet_fused {
namespace RF_VARIANT {

constexpr int64_t kTilePixels = 64;
constexpr int64_t kGroupChannels = 256;                      // channels of a work unit
constexpr int64_t kMaxGroupChannels = 2 * kGroupChannels;    // the last one takes the rest too
constexpr int64_t kUnitBytes = 128 << 10;                    // of one tensor, at most
constexpr int64_t kUnitTiles = 16;                           // at most: a unit sums in acc, its total in double
// Accumulators of a group: a slot for every channel and, for the last block of for_each_block, one more vector.
constexpr int64_t kGroupSlots = kMaxGroupChannels + RF_VECTOR_BYTES / 4;

// V vectors of channels, or, where there are fewer channels than lanes, the first `lanes` lanes of one.
template <int kVectors, bool kPartial> struct Block {
  static constexpr int V = kVectors;
  int lanes;  // of a partial block

  template <typename T> Vec<Acc<T>> load(const T* p, int v) const {
    if constexpr (kPartial) return load_partial(p, lanes);
    else return RF_VARIANT::load(p + v * kLanes<Acc<T>>);
  }
  template <typename T> void store(T* p, int v, Vec<Acc<T>> value) const {
    if constexpr (kPartial) store_partial(p, value, lanes);
    else RF_VARIANT::store(p + v * kLanes<Acc<T>>, value);
  }
};

// Calls f(block, channel, slot) for blocks of at most kMax vectors that cover [0, channels). The last one may begin inside
// the one before it: what it computes twice is the same both times, but accumulators must not meet, so they are
// addressed by slot: one after the other for channels in order, without the overlap.
template <typename A, int kMax, typename F> RF_INLINE void for_each_block(int64_t channels, const F& f) {
  constexpr int64_t L = kLanes<A>;
  if (channels < L) {
    f(Block<1, true>{static_cast<int>(channels)}, 0, 0);
    return;
  }
  int64_t c = 0;
  for (; c + kMax * L <= channels; c += kMax * L) f(Block<kMax, false>{}, c, c);
  if constexpr (kMax > 2) {
    if (c + 2 * L <= channels) {
      f(Block<2, false>{}, c, c);
      c += 2 * L;
    }
  }
  if constexpr (kMax > 1) {
    if (c + L <= channels) {
      f(Block<1, false>{}, c, c);
      c += L;
    }
  }
  if (c < channels) f(Block<1, false>{}, channels - L, c);
}

// Vectors of a block where two accumulators and some constants per vector have to stay in registers.
constexpr int kBlockVectors = RF_VECTOR_REGISTERS >= 32 ? 4 : 2;
// Pixels a loop takes at once, so that a narrow block has several accumulators too.
template <int V> constexpr int kUnroll = V >= kBlockVectors ? 1 : kBlockVectors / V;

// Where a channel's accumulator is.
template <typename A> RF_INLINE int64_t slot_of(int64_t channel, int64_t channels) {
  const int64_t whole = channels / kLanes<A> * kLanes<A>;
  return channel < whole || whole == 0 ? channel : whole + channel - (channels - kLanes<A>);
}

// Work units: pixel ranges times groups of channels.
struct Units {
  int64_t pixels, channels, groups, unit_pixels, ranges;

  int64_t count() const { return ranges * groups; }
  int64_t range(int64_t unit) const { return unit / groups; }
  int64_t first_pixel(int64_t unit) const { return range(unit) * unit_pixels; }
  int64_t last_pixel(int64_t unit) const {
    const int64_t end = first_pixel(unit) + unit_pixels;
    return end < pixels ? end : pixels;
  }
  int64_t first_channel(int64_t unit) const { return unit % groups * kGroupChannels; }
  int64_t group_channels(int64_t unit) const {
    return unit % groups == groups - 1 ? channels - first_channel(unit) : kGroupChannels;
  }
};

template <typename T> RF_INLINE Units make_units(int64_t pixels, int64_t channels) {
  Units units;
  units.pixels = pixels;
  units.channels = channels;
  units.groups = channels < kGroupChannels ? 1 : channels / kGroupChannels;
  const int64_t width = channels < kGroupChannels ? channels : kGroupChannels;
  const int64_t tiles = kUnitBytes / (width * static_cast<int64_t>(sizeof(T)) * kTilePixels);
  units.unit_pixels = kTilePixels * (tiles < 1 ? 1 : tiles > kUnitTiles ? kUnitTiles : tiles);
  units.ranges = divide_up(pixels, units.unit_pixels);
  return units;
}

// Sums of the units, in the order of the units and in double, a few channels per task.
constexpr int64_t kReduceChannels = 64;

// partial: [ranges, 2, channels] -> sums [2, channels], row 1 times factor[channel] (invstd).
template <typename A> struct SumReduction {
  const A* partial;
  int64_t ranges, channels;
  const A* factor;
  A* sums;

  static void task(int64_t index, void* context) {
    const SumReduction& r = *static_cast<const SumReduction*>(context);
    const int64_t c0 = index * kReduceChannels;
    const int64_t n = r.channels - c0 < kReduceChannels ? r.channels - c0 : kReduceChannels;
    for (int row = 0; row < 2; ++row) {
      double total[kReduceChannels] = {};
      for (int64_t u = 0; u < r.ranges; ++u) {
        const A* p = r.partial + (2 * u + row) * r.channels + c0;
        for (int64_t c = 0; c < n; ++c) total[c] += p[c];
      }
      for (int64_t c = 0; c < n; ++c)
        r.sums[row * r.channels + c0 + c] = static_cast<A>(row == 0 ? total[c] : total[c] * r.factor[c0 + c]);
    }
  }
};

// Runs a reduction's tasks over all channels; on this thread where that is faster than waking the others.
template <typename Reduction> RF_INLINE void reduce(Reduction& reduction, const Parallel& parallel) {
  const int64_t tasks = divide_up(reduction.channels, kReduceChannels);
  if (reduction.ranges * reduction.channels >= 1 << 15) {
    parallel.run(tasks, &Reduction::task, &reduction);
  } else {
    for (int64_t i = 0; i < tasks; ++i) Reduction::task(i, &reduction);
  }
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
