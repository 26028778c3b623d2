// How the element-wise and per-channel kernels walk an activation [pixels, channels]: rows of one pixel or,
// where a pixel has few channels, of several; work units of a size that depends on the shape only; and in a
// unit, blocks of a few vectors of channels, whose constants and accumulators stay in registers while a loop
// runs over rows.
#pragma once

#include "../cpu_kernels.h"
#include "simd.h"

namespace resnet_fused {
namespace RF_VARIANT {

constexpr int64_t kTileRows = 64;                          // a tile is what statistics are taken of in one go
constexpr int64_t kGroupChannels = 256;                    // columns of a work unit
constexpr int64_t kMaxGroupChannels = 2 * kGroupChannels;  // the last one takes the rest too
constexpr int64_t kUnitBytes = 128 << 10;                  // of one tensor, at most
constexpr int64_t kUnitTiles = 16;                         // at most: a unit sums in acc, its total in double
// Where a row is several blocks, so much of each tensor is gone through block by block: more is strided access
// to memory, three times slower with AVX2's narrow blocks (64 channels in 16 MB tensors); less loads constants
// and accumulators too often (256 channels with AVX-512).
constexpr int64_t kStepBytes = RF_VECTOR_BYTES >= 64 ? 4096 : 512;
// Vectors of a block: two accumulators and some constants for each have to stay in registers.
constexpr int kBlockVectors = RF_VECTOR_REGISTERS >= 32 ? 4 : 2;
// Rows a loop takes at once, so that a narrow block has several accumulators too.
template <int V> constexpr int kUnroll = V >= kBlockVectors ? 1 : kBlockVectors / V;

template <int kValue> struct Int {
  static constexpr int value = kValue;
};

// kVectors vectors of channels or, where there are fewer channels than lanes, the first `lanes` lanes of one.
//
// Two vectors of bf16 are read as one of 32-bit words: the even channels are the words shifted left, the odd
// ones the words masked. That is half the work of widening them in order, and of narrowing them. Whatever
// belongs to a channel is therefore kept by slot, the order of the lanes (channel_of_slot).
template <typename T, int kVectors, bool kPartial> struct Block {
  typedef Acc<T> A;
  typedef Vec<A> V;
  static constexpr int kCount = kVectors;
  static constexpr bool kPairs = sizeof(T) == 2 && kVectors % 2 == 0;
  int lanes;  // of a partial block

  void load(const T* p, V* values) const {
    constexpr int L = kLanes<A>;
    if constexpr (kPartial) {
      values[0] = load_partial(p, lanes);
    } else if constexpr (kPairs) {
      for (int v = 0; v < kVectors; v += 2) {
        vuint32 words;
        memcpy(&words, p + v * L, sizeof words);
        values[v] = (vfloat)(words << 16);
        values[v + 1] = (vfloat)(words & 0xffff0000u);
      }
    } else {
      for (int v = 0; v < kVectors; ++v) values[v] = RF_VARIANT::load(p + v * L);
    }
  }

  // Leaves in `values` what is read back.
  void store(T* p, V* values) const {
    constexpr int L = kLanes<A>;
    if constexpr (kPairs) {
      for (int v = 0; v < kVectors; v += 2) {
        const vuint32 even = bf16_bits(values[v]), odd = bf16_bits(values[v + 1]) & 0xffff0000u;
        const vuint32 words = even >> 16 | odd;
        memcpy(p + v * L, &words, sizeof words);
        values[v] = (vfloat)(even & 0xffff0000u);
        values[v + 1] = (vfloat)odd;
      }
    } else {
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kPartial)
          store_partial(p, values[v], lanes);
        else
          RF_VARIANT::store(p + v * L, values[v]);
        values[v] = rounded<T>(values[v]);
      }
    }
  }

  // Slots.
  void load_slots(const A* slots, V* values) const {
    for (int v = 0; v < kVectors; ++v) values[v] = RF_VARIANT::load(slots + v * kLanes<A>);
  }
  void store_slots(A* slots, const V* values) const {
    for (int v = 0; v < kVectors; ++v) RF_VARIANT::store(slots + v * kLanes<A>, values[v]);
  }
};

