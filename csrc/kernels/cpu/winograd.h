// Winograd's minimal filtering F(m x m, 3x3) (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks"): 3x3
// convolutions with stride 1 in (m + 2)^2 products per m x m outputs instead of 9 m^2, in float32 arithmetic, over the bands,
// register tiles and epilogues of conv_engine.h.
//
//   Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A        d: inputs of a tile, g: 3x3 weights, Y: m x m outputs
//
// float32 takes m = 2: 2.25 times fewer products, constants 0, 1, -1 and 1/2 (small integers stay exact), errors below those
// of a direct sum over channels and taps. bfloat16 takes m = 4: 4 times fewer products, of float32 values; constants such as
// 8 and 1/6 cost a few bits of 24, of which the result keeps 8. Only a sum that should be 0 would show it, so sums are rounded
// to a grid (Grid) well above these errors and well below what bfloat16 holds: small integers come out exact here too. (In the
// weight gradient the transforms before the sums have integer constants, and the one after them is in double.)
//
// An Inf or NaN spreads over the inputs of its tile: what comes out not all finite is done again by the direct convolution,
// which also serves finite values that overflow here.
#pragma once

#include "pack_weights.h"

namespace resnet_fused {
namespace RF_VARIANT {

// The one-dimensional transforms; two dimensions are these over the columns, then over the rows. The points are
// 0, 1, -1, infinity, and for m = 4 also 2 and -2.
template <int TILE> struct Filter;

template <> struct Filter<2> {
  static constexpr int kTile = 2, kPoints = 4, kPositions = 16;
  static constexpr bool kGrid = false;
  typedef vfloat V;

  RF_INLINE_METHOD static void input(const V (&d)[4], V (&out)[4]) {  // B^T
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[1] - d[3];
  }
  RF_INLINE_METHOD static void output(const V (&m)[4], V (&y)[2]) {  // A^T
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  RF_INLINE_METHOD static void weight(const V (&g)[3], V (&u)[4]) {  // G
    const V ends = g[0] + g[2], half = splat<float>(0.5f);
    u[0] = g[0];
    u[1] = (ends + g[1]) * half;
    u[2] = (ends - g[1]) * half;
    u[3] = g[2];
  }
  RF_INLINE_METHOD static void gradient(const V (&y)[2], V (&z)[4]) {  // A
    z[0] = y[0];
    z[1] = y[0] + y[1];
    z[2] = y[0] - y[1];
    z[3] = V{} - y[1];
  }
  RF_INLINE_METHOD static void weight_gradient(const vdouble (&u)[4], vdouble (&g)[3]) {  // G^T
    const vdouble even = (u[1] + u[2]) * 0.5;
    g[0] = u[0] + even;
    g[1] = (u[1] - u[2]) * 0.5;
    g[2] = even + u[3];
  }
};

template <> struct Filter<4> {
  static constexpr int kTile = 4, kPoints = 6, kPositions = 36;
  static constexpr bool kGrid = true;
  typedef vfloat V;

  RF_INLINE_METHOD static void input(const V (&d)[6], V (&out)[6]) {
    const V even = d[4] - d[2] * 4.f, odd = d[3] - d[1] * 4.f, even2 = d[4] - d[2], odd2 = (d[3] - d[1]) * 2.f;
    out[0] = d[0] * 4.f + (d[4] - d[2] * 5.f);
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = even2 + odd2;
    out[4] = even2 - odd2;
    out[5] = d[1] * 4.f + (d[5] - d[3] * 5.f);
  }
  RF_INLINE_METHOD static void output(const V (&m)[6], V (&y)[4]) {
    const V sum1 = m[1] + m[2], diff1 = m[1] - m[2], sum2 = m[3] + m[4], diff2 = m[3] - m[4];
    y[0] = m[0] + sum1 + sum2;
    y[1] = diff1 + diff2 * 2.f;
    y[2] = sum1 + sum2 * 4.f;
    y[3] = diff1 + diff2 * 8.f + m[5];
  }
  RF_INLINE_METHOD static void weight(const V (&g)[3], V (&u)[6]) {
    const V ends = (g[0] + g[2]) * (1 / 6.f), middle = g[1] * (1 / 6.f);
    const V ends2 = g[0] * (1 / 24.f) + g[2] * (1 / 6.f), middle2 = g[1] * (1 / 12.f);
    u[0] = g[0] * 0.25f;
    u[1] = V{} - (ends + middle);
    u[2] = middle - ends;
    u[3] = ends2 + middle2;
    u[4] = ends2 - middle2;
    u[5] = g[2];
  }
  RF_INLINE_METHOD static void gradient(const V (&y)[4], V (&z)[6]) {
    const V even = y[0] + y[2], odd = y[1] + y[3], even2 = y[0] + y[2] * 4.f, odd2 = y[1] * 2.f + y[3] * 8.f;
    z[0] = y[0];
    z[1] = even + odd;
    z[2] = even - odd;
    z[3] = even2 + odd2;
    z[4] = even2 - odd2;
    z[5] = y[3];
  }
  // In double: thirds of sums that nearly cancel.
  RF_INLINE_METHOD static void weight_gradient(const vdouble (&u)[6], vdouble (&g)[3]) {
    const vdouble sum1 = (u[1] + u[2]) * 4.0, diff1 = (u[1] - u[2]) * 4.0;
    const vdouble sum2 = u[3] + u[4], diff2 = u[3] - u[4];
    g[0] = (u[0] * 6.0 - sum1 + sum2) / 24.0;
    g[1] = (diff2 * 2.0 - diff1) / 24.0;
    g[2] = (sum2 * 4.0 - sum1 + u[5] * 24.0) / 24.0;
  }
};

template <typename T> using FilterOf = Filter<sizeof(T) == 2 ? 4 : 2>;
// Not where matrix tiles multiply pairs of bf16: they save more than 36 products of float32 instead of 144.
template <typename T> constexpr bool kHasWinograd = sizeof(Acc<T>) == sizeof(float) && (RF_LEVEL < 4 || sizeof(T) == 4);

template <typename T> static int64_t winograd_tiles(const ConvGeometry& g) {
  return g.n * divide_up(g.p, FilterOf<T>::kTile) * divide_up(g.q, FilterOf<T>::kTile);
}
static inline bool winograd_takes(const ConvGeometry& g) {
  return g.r == 3 && g.s == 3 && g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1 &&
         g.pad_h <= 2 && g.pad_w <= 2;
}

// Whether the products save more than the transforms cost. Not with channels below a vector, which leave most lanes of a
// transform idle; nor where tiles reach far over the border; nor where transformed weights, 64 or 144 bytes each, come from memory
// for few tiles. Limits as measured on 2 cores of Zen 4, 128-640 channels, 16-1024 tiles.
template <typename T> static bool winograd_fits(const ConvGeometry& g) {
  constexpr int64_t TILE = FilterOf<T>::kTile;
  const int64_t tiles = winograd_tiles<T>(g), weights = g.c * g.k;
  return kHasWinograd<T> && winograd_takes(g) && g.c >= 8 && g.k >= 8 && 2 * g.n * g.p * g.q >= tiles * TILE * TILE &&
         (TILE == 2 ? weights <= (weights <= int64_t(512) << 10 ? 16384 : 3072) * tiles
                    : weights <= min64(400 * 400, 2400 * tiles));
}

// A sum is at most bound = (its tile's largest input) * (sum of the weights' magnitudes): what is elsewhere in the image, or in
// another one, must not cost it digits. Its grid is 2^-18 of the power of two below that: adding and subtracting 48 times this
// power rounds to it.
struct Grid {
  vfloat offset;
  RF_INLINE_METHOD static Grid of(float largest, vfloat weights) {
    return {(vfloat)((vuint32)(weights * largest) & 0x7f800000u) * 48.f};
  }
  RF_INLINE_METHOD vfloat round(vfloat v) const { return (v + offset) - offset; }
};

// Packed weights: [output block][position][in channel][out lane]. Positions lie an odd number of vectors apart: a power of
// two would map them all to a few cache sets.
RF_INLINE int64_t winograd_position_step(const PackLayout& pack, int vectors) {
  return (pack.in_units * vectors | 1) * kLanes<float>;
}
template <typename F> RF_INLINE int64_t winograd_block_offset(const PackLayout& pack, int64_t out_block) {
  return out_block * F::kPositions * winograd_position_step(pack, 2);
}

// Input channels that one task packs for one vector of outputs.
constexpr int64_t kWinogradPackChannels = 16;

// G g G^T of kWinogradPackChannels inputs, from unit0, to one vector of outputs. norms: sum of the magnitudes per output;
// flipped: of the kernel turned by 180 degrees, as the input gradient needs it.
template <typename T>
static void pack_winograd(float* packed, float* norms, const PackLayout& pack, int64_t vector, int64_t unit0, const void* weight,
                          const WeightLayout& layout, int64_t in_stride, int64_t out_stride, bool flipped) {
  typedef FilterOf<T> F;
  constexpr int L = kLanes<float>, P = F::kPoints;
  const int64_t block = vector / 2, first = vector * L;
  const int64_t lanes = min64(L, pack.out_channels - first), units = min64(kWinogradPackChannels, pack.in_units - unit0);
  const int vectors = pack_vectors<ModeF32>(pack, block);
  const int64_t width = int64_t(vectors) * L, position_step = winograd_position_step(pack, vectors);
  float* at = packed + winograd_block_offset<F>(pack, block) + unit0 * width + vector % 2 * L;
  WeightBlock<T> taps[3][3];
  int32_t taps_r[9], taps_s[9];
  for (int32_t tap = 0; tap < 9; ++tap) {
    taps_r[tap] = flipped ? 2 - tap / 3 : tap / 3;
    taps_s[tap] = flipped ? 2 - tap % 3 : tap % 3;
  }
  read_taps(taps[0], weight, layout, unit0 * in_stride + first * out_stride, units, lanes, in_stride, out_stride, 9, taps_r, taps_s);
  vfloat sum = {};
  for (int64_t unit = 0; unit < units; ++unit, at += width) {
    vfloat columns[P][3];
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) {
      vfloat g[3], u[P];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        g[r] = taps[r][s].row(unit);
        sum += magnitude(g[r]);
      }
      F::weight(g, u);
#pragma GCC unroll 6
      for (int r = 0; r < P; ++r) columns[r][s] = u[r];
    }
#pragma GCC unroll 6
    for (int r = 0; r < P; ++r) {
      vfloat u[P];
      F::weight(columns[r], u);
#pragma GCC unroll 6
      for (int s = 0; s < P; ++s) store(at + (r * P + s) * position_step, u[s]);
    }
  }
  store(norms, sum);
}

// All of them, and the outputs' norms.
template <typename T>
static void pack_winograd(float* packed, float* norms, const Parallel& parallel, const PackLayout& pack, const void* weight,
                          const WeightLayout& layout, bool turned) {
  constexpr int64_t L = kLanes<float>;
  const int64_t vectors = divide_up(pack.out_channels, L), chunks = divide_up(pack.in_units, kWinogradPackChannels);
  parallel_for(parallel, vectors * chunks, [&](int64_t task) {
    const int64_t vector = task / chunks, chunk = task % chunks;
    pack_winograd<T>(packed, norms + (chunk * vectors + vector) * L, pack, vector, chunk * kWinogradPackChannels, weight, layout,
                     turned ? layout.stride_k : layout.stride_c, turned ? layout.stride_c : layout.stride_k, turned);
  });
  for (int64_t vector = 0; vector < vectors; ++vector) {
    vfloat sum = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(norms + (chunk * vectors + vector) * L);
    store(norms + vector * L, sum);
  }
}
// The floats that they take.
template <typename F> static int64_t winograd_packed_floats(const PackLayout& pack) {
  return winograd_block_offset<F>(pack, pack.out_blocks);
}
static inline int64_t winograd_norm_floats(const PackLayout& pack) {
  return divide_up(pack.out_channels, int64_t(kLanes<float>)) * kLanes<float> * divide_up(pack.in_units, kWinogradPackChannels);
}

// B^T d B of `count` neighbouring tiles of one channel block; `in`: the first tile's corner, `line`: from row to row, `step`:
// from position to position.
template <typename F> RF_INLINE void transform_inputs(float* out, int64_t step, const float* in, int64_t line, int64_t count) {
  constexpr int L = kLanes<float>, P = F::kPoints, TILE = F::kTile;
  const auto column = [&](int64_t j, vfloat(&c)[P]) __attribute__((always_inline)) {
    vfloat d[P];
#pragma GCC unroll 6
    for (int r = 0; r < P; ++r) d[r] = load(in + r * line + j * L);
    F::input(d, c);
  };
  vfloat columns[P][P];
  column(0, columns[0]);
  column(1, columns[1]);
  for (int64_t tile = 0; tile < count; ++tile, out += L) {
#pragma GCC unroll 6
    for (int j = 2; j < P; ++j) column(tile * TILE + j, columns[j]);
#pragma GCC unroll 6
    for (int r = 0; r < P; ++r) {
      vfloat row[P], values[P];
#pragma GCC unroll 6
      for (int j = 0; j < P; ++j) row[j] = columns[j][r];
      F::input(row, values);
#pragma GCC unroll 6
      for (int j = 0; j < P; ++j) store(out + (r * P + j) * step, values[j]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < P; ++r) {  // neighbours share two columns
      columns[0][r] = columns[TILE][r];
      columns[1][r] = columns[TILE + 1][r];
    }
  }
}

// A^T m A of `count` neighbouring tiles of one vector of channels, as rows of pixels, `row_step` apart. largest: [tile];
// norm: of the vector's weights.
template <typename F>
RF_INLINE void transform_outputs(float* out, int64_t row_step, const float* m, int64_t step, int64_t count,
                                 const float* largest, vfloat norm) {
  constexpr int L = kLanes<float>, P = F::kPoints, TILE = F::kTile;
  for (int64_t tile = 0; tile < count; ++tile, m += L, out += TILE * L) {
    const Grid grid = F::kGrid ? Grid::of(largest[tile], norm) : Grid{};
    vfloat columns[TILE][P];
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) {
      vfloat values[P], y[TILE];
#pragma GCC unroll 6
      for (int r = 0; r < P; ++r) values[r] = load(m + (r * P + j) * step);
      F::output(values, y);
#pragma GCC unroll 4
      for (int r = 0; r < TILE; ++r) columns[r][j] = y[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < TILE; ++r) {
      vfloat y[TILE];
      F::output(columns[r], y);
#pragma GCC unroll 4
      for (int j = 0; j < TILE; ++j) store(out + r * row_step + j * L, F::kGrid ? grid.round(y[j]) : y[j]);
    }
  }
}

// Whether a sum of values times 0 is 0 in every lane: then all values were finite.
template <typename V> RF_INLINE bool is_zero(V probe) {
  bool zero = true;
  for (size_t lane = 0; lane < sizeof probe / sizeof probe[0]; ++lane) zero = zero && probe[lane] == 0;
  return zero;
}
// Runs all tasks; whether the body returned true for each of them.
template <typename F> static bool parallel_all(const Parallel& parallel, int64_t tasks, const F& body) {
  bool* const results = static_cast<bool*>(thread_scratch(kScratchFlags, size_t(tasks)));
  parallel_for(parallel, tasks, [&](int64_t task) { results[task] = body(task); });
  for (int64_t task = 0; task < tasks; ++task)
    if (!results[task]) return false;
  return true;
}

// Tiles are taken in strips, so that both transforms of a strip stay near the core: rows of tiles, which may be of several
// images, or pieces of one row.
struct WinogradStrips {
  int64_t tile_rows, tile_cols;    // of one image's band
  int64_t rows;                    // of tiles, of all images
  int64_t pieces, rows_per_strip;  // pieces of a tile row; rows in a strip where there is one piece
  int64_t most;                    // tiles in a strip

  int64_t count() const { return pieces * divide_up(rows, rows_per_strip); }
  int64_t first_col(int64_t piece) const { return split_begin(tile_cols, pieces, piece); }
};
template <typename F>
static WinogradStrips winograd_strips(int64_t images, int64_t out_rows, int64_t out_cols, int64_t tiles) {
  WinogradStrips s;
  s.tile_rows = divide_up(out_rows, F::kTile);
  s.tile_cols = divide_up(out_cols, F::kTile);
  s.rows = images * s.tile_rows;
  s.pieces = divide_up(s.tile_cols, 2 * tiles);
  s.rows_per_strip = s.pieces > 1 ? 1 : divide_up(s.rows, divide_up(s.rows, max64(1, tiles / s.tile_cols)));
  s.most = s.rows_per_strip * divide_up(s.tile_cols, s.pieces);
  return s;
}

// A strip of the forward and input-gradient convolutions fills a register tile.
constexpr int64_t kStripTiles = 16;
// Images to a task, where a whole image is a band: a strip's worth of tiles, the band within a core's cache.
template <typename F> static int64_t winograd_images(int64_t n, int64_t out_rows, int64_t out_cols, int64_t band_bytes) {
  const int64_t tiles = divide_up(out_rows, F::kTile) * divide_up(out_cols, F::kTile);
  return max64(1, min64(min64(divide_up(kStripTiles, tiles), n), kBandBytes / max64(1, band_bytes)));
}

// Tiles whose products with one vector of outputs, or two, are summed up at once.
constexpr int64_t products_at_once(int vectors) {
  return vectors == 1 && RF_VECTOR_REGISTERS == 32 ? kStripTiles : kTilePixels;
}

// The epilogue of the products themselves: `done` is the offset of their position.
struct StoreProducts {
  int64_t channels = int64_t(1) << 62;  // every vector is whole: padded weights give zeros
  float* product;
  int64_t vector_step;
  template <int NP> RF_INLINE_METHOD void vector(vfloat (&column)[NP], int64_t k, int64_t pixel, int64_t done) const {
    constexpr int L = kLanes<float>;
    float* const at = product + k / L * vector_step + done + pixel * L;
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) store(at + p * L, column[p]);
  }
  void lanes(float*, int, int64_t, int64_t, int64_t) const {}
};

static inline ConvTile<ModeF32, StoreProducts> products_of(int tiles, int vectors) {
#if RF_VECTOR_REGISTERS == 32
  static_assert(kStripTiles == 16 && kTilePixels == 14, "two more");
  if (tiles == 16) return conv_tile<ModeF32, 16, 1, StoreProducts>;
  if (tiles == 15) return conv_tile<ModeF32, 15, 1, StoreProducts>;
#endif
  return conv_tile_of<ModeF32, StoreProducts>(tiles, vectors);
}

// Pixels that an epilogue takes at once: with registers for 14 and two operands, 16 are still held.
constexpr int kRunPixels = RF_VECTOR_REGISTERS == 32 ? 16 : 6;

// The epilogue of NP pixels that the inverse transform has left in memory.
template <typename E, int NP>
__attribute__((noinline)) void winograd_run(float* in, const E& epilogue, int64_t channel, int64_t pixel, int64_t done,
                                            vfloat* probe) {
  constexpr int L = kLanes<float>;
  vfloat column[NP], finite = *probe;
#pragma GCC unroll 16
  for (int p = 0; p < NP; ++p) {
    column[p] = load(in + p * L);
    finite += column[p] * 0.f;
  }
  *probe = finite;
  if (channel + L <= epilogue.channels) return epilogue.template vector<NP>(column, channel, pixel, done);
#pragma GCC unroll 16
  for (int p = 0; p < NP; ++p) store(in + p * L, column[p]);
  epilogue.lanes(in, NP, channel, pixel, done);
}
template <typename E> using WinogradRun = void (*)(float*, const E&, int64_t, int64_t, int64_t, vfloat*);
template <typename E> static WinogradRun<E> winograd_run_of(int64_t pixels) {
  switch (pixels) {
    case 1: return winograd_run<E, 1>;
    case 2: return winograd_run<E, 2>;
    case 3: return winograd_run<E, 3>;
    case 4: return winograd_run<E, 4>;
    case 5: return winograd_run<E, 5>;
#if RF_VECTOR_REGISTERS == 32
    case 6: return winograd_run<E, 6>;
    case 7: return winograd_run<E, 7>;
    case 8: return winograd_run<E, 8>;
    case 9: return winograd_run<E, 9>;
    case 10: return winograd_run<E, 10>;
    case 11: return winograd_run<E, 11>;
    case 12: return winograd_run<E, 12>;
    case 13: return winograd_run<E, 13>;
    case 14: return winograd_run<E, 14>;
    case 15: return winograd_run<E, 15>;
#endif
    default: return winograd_run<E, kRunPixels>;
  }
}

// The outputs [images][out_rows][out_cols] of a task, in the blocks [first_block, last_block) of channels; image i from pixel
// first_pixel + i * image_pixels. `bands`: one band per image, each with two more rows and columns than its tiles; largest: of
// each tile, where sums are rounded to a grid. Returns whether all sums were finite; if not, the outputs are to be computed
// again.
template <typename F, typename E>
static bool winograd_bands(const float* bands, const float* largest, const BandLayout& b, int64_t images, const float* packed,
                           const float* norms, const PackLayout& pack, int64_t out_rows, int64_t out_cols, int64_t first_pixel,
                           int64_t image_pixels, int64_t first_block, int64_t last_block, const E& epilogue,
                           Prefetcher& next) {
  constexpr int L = kLanes<float>;
  const WinogradStrips strips = winograd_strips<F>(images, out_rows, out_cols, kStripTiles);
  // Transformed inputs [position][channel block][tile][vector], products [vector][position][tile][vector], rows of outputs
  // [vector][row].
  // Positions lie an odd number of vectors apart: a power of two would map them all to a few cache sets.
  const int64_t input_step = (b.blocks * strips.most | 1) * L, product_step = (strips.most | 1) * L;
  const int64_t row_step = divide_up(strips.tile_cols, strips.pieces) * F::kTile * L;
  float* const inputs = static_cast<float*>(thread_scratch(
      kScratchWinograd, size_t(F::kPositions * (input_step + 2 * product_step) + 2 * F::kTile * row_step) * sizeof(float)));
  StoreProducts products;
  products.product = inputs + F::kPositions * input_step;
  products.vector_step = F::kPositions * product_step;
  float* const outputs = products.product + 2 * products.vector_step;
  const int64_t line = b.slots * L, zero_offset = 0;
  const TileInput<ModeF32> input = {&zero_offset, 1, strips.most * L, pack.in_units};
  next.divide(strips.count() * (last_block - first_block) * F::kPositions);

  vfloat probe = {};
  int64_t pixels_before = 0;
  for (int64_t strip = 0; strip < strips.count(); ++strip) {
    const int64_t row0 = strip / strips.pieces * strips.rows_per_strip, rows = min64(strips.rows_per_strip, strips.rows - row0);
    const int64_t col0 = strips.first_col(strip % strips.pieces), cols = strips.first_col(strip % strips.pieces + 1) - col0;
    const int64_t tiles = rows * cols;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t image = (row0 + row) / strips.tile_rows, tile_row = (row0 + row) % strips.tile_rows;
      for (int64_t block = 0; block < b.blocks; ++block)
        transform_inputs<F>(inputs + (block * strips.most + row * cols) * L, input_step,
                            bands + ((image * b.blocks + block) * b.rows + F::kTile * tile_row) * line + F::kTile * col0 * L,
                            line, cols);
    }
    const int64_t strip_cols = min64(F::kTile * cols, out_cols - F::kTile * col0);
    const int64_t runs = divide_up(strip_cols, int64_t(kRunPixels));
    int64_t pixels_after = pixels_before;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int vectors = pack_vectors<ModeF32>(pack, block);
      const float* w = packed + winograd_block_offset<F>(pack, block);
      const int64_t position_step = winograd_position_step(pack, vectors), groups = divide_up(tiles, products_at_once(vectors));
      for (int64_t position = 0; position < F::kPositions; ++position, w += position_step) {
        next.advance();
        for (int64_t i = 0; i < groups; ++i) {
          const int64_t begin = split_begin(tiles, groups, i);
          products_of(int(split_begin(tiles, groups, i + 1) - begin), vectors)(
              input, inputs + position * input_step + begin * L, w, products, 0, begin, position * product_step);
        }
      }
      int64_t done = pixels_before;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t image = (row0 + row) / strips.tile_rows, out_row = (row0 + row) % strips.tile_rows * F::kTile;
        for (int v = 0; v < vectors; ++v)
          transform_outputs<F>(outputs + v * F::kTile * row_step, row_step,
                               products.product + v * products.vector_step + row * cols * L, product_step, cols,
                               largest + (row0 + row) * strips.tile_cols + col0, load(norms + block * kOutBlock<float> + v * L));
        const int64_t pixel = first_pixel + image * image_pixels + out_row * out_cols + F::kTile * col0;
        for (int64_t r = 0; r < min64(F::kTile, out_rows - out_row); ++r)
          for (int64_t i = 0; i < runs; ++i) {
            const int64_t begin = split_begin(strip_cols, runs, i), count = split_begin(strip_cols, runs, i + 1) - begin;
            for (int v = 0; v < vectors; ++v)  // neighbours in memory one after the other: they may share a streamed line
              winograd_run_of<E>(count)(outputs + (v * F::kTile + r) * row_step + begin * L, epilogue,
                                        block * kOutBlock<float> + v * L, pixel + r * out_cols + begin, done, &probe);
            done += count;
          }
      }
      pixels_after = done;
    }
    pixels_before = pixels_after;
  }
  return is_zero(probe);
}

