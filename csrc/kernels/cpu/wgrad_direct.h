// The weight gradient tap by tap: dweight = sum over pixels of dy * act(x*scale + shift), the activation recomputed band by
// band. winograd_wgrad.h has the other way, wgrad_engine.h what both share.
#pragma once

#include "wgrad_engine.h"

namespace resnet_fused {
namespace RF_VARIANT {

#if RF_LEVEL >= 3
// A band as fill_band makes it, but of pairs of neighbouring slots (2j, 2j + 1) of each residue plane, [channel block][row]
// [residue][pair][channel]: two bf16 values to a unit. `odd`, if not null, gets the pairs (2j + 1, 2j + 2), which the taps at
// an odd offset read.
static void fill_pairs(uint32_t* even, uint32_t* odd, const BandLayout& b, int64_t pairs, const bf16* image, int64_t height,
                int64_t width, int64_t row0, int64_t col0, const Prologue<float>& prologue, int64_t block_stride) {
  constexpr int L = kLanes<float>;
  for (int64_t block = 0; block < b.blocks; ++block) {
    const int64_t channel = block * L;
    const int valid = int(min64(L, b.channels - channel));
    for (int64_t row = 0; row < b.rows; ++row)
      for (int64_t residue = 0; residue < b.col_stride; ++residue) {
        const int64_t line = block * block_stride + (row * b.col_stride + residue) * pairs * L, h = row0 + row * b.row_step;
        if (h < 0 || h >= height) {
          memset(even + line, 0, size_t(pairs) * L * sizeof(uint32_t));
          if (odd) memset(odd + line, 0, size_t(pairs) * L * sizeof(uint32_t));
          continue;
        }
        const bf16* const in = image + h * width * b.channels + channel;
        const auto slot = [&](int64_t index) {
          const int64_t column = (index * b.col_stride + residue) * b.col_step + col0;
          if (column < 0 || column >= width) return vfloat{};
          return load_activation<bf16>(in + column * b.channels, channel, valid, prologue);
        };
        vuint32 before = {};
        for (int64_t j = 0; j < pairs; ++j) {
          const vfloat low = slot(2 * j);
          const vuint32 pair = pair_lanes(low, slot(2 * j + 1));
          memcpy(even + line + j * L, &pair, sizeof pair);
          const vuint32 shifted = before >> 16 | pair << 16;
          if (odd && j > 0) memcpy(odd + line + (j - 1) * L, &shifted, sizeof shifted);
          before = pair;
        }
        const vuint32 last = before >> 16;
        if (odd) memcpy(odd + line + (pairs - 1) * L, &last, sizeof last);
      }
  }
}

// Pixels of pairs: halves of channel i of the first vector and of the second. From words of two pixels, of channels 0-15 and
// of channels 16-31, where both vectors are in the channels' order, and where both are [even | odd] (pack_halves); and from one
// vector of both pixels of 16 channels.
constexpr HalfOrder kPairLow = half_order([](int i) { return i / 2 + i % 2 * 32; });
constexpr HalfOrder kPairHigh = half_order([](int i) { return 16 + i / 2 + i % 2 * 32; });
constexpr HalfOrder kPairLowPacked = half_order([](int i) { return i / 4 + i / 2 % 2 * 16 + i % 2 * 32; });
constexpr HalfOrder kPairHighPacked = half_order([](int i) { return 8 + i / 4 + i / 2 % 2 * 16 + i % 2 * 32; });
constexpr HalfOrder kPairBothPacked = half_order([](int i) { return i / 4 + i / 2 % 2 * 16 + i % 2 * 8; });

// 32 channels, or the `valid` that there are, of pairs of pixels: x_of(i) is pixel i, or null, which is 0.
template <typename XOf>
RF_INLINE void pair_words(uint32_t* out, int64_t block_stride, int64_t pairs, int64_t channel, int64_t valid,
                          const Prologue<float>& prologue, const XOf& x_of) {
  constexpr int64_t L = kLanes<float>;
  const __mmask32 mask = first_halves(valid);
  const auto run = [&](const HalfOrder& low, const HalfOrder& high, const auto& halves) __attribute__((always_inline)) {
    const __m512i low_order = low.vector(), high_order = high.vector();
    const auto pixel = [&](const bf16* x) __attribute__((always_inline)) {
      return x ? halves((vuint32)_mm512_maskz_loadu_epi16(mask, x + channel)) : vuint32{};
    };
    for (int64_t j = 0; j < pairs; ++j) {
      const vuint32 first = pixel(x_of(2 * j)), second = pixel(x_of(2 * j + 1));
      const vuint32 low_pairs = permute(first, second, low_order);
      memcpy(out + j * L, &low_pairs, sizeof low_pairs);
      if (valid > L) {
        const vuint32 high_pairs = permute(first, second, high_order);
        memcpy(out + block_stride + j * L, &high_pairs, sizeof high_pairs);
      }
    }
  };
  if (prologue.scale)
    with_word_prologue(prologue, channel, valid, false, [&](const auto& words) __attribute__((always_inline)) {
      run(kPairLowPacked, kPairHighPacked, [&](vuint32 w) __attribute__((always_inline)) { return words.halves(w); });
    });
  else
    run(kPairLow, kPairHigh, [](vuint32 w) { return w; });
}

// fill_pairs for a run of pixels: no border, no stride, one copy.
static void fill_run_pairs(uint32_t* out, int64_t block_stride, const bf16* x, int64_t pixels, int64_t channels,
                           const Prologue<float>& prologue) {
  constexpr int64_t L = kLanes<float>;
  const int64_t pairs = divide_up(pixels, 2);
  if (channels == L && prologue.scale && pixels >= 2) {
    const __m512i order = kPairBothPacked.vector();
    with_word_prologue(prologue, 0, L, true, [&](const auto& words) __attribute__((always_inline)) {
      for (int64_t j = 0; j < pairs; ++j) {
        const bool whole = 2 * j + 1 < pixels;
        vuint32 both = permute(words.halves(whole ? load_words(x + 2 * j * L)
                                                  : (vuint32)_mm512_maskz_loadu_epi16(first_halves(L), x + 2 * j * L)), order);
        if (!whole) both &= 0xffffu;  // an absent pixel is 0, not act(shift)
        memcpy(out + j * L, &both, sizeof both);
      }
    });
    return;
  }
  for (int64_t channel = 0; channel < channels; channel += kWordChannels, out += 2 * block_stride)
    pair_words(out, block_stride, pairs, channel, min64(kWordChannels, channels - channel), prologue,
               [&](int64_t i) __attribute__((always_inline)) { return i < pixels ? x + i * channels : nullptr; });
}

// dy rows [cols][k] -> [pairs][k] of neighbouring pixels, `step` apart; a missing last pixel is 0.
static void pair_pixels(uint32_t* out, int64_t step, const bf16* dy, int64_t rows, int64_t cols, int64_t k) {
  const int64_t pairs = divide_up(cols, 2);
  const __m512i low_order = kPairLow.vector(), high_order = kPairHigh.vector();
  for (int64_t row = 0; row < rows; ++row, dy += cols * k)
    for (int64_t j = 0; j < pairs; ++j, out += step) {
      const bf16* lo = dy + 2 * j * k;
      const bf16* hi = 2 * j + 1 < cols ? lo + k : nullptr;
      int64_t i = 0;
      for (; hi && i + kWordChannels <= k; i += kWordChannels) {
        const vuint32 first = load_words(lo + i), second = load_words(hi + i);
        const vuint32 low = permute(first, second, low_order), high = permute(first, second, high_order);
        memcpy(out + i, &low, sizeof low);
        memcpy(out + i + kLanes<float>, &high, sizeof high);
      }
      for (; hi && i + kLanes<float> <= k; i += kLanes<float>) {
        const vuint32 both = (vuint32)load(lo + i) >> 16 | (vuint32)load(hi + i);
        memcpy(out + i, &both, sizeof both);
      }
      for (; i < k; ++i) out[i] = uint32_t(lo[i].bits) | (hi ? uint32_t(hi[i].bits) << 16 : 0u);
    }
}
#endif

// Values from one pixel's gradients to the next. A tile reads one line of many pixels: where these lie a multiple of 512 bytes
// apart, they push each other out of the L1 cache.
static int64_t gradient_step(int64_t k) { return k >= 128 && k % 128 == 0 ? k + 16 : k; }

// Where the activations of a run of pixels go as pairs of neighbours, [channel block][pair][channel]; null: not as pairs.
struct RunPairs {
  uint32_t* at;
  int64_t block_stride;
};

// Whether a tap reads pairs that begin at an odd slot of a row.
RF_INLINE bool has_odd_offset(const ConvGeometry& g) {
  for (int64_t s = 0; s < g.s; ++s)
    if (s * g.dilation_w / band_steps(g).stride_w & 1) return true;
  return false;
}

// Everything after the choice of mode. T: storage; M: how products are formed.
template <typename M, typename T> struct Wgrad {
  typedef typename M::Unit Unit;
  typedef Acc<T> A;
  static constexpr int L = kLanes<A>;
  static constexpr bool kPairs = M::kUnitChannels == 2;
  typedef typename ModeOf<Acc<T>>::type FillMode;  // F32 or F64: the band before pairing

  const PreactConvWgradParams& params;
  const ConvGeometry& g;
  const WgradPlan plan;

  int64_t max_pairs(const BandLayout& b) const { return b.plane / 2 + 1; }

  int64_t pairs_stride(const BandLayout& b) const { return b.rows * b.col_stride * max_pairs(b) * L; }

  // The calling thread's pairs: activations of some images, once or, with those at odd offsets, twice; gradients.
  uint32_t* pair_scratch(const BandLayout& b, int64_t images, int64_t copies, int64_t dy_rows, int64_t out_cols) const {
    const int64_t units = copies * images * b.blocks * pairs_stride(b) + dy_rows * divide_up(out_cols, 2) * gradient_step(g.k);
    return static_cast<uint32_t*>(thread_scratch(kScratchTile, size_t(units) * sizeof(uint32_t)));
  }
  // Where add_unit has a run's activations.
  RunPairs run_pairs(int64_t unit) const {
    if (!kPairs || !plan.pointwise) return {};
    const int64_t pixels = wgrad_unit<T>(params, plan, unit).out_cols;
    const BandLayout layout = make_band<FillMode>(g.c, 1, pixels, 1);
    return {pair_scratch(layout, 1, 1, 1, pixels), pairs_stride(layout)};
  }

  // One band of rows or run of pixels, added to `partial` [slot group][k][vectors], which is fresh if nothing has
  // been added yet, and, if wanted, to dbias. filled: run_pairs(unit) holds the activations.
  void add_unit(int64_t unit, A* partial, bool fresh, A* dbias, bool filled) const {
    const WgradUnit<T> u = wgrad_unit<T>(params, plan, unit);
    const Prologue<A> prologue = make_prologue<A>(params.bn, g.c, params.slope);
    const BandSteps steps = band_steps(g);
    const int64_t images = u.images, out_rows = u.out_rows, out_cols = u.out_cols;
    const BandLayout layout =
        plan.pointwise
            ? make_band<FillMode>(g.c, 1, out_cols, 1)
            : make_band<FillMode>(g.c, (out_rows - 1) * steps.stride_h + g.dilation_h * (g.r - 1) + 1, plan.cols,
                                  steps.stride_w, steps.row, steps.col);
    // With several images per unit a band is a whole image, so their dy rows are contiguous.
    const int64_t dy_rows = images * out_rows;
    if (dbias) add_bias(dbias, u.dy, dy_rows * out_cols, g.k);

    GradTile<M> tile = {};
    const Unit* a_base;
    int64_t copy_stride = 0, line, plane, block_stride;  // units
    const int64_t dy_step = gradient_step(g.k);
    if constexpr (kPairs) {
#if RF_LEVEL >= 3
      const int64_t pairs = max_pairs(layout);
      line = layout.col_stride * pairs * L;
      plane = pairs * L;
      block_stride = pairs_stride(layout);
      copy_stride = images * layout.blocks * block_stride;
      tile.a_image = layout.blocks * block_stride;
      const bool odd = has_odd_offset(g);
      uint32_t* const paired = pair_scratch(layout, images, odd ? 2 : 1, dy_rows, out_cols);
      for (int64_t i = 0; i < images && !filled; ++i) {
        uint32_t* const even = paired + i * tile.a_image;
        if (plan.pointwise)
          fill_run_pairs(even, block_stride, u.image, out_cols, g.c, prologue);
        else
          fill_pairs(even, odd ? even + copy_stride : nullptr, layout, pairs, u.image + i * g.h * g.w * g.c, u.height, u.width,
                     u.row0, u.col0, prologue, block_stride);
      }
      uint32_t* const dy_pairs = paired + copy_stride * (odd ? 2 : 1);
      pair_pixels(dy_pairs, dy_step, u.dy, dy_rows, out_cols, g.k);
      a_base = paired;
      tile.dy = dy_pairs;
      tile.cols = divide_up(out_cols, 2);
#endif
    } else {
      line = layout.slots * L;
      plane = layout.plane * L;
      block_stride = layout.rows * line;
      tile.a_image = band_units<FillMode>(layout);
      A* const bands = static_cast<A*>(thread_scratch(kScratchActivation, size_t(images * tile.a_image) * sizeof(A)));
      for (int64_t i = 0; i < images; ++i)
        fill_band<FillMode, T>(bands + i * tile.a_image, layout, u.image + i * g.h * g.w * g.c, u.height, u.width, u.row0,
                               u.col0, prologue);
      a_base = bands;
      tile.cols = out_cols;
      if (sizeof(T) == sizeof(A) && dy_step == g.k) {
        tile.dy = reinterpret_cast<const Unit*>(u.dy);
      } else {
        A* const copy = static_cast<A*>(thread_scratch(kScratchTile, size_t(dy_rows * out_cols * dy_step) * sizeof(A)));
        for (int64_t pixel = 0; pixel < dy_rows * out_cols; ++pixel)
          for (int64_t k = 0; k < g.k; ++k) copy[pixel * dy_step + k] = load1(u.dy + pixel * g.k + k);
        tile.dy = copy;
      }
    }
    tile.images = images;
    tile.dy_pixel = dy_step;
    tile.dy_row = tile.cols * dy_step;
    tile.dy_image = out_rows * tile.dy_row;
    tile.a_row = steps.stride_h * line;

    // Rows at a time such that inputs and gradients stay in the L1 cache while all tiles pass over them.
    const int64_t row_bytes = (layout.blocks * layout.slots * L * steps.stride_h + tile.cols * g.k) * int64_t(sizeof(Unit));
    const int64_t step = min64(out_rows, max64(divide_up(kTilePass / 4, tile.cols), 24 * 1024 / max64(1, row_bytes)));
    // A pointwise run is one long row: cut it the same way.
    const int64_t col_step =
        plan.pointwise ? max64(kTilePass / 4, 24 * 1024 / max64(1, (layout.blocks * L + g.k) * int64_t(sizeof(Unit)))) : tile.cols;
    const int64_t all_cols = tile.cols;
    const Unit* const dy_base = tile.dy;
    Prefetcher next = u.next;
    next.divide(divide_up(out_rows, step) * divide_up(all_cols, col_step) * divide_up(plan.slots, vectors_at(0)) *
                divide_up(g.k, int64_t(tile_outputs(int(vectors_at(0))))));
    for (int64_t row = 0; row < out_rows; row += step)
      for (int64_t col = 0; col < all_cols; col += col_step) {
        tile.fresh = fresh && row == 0 && col == 0;
        tile.rows = min64(step, out_rows - row);
        tile.cols = min64(col_step, all_cols - col);
        for (int64_t slot = 0; slot < plan.slots;) {
          const int vectors = int(vectors_at(slot));
          for (int v = 0; v < vectors; ++v) {
            const int64_t tap = (slot + v) / plan.blocks, block = (slot + v) % plan.blocks;
            const int64_t r = tap / g.s * g.dilation_h, s = tap % g.s * g.dilation_w;
            const int64_t offset = s / steps.stride_w;
            const int64_t column = kPairs ? (offset & 1) * copy_stride + offset / 2 * L : offset * L;
            tile.a[v] = a_base + block * block_stride + r * line + (s % steps.stride_w) * plane + column +
                        row * tile.a_row + col * L;
          }
          const int64_t tiles = divide_up(g.k, int64_t(tile_outputs(vectors)));
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t k = split_begin(g.k, tiles, i);
            const int outputs = int(split_begin(g.k, tiles, i + 1) - k);
            next.advance();
            tile.dy = dy_base + row * tile.dy_row + col * dy_step + k;
            A* const at = partial + (slot * g.k + k * vectors) * L;
            if (vectors == 3)
              run_tile<M, 3>(outputs, tile, at);
            else if (vectors == 2)
              run_tile<M, 2>(outputs, tile, at);
            else
              run_tile<M, 1>(outputs, tile, at);
          }
          slot += vectors;
        }
      }
  }

