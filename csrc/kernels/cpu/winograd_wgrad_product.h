// dweight of a 3x3 convolution by Winograd's filtering (winograd_wgrad.h) where weights are many: both operands are transformed,
// then every task owns some weights and sums over all tiles. Its 16 or 36 sums per weight stay in the L2 cache until they are
// transformed back; there are no partial results, which cost more than the products here. Where the transformed operands would
// take too much memory, some images after the others, whose results are added in order.
#pragma once

#include "winograd_wgrad.h"

namespace resnet_fused {
namespace RF_VARIANT {

constexpr int64_t kWinogradProductBytes = int64_t(40) << 20;  // of both transformed operands, about
constexpr int64_t kWinogradProductWeights = 4 << 10;          // from so many weights (of one tap) on,
constexpr int64_t kWinogradProductWeightsPerTile = 32;        // so many to a tile, or where partial results take too much memory
constexpr int64_t kWinogradProductPass = kWgradStripTiles;    // tiles that a register tile passes over at once
constexpr int64_t kWinogradProductVectors = 16;               // of channels, transformed by one task
constexpr int64_t kWinogradGradBytes = int64_t(400) << 10;    // of the gradients that stay in a core's cache from task to task

template <typename T> struct WinogradWgradProduct {
  typedef ModeF32 M;
  typedef float A;
  typedef FilterOf<T> F;
  static constexpr int L = kLanes<A>, TILE = F::kTile, kVectors = 2;
  // Outputs whose gradients lie together: pixels apart, they would share a few cache sets.
  static constexpr int64_t kGradBlock = (RF_VECTOR_REGISTERS == 32 ? 2 : 3) * L;
  // Sums of such a block, from position to position: an odd number of vectors, see winograd_bands.
  static constexpr int64_t kSumStep = (kGradBlock * kVectors + 1) * L, kBlockSums = F::kPositions * kSumStep;

  const PreactConvWgradParams& params;
  const ConvGeometry& g;
  int64_t tile_rows, tile_cols;   // of an image
  int64_t images, tiles;          // that are summed at once, the most
  int64_t blocks, grad_blocks;    // of input channels, of outputs
  int64_t input_step, grad_step;  // from position to position

  explicit WinogradWgradProduct(const PreactConvWgradParams& params)
      : params(params), g(params.g), tile_rows(divide_up(g.p, TILE)), tile_cols(divide_up(g.q, TILE)), images(g.n),
        blocks(divide_up(g.c, L)), grad_blocks(divide_up(g.k, kGradBlock)) {
    const int64_t outputs = divide_up(g.k, L);
    const int64_t image_bytes = F::kPositions * tile_rows * tile_cols * (blocks + outputs) * L * int64_t(sizeof(A));
    // Results in T would be rounded before they are added.
    if (is_unrounded<T>(params.weight_layout))
      images = divide_up(g.n, divide_up(g.n, max64(1, kWinogradProductBytes / image_bytes)));
    tiles = images * tile_rows * tile_cols;
    input_step = (blocks * tiles | 1) * L;
    grad_step = (outputs * tiles | 1) * L;
  }

  int64_t operand_bytes() const { return F::kPositions * (input_step + grad_step) * int64_t(sizeof(A)); }

  // Limits as measured on 2 cores of Zen 3 (AVX2), 64-640 channels, 8-4096 tiles. Pairs of bf16, two products at once, are not
  // done there: against them 64 tiles, by the number of products, and only instead of the direct algorithm.
  bool fits() const {
    constexpr bool kPairs = PixelModeOf<T>::type::kUnitChannels == 2;
    const int64_t weights = g.c * g.k, all_tiles = g.n * tile_rows * tile_cols;
    return kHasWinograd<T> && winograd_takes(g) && g.c >= 8 && g.k >= 8 && weights >= kWinogradProductWeights &&
           all_tiles >= (kPairs ? 64 : 16) && 2 * g.n * g.p * g.q >= all_tiles * TILE * TILE &&
           operand_bytes() <= kWinogradProductBytes + (kWinogradProductBytes >> 4) &&
           (!winograd_wgrad_fits<T>(g) || (!kPairs && weights >= kWinogradProductWeightsPerTile * all_tiles));
  }

  int64_t grad_width(int64_t block) const { return min64(kGradBlock, round_up(g.k - block * kGradBlock, L)); }

  // [position][block][tile][lane] of one image, its tiles from `first_tile`; `count` blocks from `first`.
  void transform_image_inputs(A* inputs, int64_t image, int64_t first_tile, int64_t first, int64_t count,
                              const Prologue<A>& prologue) const {
    BandLayout band = make_band<M>(g.c, tile_rows * TILE + 2, tile_cols * TILE + 2, 1);
    band.first_channel = first * L;
    band.blocks = count;
    const int64_t line = band.slots * L;
    A* const pixels = static_cast<A*>(thread_scratch(kScratchActivation, size_t(band_units<M>(band)) * sizeof(A)));
    fill_band<M, T>(pixels, band, static_cast<const T*>(params.x) + image * g.h * g.w * g.c, g.h, g.w, -g.pad_h, -g.pad_w,
                    prologue);
    for (int64_t block = 0; block < count; ++block)
      for (int64_t row = 0; row < tile_rows; ++row)
        transform_inputs<F>(inputs + ((first + block) * tiles + first_tile + row * tile_cols) * L, input_step,
                            pixels + (block * band.rows + TILE * row) * line, line, tile_cols);
  }

  // [position][grad block][tile][output] of one image, its tiles from `first_tile`; outputs [begin, end).
  void transform_image_gradients(A* gradients, int64_t image, int64_t first_tile, int64_t begin, int64_t end) const {
    const T* const dy = static_cast<const T*>(params.dy) + image * g.p * g.q * g.k;
    for (int64_t row = 0; row < tile_rows; ++row)
      for (int64_t col = 0; col < tile_cols; ++col) {
        const int64_t tile = first_tile + row * tile_cols + col;
        for (int64_t k = begin; k < end; k += L) {
          const int64_t block = k / kGradBlock;
          transform_gradient<F>(gradients + block * kGradBlock * tiles + tile * grad_width(block) + k % kGradBlock, grad_step,
                                dy + TILE * (row * g.q + col) * g.k, g.q * g.k, k, g.k, g.p - TILE * row, g.q - TILE * col);
        }
      }
  }

  void transform(A* inputs, A* gradients, int64_t first_image, int64_t image_count) const {
    const Prologue<A> prologue = make_prologue<A>(params.bn, g.c, params.slope);
    const int64_t input_pieces = divide_up(blocks, kWinogradProductVectors);
    const int64_t outputs = divide_up(g.k, L), pieces = input_pieces + divide_up(outputs, kWinogradProductVectors);
    parallel_for(params.parallel, image_count * pieces, [&](int64_t task) {
      const int64_t image = first_image + task / pieces, first_tile = task / pieces * tile_rows * tile_cols;
      const int64_t piece = task % pieces;
      if (piece < input_pieces) {
        const int64_t first = piece * kWinogradProductVectors;
        return transform_image_inputs(inputs, image, first_tile, first, min64(kWinogradProductVectors, blocks - first), prologue);
      }
      const int64_t first = (piece - input_pieces) * kWinogradProductVectors;
      transform_image_gradients(gradients, image, first_tile, first * L, min64(outputs, first + kWinogradProductVectors) * L);
    });
  }

  // Sums over `count` tiles of `vectors` blocks of input channels, from `slot`, and one block of outputs, at one position.
  void multiply(A* sums, const A* inputs, const A* gradients, int64_t count, int64_t position, int64_t slot, int vectors,
                int64_t block) const {
    GradTile<M> tile = {};
    tile.images = tile.rows = 1;
    tile.dy_pixel = grad_width(block);
    const int64_t outputs = min64(kGradBlock, g.k - block * kGradBlock);
    const int64_t groups = divide_up(outputs, int64_t(tile_outputs(vectors)));
    for (int64_t first = 0; first < count; first += kWinogradProductPass) {
      tile.fresh = first == 0;
      tile.cols = min64(kWinogradProductPass, count - first);
      for (int v = 0; v < vectors; ++v) tile.a[v] = inputs + position * input_step + ((slot + v) * tiles + first) * L;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t k = split_begin(outputs, groups, group), width = split_begin(outputs, groups, group + 1) - k;
        tile.dy = gradients + position * grad_step + block * kGradBlock * tiles + first * tile.dy_pixel + k;
        A* const at = sums + position * kSumStep + k * vectors * L;
        if (vectors == 2)
          run_tile<M, 2>(int(width), tile, at);
        else
          run_tile<M, 1>(int(width), tile, at);
      }
    }
  }

