// Rows of pixels in tiles: the register tile of the convolution kernels, or, where the CPU has matrix tiles, 32 pixels in those.
#pragma once

#include "conv_tile.h"
#include "matrix_tiles.h"

namespace resnet_fused {
namespace RF_VARIANT {

// Splits n pixels into tiles of nearly equal size: first pixel of tile i of `tiles`.
RF_INLINE int64_t split_begin(int64_t n, int64_t tiles, int64_t i) {
  const int64_t rest = n % tiles;
  return i * (n / tiles) + (i < rest ? i : rest);
}

// Whether the matrix tiles multiply `units` units of channels under a tap. With fewer they would be mostly empty.
template <typename M> RF_INLINE bool uses_matrix_tiles(int64_t units) {
  return RF_LEVEL >= 4 && M::kUnitChannels == 2 && units >= 2;
}

// Pixels that a tile takes at most.
template <typename M> RF_INLINE int64_t tile_pixels(int64_t units) { return uses_matrix_tiles<M>(units) ? 32 : kTilePixels; }

// Units of ModeBf16Pair that a tile may read behind the pixels that it is given: a run's.
constexpr int64_t kOverreadUnits = RF_LEVEL >= 4 ? 16 * 16 : 0;

// Where rows of pixels are read and what they become.
template <typename M> struct PixelRows {
  const typename M::Unit* in;  // of the first row
  int64_t in_row;              // units from one row to the next
  int64_t pixel, pixel_row;    // place in the output, and from one row to the next
  int64_t rows, cols;
};

#if RF_LEVEL >= 4
constexpr int64_t kTilePitch = kBlock<ModeBf16Pair>;  // units from one pixel in a row to the next

// Two runs of 16 slots of the input, from (row, col) on. A run goes on in the next row, where slots of no pixel lie between them,
// if that takes fewer tiles than runs which end with their row.
template <typename M> class SlotRuns {
 public:
  struct Run {
    int64_t row, col;
  };
  explicit SlotRuns(const PixelRows<M>& p) : p_(p), pitch_(p.in_row / kTilePitch) {
    const int64_t slots = (p.rows - 1) * pitch_ + p.cols, of_rows = p.rows * ((p.cols + kTileRows - 1) / kTileRows);
    through_ = p.in_row % kTilePitch == 0 && (slots + kTileRows - 1) / kTileRows < of_rows;
  }
  bool next(Run& run) {
    if (at_.row >= p_.rows) return false;
    run = at_;
    at_.col += kTileRows;
    if (!through_) {
      if (at_.col >= p_.cols) at_ = {at_.row + 1, 0};
      return true;
    }
    while (at_.col >= pitch_) at_ = {at_.row + 1, at_.col - pitch_};
    if (at_.col >= p_.cols) at_ = {at_.row + 1, 0};  // the slots between two rows
    return true;
  }
  RF_INLINE_METHOD const uint32_t* in(const Run& run) const { return p_.in + run.row * p_.in_row + run.col * kTilePitch; }
  // Calls pixels(slot of the run, row, col, count) for what belongs to a pixel.
  template <typename F> RF_INLINE_METHOD void each(Run run, const F& pixels) const {
    for (int64_t slot = 0; slot < kTileRows && run.row < p_.rows; slot += pitch_ - p_.cols) {
      const int64_t left = kTileRows - slot, count = p_.cols - run.col < left ? p_.cols - run.col : left;
      pixels(slot, run.row, run.col, count);
      if (!through_) break;
      slot += count;
      run = {run.row + 1, 0};
    }
  }

 private:
  const PixelRows<M>& p_;
  const int64_t pitch_;
  bool through_;
  Run at_ = {0, 0};
};

// sums[32 pixels][NV vectors], the pixels being `distance` units apart after the 16th.
template <typename M, int NV, typename Advance>
__attribute__((noinline)) void conv_matrix_tile(const TileInput<M>& t, const uint32_t* in, int64_t distance, const uint32_t* w,
                                                float* sums, const Advance& advance) {
  constexpr int64_t L = kLanes<float>, kLeftStep = kTilePitch * 4, kRightStep = NV * L * 4;
  const int64_t units = t.in_units < kTileUnits ? t.in_units : kTileUnits;
  zero_tiles();
  bool copy = false;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint32_t* a = in + t.tap_offsets[tap];
    for (int64_t unit = 0; unit < t.in_units; unit += units, a += t.block_stride, w += units * NV * L) {
      advance();
      if (NV == 2 || !copy)
        multiply_tiles<NV, 0>(a, a + distance, kLeftStep, w, w + L, kRightStep);
      else
        multiply_tiles<NV, 1>(a, a + distance, kLeftStep, w, w + L, kRightStep);
      copy = !copy;
    }
  }
  store_tiles<NV>(sums);
}

// The epilogue of `count` <= 16 pixels, whose sums are there.
template <typename M, int NV, typename Epilogue>
__attribute__((noinline)) void finish_pixels(const float* sums, const Epilogue& epilogue, int64_t channel, int64_t pixel,
                                             int64_t done, int64_t count) {
  const auto finish = [&](auto number) __attribute__((always_inline)) {
    constexpr int NP = decltype(number)::value;
    vfloat acc[NP][NV];
    for_each_sum(acc, [&](vfloat& sum, int i) __attribute__((always_inline)) { sum = load(sums + i * kLanes<float>); });
    finish_tile<M, NP, NV>(acc, epilogue, channel, pixel, done);
    sums += NP * NV * kLanes<float>;
    pixel += NP * epilogue.pixel_step;
    done += NP;
  };
  if (count == kTileRows) return finish(Number<kTileRows>{});
  if (count >= 8) finish(Number<8>{});
  switch (count % 8) {
    case 1: return finish(Number<1>{});
    case 2: return finish(Number<2>{});
    case 3: return finish(Number<3>{});
    case 4: return finish(Number<4>{});
    case 5: return finish(Number<5>{});
    case 6: return finish(Number<6>{});
    case 7: return finish(Number<7>{});
  }
}

template <typename M, int NV, typename Epilogue, typename Advance>
static void convolve_in_matrix_tiles(const TileInput<M>& t, const PixelRows<M>& p, const uint32_t* w, const Epilogue& epilogue,
                                     int64_t channel, int64_t done, const Advance& advance) {
  constexpr int64_t kHalf = kTileRows * NV * kLanes<float>;
  typedef typename SlotRuns<M>::Run Run;
  SlotRuns<M> slots(p);
  alignas(64) float sums[2 * kHalf];
  for (Run run[2]; slots.next(run[0]);) {
    const int runs = slots.next(run[1]) ? 2 : 1;
    const uint32_t* const in = slots.in(run[0]);
    conv_matrix_tile<M, NV>(t, in, runs == 2 ? slots.in(run[1]) - in : 0, w, sums, advance);
    for (int i = 0; i < runs; ++i) {
      advance();
      slots.each(run[i], [&](int64_t slot, int64_t row, int64_t col, int64_t count) {
        finish_pixels<M, NV>(sums + i * kHalf + slot * NV * kLanes<float>, epilogue, channel,
                             p.pixel + row * p.pixel_row + col * epilogue.pixel_step, done, count);
        done += count;
      });
    }
  }
}
#endif

// How often convolve_rows calls advance() for each tile.
template <typename M> RF_INLINE int64_t advances_per_tile(int64_t taps, int64_t units) {
#if RF_LEVEL >= 4
  if (uses_matrix_tiles<M>(units)) return taps * ((units + kTileUnits - 1) / kTileUnits) + 2;
#else
  (void)taps;
  (void)units;
#endif
  return 1;
}

// All of these pixels and `vectors` vectors of output channels from `channel` on. Between begin_convolution and end_convolution.
// done: pixels of these channels that the epilogue has had before; advance(): called while tiles are computed, see advances_per_tile.
template <typename M, typename Epilogue, typename Advance>
RF_INLINE void convolve_rows(const TileInput<M>& t, const PixelRows<M>& p, const typename M::Unit* w, const Epilogue& epilogue,
                             int64_t channel, int vectors, int64_t done, const Advance& advance) {
#if RF_LEVEL >= 4
  if constexpr (M::kUnitChannels == 2)
    if (uses_matrix_tiles<M>(t.in_units))
      return vectors == 2 ? convolve_in_matrix_tiles<M, 2>(t, p, w, epilogue, channel, done, advance)
                          : convolve_in_matrix_tiles<M, 1>(t, p, w, epilogue, channel, done, advance);
#endif
  const int64_t tiles = (p.cols + kTilePixels - 1) / kTilePixels;
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = split_begin(p.cols, tiles, i);
      const int np = int(split_begin(p.cols, tiles, i + 1) - begin);
      advance();
      conv_tile_of<M, Epilogue>(np, vectors)(t, p.in + row * p.in_row + begin * kBlock<M>, w, epilogue, channel,
                                             p.pixel + row * p.pixel_row + begin * epilogue.pixel_step, done);
      done += np;
    }
}

// Around convolve_rows, in each task: the calling thread's matrix tiles, if it uses them. No destructor: a task's exception would
// need the compiler's tables, which all levels would share.
template <typename M> RF_INLINE void begin_convolution(int64_t units) {
#if RF_LEVEL >= 4
  if (uses_matrix_tiles<M>(units)) use_tiles(units < kTileUnits ? units : kTileUnits);
#else
  (void)units;
#endif
}
template <typename M> RF_INLINE void end_convolution(int64_t units) {
#if RF_LEVEL >= 4
  if (uses_matrix_tiles<M>(units)) _tile_release();
#else
  (void)units;
#endif
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