// A convolution, or an input gradient, which is one of dy with the turned kernel.
struct WinogradProblem {
  int64_t n, in_channels, out_channels;
  int64_t in_h, in_w, out_h, out_w;
  int64_t top, left;  // input row and column of the first tap of output (0, 0)
};

// How it is cut up: bands of rows of one image, or several whole images ("parts"), and where these are few, groups of blocks of
// output channels, each of which transforms the inputs anew.
struct WinogradPlan {
  WinogradProblem p;
  int64_t images, bands, band_rows, parts, blocks, groups;
  int64_t rows, cols;  // of the largest input band

  int64_t first_image(int64_t part) const { return part / bands * images; }
  int64_t image_count(int64_t part) const { return min64(images, p.n - first_image(part)); }
  int64_t first_row(int64_t part) const { return part % bands * band_rows; }
  int64_t row_count(int64_t part) const { return min64(band_rows, p.out_h - first_row(part)); }
  int64_t first_pixel(int64_t part) const { return (first_image(part) * p.out_h + first_row(part)) * p.out_w; }
  int64_t pixels(int64_t part) const { return image_count(part) * row_count(part) * p.out_w; }

  int64_t tasks() const { return parts * groups; }
  int64_t first_block(int64_t task) const { return split_begin(blocks, groups, task % groups); }
  int64_t last_block(int64_t task) const { return split_begin(blocks, groups, task % groups + 1); }
};
constexpr int64_t kWinogradTasks = 8, kWinogradGroupBlocks = 2;  // at least
template <typename T> static WinogradPlan plan_winograd(const WinogradProblem& p) {
  typedef FilterOf<T> F;
  WinogradPlan plan = {};
  plan.p = p;
  plan.cols = round_up(p.out_w, F::kTile) + 2;
  const int64_t row_bytes = divide_up(p.in_channels, int64_t(kLanes<float>)) * plan.cols * RF_VECTOR_BYTES;
  plan.band_rows = round_up(rows_per_band(p.out_h, row_bytes, 1, 2), F::kTile);
  plan.bands = divide_up(p.out_h, plan.band_rows);
  plan.rows = plan.band_rows + 2;
  plan.images = plan.bands == 1 ? winograd_images<F>(p.n, p.out_h, p.out_w, row_bytes * plan.rows) : 1;
  plan.parts = divide_up(p.n, plan.images) * plan.bands;
  plan.blocks = divide_up(p.out_channels, kOutBlock<float>);
  plan.groups = 1;
  while (plan.tasks() < kWinogradTasks && 2 * plan.groups * kWinogradGroupBlocks <= plan.blocks) plan.groups *= 2;
  return plan;
}

