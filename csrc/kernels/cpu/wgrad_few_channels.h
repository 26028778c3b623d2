// The weight gradient of convolutions with few input channels, as the first of a net has them. Vectors of input channels, as
// in wgrad_direct.h, would be mostly empty; here the lanes are output channels and inputs are broadcast one by one:
//
//   sum[r][i][lane k] += x[row + r][i] * dy[k]      for one output pixel and all i in [0, S * C)
//
// In channels_last the S taps of a kernel row times C channels are one run of values in the input's row ("window"), so a tile
// of sums needs one pointer per kernel row and knows nothing of taps or channels. For a 3x3 of 3 channels its 27 sums stay
// in AVX-512's registers while the gradients pass by once.
//
// Padding is multiplied as zeros, so an infinite dy is NaN under the taps that lie outside there, as in wgrad_direct.h and in
// PyTorch's own convolution.
#pragma once

#include "wgrad_engine.h"

namespace resnet_fused {
namespace RF_VARIANT {

// Window values of a tile: the window's length, or a part of it, rounded up to a multiple of kWindowStep; and kernel rows, as
// many as there are registers for. What is beyond the window is summed and thrown away.
constexpr int kWindowStep = 3;
constexpr int kWindowSums = RF_VECTOR_REGISTERS == 32 ? 27 : 12;
constexpr int kWindowRows = 3;
constexpr int window_rows(int length) { return kWindowSums / length < kWindowRows ? kWindowSums / length : kWindowRows; }

constexpr int64_t kWindowUnitBytes = 24 * 1024;  // of the gradients of a unit of work, if they are kTilePass pixels

template <typename M> struct WindowTile {
  const typename M::Unit* x;
  int64_t x_image, x_row, x_tap, x_col;  // units from one image, output row, kernel row, unit of pixels to the next
  int64_t x_last;                        // where, in its row, the window of the last unit lies if that is half a pair; or 0
  const typename M::Unit* dy;
  int64_t dy_row, dy_col;                // from one output row, unit of pixels to the next; images follow their rows
  int64_t dy_pixel;                      // not 0: dy is as in memory, bf16, and a unit is made of two pixels so far apart
  int64_t images, rows, cols;            // cols: units of pixels, without that half pair
  int64_t sum_row;                       // values from one kernel row's sums to the next's
  bool fresh;                            // the sums hold nothing yet
};

// A vector of output channels of one unit of pixels.
template <typename M> RF_INLINE typename M::UnitVec load_gradients(const typename M::Unit* d, int64_t pixel) {
#if RF_LEVEL >= 3
  if constexpr (M::kUnitChannels == 2)
    if (pixel != 0) {
      __m256i first, second;
      memcpy(&first, d, sizeof first);
      memcpy(&second, reinterpret_cast<const bf16*>(d) + pixel, sizeof second);
      const __m512i both = _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(first), second, 1);
      return permute((vuint32)both, kInterleave.vector());
    }
#endif
  return load_units<M>(d);
}

// sums[r][i] += sum over the pixels of x[r][i] * dy, from zero: two-level summation.
template <typename M, int NR, int NI>
__attribute__((noinline)) void window_tile(const WindowTile<M>& t, typename M::A* sums, Prefetcher& next) {
  typedef typename M::A A;
  constexpr int L = kLanes<A>;
  Vec<A> acc[NR][NI];
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 32
    for (int i = 0; i < NI; ++i) acc[r][i] = Vec<A>{};
  for (int64_t line = 0; line < t.images * t.rows; ++line) {
    const typename M::Unit* const row = t.x + line / t.rows * t.x_image + line % t.rows * t.x_row;
    const typename M::Unit* d = t.dy + line * t.dy_row;
    const typename M::Unit* x = row;
    int64_t cols = t.cols;
    next.advance();
    for (int64_t segment = 0; segment < (t.x_last ? 2 : 1); ++segment) {
      for (int64_t col = 0; col < cols; ++col, x += t.x_col, d += t.dy_col) {
        const typename M::UnitVec dv = load_gradients<M>(d, t.dy_pixel);
#pragma GCC unroll 4
        for (int r = 0; r < NR; ++r)
#pragma GCC unroll 32
          for (int i = 0; i < NI; ++i) acc[r][i] = M::fma(acc[r][i], x[r * t.x_tap + i], dv);
      }
      x = row + t.x_last;
      cols = 1;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r)
#pragma GCC unroll 32
    for (int i = 0; i < NI; ++i) {
      A* const at = sums + r * t.sum_row + i * L;
      store(at, t.fresh ? acc[r][i] : load(at) + acc[r][i]);
    }
}

template <typename M, int NI>
static void run_window_tile(int rows, const WindowTile<M>& tile, typename M::A* sums, Prefetcher& next) {
  if constexpr (window_rows(NI) >= 3)
    if (rows == 3) return window_tile<M, 3, NI>(tile, sums, next);
  if constexpr (window_rows(NI) >= 2)
    if (rows == 2) return window_tile<M, 2, NI>(tile, sums, next);
  window_tile<M, 1, NI>(tile, sums, next);
}
template <typename M>
static void run_window_tile(int rows, int length, const WindowTile<M>& tile, typename M::A* sums, Prefetcher& next) {
  switch (length) {
    case 3: return run_window_tile<M, 3>(rows, tile, sums, next);
    case 6: return run_window_tile<M, 6>(rows, tile, sums, next);
    case 9: return run_window_tile<M, 9>(rows, tile, sums, next);
    default: break;
  }
#if RF_VECTOR_REGISTERS == 32
  switch (length) {
    case 12: return run_window_tile<M, 12>(rows, tile, sums, next);
    case 15: return run_window_tile<M, 15>(rows, tile, sums, next);
    case 18: return run_window_tile<M, 18>(rows, tile, sums, next);
    case 21: return run_window_tile<M, 21>(rows, tile, sums, next);
    case 24: return run_window_tile<M, 24>(rows, tile, sums, next);
    default: break;
  }
#endif
  run_window_tile<M, kWindowSums>(rows, tile, sums, next);
}

template <typename T> struct FewChannelsWgrad {
  typedef typename PixelModeOf<T>::type M;
  typedef typename M::Unit Unit;
  typedef Acc<T> A;
  static constexpr int L = kLanes<A>, kUnitPixels = M::kUnitChannels;

  const PreactConvWgradParams& params;
  const ConvGeometry& g;
  WgradPlan plan = {};
  int64_t window;                   // S * C
  int64_t pieces, length;           // of the window, and values of each with what is thrown away
  int64_t row_groups;               // kernel rows, several to a tile
  int64_t vectors;                  // of output channels
  int64_t units;                    // of pixels in an output row
  bool half_pair;                   // the last unit of a row is one pixel
  int64_t row_values, row_units;    // of a band's row: values of x and their padding; units, with the last window apart

  explicit FewChannelsWgrad(const PreactConvWgradParams& params)
      : params(params), g(params.g), window(g.s * g.c), pieces(divide_up(window, int64_t(kWindowSums))),
        length(round_up(divide_up(window, pieces), int64_t(kWindowStep))),
        row_groups(divide_up(g.r, int64_t(window_rows(int(length))))), vectors(divide_up(g.k, int64_t(L))),
        units(divide_up(g.q, int64_t(kUnitPixels))), half_pair(kUnitPixels == 2 && g.q % 2 == 1),
        row_values(((g.q - 1) * g.stride_w + g.s) * g.c), row_units(row_values + (half_pair ? window : 0)) {
    plan.band_rows = max64(divide_up(kTilePass, g.q), kWindowUnitBytes / (units * vectors * RF_VECTOR_BYTES));
    plan.bands = divide_up(g.p, plan.band_rows);
    plan.band_rows = divide_up(g.p, plan.bands);
    plan.images = plan.bands > 1 ? 1 : max64(1, min64(g.n, kTilePass / (g.p * g.q)));
    plan.units = divide_up(g.n, plan.images) * plan.bands;
    plan.rows = band_rows(plan.band_rows);
    plan.parts = wgrad_parts<T>(g, partial_size(), plan.units);
  }

  int64_t band_rows(int64_t out_rows) const { return (out_rows - 1) * g.stride_h + g.dilation_h * (g.r - 1) + 1; }
  // Sums are [vector of outputs][kernel row][piece][value][lane], with dbias after them.
  int64_t partial_size() const { return vectors * g.r * pieces * length * L; }

  // BatchNorm's scale and shift of a row's values: the channels', again and again.
  Prologue<A> row_prologue(int64_t values) const {
    Prologue<A> prologue = make_prologue<A>(params.bn, g.c, params.slope);
    if (!prologue.scale) return prologue;
    A* const rows = static_cast<A*>(thread_scratch(kScratchSums, size_t(2 * values) * sizeof(A)));
    for (int64_t i = 0; i < values; ++i) {
      rows[i] = i < g.c ? prologue.scale[i] : rows[i - g.c];
      rows[values + i] = i < g.c ? prologue.shift[i] : rows[values + i - g.c];
    }
    prologue.scale = rows;
    prologue.shift = rows + values;
    return prologue;
  }

  // One row of a band from its values, [row_values] as they are multiplied.
  void fill_row(Unit* out, const T* x, int64_t values, const Prologue<A>& prologue, bf16* halves) const {
    const int64_t before = min64(row_values, g.pad_w * g.c);
    if constexpr (kUnitPixels == 1) {
      memset(out, 0, size_t(row_values) * sizeof(Unit));
      convert_row(out + before, x, values, prologue);
    } else {
#if RF_LEVEL >= 3
      // Value i of a pixel beside that of the next one; of the last pixel, where that has none, beside 0.
      const int64_t step = g.stride_w * g.c;
      if (prologue.scale)
        convert_row(halves + before, x, values, prologue);
      else
        memcpy(halves + before, x, size_t(values) * sizeof(bf16));
      for (int64_t i = 0; i < row_values; i += L) {
        const vuint32 pair = bits_below(halves + i) | (vuint32)load(halves + i + step);
        if (row_values - i >= L) memcpy(out + i, &pair, sizeof pair);
        else store_partial(reinterpret_cast<float*>(out + i), (vfloat)pair, int(row_values - i));
      }
      if (half_pair)
        for (int64_t i = 0; i < window; ++i) out[row_values + i] = halves[row_values - window + i].bits;
#endif
    }
  }
  template <typename To> void convert_row(To* out, const T* x, int64_t values, const Prologue<A>& prologue) const {
    for (int64_t i = 0; i < values; i += L) {
      const int n = int(min64(L, values - i));
      Vec<A> v = n == L ? load(x + i) : load_partial(x + i, n);
      if (prologue.scale) {
        const Vec<A> scale = n == L ? load(prologue.scale + i) : load_partial(prologue.scale + i, n);
        const Vec<A> shift = n == L ? load(prologue.shift + i) : load_partial(prologue.shift + i, n);
        v = rounded_activation<T>(activate<A>(preact(v, scale, shift), splat<A>(prologue.slope), prologue.relu));
      }
      if (n == L) store(out + i, v);
      else store_partial(out + i, v, n);
    }
  }

  void fill_band(Unit* out, const T* image, int64_t rows, int64_t row0, const Prologue<A>& prologue, int64_t values) const {
    bf16* halves = nullptr;
    if constexpr (kUnitPixels == 2) {
      // The padding stays what it is from row to row.
      const int64_t count = row_values + g.stride_w * g.c + 2 * L;
      halves = static_cast<bf16*>(thread_scratch(kScratchPack, size_t(count) * sizeof(bf16)));
      memset(halves, 0, size_t(count) * sizeof(bf16));
    }
    for (int64_t row = 0; row < rows; ++row, out += row_units) {
      const int64_t h = row0 + row;
      if (h < 0 || h >= g.h)
        memset(out, 0, size_t(row_units) * sizeof(Unit));
      else
        fill_row(out, image + h * g.w * g.c, values, prologue, halves);
    }
    memset(out, 0, kWindowSums * sizeof(Unit));  // the last tile reads beyond its window
  }

#if RF_LEVEL >= 3
  RF_INLINE vuint32 bits_below(const bf16* p) {
    __m256i bits;
    memcpy(&bits, p, sizeof bits);
    return (vuint32)_mm512_maskz_cvtepu16_epi32(0xffff, bits);
  }
#endif

  // A unit's gradients as [vector of outputs][unit of pixels][lane]: pairs of pixels, or values.
  void arrange_gradients(Unit* out, const T* dy, int64_t lines) const {
    for (int64_t v = 0; v < vectors; ++v) {
      const int lanes = int(min64(L, g.k - v * L));
      const T* at = dy + v * L;
      if constexpr (kUnitPixels == 1) {
        for (int64_t pixel = 0; pixel < lines * g.q; ++pixel, at += g.k, out += L)
          store(out, lanes == L ? load(at) : load_partial(at, lanes));
      } else {
#if RF_LEVEL >= 3
        const __mmask16 mask = __mmask16((1u << lanes) - 1);
        const __m512i order = kInterleave.vector();
        const int64_t pixel = g.k, pairs = g.q / 2;
        for (int64_t line = 0; line < lines; ++line) {
          for (int64_t pair = 0; pair < pairs; ++pair, at += 2 * pixel, out += L) {
            const __m512i first = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, at));
            const __m512i both = _mm512_maskz_inserti64x4(0xff, first, _mm256_maskz_loadu_epi16(mask, at + pixel), 1);
            _mm512_storeu_si512(out, (__m512i)permute((vuint32)both, order));
          }
          if (half_pair) {
            _mm512_storeu_si512(out, _mm512_maskz_cvtepu16_epi32(kAllLanes, _mm256_maskz_loadu_epi16(mask, at)));
            at += pixel;
            out += L;
          }
        }
#endif
      }
    }
  }

