// dz = act'(z) * (input gradient of the convolution) + dz_in, with sum dz and sum dz*xhat per channel: what BatchNorm's
// backward needs of the layer (Ioffe & Szegedy 2015). z is recomputed from x.
//
// The input gradient of a convolution with stride (sh, sw) is sh*sw convolutions of dy with stride 1, one for each residue
// ("phase") of the input position, each with the taps that reach it: h + pad = p*stride + r*dilation.
#include "dgrad_epilogue.h"
#include "pack_weights.h"
#include "primitives.h"
#include "winograd.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

RF_INLINE bool reaches(int64_t phase, int64_t tap, int64_t stride, int64_t pad, int64_t dilation, int64_t* offset) {
  const int64_t position = phase + pad - tap * dilation;
  const int64_t residue = ((position % stride) + stride) % stride;
  *offset = (position - residue) / stride;
  return residue == 0;
}

struct Extent {
  int64_t least, most;  // offsets of p relative to the phase index, over all phases
};
Extent extent_of(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  Extent e = {0, 0};
  for (int64_t phase = 0; phase < stride; ++phase)
    for (int64_t tap = 0; tap < kernel; ++tap) {
      int64_t offset;
      if (!reaches(phase, tap, stride, pad, dilation, &offset)) continue;
      e.least = min64(e.least, offset);
      e.most = max64(e.most, offset);
    }
  return e;
}

// The epilogue of some channels of a run of pixels or a band; their sums, row `index` of the partial ones, at zero.
template <typename T>
DgradEpilogue<T> start_epilogue(const PreactConvDgradParams& params, int64_t index, int64_t first_channel,
                                int64_t last_channel, Acc<T>* partial, bool streamed, bool paired) {
  Acc<T>* const sums = partial + index * 2 * params.g.c;
  for (int64_t row = 0; row < 2; ++row)
    memset(sums + row * params.g.c + first_channel, 0, size_t(last_channel - first_channel) * sizeof(Acc<T>));
  return dgrad_epilogue<T>(params, sums, kRunPixels, streamed, paired);
}
template <typename A> A* partial_sums(const PreactConvDgradParams& params, int64_t tasks) {
  return static_cast<A*>(thread_scratch(kScratchPartial, size_t(tasks) * 2 * params.g.c * sizeof(A)));
}
template <typename A>
void merge_partial_sums(const PreactConvDgradParams& params, const A* partial, int64_t tasks, bool paired) {
  A* const sums = static_cast<A*>(params.sums);
  add_partial_sums(sums, partial, 2 * params.g.c, tasks, params.g.c, paired);
  if (const A* const before = static_cast<const A*>(params.dz_in_sums))
    for (int64_t c = 0; c < 2 * params.g.c; ++c) sums[c] += before[c];
}

template <typename T> void set_zero(T* out, int64_t pixels, int64_t channels, int64_t first_channel, int64_t last_channel) {
  constexpr int64_t kAhead = 2048 / sizeof(T), kPiece = 512 / sizeof(T);  // a fourth faster than memset with this
  if (last_channel - first_channel == channels) {
    for (T* const end = out + pixels * channels; out < end; out += kPiece) {
      const int64_t count = min64(kPiece, end - out);
      for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(out + kAhead + i, 1);
      memset(out, 0, size_t(count) * sizeof(T));
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p)
    memset(out + p * channels + first_channel, 0, size_t(last_channel - first_channel) * sizeof(T));
}

// Returns false, with everything to be computed again, if not all sums were finite.
template <typename T> bool winograd_dgrad(const PreactConvDgradParams& params) {
  const ConvGeometry& g = params.g;
  const WinogradPlan plan = plan_winograd<T>({g.n, g.k, g.c, g.p, g.q, g.h, g.w, g.pad_h - 2, g.pad_w - 2});
  float* const partial = partial_sums<float>(params, plan.parts);
  const T* const dz = static_cast<const T*>(params.dz);
  const bool streamed = should_stream(dz, g.n * g.h * g.w, g.c);
  const bool finite = winograd_convolution<T>(
      params.parallel, plan, static_cast<const T*>(params.dy), make_prologue<float>(nullptr, g.k, 0), params.weight,
      params.weight_layout, true, {static_cast<const T*>(params.x), static_cast<const T*>(params.dz_in)},
      streamed || params.dz_in == dz ? nullptr : dz,
      [&](int64_t part, int64_t first_channel, int64_t last_channel) {
        return start_epilogue<T>(params, part, first_channel, last_channel, partial, streamed, false);
      });
  if (finite) merge_partial_sums(params, partial, plan.parts, false);
  return finite;
}

}  // namespace

