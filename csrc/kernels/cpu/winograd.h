// Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks"): 3x3
// convolutions with stride 1 in 16 products per 2x2 outputs instead of 36, over the bands, register tiles and epilogues
// of conv_engine.h. float32 arithmetic only.
//
//   Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A        d: 4x4 inputs, g: 3x3 weights, Y: 2x2 outputs
//
// All constants are 0, 1, -1 and 1/2, so small integers stay exact. An Inf or NaN spreads over its 4x4 inputs: a band whose
// outputs are not all finite is done again by the direct convolution, which also serves finite values that overflow here.
#pragma once

#include "conv_engine.h"

namespace resnet_fused {
namespace RF_VARIANT {

constexpr int64_t kWinogradPositions = 16;

template <typename M> constexpr bool kHasWinograd = M::kUnitChannels == 1 && sizeof(typename M::A) == sizeof(float);

// Whether the products save more than the transforms cost. Channels below a vector leave most lanes of a transform idle.
template <typename M> static bool winograd_fits(const ConvGeometry& g) {
  return kHasWinograd<M> && g.r == 3 && g.s == 3 && g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1 &&
         g.pad_h <= 2 && g.pad_w <= 2 && g.c >= 8 && g.k >= 8 && g.p >= 2 && g.q >= 2;
}

// G g G^T of one output block, as [position][in channel][out lane]. step_r, step_s: +1 or, for the flipped kernel of the
// input gradient, -1 from the last tap.
template <typename M, typename T>
static void pack_winograd(typename M::Unit* out, const PackLayout& pack, int64_t out_block, const void* weight,
                          const WeightLayout& layout, int64_t in_stride, int64_t out_stride, bool flipped) {
  typedef typename M::A A;
  constexpr int L = kLanes<A>;
  const int vectors = pack_vectors<M>(pack, out_block);
  const int64_t width = int64_t(vectors) * L, first = out_block * kOutBlock<A>;
  const int64_t position_step = pack.in_units * width;
  for (int64_t unit = 0; unit < pack.in_units; ++unit)
    for (int v = 0; v < vectors; ++v) {
      const int64_t valid = max64(0, min64(L, pack.out_channels - first - v * L));
      Vec<A> g[3][3];
      for (int r = 0; r < 3; ++r)
        for (int s = 0; s < 3; ++s) {
          const int64_t at = (flipped ? 2 - r : r) * layout.stride_r + (flipped ? 2 - s : s) * layout.stride_s +
                             unit * in_stride + (first + v * L) * out_stride;
          A lanes[L] = {};
          for (int64_t lane = 0; lane < valid; ++lane) lanes[lane] = weight_value<T>(weight, layout, at + lane * out_stride);
          g[r][s] = load(lanes);
        }
      const Vec<A> half = splat<A>(A(0.5));
      Vec<A> rows[4][3];
      for (int s = 0; s < 3; ++s) {
        rows[0][s] = g[0][s];
        rows[1][s] = ((g[0][s] + g[2][s]) + g[1][s]) * half;
        rows[2][s] = ((g[0][s] + g[2][s]) - g[1][s]) * half;
        rows[3][s] = g[2][s];
      }
      A* const at = out + unit * width + v * L;
      for (int r = 0; r < 4; ++r) {
        const Vec<A> ends = rows[r][0] + rows[r][2];
        store(at + (4 * r + 0) * position_step, rows[r][0]);
        store(at + (4 * r + 1) * position_step, (ends + rows[r][1]) * half);
        store(at + (4 * r + 2) * position_step, (ends - rows[r][1]) * half);
        store(at + (4 * r + 3) * position_step, rows[r][2]);
      }
    }
}

// Tiles are taken in strips: whole tile rows, or a piece of one, so that both transforms of a strip stay near the core.
constexpr int64_t kStripTiles = 32;
struct WinogradStrips {
  int64_t tile_rows, tile_cols;    // of the band
  int64_t pieces, rows_per_strip;  // pieces of a tile row; tile rows in a strip where there is one piece
  int64_t count;
  int64_t most;                    // tiles in a strip
};
static inline WinogradStrips winograd_strips(int64_t out_rows, int64_t out_cols) {
  WinogradStrips s;
  s.tile_rows = divide_up(out_rows, 2);
  s.tile_cols = divide_up(out_cols, 2);
  s.pieces = divide_up(s.tile_cols, kStripTiles);
  s.rows_per_strip = s.pieces > 1 ? 1 : min64(s.tile_rows, max64(1, kStripTiles / 2 / s.tile_cols));
  s.count = s.pieces * divide_up(s.tile_rows, s.rows_per_strip);
  s.most = s.rows_per_strip * divide_up(s.tile_cols, s.pieces);
  return s;
}

// Memory for a strip: the transformed inputs [position][channel block][tile][vector] and the products of one output block
// [vector][position][tile][vector]. Positions lie an odd number of vectors apart: a power of two would map all 16 to a few
// cache sets.
template <typename M> struct WinogradScratch {
  typedef typename M::A A;
  static constexpr int L = kLanes<A>;
  int64_t tiles, input_step, product_step;
  A* input;
  A* product;

  WinogradScratch(const WinogradStrips& strips, int64_t blocks) {
    tiles = strips.most;
    input_step = (blocks * tiles | 1) * L;
    product_step = (tiles | 1) * L;
    input = static_cast<A*>(
        thread_scratch(kScratchWinograd, size_t(kWinogradPositions * (input_step + 2 * product_step)) * sizeof(A)));
    product = input + kWinogradPositions * input_step;
  }
};

// B^T d B of `count` neighbouring tiles of one channel block; `in`: the first tile's corner, `line`: from row to row.
template <typename A> RF_INLINE void transform_inputs(A* out, int64_t step, const A* in, int64_t line, int64_t count) {
  constexpr int L = kLanes<A>;
  typedef Vec<A> V;
  const auto column = [&](int64_t j, V(&c)[4]) __attribute__((always_inline)) {
    const V d0 = load(in + j * L), d1 = load(in + line + j * L), d2 = load(in + 2 * line + j * L),
            d3 = load(in + 3 * line + j * L);
    c[0] = d0 - d2;
    c[1] = d1 + d2;
    c[2] = d2 - d1;
    c[3] = d1 - d3;
  };
  V left[2][4];
  column(0, left[0]);
  column(1, left[1]);
  for (int64_t tile = 0; tile < count; ++tile, out += L) {
    V right[2][4];
    column(2 * tile + 2, right[0]);
    column(2 * tile + 3, right[1]);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      store(out + (4 * r + 0) * step, left[0][r] - right[0][r]);
      store(out + (4 * r + 1) * step, left[1][r] + right[0][r]);
      store(out + (4 * r + 2) * step, right[0][r] - left[1][r]);
      store(out + (4 * r + 3) * step, left[1][r] - right[1][r]);
      left[0][r] = right[0][r];
      left[1][r] = right[1][r];
    }
  }
}

// One of the two output rows of NT neighbouring tiles: 2 NT pixels of one vector of channels.
template <typename A, int ROW, int NT> RF_INLINE void transform_outputs(Vec<A> (&column)[2 * NT], const A* m, int64_t step) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 8
  for (int t = 0; t < NT; ++t) {
    Vec<A> sums[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const A* const at = m + t * L + j * step;
      sums[j] = ROW == 0 ? load(at) + load(at + 4 * step) + load(at + 8 * step)
                         : load(at + 4 * step) - load(at + 8 * step) - load(at + 12 * step);
    }
    column[2 * t] = sums[0] + sums[1] + sums[2];
    column[2 * t + 1] = sums[1] - sums[2] - sums[3];
  }
}