// A band of an image, and the largest magnitude of each of its tiles where F has a grid: of the pixels in it and up to two more
// than it reads on the right, as they were noted.
template <typename F, typename T>
static void fill_winograd_band(float* band, float* largest, const BandLayout& b, const T* image, int64_t height, int64_t width,
                               int64_t row0, int64_t col0, const Prologue<float>& prologue) {
  if constexpr (!F::kGrid) {
    fill_band<ModeF32, T>(band, b, image, height, width, row0, col0, prologue);
  } else {
    static_assert(F::kTile == kNotePixels, "a tile begins where a group does");
    const int64_t groups = divide_up(b.cols, kNotePixels);
    const size_t bytes = size_t(b.rows * groups) * kLanes<float> * sizeof(float);
    const LargestMagnitudes noted = {static_cast<float*>(thread_scratch(kScratchTile, bytes)), groups};
    memset(noted.at, 0, bytes);
    fill_band<ModeF32, T>(band, b, image, height, width, row0, col0, prologue, noted);
    for (int64_t row = 0; row + F::kPoints <= b.rows; row += F::kTile)
      for (int64_t col = 0; col + F::kPoints <= b.cols; col += F::kTile) {
        vfloat most = {};
        for (int64_t r = row; r < row + F::kPoints; ++r)
          most = larger(most, larger(load(noted.of(r, col)), load(noted.of(r, col + F::kTile))));
        *largest++ = largest_lane(most);
      }
  }
}

