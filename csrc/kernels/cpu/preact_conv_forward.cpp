// y = conv(act(x*scale + shift)) + bias + residual, with the statistics of y (He et al. 2016, "Identity Mappings in Deep
// Residual Networks": one pre-activation convolution and, at a unit's end, the addition). The normalised input exists
// only as a band of rows in a core's cache; y and residual are touched once.
#include "pack_weights.h"
#include "primitives.h"
#include "winograd.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

// What happens to a register tile on its way to memory.
template <typename T> struct Epilogue {
  typedef Acc<T> A;
  static constexpr int64_t pixel_step = 1;
  int64_t channels;
  const A* bias;
  const T* residual;
  T* y;
  bool streamed;
  T* lines;
  A* mean;  // of this task, null: no statistics
  A* m2;

  // `done` pixels of these channels were merged before.
  template <int NP> RF_INLINE_METHOD void vector(Vec<A> (&column)[NP], int64_t k, int64_t pixel, int64_t done) const {
    if (bias) {
      const Vec<A> b = load(bias + k);
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) column[p] += b;
    }
    if (residual) {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) column[p] += load(residual + (pixel + p) * channels + k);
    }
#if RF_LEVEL >= 3
    if constexpr (sizeof(T) == 2)
      if (channels == kLanes<A>) return two_pixels<NP>(column, pixel, done);
#endif
    store_column<T>(y + pixel * channels, k, channels, column, streamed, lines);
    if (!mean) return;
    Vec<A> sum = {}, tile_m2 = {};
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) sum += column[p];
    const Vec<A> tile_mean = sum * (A(1) / A(NP));
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) {
      const Vec<A> d = column[p] - tile_mean;
      tile_m2 += d * d;
    }
    Vec<A> total_mean = load(mean + k), total_m2 = load(m2 + k);
    merge_stats(A(done), total_mean, total_m2, A(NP), tile_mean, tile_m2);
    store(mean + k, total_mean);
    store(m2 + k, total_m2);
  }

#if RF_LEVEL >= 3
  // The statistics stay in slots. Deviations are from the mean so far, at first from the first pixel: one pass, and nothing
  // cancels that is not in the variance too.
  template <int NP> RF_INLINE_METHOD void pair(vfloat (&column)[NP][2], int64_t k, int64_t pixel, int64_t done) const {
    constexpr int L = kLanes<float>;
    if (bias) {
      const EvenOdd b = load_even_odd(bias + k, kWordChannels);
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) {
        column[p][0] += b.even;
        column[p][1] += b.odd;
      }
    }
    if (residual) {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) {
        const vuint32 words = load_words(residual + (pixel + p) * channels + k);
        column[p][0] += even_channels(words);
        column[p][1] += odd_channels(words);
      }
    }
    const __m512i order = kInterleave.vector();
    vuint32 words[NP];
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) words[p] = permute(pack_halves(column[p][0], column[p][1]), order);
    if (streamed) {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) store_words(y + (pixel + p) * channels + k, words[p], true);
    } else {
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) store_words(y + (pixel + p) * channels + k, words[p], false);
    }
    if (!mean) return;
    vfloat center[2] = {even_channels(words[0]), odd_channels(words[0])};
    vfloat sum[2] = {}, squares[2] = {};
    if (done > 0) {
      center[0] = load(mean + k);
      center[1] = load(mean + k + L);
    }
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) {
      const vfloat even = even_channels(words[p]) - center[0], odd = odd_channels(words[p]) - center[1];
      sum[0] += even;
      sum[1] += odd;
      squares[0] += even * even;
      squares[1] += odd * odd;
    }
    const float total = float(done + NP), share = NP / total, cross = done * share;
    for (int half = 0; half < 2; ++half) {
      const vfloat delta = sum[half] * (1.f / NP), tile_m2 = squares[half] - sum[half] * delta;
      store(mean + k + half * L, center[half] + delta * share);
      store(m2 + k + half * L, load(m2 + k + half * L) + tile_m2 + delta * delta * cross);
    }
  }

  // The same where 16 channels are all of a pixel, so that two pixels are a vector of words: [even | even], [odd | odd].
  template <int NP> RF_INLINE_METHOD void two_pixels(vfloat (&column)[NP], int64_t pixel, int64_t done) const {
    constexpr int kPairs = NP / 2;
    constexpr int64_t L = kLanes<float>;
    bf16* const out = y + pixel * L;
    vuint32 words[kPairs + 1];
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) words[p] = pack_halves(column[2 * p], column[2 * p + 1]);
    if constexpr (NP % 2 == 1) words[kPairs] = pack_halves(column[NP - 1], vfloat{});