// The epilogue of the products themselves: `done` is the offset of their position.
template <typename A> struct StoreProducts {
  int64_t channels = int64_t(1) << 62;  // every vector is whole: padded weights give zeros
  A* product;
  int64_t vector_step;
  template <int NP> RF_INLINE_METHOD void vector(Vec<A> (&column)[NP], int64_t k, int64_t pixel, int64_t done) const {
    constexpr int L = kLanes<A>;
    A* const at = product + k / L * vector_step + done + pixel * L;
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) store(at + p * L, column[p]);
  }
  void lanes(A*, int, int64_t, int64_t, int64_t) const {}
};

// Inverse transform and epilogue of NT tiles' pixels in one row: 2 NT of them, or one fewer at an odd border.
template <typename A, typename E, int ROW, int NT>
__attribute__((noinline)) void winograd_run(const A* m, int64_t step, bool odd, const E& epilogue, int64_t channel,
                                            int64_t pixel, int64_t done, Vec<A>* probe) {
  constexpr int L = kLanes<A>;
  Vec<A> column[2 * NT];
  transform_outputs<A, ROW, NT>(column, m, step);
  Vec<A> finite = *probe;
#pragma GCC unroll 16
  for (int p = 0; p < 2 * NT - 1; ++p) finite += column[p] * A(0);
  if (!odd) finite += column[2 * NT - 1] * A(0);
  *probe = finite;
  if (channel + L > epilogue.channels) {
    A buffer[2 * NT * L];
#pragma GCC unroll 16
    for (int p = 0; p < 2 * NT; ++p) store(buffer + p * L, column[p]);
    return epilogue.lanes(buffer, 2 * NT - odd, channel, pixel, done);
  }
  if (!odd) return epilogue.template vector<2 * NT>(column, channel, pixel, done);
  Vec<A> shorter[2 * NT - 1];
#pragma GCC unroll 16
  for (int p = 0; p < 2 * NT - 1; ++p) shorter[p] = column[p];
  epilogue.template vector<2 * NT - 1>(shorter, channel, pixel, done);
}