  // A vector of input channels of dweight, which is of dtype acc.
  vfloat read(int64_t at, int64_t lanes) const {
    const A* const from = static_cast<const A*>(params.dweight) + at;
    const int64_t step = params.weight_layout.stride_c;
    if (step == 1 && lanes == L) return load(from);
    A value[L] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) value[lane] = from[lane * step];
    return load(value);
  }

  // A block's sums to dweight, added to what is there if that is not fresh; returns 0 in every lane, or NaN where a weight is
  // not finite.
  vfloat write(const WeightWriter<T>& writer, const A* sums, int64_t slot, int vectors, int64_t block, bool fresh) const {
    const WeightLayout& layout = params.weight_layout;
    vfloat probe = {};
    for (int64_t i = 0; i < min64(kGradBlock, g.k - block * kGradBlock); ++i) {
      const int64_t k = block * kGradBlock + i;
      A taps[kVectors][9][L];
      for (int v = 0; v < vectors; ++v) {
        transform_weight_gradient<F>(taps[v], [&](int64_t position, int half) __attribute__((always_inline)) {
          return load_wide(sums + position * kSumStep + (i * vectors + v) * L + half * L / 2);
        });
        const int64_t channel = (slot + v) * L, at = k * layout.stride_k + channel * layout.stride_c;
        for (int tap = 0; tap < 9; ++tap) {
          vfloat value = load(taps[v][tap]);
          if (!fresh) {
            value += read(at + tap / 3 * layout.stride_r + tap % 3 * layout.stride_s, min64(L, g.c - channel));
            store(taps[v][tap], value);
          }
          probe += value * 0.f;
        }
      }
      writer.write(k, slot, vectors, taps[0][0], L, 9 * L);
    }
    return probe;
  }

