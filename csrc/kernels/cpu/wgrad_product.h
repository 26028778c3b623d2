// The weight gradient of large weights over few pixels, as one matrix product [K] x [taps * C] over the output pixels. Both
// operands are first arranged for the register tile, activations tap by tap; then every task owns some outputs and sums over
// all pixels. There are no partial results, which where weights outnumber pixels cost more than the products.
#pragma once

#include "wgrad_direct.h"

namespace resnet_fused {
namespace RF_VARIANT {

constexpr int64_t kProductWeights = 64 << 10;          // from so many weights on,
// more than so many to a pixel (on matrix tiles 0.3-0.7 of the other's time with 576 and more, 1.3-1.6 with 36 and 144),
template <typename M> constexpr int64_t kProductWeightsPerPixel = RF_LEVEL >= 4 && M::kUnitChannels == 2 ? 256 : 32;
constexpr int64_t kProductValues = 5 << 20;           // in both arranged operands, at most
// Units of pixels that a tile passes over at once: a run. float32 sums of few images must not be much longer than an image's,
// which the library's are; pairs of bf16 have no such digits to lose.
template <typename M> constexpr int64_t kProductPass = M::kUnitChannels == 2 ? 128 : 64;
constexpr int64_t kReadUnits = 8;                     // units of pixels whose operands are read beside each other,
constexpr int64_t kReadBlocks = 16;                   // so many vectors of input channels, or tiles of output channels, to a task
constexpr int64_t kRangeBytes = int64_t(512) << 10;   // of the gradients that stay in a core's cache from task to task
constexpr int64_t kProductGroups = 16;                // tiles of output channels to a task, at most,
constexpr int64_t kSumBytes = int64_t(256) << 10;     // and of its sums under all taps, which stay in the L2 cache

template <typename M, typename T> struct WgradProduct {
  typedef typename M::Unit Unit;
  typedef Acc<T> A;
  static constexpr int L = kLanes<A>, kVectors = 2, kUnitPixels = M::kUnitChannels;

  const PreactConvWgradParams& params;
  const ConvGeometry& g;
  int64_t pixels, units;  // of outputs; a unit is one, or a pair of neighbours in memory
  int64_t blocks, slots;  // channel blocks; slot = tap * blocks + block
  int64_t groups;         // tiles of output channels

  explicit WgradProduct(const PreactConvWgradParams& params)
      : params(params), g(params.g), pixels(g.n * g.p * g.q), units(divide_up(pixels, kUnitPixels)),
        blocks(divide_up(g.c, L)), slots(blocks * g.r * g.s), groups(divide_up(g.k, int64_t(tile_outputs(kVectors)))) {}

  // As measured on 2 cores of Zen 4, 16-65536 pixels, 1 K to 4 M weights.
  bool fits() const {
    const int64_t weights = g.k * g.c * g.r * g.s;
    return weights >= kProductWeights && weights > kProductWeightsPerPixel<M> * pixels &&
           (slots * L + g.k) * units * kUnitPixels <= kProductValues + (kProductValues >> 4);
  }

  // Walks over output pixels and tells where a tap finds its input, or null outside the image.
  struct Walk {
    const ConvGeometry& g;
    const T* x;
    int64_t r, s;
    int64_t image, p, q;

    RF_INLINE_METHOD const T* next() {
      const int64_t h = p * g.stride_h - g.pad_h + r, w = q * g.stride_w - g.pad_w + s;
      const T* const at = h < 0 || h >= g.h || w < 0 || w >= g.w ? nullptr : x + ((image * g.h + h) * g.w + w) * g.c;
      if (++q == g.q) {
        q = 0;
        if (++p == g.p) {
          p = 0;
          ++image;
        }
      }
      return at;
    }
  };

  // Units from one slot to the next: an odd number of vectors, since all of them are written in turn.
  int64_t slot_units() const {
    const int64_t whole = RF_LEVEL >= 4 ? round_up(units, 16) : units;  // matrix tiles read 16
    return min64(whole, kProductPass<M>) | 1;
  }

  // [slot][unit][lane] of one run: the channel blocks [first, last) under one tap, units [begin, end). Pixels may lie a
  // multiple of a page apart, so of each as many neighbouring channels are read as there are.
  void arrange_activations(Unit* out, int64_t tap, int64_t first, int64_t last, int64_t begin, int64_t end,
                           const Prologue<A>& prologue) const {
    const int64_t pixel = begin * kUnitPixels;
    Walk walk = {g, static_cast<const T*>(params.x), tap / g.s * g.dilation_h, tap % g.s * g.dilation_w,
                 pixel / (g.p * g.q), pixel / g.q % g.p, pixel % g.q};
    out += tap * blocks * slot_units() * L;
    for (int64_t unit = begin; unit < end; unit += kReadUnits) {
      const int64_t count = min64(kReadUnits, end - unit);
      const T* at[kReadUnits * kUnitPixels];
      for (int64_t i = 0; i < count * kUnitPixels; ++i)
        at[i] = unit * kUnitPixels + i < pixels ? walk.next() : nullptr;
      for (int64_t block = first; block < last; block += kUnitPixels) {
        const int64_t channel = block * L, valid = min64(kUnitPixels * L, g.c - channel);
        Unit* const to = out + (block * slot_units() + unit - begin) * L;
        if constexpr (kUnitPixels == 1) {
          for (int64_t i = 0; i < count; ++i)
            store(to + i * L, at[i] ? rounded_activation<T>(load_activation<T>(at[i] + channel, channel, int(valid), prologue))
                                    : Vec<A>{});
        } else {
#if RF_LEVEL >= 3
          pair_words(to, slot_units() * L, count, channel, valid, prologue,
                     [&](int64_t i) __attribute__((always_inline)) { return at[i]; });
#endif
        }
      }
    }
  }

  // [group][unit][output] of the tiles of output channels [first, last), units [begin, end).
  void arrange_gradients(Unit* out, int64_t first, int64_t last, int64_t begin, int64_t end) const {
    const T* const dy = static_cast<const T*>(params.dy);
    for (int64_t unit = begin; unit < end; unit += kReadUnits) {
      const int64_t stop = min64(end, unit + kReadUnits);
      for (int64_t group = first; group < last; ++group) {
        const int64_t k = split_begin(g.k, groups, group), outputs = split_begin(g.k, groups, group + 1) - k;
        for (int64_t u = unit; u < stop; ++u)
          for (int64_t i = 0; i < outputs; i += L) {
            const int lanes = int(min64(L, outputs - i));
            const T* const at = dy + u * kUnitPixels * g.k + k + i;
            Unit* const to = out + k * units + u * outputs + i;
            if constexpr (kUnitPixels == 1) {
              store_partial(to, load_partial(at, lanes), lanes);
            } else {
              const vuint32 low = (vuint32)load_partial(at, lanes);
              const vuint32 high = 2 * u + 1 < pixels ? (vuint32)load_partial(at + g.k, lanes) : vuint32{};
              const vfloat pair = (vfloat)(low >> 16 | high);
              store_partial(reinterpret_cast<float*>(to), pair, lanes);
            }
          }
      }
    }
  }

  void arrange(Unit* activations, Unit* gradients) const {
    const Prologue<A> prologue = make_prologue<A>(params.bn, g.c, params.slope);
    const int64_t runs = divide_up(units, kProductPass<M>), taps = g.r * g.s;
    const int64_t block_pieces = divide_up(blocks, kReadBlocks), group_pieces = divide_up(groups, kReadBlocks);
    const int64_t pieces = taps * block_pieces + group_pieces;
    parallel_for(params.parallel, runs * pieces, [&](int64_t task) {
      const int64_t run = task / pieces, piece = task % pieces - group_pieces;
      const int64_t begin = run * kProductPass<M>, end = min64(units, begin + kProductPass<M>);
      if (piece < 0) {
        const int64_t first = (piece + group_pieces) * kReadBlocks;
        return arrange_gradients(gradients, first, min64(groups, first + kReadBlocks), begin, end);
      }
      const int64_t first = piece % block_pieces * kReadBlocks;
      arrange_activations(activations + run * slots * slot_units() * L, piece / block_pieces, first,
                          min64(blocks, first + kReadBlocks), begin, end, prologue);
    });
  }

  void run() const {
    const int64_t run_units = slots * slot_units() * L, all = divide_up(units, kProductPass<M>) * run_units + units * g.k;
    Unit* const activations = static_cast<Unit*>(thread_scratch(kScratchPartial, size_t(all) * sizeof(Unit)));
    Unit* const gradients = activations + all - units * g.k;
    arrange(activations, gradients);

    // Column after column, one for each tap, of the same output channels: what is read again lies in the cache.
    constexpr int64_t kOutputs = tile_outputs(kVectors), kTileSize = kOutputs * kVectors * L;
    const int64_t columns = divide_up(blocks, int64_t(kVectors)), taps = g.r * g.s;
    const int64_t fit = min64(min64(kProductGroups, kRangeBytes / (kOutputs * units * int64_t(sizeof(Unit)))),
                              kSumBytes / (taps * kTileSize * int64_t(sizeof(A))));
    const int64_t ranges = divide_up(groups, max64(1, fit));
    const WeightWriter<T> writer(params, true);
    parallel_for(params.parallel, columns * ranges, [&](int64_t task) {
      const int64_t block = task % columns * kVectors, range = task / columns;
      const int vectors = int(min64(kVectors, blocks - block));
      const int64_t first = split_begin(groups, ranges, range), last = split_begin(groups, ranges, range + 1);
      const int64_t tap_step = (last - first) * kTileSize;
      A* const sums = static_cast<A*>(thread_scratch(kScratchTile, size_t(taps * tap_step) * sizeof(A)));
      GradTile<M> tile = {};
      tile.images = tile.rows = 1;
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t unit = 0; unit < units; unit += kProductPass<M>) {
          tile.fresh = unit == 0;
          tile.cols = min64(kProductPass<M>, units - unit);
          for (int v = 0; v < vectors; ++v)
            tile.a[v] = activations + unit / kProductPass<M> * run_units + (tap * blocks + block + v) * slot_units() * L;
          for (int64_t group = first; group < last; ++group) {
            const int64_t k = split_begin(g.k, groups, group), outputs = split_begin(g.k, groups, group + 1) - k;
            tile.dy = gradients + k * units + unit * outputs;
            tile.dy_pixel = outputs;
            A* const at = sums + tap * tap_step + (group - first) * kTileSize;
            if (vectors == 2)
              run_tile<M, 2>(int(outputs), tile, at);
            else
              run_tile<M, 1>(int(outputs), tile, at);
          }
        }
      for (int64_t group = first; group < last; ++group) {
        const int64_t k = split_begin(g.k, groups, group), outputs = split_begin(g.k, groups, group + 1) - k;
        for (int64_t i = 0; i < outputs; ++i)
          writer.write(k + i, block, vectors, sums + (group - first) * kTileSize + i * vectors * L, tap_step, L);
      }
      writer.finish();
    });
    if (params.dbias) whole_bias<T>(params);
  }
};

template <typename T> using WgradProductOf = WgradProduct<typename PixelModeOf<T>::type, T>;
template <typename T> static bool product_fits(const PreactConvWgradParams& params) { return WgradProductOf<T>(params).fits(); }

}  // namespace RF_VARIANT
}  // namespace resnet_fused
