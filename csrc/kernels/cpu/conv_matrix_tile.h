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

// Whether the matrix tiles multiply `units` units of channels under a tap. A product takes as long for one pair as for 16.
template <typename M> RF_INLINE bool uses_matrix_tiles(int64_t units) {
  return RF_LEVEL >= 4 && M::kUnitChannels == 2 && units >= 4;
}

// Pixels that a tile takes at most.
template <typename M> RF_INLINE int64_t tile_pixels(int64_t units) { return uses_matrix_tiles<M>(units) ? 32 : kTilePixels; }

// Units of ModeBf16Pair that a tile may read behind the pixels that it is given.
constexpr int64_t kOverreadUnits = RF_LEVEL >= 4 ? 32 * 16 : 0;

#if RF_LEVEL >= 4
constexpr int kFinishPixels = 16;  // that the epilogue takes at once

// Two runs of at most 16 pixels, or one of up to 32.
struct PixelRuns {
  const uint32_t* in[2];
  int64_t pixel[2];
  int count[2];
};

// As conv_tile, of 32 pixels.
template <typename M, int NV, typename Epilogue>
__attribute__((noinline)) void conv_matrix_tile(const TileInput<M>& t, const PixelRuns& runs, const uint32_t* w,
                                                const Epilogue& epilogue, int64_t channel, int64_t done) {
  constexpr int64_t B = kBlock<M>, L = kLanes<float>, kLeftStep = B * 4, kRightStep = NV * L * 4;
  zero_tiles();
  const int64_t units = t.in_units < kTileUnits ? t.in_units : kTileUnits, distance = runs.in[1] - runs.in[0];
  bool copy = false;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint32_t* a = runs.in[0] + t.tap_offsets[tap];
    for (int64_t unit = 0; unit < t.in_units; unit += units, a += t.block_stride, w += units * NV * L) {
      if (NV == 2 || !copy)
        multiply_tiles<NV, 0>(a, a + distance, kLeftStep, w, w + L, kRightStep);
      else
        multiply_tiles<NV, 1>(a, a + distance, kLeftStep, w, w + L, kRightStep);
      copy = !copy;
    }
  }
  alignas(64) float sums[kTileLefts * NV * L];
  store_tiles<NV>(sums);
  const auto finish = [&](const float* from, int64_t pixel, auto count) __attribute__((always_inline)) {
    constexpr int NP = decltype(count)::value;
    vfloat acc[NP][NV];
    for_each_sum(acc, [&](vfloat& sum, int i) __attribute__((always_inline)) { sum = load(from + i * L); });
    finish_tile<M, NP, NV>(acc, epilogue, channel, pixel, done);
    done += NP;
  };
  for (int run = 0; run < 2; ++run) {
    const float* from = sums + run * kTileRows * NV * L;
    int64_t pixel = runs.pixel[run];
    int left = runs.count[run];
    for (; left >= kFinishPixels; left -= kFinishPixels) {
      finish(from, pixel, Number<kFinishPixels>{});
      from += kFinishPixels * NV * L;
      pixel += kFinishPixels * epilogue.pixel_step;
    }
    if (left >= 8) {
      finish(from, pixel, Number<8>{});
      from += 8 * NV * L;
      pixel += 8 * epilogue.pixel_step;
      left -= 8;
    }
    switch (left) {
      case 1: finish(from, pixel, Number<1>{}); break;
      case 2: finish(from, pixel, Number<2>{}); break;
      case 3: finish(from, pixel, Number<3>{}); break;
      case 4: finish(from, pixel, Number<4>{}); break;
      case 5: finish(from, pixel, Number<5>{}); break;
      case 6: finish(from, pixel, Number<6>{}); break;
      case 7: finish(from, pixel, Number<7>{}); break;
    }
  }
}
#endif

// Where rows of pixels are read and what they become.
template <typename M> struct PixelRows {
  const typename M::Unit* in;  // of the first row
  int64_t in_row;              // units from one row to the next
  int64_t pixel, pixel_row;    // place in the output, and from one row to the next
  int64_t rows, cols;
};

// All of these pixels and `vectors` vectors of output channels from `channel` on. Between begin_convolution and end_convolution.
// advance(): called with every tile.
template <typename M, typename Epilogue, typename Advance>
RF_INLINE void convolve_rows(const TileInput<M>& t, const PixelRows<M>& p, const typename M::Unit* w, const Epilogue& epilogue,
                             int64_t channel, int vectors, const Advance& advance) {
  constexpr int B = kBlock<M>;
  const int64_t most = tile_pixels<M>(t.in_units), tiles = (p.cols + most - 1) / most;
  int64_t done = 0;
#if RF_LEVEL >= 4
  if constexpr (M::kUnitChannels == 2)
    if (uses_matrix_tiles<M>(t.in_units)) {
      const auto tile = vectors == 2 ? conv_matrix_tile<M, 2, Epilogue> : conv_matrix_tile<M, 1, Epilogue>;
      const auto place = [&](int64_t row, int64_t col) { return p.pixel + row * p.pixel_row + col * epilogue.pixel_step; };
      const int64_t together = p.cols <= kTileRows ? 2 : 1;  // rows to a tile
      for (int64_t row = 0; row < p.rows; row += together) {
        const uint32_t* const in = p.in + row * p.in_row;
        for (int64_t i = 0; i < tiles; ++i) {
          // Whole tiles of 16 first: what is left over is read for nothing.
          const int64_t col = i * most, count = p.cols - col < most ? p.cols - col : most;
          const int first = int(count < kTileRows ? count : kTileRows);
          PixelRuns runs = {{in + col * B, in + (col + kTileRows) * B},
                            {place(row, col), place(row, col + kTileRows)},
                            {first, int(count) - first}};
          if (together == 2) {
            const bool second = row + 1 < p.rows;
            runs.in[1] = second ? in + p.in_row : in;
            runs.pixel[1] = place(row + 1, 0);
            runs.count[1] = second ? first : 0;
          }
          advance();
          tile(t, runs, w, epilogue, channel, done);
          done += runs.count[0] + runs.count[1];
        }
      }
      return;
    }
#endif
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = split_begin(p.cols, tiles, i);
      const int np = int(split_begin(p.cols, tiles, i + 1) - begin);
      advance();
      conv_tile_of<M, Epilogue>(np, vectors)(t, p.in + row * p.in_row + begin * B, w, epilogue, channel,
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