  // Returns false, with dweight to be computed again, if not all sums were finite.
  bool run() const {
    A* const inputs = static_cast<A*>(thread_scratch(kScratchPartial, size_t(operand_bytes())));
    for (int64_t first = 0; first < g.n; first += images)
      if (!add_images(inputs, inputs + F::kPositions * input_step, first, min64(images, g.n - first))) return false;
    if (params.dbias) whole_bias<T>(params);
    return true;
  }

  bool add_images(A* inputs, A* gradients, int64_t first_image, int64_t image_count) const {
    transform(inputs, gradients, first_image, image_count);

    // Column after column of the same outputs: what is read again lies in the cache.
    const int64_t block_bytes = F::kPositions * kGradBlock * tiles * int64_t(sizeof(A));
    const int64_t ranges = divide_up(grad_blocks, max64(1, kWinogradGradBytes / block_bytes));
    const int64_t columns = divide_up(blocks, int64_t(kVectors)), tasks = ranges * columns;
    const int64_t count = image_count * tile_rows * tile_cols;
    const bool fresh = first_image == 0;
    const WeightWriter<T> writer(params, first_image + image_count == g.n);
    return parallel_all(params.parallel, tasks, [&](int64_t task) {
      const int64_t range = task / columns, slot = task % columns * kVectors;
      const int vectors = int(min64(kVectors, blocks - slot));
      const int64_t begin = split_begin(grad_blocks, ranges, range), end = split_begin(grad_blocks, ranges, range + 1);
      A* const sums = static_cast<A*>(thread_scratch(kScratchTile, size_t((end - begin) * kBlockSums) * sizeof(A)));
      for (int64_t position = 0; position < F::kPositions; ++position)
        for (int64_t block = begin; block < end; ++block)
          multiply(sums + (block - begin) * kBlockSums, inputs, gradients, count, position, slot, vectors, block);
      vfloat probe = {};
      for (int64_t block = begin; block < end; ++block)
        probe += write(writer, sums + (block - begin) * kBlockSums, slot, vectors, block, fresh);
      writer.finish();
      return is_zero(probe);
    });
  }
};

}  // namespace RF_VARIANT
}  // namespace resnet_fused