  // Slots are taken three at a time where that comes out even, else two at a time.
  int64_t vectors_at(int64_t slot) const {
    if (plan.slots % 3 == 0) return 3;
    return min64(2, plan.slots - slot);
  }

  // beside(part, unit, RunPairs): called before every unit, by the thread that takes it; returns whether it has put the
  // unit's activations where it was told.
  template <typename Beside> void run(const Beside& beside) const {
    const int64_t partial_size = plan.slots * L * g.k, stride = partial_size + g.k;
    A* const partials = static_cast<A*>(thread_scratch(kScratchPartial, size_t(plan.parts * stride) * sizeof(A)));
    parallel_for(params.parallel, plan.parts, [&](int64_t part) {
      A* const partial = partials + part * stride;
      memset(partial + partial_size, 0, size_t(g.k) * sizeof(A));
      // Neighbours differ by at most one, evenly spread.
      const int64_t first = part * plan.units / plan.parts, end = (part + 1) * plan.units / plan.parts;
      for (int64_t unit = first; unit < end; ++unit) {
        const bool filled = beside(part, unit, run_pairs(unit));
        add_unit(unit, partial, unit == first, params.dbias ? partial + partial_size : nullptr, filled);
      }
    });

    // The parts in order, whichever thread made them.
    const int64_t most = vectors_at(0);  // of a group of slots, but for the last
    sum_parts<T>(params, plan, partials, stride, [&](int64_t tap, int64_t block, int64_t k) {
      const int64_t slot = tap * plan.blocks + block, group = slot / most * most;
      return (group * g.k + k * vectors_at(group) + slot - group) * L;
    });
    if (params.dbias)
      finish_bias(static_cast<A*>(params.dbias), partials + partial_size, stride, plan.parts, g.k);
  }
};

template <typename T, typename Beside>
static void direct_wgrad(const PreactConvWgradParams& params, const WgradPlan& plan, const Beside& beside) {
#if RF_LEVEL >= 3
  // With an odd width a pair would take in a pixel that belongs to no product, and 0 * Inf is NaN.
  if constexpr (sizeof(T) == 2)
    if (plan.pointwise || params.g.q % 2 == 0) return Wgrad<ModePixelPair, T>{params, params.g, plan}.run(beside);
#endif
  Wgrad<typename ModeOf<Acc<T>>::type, T>{params, params.g, plan}.run(beside);
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