template <typename T> void preact_conv_dgrad(const PreactConvDgradParams& params) {
  if constexpr (kHasWinograd<T>)
    if (winograd_fits<T>(params.g) && winograd_dgrad<T>(params)) return;
  typedef typename ModeOf<T>::type M;
  typedef typename M::Unit Unit;
  typedef Acc<T> A;
  constexpr int B = kBlock<M>;
  const ConvGeometry& g = params.g;

  // A pointwise convolution is one long row of pixels.
  const bool pointwise = is_pointwise(g);
  const int64_t blocks = divide_up(g.k, int64_t(B) * M::kUnitChannels);
  const PointwisePlan runs = plan_pointwise<M>(g.n * g.h * g.w, g.k, divide_up(g.c, kOutBlock<A>));

  const int64_t phases = g.stride_h * g.stride_w;
  const Extent eh = extent_of(g.r, g.stride_h, g.pad_h, g.dilation_h);
  const Extent ew = extent_of(g.s, g.stride_w, g.pad_w, g.dilation_w);
  const int64_t index_rows = divide_up(g.h, g.stride_h), index_cols = divide_up(g.w, g.stride_w);
  const int64_t band_cols = pointwise ? divide_up(runs.pixels, runs.runs) : index_cols + ew.most - ew.least;
  const int64_t row_bytes = blocks * band_cols * RF_VECTOR_BYTES;
  const int64_t band_rows = pointwise ? 1 : rows_per_band(index_rows, row_bytes, 1, eh.most - eh.least);
  const int64_t in_rows = pointwise ? 1 : band_rows + eh.most - eh.least;
  const BandLayout largest = make_band<M>(g.k, in_rows, band_cols, 1);

  // Taps sorted by phase: [phase_begin[i], phase_begin[i+1]).
  const int64_t taps = g.r * g.s;
  const PackLayout whole = make_pack<M>(g.k, g.c, taps);
  const int64_t packed_units = pack_units<M>(whole), most_pixels = tile_pixels<M>(whole.in_units);
  const BandPlan bands = plan_bands(g.n, index_rows, band_rows, in_rows * row_bytes, whole.out_blocks,
                                    packed_units * int64_t(sizeof(Unit)));
  const int64_t parts = pointwise ? runs.runs : bands.parts, tasks = pointwise ? runs.tasks() : bands.tasks();
  const int64_t scratch_units = band_scratch_units<M>(largest, pointwise ? 1 : bands.most_images);
  char* const shared = static_cast<char*>(thread_scratch(
      kScratchPack, size_t(packed_units) * sizeof(Unit) + size_t(phases + 1 + 2 * taps) * sizeof(int64_t) +
                        size_t(2 * taps) * sizeof(int32_t)));
  Unit* const packed = reinterpret_cast<Unit*>(shared);
  int64_t* const phase_begin = reinterpret_cast<int64_t*>(shared + size_t(packed_units) * sizeof(Unit));
  int64_t* const tap_row = phase_begin + phases + 1;
  int64_t* const tap_col = tap_row + taps;
  int32_t* const taps_r = reinterpret_cast<int32_t*>(tap_col + taps);
  int32_t* const taps_s = taps_r + taps;
  int64_t found = 0;
  for (int64_t phase = 0; phase < phases; ++phase) {
    phase_begin[phase] = found;
    for (int64_t r = 0; r < g.r; ++r)
      for (int64_t s = 0; s < g.s; ++s)
        if (int64_t row, col; reaches(phase / g.stride_w, r, g.stride_h, g.pad_h, g.dilation_h, &row) &&
                              reaches(phase % g.stride_w, s, g.stride_w, g.pad_w, g.dilation_w, &col)) {
          tap_row[found] = row - eh.least;
          tap_col[found] = col - ew.least;
          taps_r[found] = int32_t(r);
          taps_s[found] = int32_t(s);
          ++found;
        }
  }
  phase_begin[phases] = found;
  // [block][tap][unit][lane]: the phases' taps together, since they are neighbours in memory.
  const PackLayout pack = make_pack<M>(g.k, g.c, found);
  parallel_for(params.parallel, pack.out_blocks, [&](int64_t block) {
    pack_block<M, T>(packed + pack_block_offset<M>(pack, block), pack, block, params.weight, params.weight_layout,
                     params.weight_layout.stride_k, params.weight_layout.stride_c, taps_r, taps_s);
  });

  // No output reads some pixels of x, where a stride is larger than the kernel: their dz is 0, and adds nothing to the sums.
  bool sparse = false;
  for (int64_t phase = 0; phase < phases; ++phase) sparse = sparse || phase_begin[phase] == phase_begin[phase + 1];
  const bool zeroes = sparse && !params.dz_in;
  const bool streamed = !zeroes && should_stream(static_cast<const T*>(params.dz), g.n * g.h * g.w, g.c);
  A* const partial = partial_sums<A>(params, parts);
  const Prologue<A> none = make_prologue<A>(nullptr, g.k, 0);
  parallel_for(params.parallel, tasks, [&](int64_t task) {
    Unit* const band = static_cast<Unit*>(thread_scratch(
        kScratchActivation, size_t(scratch_units) * sizeof(Unit) + size_t(taps) * sizeof(int64_t)));
    int64_t* const tap_offsets = reinterpret_cast<int64_t*>(band + scratch_units);
    begin_convolution<M>(whole.in_units);
    const int64_t part = pointwise ? runs.run(task) : bands.part(task);
    const int64_t first_block = pointwise ? runs.first_block(task) : bands.first_block(task);
    const int64_t last_block = pointwise ? runs.last_block(task) : bands.last_block(task);
    int64_t image = 0, images = 1, row0 = 0, rows = 1, first_pixel = 0;
    BandLayout layout;
    if (pointwise) {
      first_pixel = runs.first_pixel(part);
      layout = make_band<M>(g.k, 1, runs.pixel_count(part), 1);
      fill_band<M, T>(band, layout, static_cast<const T*>(params.dy) + first_pixel * g.k, 1, layout.cols, 0, 0, none);
    } else {
      image = bands.first_image(part);
      images = bands.image_count(part);
      row0 = bands.first_row(part);
      rows = bands.row_count(part);
      layout = make_band<M>(g.k, rows + eh.most - eh.least, band_cols, 1);
      for (int64_t i = 0; i < images; ++i)
        fill_band<M, T>(band + i * band_units<M>(layout), layout, static_cast<const T*>(params.dy) + (image + i) * g.p * g.q * g.k,
                        g.p, g.q, row0 + eh.least, ew.least, none);
    }
    const int64_t first_channel = first_block * kOutBlock<A>, last_channel = min64(g.c, last_block * kOutBlock<A>);
    const DgradEpilogue<T> epilogue =
        start_epilogue<T>(params, part, first_channel, last_channel, partial, streamed, kPairedOutputs<M>);
    if (zeroes) {
      const int64_t top = row0 * g.stride_h, height = min64(rows * g.stride_h, g.h - top);
      for (int64_t i = image; i < image + images; ++i)
        set_zero(epilogue.dz + (i * g.h + top) * g.w * g.c, height * g.w, g.c, first_channel, last_channel);
    }
    for (int64_t t = 0; t < found; ++t) tap_offsets[t] = (tap_row[t] * layout.slots + tap_col[t]) * B;

    Prefetcher next;
    if (part + 1 < parts) {
      const T* const dy = static_cast<const T*>(params.dy);
      int64_t begin, end, first, last;  // of the next task: pixels of dy, pixels of x
      if (pointwise) {
        begin = first = runs.first_pixel(part + 1);
        end = last = begin + runs.pixel_count(part + 1);
      } else {
        const int64_t image = bands.first_image(part + 1), last_image = image + bands.image_count(part + 1) - 1;
        const int64_t index = bands.first_row(part + 1);
        begin = (image * g.p + min64(g.p, max64(0, index + eh.least))) * g.q;
        end = (last_image * g.p + min64(g.p, max64(0, index + band_rows + eh.most))) * g.q;
        first = (image * g.h + index * g.stride_h) * g.w;
        last = (last_image * g.h + min64(g.h, (index + band_rows) * g.stride_h)) * g.w;
      }
      next.add(dy + begin * g.k, dy + end * g.k);
      // Of a stride of 2, three pixels of four are not read.
      const auto add = [&](const T* tensor) {
        if (epilogue.replaces || zeroes)
          next.add_input(g, tensor, first, last);
        else
          next.add(tensor + first * g.c, tensor + last * g.c);
      };
      add(epilogue.x);
      if (epilogue.dz_in) add(epilogue.dz_in);
      if (!streamed && !epilogue.replaces && !zeroes && epilogue.dz != epilogue.dz_in)
        next.add_output(epilogue.dz + first * g.c, epilogue.dz + last * g.c);
      int64_t advances = 0;
      for (int64_t phase = 0; phase < phases; ++phase)
        advances += advances_per_tile<M>(phase_begin[phase + 1] - phase_begin[phase], pack.in_units);
      next.divide((last_block - first_block) * images * rows * divide_up(pointwise ? layout.cols : index_cols, most_pixels) * advances);
    }
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t phase_h = phase / g.stride_w, phase_w = phase % g.stride_w, first_tap = phase_begin[phase];
      const int64_t phase_taps = phase_begin[phase + 1] - first_tap;
      const TileInput<M> input = {tap_offsets + first_tap, phase_taps, layout.rows * layout.slots * B, pack.in_units};
      const int64_t cols = pointwise ? layout.cols : divide_up(g.w - phase_w, g.stride_w);
      const int64_t top = row0 * g.stride_h + phase_h, first = pointwise ? first_pixel : (image * g.h + top) * g.w + phase_w;
      const int64_t phase_rows = pointwise ? 1 : min64(rows, divide_up(g.h - top, g.stride_h));
      if (cols <= 0 || phase_rows <= 0 || ((epilogue.replaces || zeroes) && phase_taps == 0)) continue;
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t channel = block * kOutBlock<A>;
        const int vectors = pack_vectors<M>(pack, block);
        const Unit* const w = packed + pack_block_offset<M>(pack, block) + first_tap * pack.in_units * vectors * kLanes<A>;
        for (int64_t i = 0; i < images; ++i) {
          const PixelRows<M> pixels = {band + i * band_units<M>(layout), layout.slots * B, first + i * g.h * g.w,
                                       g.stride_h * g.w, phase_rows, cols};
          convolve_rows(input, pixels, w, epilogue, channel, vectors, 0, [&] { next.advance(); });
        }
      }
    }
    end_convolution<M>(whole.in_units);
    if (streamed) stream_fence();
  });

  merge_partial_sums(params, partial, parts, kPairedOutputs<M>);
}

#if RF_LEVEL < 4
template void preact_conv_dgrad<float>(const PreactConvDgradParams&);
template void preact_conv_dgrad<double>(const PreactConvDgradParams&);
#endif
template void preact_conv_dgrad<bf16>(const PreactConvDgradParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