// Calls f(block, channel, slot) for blocks that cover [0, channels). The last one may begin inside the one
// before it: what it computes a second time is the same, but accumulators must not meet, so slots are counted
// on without the overlap.
template <typename T, typename F> RF_INLINE void for_each_block(int64_t channels, const F& f) {
  constexpr int64_t L = kLanes<Acc<T>>;
  if (channels < L) {
    f(Block<T, 1, true>{static_cast<int>(channels)}, 0, 0);
    return;
  }
  int64_t c = 0;
  for (; c + kBlockVectors * L <= channels; c += kBlockVectors * L) f(Block<T, kBlockVectors, false>{}, c, c);
  if constexpr (kBlockVectors > 2) {
    if (c + 2 * L <= channels) {
      f(Block<T, 2, false>{}, c, c);
      c += 2 * L;
    }
  }
  if (c + L <= channels) {
    f(Block<T, 1, false>{}, c, c);
    c += L;
  }
  if (c < channels) f(Block<T, 1, false>{}, channels - L, c);
}

// Slots of a group at most, and of a group of so many channels.
constexpr int64_t kGroupSlots = kMaxGroupChannels + RF_VECTOR_BYTES / 4;
template <typename T> RF_INLINE int64_t slot_count(int64_t channels) {
  return round_up(channels, int64_t(kLanes<Acc<T>>));
}

// The channel whose lane a slot is, -1 for a lane beyond a partial block.
template <typename T> RF_INLINE int64_t channel_of_slot(int64_t slot, int64_t channels) {
  constexpr int64_t L = kLanes<Acc<T>>;
  if (channels < L) return slot < channels ? slot : -1;
  if (sizeof(T) == 2 && slot < channels / (2 * L) * (2 * L)) {
    const int64_t lane = slot % (2 * L);
    return slot - lane + 2 * (lane % L) + lane / L;
  }
  return slot < channels / L * L ? slot : slot + channels - round_up(channels, L);
}

// Per-channel numbers into the slots of `columns` columns, and the slots' numbers into columns. A row of
// several pixels repeats the channels.
template <typename T, typename A>
RF_INLINE void gather_slots(const A* row, int64_t channels, int64_t columns, A* slots) {
  A repeated[kMaxGroupChannels];
  if (columns > channels) {
    for (int64_t c = 0; c < columns; ++c) repeated[c] = c < channels ? row[c] : repeated[c - channels];
    row = repeated;
  }
  const int64_t count = slot_count<T>(columns);
  for (int64_t s = 0; s < count; ++s) {
    const int64_t c = channel_of_slot<T>(s, columns);
    slots[s] = c < 0 ? A(0) : row[c];
  }
}
template <typename T, typename A> RF_INLINE void scatter_slots(const A* slots, int64_t columns, A* row) {
  const int64_t count = slot_count<T>(columns);
  for (int64_t s = 0; s < count; ++s) {
    const int64_t c = channel_of_slot<T>(s, columns);
    if (c >= 0) row[c] = slots[s];
  }
}

// A run of an activation as a matrix [rows, columns], in work units: ranges of rows times groups of columns.
struct Units {
  int64_t first;          // element
  int64_t channels;       // of the activation
  int64_t rows, columns;  // columns = channels * pixels of a row
  int64_t ranges, range_rows, groups;
  int64_t step;  // rows gone through block by block

  int64_t count() const { return ranges * groups; }
};

// One work unit. A group of columns that is not the whole row is of rows of one pixel.
struct Unit {
  int64_t range, begin, end;  // rows
  int64_t first_column, columns;
  int64_t first_channel;

  Unit(const Units& units, int64_t index) {
    range = index / units.groups;
    begin = range * units.range_rows;
    end = begin + units.range_rows < units.rows ? begin + units.range_rows : units.rows;
    const int64_t group = index % units.groups;
    first_column = first_channel = group * kGroupChannels;
    columns = group == units.groups - 1 ? units.columns - first_column : kGroupChannels;
  }
};

template <typename T>
RF_INLINE Units make_units(int64_t first, int64_t rows, int64_t columns, int64_t channels) {
  Units units;
  units.first = first;
  units.channels = channels;
  units.rows = rows;
  units.columns = columns;
  units.groups = columns < kGroupChannels ? 1 : columns / kGroupChannels;
  const int64_t row_bytes =
      (columns < kGroupChannels ? columns : kGroupChannels) * static_cast<int64_t>(sizeof(T));
  const int64_t tiles = kUnitBytes / (row_bytes * kTileRows);
  units.range_rows = kTileRows * (tiles < 1 ? 1 : tiles > kUnitTiles ? kUnitTiles : tiles);
  units.ranges = divide_up(rows, units.range_rows);
  const bool one_block = columns <= kBlockVectors * kLanes<Acc<T>>;
  units.step = one_block ? kTileRows : row_bytes >= kStepBytes ? 1 : kStepBytes / row_bytes;
  return units;
}