  void add_unit(int64_t unit, A* partial, bool fresh, const Prologue<A>& prologue, int64_t values, A* dbias) const {
    WgradUnit<T> u = wgrad_unit<T>(params, plan, unit);
    const int64_t lines = u.images * u.out_rows;
    if (dbias) add_bias(dbias, u.dy, lines * g.q, g.k);
    u.next.divide(vectors * row_groups * pieces * lines);

    WindowTile<M> tile = {};
    tile.x_row = g.stride_h * row_units;
    tile.x_tap = g.dilation_h * row_units;
    tile.x_col = kUnitPixels * g.stride_w * g.c;
    tile.x_last = half_pair ? row_values : 0;
    tile.x_image = band_rows(u.out_rows) * row_units;
    Unit* const band = static_cast<Unit*>(
        thread_scratch(kScratchActivation, size_t(u.images * tile.x_image + kWindowSums) * sizeof(Unit)));
    for (int64_t i = 0; i < u.images; ++i)
      fill_band(band + i * tile.x_image, u.image + i * g.h * g.w * g.c, band_rows(u.out_rows), u.row0, prologue, values);

    const Unit* dy = reinterpret_cast<const Unit*>(u.dy);
    int64_t dy_vector = 0;
    if (kUnitPixels == 1 && sizeof(T) == sizeof(A) && g.k % L == 0) {
      dy_vector = L;
      tile.dy_col = g.k;
    } else if (kUnitPixels == 2 && g.k % L == 0 && !half_pair && row_groups * pieces == 1) {
      // Read once: loads that wait for memory overlap the products. 0.8-0.9 of the time; 1.2 where 7 tiles read them.
      dy_vector = L / kUnitPixels;
      tile.dy_col = tile.dy_pixel = g.k;
    } else {
      dy_vector = lines * units * L;
      Unit* const arranged = static_cast<Unit*>(thread_scratch(kScratchTile, size_t(vectors * dy_vector) * sizeof(Unit)));
      arrange_gradients(arranged, u.dy, lines);
      dy = arranged;
      tile.dy_col = L;
    }
    tile.dy_row = units * tile.dy_col;
    tile.images = u.images;
    tile.rows = u.out_rows;
    tile.cols = units - (half_pair ? 1 : 0);
    tile.sum_row = pieces * length * L;
    tile.fresh = fresh;
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t group = 0; group < row_groups; ++group) {
        const int64_t r = split_begin(g.r, row_groups, group), rows = split_begin(g.r, row_groups, group + 1) - r;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          tile.x = band + r * tile.x_tap + piece * length;
          tile.dy = dy + v * dy_vector;
          run_window_tile<M>(int(rows), int(length), tile, partial + ((v * g.r + r) * pieces + piece) * length * L, u.next);
        }
      }
  }

  void run() const {
    const int64_t size = partial_size(), stride = size + round_up(g.k, L);
    A* const partials = static_cast<A*>(thread_scratch(kScratchPartial, size_t(plan.parts * stride) * sizeof(A)));
    // A row's values that are used: columns to the right may lie beyond the last window, all may lie beyond the padding.
    const int64_t values = max64(0, min64(g.w * g.c, row_values - g.pad_w * g.c));
    parallel_for(params.parallel, plan.parts, [&](int64_t part) {
      A* const partial = partials + part * stride;
      memset(partial + size, 0, size_t(g.k) * sizeof(A));
      const Prologue<A> prologue = row_prologue(values);
      const int64_t first = part * plan.units / plan.parts, end = (part + 1) * plan.units / plan.parts;
      for (int64_t unit = first; unit < end; ++unit)
        add_unit(unit, partial, unit == first, prologue, values, params.dbias ? partial + size : nullptr);
    });

    // The parts in order, whichever thread made them.
    const WeightLayout& layout = params.weight_layout;
    parallel_for(params.parallel, vectors * row_groups, [&](int64_t task) {
      const int64_t v = task / row_groups, group = task % row_groups;
      for (int64_t r = split_begin(g.r, row_groups, group); r < split_begin(g.r, row_groups, group + 1); ++r)
        for (int64_t i = 0; i < window; ++i) {
          const A* const from = partials + ((v * g.r + r) * pieces * length + i) * L;
          Vec<A> sum = load(from);
          for (int64_t part = 1; part < plan.parts; ++part) sum += load(from + part * stride);
          write_weight<T>(params.dweight, layout.is_acc, v * L * layout.stride_k + i % g.c * layout.stride_c +
                          r * layout.stride_r + i / g.c * layout.stride_s, layout.stride_k, sum, min64(L, g.k - v * L));
        }
    });
    if (params.dbias)
      finish_bias(static_cast<A*>(params.dbias), partials + size, stride, plan.parts, g.k);
  }
};

// Whether fewer lanes are idle than with vectors of input channels, and taps of a row are neighbours. As measured with 1-12
// input channels at every level: where more than 1 lane in 4 is idle there, 0.2-0.85 of the direct algorithm's time.
// A pointwise convolution stays direct: its weight gradient is also made beside the input gradient, with the same bits.
constexpr int64_t kFewChannels = 16;
template <typename T> static bool few_channels_fits(const ConvGeometry& g) {
  constexpr int64_t L = kLanes<Acc<T>>;
  return g.c < kFewChannels && (g.s == 1 || g.dilation_w == 1) && !is_pointwise(g) &&
         g.c * round_up(g.k, L) < round_up(g.c, L) * g.k;
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