#pragma GCC unroll 16
    for (int p = 0; p < kPairs; ++p) store_words(out + 2 * p * L, words[p], false);
    if constexpr (NP % 2 == 1) memcpy(out + (NP - 1) * L, &words[kPairs], L * sizeof(bf16));
    if (!mean) return;
    EvenOdd center = {even_channels(words[0]), odd_channels(words[0])}, sum = {}, squares = {};
    if (done > 0) {
      center = load_even_odd(mean, L, true);
    } else {  // the first pixel's, for both
      center.even = (vfloat)_mm512_maskz_shuffle_f32x4(kAllLanes, (__m512)center.even, (__m512)center.even, 0x44);
      center.odd = (vfloat)_mm512_maskz_shuffle_f32x4(kAllLanes, (__m512)center.odd, (__m512)center.odd, 0x44);
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPairs + NP % 2; ++p) {
      vfloat even = even_channels(words[p]) - center.even, odd = odd_channels(words[p]) - center.odd;
      if (p == kPairs) {  // no second pixel
        even = (vfloat)_mm512_maskz_mov_ps(0xff, (__m512)even);
        odd = (vfloat)_mm512_maskz_mov_ps(0xff, (__m512)odd);
      }
      sum.even += even;
      sum.odd += odd;
      squares.even += even * even;
      squares.odd += odd * odd;
    }
    const float total = float(done + NP), share = NP / total, cross = done * share;
    const vfloat all = pixels_sum(sum), delta = all * (1.f / NP), tile_m2 = pixels_sum(squares) - all * delta;
    store(mean, permute(center.even, center.odd, kInterleavedLanes) + delta * share);
    store(m2, load(m2) + tile_m2 + delta * delta * cross);
  }
#endif

  void lanes(A* column, int np, int64_t k, int64_t pixel, int64_t done) const {
    constexpr int stride = kLanes<A>;
    for (int64_t lane = 0; lane < channels - k; ++lane) {
      A sum = 0;
      for (int p = 0; p < np; ++p) {
        const int64_t at = (pixel + p) * channels + k + lane;
        A value = column[p * stride + lane] + (bias ? bias[k + lane] : A(0));
        if (residual) value += load1(residual + at);
        store1(y + at, value);
        value = rounded1<T>(value);
        column[p * stride + lane] = value;
        sum += value;
      }
      if (!mean) continue;
      const A tile_mean = sum * (A(1) / A(np));
      A tile_m2 = 0;
      for (int p = 0; p < np; ++p) {
        const A d = column[p * stride + lane] - tile_mean;
        tile_m2 += d * d;
      }
      merge_stats(A(done), mean[k + lane], m2[k + lane], A(np), tile_mean, tile_m2);
    }
  }
};

// The epilogue of some channels of a run of pixels or a band; their statistics, row `index` of the partial ones, at zero.
// lines: see store_column.
template <typename T>
Epilogue<T> start_epilogue(const PreactConvForwardParams& params, int64_t index, int64_t first_channel, int64_t last_channel,
                           Acc<T>* partial, bool streamed) {
  const int64_t k = params.g.k;
  Acc<T>* const mean = partial ? partial + index * 2 * k : nullptr;
  if (mean)
    for (int64_t row = 0; row < 2; ++row)
      memset(mean + row * k + first_channel, 0, size_t(last_channel - first_channel) * sizeof(Acc<T>));
  return {k,
          static_cast<const Acc<T>*>(params.bias),
          static_cast<const T*>(params.residual),
          static_cast<T*>(params.y),
          streamed,
          static_cast<T*>(thread_scratch(kScratchTile, size_t(kRunPixels) * 2 * kLanes<Acc<T>> * sizeof(T))),
          mean,
          mean ? mean + k : nullptr};
}
template <typename A> A* partial_stats(const PreactConvForwardParams& params, int64_t tasks) {
  if (!params.stats) return nullptr;
  return static_cast<A*>(thread_scratch(kScratchPartial, size_t(tasks) * 2 * params.g.k * sizeof(A)));
}
// In the order of the tasks, whichever thread ran them.
template <typename A, typename Pixels>
void merge_partial_stats(const PreactConvForwardParams& params, const A* partial, int64_t tasks, const Pixels& pixels_of) {
  if (!params.stats) return;
  const int64_t channels = params.g.k;
  A* const mean = static_cast<A*>(params.stats);
  A* const m2 = mean + channels;
  memset(mean, 0, size_t(2 * channels) * sizeof(A));
  A count = 0;
  for (int64_t task = 0; task < tasks; ++task) {
    const A pixels = A(pixels_of(task));
    const A* const from = partial + task * 2 * channels;
    for (int64_t k = 0; k < channels; ++k) merge_stats(count, mean[k], m2[k], pixels, from[k], from[channels + k]);
    count += pixels;
  }
}