constexpr int kRunTiles = RF_VECTOR_REGISTERS == 32 ? 8 : 3;
template <typename A, typename E>
using WinogradRun = void (*)(const A*, int64_t, bool, const E&, int64_t, int64_t, int64_t, Vec<A>*);
template <typename A, typename E, int ROW> static WinogradRun<A, E> winograd_run_of(int64_t tiles) {
  switch (tiles) {
    case 1: return winograd_run<A, E, ROW, 1>;
    case 2: return winograd_run<A, E, ROW, 2>;
#if RF_VECTOR_REGISTERS == 32
    case 3: return winograd_run<A, E, ROW, 3>;
    case 4: return winograd_run<A, E, ROW, 4>;
    case 5: return winograd_run<A, E, ROW, 5>;
    case 6: return winograd_run<A, E, ROW, 6>;
    case 7: return winograd_run<A, E, ROW, 7>;
#endif
    default: return winograd_run<A, E, ROW, kRunTiles>;
  }
}

// The band's outputs [out_rows, out_cols], row r from pixel first_pixel + r * out_cols. `band` has two more rows and columns
// than twice the tiles. Returns whether all sums were finite; if not, the outputs are to be computed again.
template <typename M, typename E>
static bool winograd_band(const typename M::Unit* band, const BandLayout& b, const typename M::Unit* packed,
                          const PackLayout& pack, int64_t out_rows, int64_t out_cols, int64_t first_pixel,
                          const E& epilogue, Prefetcher& next) {
  typedef typename M::A A;
  constexpr int B = kBlock<M>, L = kLanes<A>;
  const WinogradStrips strips = winograd_strips(out_rows, out_cols);
  const WinogradScratch<M> scratch(strips, b.blocks);
  next.divide(strips.count * pack.out_blocks * kWinogradPositions);
  const int64_t line = b.slots * B, zero_offset = 0;
  Vec<A> probe = {};
  int64_t pixels_before = 0;
  for (int64_t strip = 0; strip < strips.count; ++strip) {
    const int64_t piece = strip % strips.pieces;
    const int64_t row0 = strip / strips.pieces * strips.rows_per_strip;
    const int64_t rows = min64(strips.rows_per_strip, strips.tile_rows - row0);
    const int64_t col0 = split_begin(strips.tile_cols, strips.pieces, piece);
    const int64_t cols = split_begin(strips.tile_cols, strips.pieces, piece + 1) - col0;
    const int64_t tiles = rows * cols;
    for (int64_t block = 0; block < b.blocks; ++block)
      for (int64_t row = 0; row < rows; ++row)
        transform_inputs<A>(scratch.input + (block * scratch.tiles + row * cols) * L, scratch.input_step,
                            band + (block * b.rows + 2 * (row0 + row)) * line + 2 * col0 * B, line, cols);

    const int64_t strip_rows = min64(2 * rows, out_rows - 2 * row0), strip_cols = min64(2 * cols, out_cols - 2 * col0);
    const int64_t groups = divide_up(tiles, int64_t(kTilePixels));
    const TileInput<M> input = {&zero_offset, 1, scratch.tiles * L, pack.in_units};
    StoreProducts<A> products;
    products.product = scratch.product;
    products.vector_step = kWinogradPositions * scratch.product_step;
    const int64_t runs = divide_up(cols, int64_t(kRunTiles));
    for (int64_t block = 0; block < pack.out_blocks; ++block) {
      const int vectors = pack_vectors<M>(pack, block);
      const typename M::Unit* w = packed + pack_block_offset<M>(pack, block);
      for (int64_t position = 0; position < kWinogradPositions; ++position, w += pack.in_units * vectors * L) {
        next.advance();
        for (int64_t i = 0; i < groups; ++i) {
          const int64_t begin = split_begin(tiles, groups, i);
          conv_tile_of<M, StoreProducts<A>>(int(split_begin(tiles, groups, i + 1) - begin), vectors)(
              input, scratch.input + position * scratch.input_step + begin * L, w, products, 0, begin,
              position * scratch.product_step);
        }
      }
      for (int v = 0; v < vectors; ++v) {
        const int64_t channel = block * kOutBlock<A> + v * L;
        const A* const m = scratch.product + v * products.vector_step;
        int64_t done = pixels_before;
        for (int64_t row = 0; row < strip_rows; ++row)
          for (int64_t i = 0; i < runs; ++i) {
            const int64_t begin = split_begin(cols, runs, i), count = split_begin(cols, runs, i + 1) - begin;
            const bool odd = 2 * (begin + count) > strip_cols;
            const auto run = row % 2 == 0 ? winograd_run_of<A, E, 0>(count) : winograd_run_of<A, E, 1>(count);
            run(m + (row / 2 * cols + begin) * L, scratch.product_step, odd, epilogue, channel,
                first_pixel + (2 * row0 + row) * out_cols + 2 * (col0 + begin), done, &probe);
            done += 2 * count - odd;
          }
      }
    }
    pixels_before += strip_rows * strip_cols;
  }
  A left[L];
  store(left, probe);
  for (int lane = 0; lane < L; ++lane)
    if (left[lane] != 0) return false;
  return true;
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