// `input`: [n, in_h, in_w, in_channels]; make_epilogue(part, first_channel, last_channel) starts the epilogue of these
// channels of a part; `beside`: tensors of the output's shape that the epilogue reads, or null; output: the one that it writes, null
// where no line of it should be asked for. Returns whether all sums were finite.
template <typename T, typename MakeEpilogue>
static bool winograd_convolution(const Parallel& parallel, const WinogradPlan& plan, const T* input,
                                 const Prologue<float>& prologue, const void* weight, const WeightLayout& layout,
                                 bool turned, const T* const (&beside)[2], const T* output,
                                 const MakeEpilogue& make_epilogue) {
  typedef FilterOf<T> F;
  const WinogradProblem& p = plan.p;
  const PackLayout pack = make_pack<ModeF32>(p.in_channels, p.out_channels, F::kPositions);
  float* const packed = static_cast<float*>(thread_scratch(
      kScratchPack, size_t(winograd_packed_floats<F>(pack) + winograd_norm_floats(pack)) * sizeof(float)));
  float* const norms = packed + winograd_packed_floats<F>(pack);
  pack_winograd<T>(packed, norms, parallel, pack, weight, layout, turned);
  const auto tiles_of = [](const BandLayout& b) { return (b.rows - 2) / F::kTile * ((b.cols - 2) / F::kTile); };
  const BandLayout widest = make_band<ModeF32>(p.in_channels, plan.rows, plan.cols, 1);
  return parallel_all(parallel, plan.tasks(), [&](int64_t task) {
    const int64_t part = task / plan.groups, first_block = plan.first_block(task), last_block = plan.last_block(task);
    const int64_t images = plan.image_count(part), out_rows = plan.row_count(part), row0 = plan.first_row(part) + p.top;
    const BandLayout b = make_band<ModeF32>(p.in_channels, round_up(out_rows, F::kTile) + 2, plan.cols, 1);
    const int64_t image_floats = band_units<ModeF32>(widest) + tiles_of(widest);
    float* const bands =
        static_cast<float*>(thread_scratch(kScratchActivation, size_t(plan.images * image_floats) * sizeof(float)));
    float* const largest = bands + plan.images * band_units<ModeF32>(widest);
    for (int64_t i = 0; i < images; ++i)
      fill_winograd_band<F, T>(bands + i * band_units<ModeF32>(b), largest + i * tiles_of(b), b,
                               input + (plan.first_image(part) + i) * p.in_h * p.in_w * p.in_channels, p.in_h, p.in_w, row0,
                               p.left, prologue);
    Prefetcher next;
    if (part + 1 < plan.parts) {
      const int64_t image = plan.first_image(part + 1), top = plan.first_row(part + 1) + p.top;
      const int64_t begin = (image * p.in_h + max64(0, min64(p.in_h, top))) * p.in_w;
      const int64_t end =
          ((image + plan.image_count(part + 1) - 1) * p.in_h + max64(0, min64(p.in_h, top + plan.rows))) * p.in_w;
      next.add(input + begin * p.in_channels, input + max64(begin, end) * p.in_channels);
      const int64_t pixel = plan.first_pixel(part + 1) * p.out_channels, count = plan.pixels(part + 1) * p.out_channels;
      for (const T* tensor : beside)
        if (tensor) next.add(tensor + pixel, tensor + pixel + count);
      if (output) next.add_output(output + pixel, output + pixel + count);
    }
    const auto epilogue =
        make_epilogue(part, first_block * kOutBlock<float>, min64(p.out_channels, last_block * kOutBlock<float>));
    const bool finite = winograd_bands<F>(bands, largest, b, images, packed, norms, pack, out_rows, p.out_w,
                                          plan.first_pixel(part), p.out_h * p.out_w, first_block, last_block, epilogue, next);
    stream_fence();  // the epilogue may have streamed its output
    return finite;
  });
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