// How many pixels a row should hold, so that it is whole blocks if that is possible, and at least one.
template <typename T> RF_INLINE int64_t pixels_per_row(int64_t channels) {
  constexpr int64_t width = kBlockVectors * kLanes<Acc<T>>;
  for (int64_t n = 1; n * channels <= kGroupChannels; ++n)
    if (n * channels % width == 0) return n;
  return channels < width ? divide_up(width, channels) : 1;
}

// An activation's units: rows of `pixels_of_row` pixels, and the pixels that are left over as rows of one (no
// rows: none).
struct Split {
  Units body, rest;
  int64_t repeats;  // of the channels in a row of the body
};

template <typename T> RF_INLINE Split split(int64_t pixels, int64_t channels, int64_t pixels_of_row) {
  Split s;
  s.repeats = pixels < pixels_of_row ? 1 : pixels_of_row;
  const int64_t rows = pixels / s.repeats;
  s.body = make_units<T>(0, rows, channels * s.repeats, channels);
  s.rest = make_units<T>(rows * s.repeats * channels, pixels - rows * s.repeats, channels, channels);
  return s;
}

// Runs job(units, partial) for both parts; each writes [ranges, kRows, columns] partial results, one after
// the other.
template <int kRows, typename A, typename F>
RF_INLINE void for_both(const Split& s, A* partial, const F& run) {
  run(s.body, partial);
  if (s.rest.rows > 0) run(s.rest, partial ? partial + s.body.ranges * kRows * s.body.columns : nullptr);
}
template <int kRows, typename A> RF_INLINE A* partial_buffer(const Split& s) {
  const int64_t count = s.body.ranges * s.body.columns + s.rest.ranges * s.rest.columns;
  return static_cast<A*>(thread_scratch(kScratchPartial, count * kRows * sizeof(A)));
}

// The partial results of `channels` as a sequence, in a fixed order: for each range of the body every repeat,
// then the rest.
template <int kRows, typename A> struct Partials {
  const A* partial;
  const Split& split;

  int64_t count() const { return split.body.ranges * split.repeats + split.rest.ranges; }
  bool in_body(int64_t i) const { return i < split.body.ranges * split.repeats; }
  int64_t stride(int64_t i) const { return in_body(i) ? split.body.columns : split.rest.columns; }
  const A* row(int64_t i) const {  // row r of it is at r * stride(i)
    const int64_t columns = split.body.columns;
    if (in_body(i))
      return partial + i / split.repeats * kRows * columns + i % split.repeats * split.body.channels;
    return partial + split.body.ranges * kRows * columns +
           (i - split.body.ranges * split.repeats) * kRows * split.rest.columns;
  }
  int64_t pixels(int64_t i) const {
    const Units& units = in_body(i) ? split.body : split.rest;
    const int64_t range = in_body(i) ? i / split.repeats : i - split.body.ranges * split.repeats;
    const int64_t left = units.rows - range * units.range_rows;
    return left < units.range_rows ? left : units.range_rows;
  }
};

// The partial results are added in order and in double, a few channels per task.
constexpr int64_t kReduceChannels = 64;

// [2, columns] partial sums -> sums [2, channels], row 1 times factor[channel] (invstd).
template <typename A> struct SumReduction {
  Partials<2, A> partials;
  int64_t channels;
  const A* factor;
  A* sums;

  static void task(int64_t index, void* context) {
    const SumReduction& r = *static_cast<const SumReduction*>(context);
    const int64_t c0 = index * kReduceChannels;
    const int64_t n = r.channels - c0 < kReduceChannels ? r.channels - c0 : kReduceChannels;
    const int64_t count = r.partials.count();
    double total[2][kReduceChannels] = {};
    for (int64_t i = 0; i < count; ++i)
      for (int row = 0; row < 2; ++row) {
        const A* p = r.partials.row(i) + row * r.partials.stride(i) + c0;
        for (int64_t c = 0; c < n; ++c) total[row][c] += p[c];
      }
    for (int64_t c = 0; c < n; ++c) {
      r.sums[c0 + c] = static_cast<A>(total[0][c]);
      r.sums[r.channels + c0 + c] = static_cast<A>(total[1][c] * r.factor[c0 + c]);
    }
  }
};

// Runs a reduction's tasks over all channels; on this thread where that is faster than waking the others.
template <typename Reduction> RF_INLINE void reduce(Reduction& reduction, const Parallel& parallel) {
  const int64_t tasks = divide_up(reduction.channels, kReduceChannels);
  if (reduction.partials.count() * reduction.channels >= 1 << 15) {
    parallel.run(tasks, &Reduction::task, &reduction);
  } else {
    for (int64_t i = 0; i < tasks; ++i) Reduction::task(i, &reduction);
  }
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