// Returns false, with everything to be computed again, if not all sums were finite.
template <typename T> bool winograd_forward(const PreactConvForwardParams& params) {
  const ConvGeometry& g = params.g;
  const WinogradPlan plan = plan_winograd<T>({g.n, g.c, g.k, g.h, g.w, g.p, g.q, -g.pad_h, -g.pad_w});
  float* const partial = partial_stats<float>(params, plan.parts);
  const T* const y = static_cast<const T*>(params.y);
  const bool streamed = should_stream(y, g.n * g.p * g.q, g.k);
  const bool finite = winograd_convolution<T>(
      params.parallel, plan, static_cast<const T*>(params.x), make_prologue<float>(params.bn, g.c, params.slope),
      params.weight, params.weight_layout, false, {static_cast<const T*>(params.residual), nullptr}, streamed || params.residual == y ? nullptr : y,
      [&](int64_t part, int64_t first_channel, int64_t last_channel) {
        return start_epilogue<T>(params, part, first_channel, last_channel, partial, streamed);
      });
  if (finite) merge_partial_stats(params, partial, plan.parts, [&](int64_t part) { return plan.pixels(part); });
  return finite;
}

}  // namespace

template <typename T> void preact_conv_forward(const PreactConvForwardParams& params) {
  if constexpr (kHasWinograd<T>)
    if (winograd_fits<T>(params.g) && winograd_forward<T>(params)) return;
  typedef typename ModeOf<T>::type M;
  typedef typename M::Unit Unit;
  typedef Acc<T> A;
  const ConvGeometry& g = params.g;
  const Prologue<A> prologue = make_prologue<A>(params.bn, g.c, params.slope);
  const int64_t taps = g.r * g.s;
  const PackLayout pack = make_pack<M>(g.c, g.k, taps);
  const bool pointwise = is_pointwise(g);
  const PointwisePlan runs = plan_pointwise<M>(g.n * g.h * g.w, g.c, pack.out_blocks);
  const BandSteps steps = band_steps(g);
  const int64_t halo_h = g.dilation_h * (g.r - 1) + 1, band_cols = (g.q - 1) * steps.stride_w + g.dilation_w * (g.s - 1) + 1;
  const int64_t row_bytes =
      divide_up(g.c, int64_t(kBlock<M>) * M::kUnitChannels) * round_up(band_cols, steps.stride_w) * RF_VECTOR_BYTES;
  const int64_t band_rows = rows_per_band(g.p, row_bytes, steps.stride_h, halo_h - steps.stride_h);
  const int64_t in_rows = (band_rows - 1) * steps.stride_h + halo_h;
  const BandPlan bands = plan_bands(g.n, g.p, band_rows, in_rows * row_bytes, pack.out_blocks,
                                    pack_units<M>(pack) * int64_t(sizeof(Unit)));
  const int64_t parts = pointwise ? runs.runs : bands.parts, tasks = pointwise ? runs.tasks() : bands.tasks();
  const int64_t most_pixels = tile_pixels<M>(pack.in_units);

  // Shared by all tasks: packed weights, then the kernel position of every tap.
  Unit* const packed = static_cast<Unit*>(thread_scratch(
      kScratchPack, size_t(pack_units<M>(pack)) * sizeof(Unit) + size_t(taps) * 2 * sizeof(int32_t)));
  int32_t* const taps_r = reinterpret_cast<int32_t*>(packed + pack_units<M>(pack));
  int32_t* const taps_s = taps_r + taps;
  for (int64_t t = 0; t < taps; ++t) {
    taps_r[t] = int32_t(t / g.s);
    taps_s[t] = int32_t(t % g.s);
  }
  parallel_for(params.parallel, pack.out_blocks, [&](int64_t block) {
    pack_block<M, T>(packed + pack_block_offset<M>(pack, block), pack, block, params.weight, params.weight_layout,
                     params.weight_layout.stride_c, params.weight_layout.stride_k, taps_r, taps_s);
  });
  A* const partial = partial_stats<A>(params, parts);
  const bool streamed = should_stream(static_cast<const T*>(params.y), g.n * g.p * g.q, g.k);
  const BandLayout largest = pointwise ? make_band<M>(g.c, 1, divide_up(runs.pixels, runs.runs), 1)
                                       : make_band<M>(g.c, in_rows, band_cols, steps.stride_w);
  const int64_t scratch_units = band_scratch_units<M>(largest, pointwise ? 1 : bands.most_images);
  parallel_for(params.parallel, tasks, [&](int64_t task) {
    Unit* const band = static_cast<Unit*>(thread_scratch(
        kScratchActivation, size_t(scratch_units) * sizeof(Unit) + size_t(taps) * sizeof(int64_t)));
    int64_t* const tap_offsets = reinterpret_cast<int64_t*>(band + scratch_units);
    begin_convolution<M>(pack.in_units);

    const int64_t part = pointwise ? runs.run(task) : bands.part(task);
    const int64_t first_block = pointwise ? runs.first_block(task) : bands.first_block(task);
    const int64_t last_block = pointwise ? runs.last_block(task) : bands.last_block(task);
    int64_t images = 1, out_rows = 1, out_cols, first_pixel;
    BandLayout layout;
    if (pointwise) {
      first_pixel = runs.first_pixel(part);
      out_cols = runs.pixel_count(part);
      layout = make_band<M>(g.c, 1, out_cols, 1);
      fill_band<M, T>(band, layout, static_cast<const T*>(params.x) + first_pixel * g.c, 1, out_cols, 0, 0, prologue);
    } else {
      const int64_t image = bands.first_image(part), p0 = bands.first_row(part);
      images = bands.image_count(part);
      out_rows = bands.row_count(part);
      out_cols = g.q;
      first_pixel = (image * g.p + p0) * g.q;
      layout = make_band<M>(g.c, (out_rows - 1) * steps.stride_h + halo_h, band_cols, steps.stride_w, steps.row, steps.col);
      for (int64_t i = 0; i < images; ++i)
        fill_band<M, T>(band + i * band_units<M>(layout), layout, static_cast<const T*>(params.x) + (image + i) * g.h * g.w * g.c,
                        g.h, g.w, p0 * g.stride_h - g.pad_h, -g.pad_w, prologue);
    }
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t col = taps_s[t] * g.dilation_w;
      tap_offsets[t] = (taps_r[t] * g.dilation_h * layout.slots + (col % steps.stride_w) * layout.plane + col / steps.stride_w) *
                       kBlock<M>;
    }
    const Epilogue<T> epilogue = start_epilogue<T>(
        params, part, first_block * kOutBlock<A>, min64(g.k, last_block * kOutBlock<A>), partial, streamed);
    const TileInput<M> input = {tap_offsets, taps, layout.rows * layout.slots * kBlock<M>, pack.in_units};
    Prefetcher next;
    if (part + 1 < parts) {
      const T* const x = static_cast<const T*>(params.x);
      int64_t begin, end, pixel, count;  // of the next task: input pixels, output pixels
      if (pointwise) {
        begin = pixel = first_pixel + out_cols;
        count = runs.pixel_count(part + 1);
        end = begin + count;
      } else {
        const int64_t image = bands.first_image(part + 1), p0 = bands.first_row(part + 1);
        const int64_t last_image = image + bands.image_count(part + 1) - 1, top = p0 * g.stride_h - g.pad_h;
        begin = (image * g.h + max64(0, top)) * g.w;
        end = (last_image * g.h + max64(0, min64(g.h, top + in_rows * steps.row))) * g.w;
        pixel = (image * g.p + p0) * g.q;
        count = ((last_image - image) * g.p + bands.row_count(part + 1)) * g.q;
      }
      next.add_input(g, x, begin, end);
      if (epilogue.residual) next.add(epilogue.residual + pixel * g.k, epilogue.residual + (pixel + count) * g.k);
      if (!streamed && epilogue.y != epilogue.residual) next.add_output(epilogue.y + pixel * g.k, epilogue.y + (pixel + count) * g.k);
      next.divide((last_block - first_block) * images * out_rows * divide_up(out_cols, most_pixels) *
                  advances_per_tile<M>(taps, pack.in_units));
    }
    for (int64_t block = first_block; block < last_block; ++block) {
      const Unit* const w = packed + pack_block_offset<M>(pack, block);
      const int64_t channel = block * kOutBlock<A>;
      const int vectors = pack_vectors<M>(pack, block);
      for (int64_t i = 0; i < images; ++i) {
        const PixelRows<M> pixels = {band + i * band_units<M>(layout), steps.stride_h * layout.slots * kBlock<M>,
                                     first_pixel + i * g.p * g.q, out_cols, out_rows, out_cols};
        convolve_rows(input, pixels, w, epilogue, channel, vectors, i * out_rows * out_cols, [&] { next.advance(); });
      }
    }
    end_convolution<M>(pack.in_units);
    if (streamed) stream_fence();
  });

  merge_partial_stats(params, partial, parts, [&](int64_t part) {
    if (pointwise) return runs.pixel_count(part);
    return bands.image_count(part) * bands.row_count(part) * g.q;
  });
#if RF_LEVEL >= 3
  if constexpr (kPairedOutputs<M>)
    if (params.stats)
      for (int64_t row = 0; row < 2; ++row) slots_to_channels(static_cast<A*>(params.stats) + row * g.k, g.k);
#endif
}

#if RF_LEVEL < 4
template void preact_conv_forward<float>(const PreactConvForwardParams&);
template void preact_conv_forward<double>(const PreactConvForwardParams&);
#endif
template void preact_conv_forward<bf16>(const PreactConvForwardParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
