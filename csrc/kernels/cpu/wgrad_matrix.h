// The weight gradient of bf16 where the CPU has matrix tiles. A left operand are 16 output channels by 32 pixels of the gradients,
// transposed for it; a right one pairs of pixels by 16 input channels, as wgrad_direct.h and wgrad_product.h arrange them.
//
// Rows of pixels follow each other without a gap: the gradients have zeros at the slots between one row's last pixel and the next
// row's first, so one run of slots is summed for each tap. What stands there in the activations is multiplied by zero, which is
// seen where it is not finite: then all is computed again by wgrad_direct.h.
#pragma once

#include "conv_matrix_tile.h"
#include "pack_weights.h"
#include "wgrad_product.h"

namespace resnet_fused {
namespace RF_VARIANT {

#if RF_LEVEL >= 4
constexpr int64_t kMatrixSums = kTileLefts * 2 * kLanes<float>;  // of 32 outputs and 2 vectors of input channels

// An odd number of vectors, since 16 rows are read at once.
RF_INLINE int64_t matrix_step(int64_t pairs) { return round_up(pairs, kTileUnits) | kTileUnits; }

// 16 output channels, or the `valid` that there are, of 16 pairs of pixels: out[channel * step + pair]. pixel(i): gradients of
// pixel i, or null, which is 0.
template <typename Pixel>
RF_INLINE void transpose_gradients(uint32_t* out, int64_t step, int64_t valid, const Pixel& pixel) {
  constexpr int64_t L = kLanes<float>;
  const __mmask16 mask = static_cast<__mmask16>((1u << valid) - 1);
  const auto half = [&](const bf16* from) __attribute__((always_inline)) {
    return from ? (vuint32)_mm512_maskz_cvtepu16_epi32(kAllLanes, _mm256_maskz_loadu_epi16(mask, from)) : vuint32{};
  };
  __m512 rows[L];
#pragma GCC unroll 16
  for (int64_t j = 0; j < L; ++j) rows[j] = (__m512)(half(pixel(2 * j)) | half(pixel(2 * j + 1)) << 16);
  transpose(rows);
#pragma GCC unroll 16
  for (int64_t i = 0; i < L; ++i) memcpy(out + i * step, &rows[i], sizeof rows[i]);
}

// The sums of 32 outputs, whose gradients are left, and the input channels of right0 and right1: `steps` of 16 pairs more.
struct MatrixReduction {
  const uint32_t* left0;
  const uint32_t* left1;
  int64_t left_step;  // units from one output to the next
  const uint32_t* right0;
  const uint32_t* right1;
  int64_t steps;
};
// advance(): called with each of them.
template <typename Advance> RF_INLINE void reduce_tiles(const MatrixReduction& r, const Advance& advance) {
  constexpr int64_t L = kLanes<float>;
  for (int64_t step = 0; step < r.steps; ++step) {
    advance();
    multiply_tiles<2, 0>(r.left0 + step * kTileUnits, r.left1 + step * kTileUnits, r.left_step * 4,
                         r.right0 + step * kTileUnits * L, r.right1 + step * kTileUnits * L, L * 4);
  }
}
RF_INLINE void load_tiles(const float* from) {
  constexpr int64_t L = kLanes<float>;
  memory_to_tiles();
  _tile_loadd(0, from, 2 * L * 4);
  _tile_loadd(1, from + L, 2 * L * 4);
  _tile_loadd(2, from + kTileRows * 2 * L, 2 * L * 4);
  _tile_loadd(3, from + kTileRows * 2 * L + L, 2 * L * 4);
}

// By parts with a partial result each, [32 outputs][pair of slots][output][2 vectors]. Of a
// convolution with a stride, the input positions of each residue are a band of their own, a plane: in it neighbouring outputs read
// neighbours, under every tap.
struct MatrixWgrad {
  static constexpr int64_t L = kLanes<float>;
  const PreactConvWgradParams& params;
  const ConvGeometry& g;
  const WgradPlan plan;
  const int64_t groups, slot_pairs, partial_size;

  MatrixWgrad(const PreactConvWgradParams& params, const WgradPlan& plan)
      : params(params), g(params.g), plan(plan), groups(divide_up(g.k, kTileLefts)), slot_pairs(divide_up(plan.slots, 2)),
        partial_size(groups * slot_pairs * kMatrixSums) {}

  static bool fits(const ConvGeometry& g) { return g.c >= 8; }

  // One unit of work's operands, in the calling thread's scratch.
  struct Operands {
    BandLayout band;       // one plane
    int64_t pitch;         // pairs from one row of a band to the next
    int64_t image_pairs;   // of an image, with the slots behind each row, in whole tiles
    int64_t block_stride, plane_stride, image_stride, copy_stride;
    int64_t left_step;
    uint32_t* activations;
    uint32_t* gradients;
  };
  Operands operands(const WgradUnit<bf16>& u) const {
    Operands o = {};
    const BandSteps steps = band_steps(g);
    // Taps reach so far behind an output's own row and column of a plane.
    const int64_t halo_h = g.dilation_h * (g.r - 1) / steps.stride_h, halo_w = g.dilation_w * (g.s - 1) / steps.stride_w;
    o.band = plan.pointwise ? make_band<ModeF32>(g.c, 1, u.out_cols, 1)
                            : make_band<ModeF32>(g.c, u.out_rows + halo_h, u.out_cols + halo_w, 1, g.stride_h, g.stride_w);
    o.pitch = divide_up(o.band.plane, 2);
    o.image_pairs = round_up(u.out_rows * o.pitch, kTileUnits);
    // A tap's run of slots begins up to a halo later, and ends with a whole tile.
    const int64_t last = halo_h * o.pitch + halo_w / 2 + o.image_pairs;
    o.block_stride = (max64(o.band.rows * o.pitch, last) | 1) * L;
    o.plane_stride = o.band.blocks * o.block_stride;
    o.image_stride = steps.stride_h * steps.stride_w * o.plane_stride;
    o.copy_stride = u.images * o.image_stride;
    o.left_step = matrix_step(u.images * o.image_pairs);
    const int64_t activations = o.copy_stride * (has_odd_offset(g) ? 2 : 1);
    o.activations = static_cast<uint32_t*>(
        thread_scratch(kScratchTile, size_t(activations + groups * kTileLefts * o.left_step) * sizeof(uint32_t)));
    o.gradients = o.activations + activations;
    return o;
  }
  // Where add_unit has a run's activations.
  RunPairs run_pairs(int64_t unit) const {
    if (!plan.pointwise) return {};
    const Operands o = operands(wgrad_unit<bf16>(params, plan, unit));
    return {o.activations, o.block_stride};
  }

  void arrange(const WgradUnit<bf16>& u, const Operands& o, bool filled) const {
    const Prologue<float> prologue = make_prologue<float>(params.bn, g.c, params.slope);
    const BandSteps steps = band_steps(g);
    const int64_t used = o.band.rows * o.pitch, planes = steps.stride_h * steps.stride_w;
    const bool odd = has_odd_offset(g);
    for (int64_t i = 0; i < u.images * planes; ++i) {
      uint32_t* const even = o.activations + i * o.plane_stride;
      if (plan.pointwise) {
        if (!filled) fill_run_pairs(even, o.block_stride, u.image, u.out_cols, g.c, prologue);
      } else {
        const int64_t plane = i % planes;
        fill_pairs(even, odd ? even + o.copy_stride : nullptr, o.band, o.pitch, u.image + i / planes * g.h * g.w * g.c, u.height,
                   u.width, u.row0 + plane / steps.stride_w, u.col0 + plane % steps.stride_w, prologue, o.block_stride);
      }
      for (int64_t block = 0; block < o.band.blocks; ++block)
        for (int64_t copy = 0; copy < (odd ? 2 : 1); ++copy)
          memset(even + copy * o.copy_stride + block * o.block_stride + used * L, 0,
                 size_t(o.block_stride - used * L) * sizeof(uint32_t));
    }
    for (int64_t i = 0; i < u.images; ++i)
      for (int64_t first = 0; first < o.image_pairs; first += kTileUnits) {
        const bf16* at[2 * kTileUnits];
        int64_t row = first / o.pitch, pair = first % o.pitch;
        for (int64_t j = 0; j < kTileUnits; ++j) {
          for (int64_t k = 0; k < 2; ++k)
            at[2 * j + k] = row < u.out_rows && 2 * pair + k < u.out_cols
                                ? u.dy + ((i * u.out_rows + row) * u.out_cols + 2 * pair + k) * g.k
                                : nullptr;
          if (++pair == o.pitch) {
            pair = 0;
            ++row;
          }
        }
        for (int64_t k = 0; k < g.k; k += L)
          transpose_gradients(o.gradients + k * o.left_step + i * o.image_pairs + first, o.left_step, min64(L, g.k - k),
                              [&](int64_t p) __attribute__((always_inline)) { return at[p] ? at[p] + k : nullptr; });
      }
  }

  void add_unit(int64_t unit, float* partial, bool fresh, float* dbias, bool filled) const {
    WgradUnit<bf16> u = wgrad_unit<bf16>(params, plan, unit);
    const Operands o = operands(u);
    if (dbias) add_bias(dbias, u.dy, u.images * u.out_rows * u.out_cols, g.k);
    arrange(u, o, filled);
    u.next.divide(groups * slot_pairs * u.images * (o.image_pairs / kTileUnits));
    use_tiles(kTileUnits);
    const BandSteps steps = band_steps(g);
    const auto right = [&](int64_t slot) {
      const int64_t tap = slot / plan.blocks, block = slot % plan.blocks;
      const int64_t row = tap / g.s * g.dilation_h, col = tap % g.s * g.dilation_w, offset = col / steps.stride_w;
      const int64_t plane = row % steps.stride_h * steps.stride_w + col % steps.stride_w;
      return o.activations + plane * o.plane_stride + block * o.block_stride +
             (row / steps.stride_h * o.pitch + offset / 2) * L + (offset & 1) * o.copy_stride;
    };
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t pair = 0; pair < slot_pairs; ++pair) {
        const bool alone = 2 * pair + 1 == plan.slots;  // its sums are there twice
        const uint32_t* const right0 = right(2 * pair);
        const uint32_t* const right1 = alone ? right0 : right(2 * pair + 1);
        const uint32_t* const left0 = o.gradients + group * kTileLefts * o.left_step;
        // Of at most 16 outputs, the other sums are not read.
        const uint32_t* const left1 = g.k - group * kTileLefts > kTileRows ? left0 + kTileRows * o.left_step : left0;
        float* const sums = partial + (group * slot_pairs + pair) * kMatrixSums;
        if (fresh)
          zero_tiles();
        else
          load_tiles(sums);
        for (int64_t i = 0; i < u.images; ++i)
          reduce_tiles({left0 + i * o.image_pairs, left1 + i * o.image_pairs, o.left_step, right0 + i * o.image_stride,
                        right1 + i * o.image_stride, o.image_pairs / kTileUnits},
                       [&]() __attribute__((always_inline)) { u.next.advance(); });
        store_tiles<2>(sums);
      }
    _tile_release();
  }

  // beside: as of Wgrad::run. False, with everything to be computed again, if not all sums were finite.
  template <typename Beside> bool run(const Beside& beside) const {
    const int64_t stride = partial_size + g.k;
    float* const partials = static_cast<float*>(thread_scratch(kScratchPartial, size_t(plan.parts * stride) * sizeof(float)));
    parallel_for(params.parallel, plan.parts, [&](int64_t part) {
      float* const partial = partials + part * stride;
      memset(partial + partial_size, 0, size_t(g.k) * sizeof(float));
      const int64_t first = part * plan.units / plan.parts, end = (part + 1) * plan.units / plan.parts;
      for (int64_t unit = first; unit < end; ++unit) {
        const bool filled = beside(part, unit, run_pairs(unit));
        add_unit(unit, partial, unit == first, params.dbias ? partial + partial_size : nullptr, filled);
      }
    });

    const bool finite = sum_parts<bf16>(params, plan, partials, stride, [&](int64_t tap, int64_t block, int64_t k) {
      const int64_t slot = tap * plan.blocks + block;
      return (k / kTileLefts * slot_pairs + slot / 2) * kMatrixSums + (k % kTileLefts * 2 + slot % 2) * L;
    });
    if (params.dbias) finish_bias(static_cast<float*>(params.dbias), partials + partial_size, stride, plan.parts, g.k);
    return plan.pointwise || finite;  // there is no product there that does not belong
  }
};

// The whole as one product (wgrad_product.h).
struct MatrixWgradProduct : WgradProduct<ModePixelPair, bf16> {
  typedef WgradProduct<ModePixelPair, bf16> Base;
  explicit MatrixWgradProduct(const PreactConvWgradParams& params) : Base(params) {}

  void run() const {
    constexpr int64_t kPass = kProductPass<ModePixelPair>;
    static_assert(kPass % kTileUnits == 0);
    const int64_t run_units = slots * slot_units() * L, runs = divide_up(units, kPass), step = matrix_step(units);
    const int64_t lefts = round_up(g.k, kTileLefts);
    uint32_t* const activations =
        static_cast<uint32_t*>(thread_scratch(kScratchPartial, size_t(runs * run_units + lefts * step) * sizeof(uint32_t)));
    uint32_t* const gradients = activations + runs * run_units;
    const Prologue<float> prologue = make_prologue<float>(params.bn, g.c, params.slope);
    const int64_t block_pieces = divide_up(blocks, kReadBlocks), gradient_pieces = divide_up(g.k, kReadBlocks * L);
    const int64_t pieces = g.r * g.s * block_pieces + gradient_pieces;
    parallel_for(params.parallel, runs * pieces, [&](int64_t task) {
      const int64_t run = task / pieces, piece = task % pieces - gradient_pieces;
      const int64_t begin = run * kPass, end = min64(units, begin + kPass);
      if (piece < 0) {
        const int64_t first = (piece + gradient_pieces) * kReadBlocks * L;
        return transpose_run(gradients, step, first, min64(g.k, first + kReadBlocks * L), begin, end);
      }
      const int64_t tap = piece / block_pieces, first = piece % block_pieces * kReadBlocks, last = min64(blocks, first + kReadBlocks);
      uint32_t* const out = activations + run * run_units;
      arrange_activations(out, tap, first, last, begin, end, prologue);
      for (int64_t block = first; block < last; ++block) {
        uint32_t* const line = out + (tap * blocks + block) * slot_units() * L;
        memset(line + (end - begin) * L, 0, size_t(round_up(end - begin, kTileUnits) - (end - begin)) * L * sizeof(uint32_t));
      }
    });

    // Column after column, one for each tap, of the same output channels: what is read again lies in the cache.
    const int64_t columns = divide_up(blocks, int64_t(kVectors)), taps = g.r * g.s, left_groups = divide_up(g.k, kTileLefts);
    const int64_t fit = min64(kRangeBytes / (kTileLefts * step * 4), kSumBytes / (taps * kMatrixSums * int64_t(sizeof(float))));
    const int64_t ranges = divide_up(left_groups, max64(1, fit));
    const WeightWriter<bf16> writer(params, true);
    parallel_for(params.parallel, columns * ranges, [&](int64_t task) {
      const int64_t block = task % columns * kVectors, range = task / columns;
      const bool alone = block + 1 == blocks;  // its sums are there twice
      const int64_t first = split_begin(left_groups, ranges, range), last = split_begin(left_groups, ranges, range + 1);
      const int64_t tap_step = (last - first) * kMatrixSums;
      float* const sums = static_cast<float*>(thread_scratch(kScratchTile, size_t(taps * tap_step) * sizeof(float)));
      use_tiles(kTileUnits);
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t group = first; group < last; ++group) {
          const int64_t k = group * kTileLefts;
          const uint32_t* const left0 = gradients + k * step;
          const uint32_t* const left1 = g.k - k > kTileRows ? left0 + kTileRows * step : left0;
          zero_tiles();
          for (int64_t run = 0; run < runs; ++run) {
            const uint32_t* const right0 = activations + run * run_units + (tap * blocks + block) * slot_units() * L;
            reduce_tiles({left0 + run * kPass, left1 + run * kPass, step, right0, alone ? right0 : right0 + slot_units() * L,
                          divide_up(min64(kPass, units - run * kPass), kTileUnits)},
                         [] {});
          }
          store_tiles<2>(sums + tap * tap_step + (group - first) * kMatrixSums);
        }
      _tile_release();
      for (int64_t k = first * kTileLefts; k < min64(g.k, last * kTileLefts); ++k)
        writer.write(k, block, alone ? 1 : 2, sums + (k - first * kTileLefts) * 2 * L, tap_step, L);
      writer.finish();
    });
    if (params.dbias) whole_bias<bf16>(params);
  }

 private:
  // Pairs [begin, end) of output channels [first, last), and zeros up to a whole tile.
  void transpose_run(uint32_t* gradients, int64_t step, int64_t first, int64_t last, int64_t begin, int64_t end) const {
    const bf16* const dy = static_cast<const bf16*>(params.dy);
    for (int64_t pair = begin; pair < end; pair += kTileUnits)
      for (int64_t k = first; k < last; k += L)
        transpose_gradients(gradients + k * step + pair, step, min64(L, g.k - k), [&](int64_t p) __attribute__((always_inline)) {
          return 2 * pair + p < pixels ? dy + (2 * pair + p) * g.k + k : nullptr;
        });
  }
};
#endif

// The two algorithms, by matrix tiles where there are some.
template <typename T> static void run_product(const PreactConvWgradParams& params) {
#if RF_LEVEL >= 4
  if constexpr (sizeof(T) == 2) return MatrixWgradProduct(params).run();
#endif
  WgradProductOf<T>(params).run();
}
template <typename T, typename Beside>
static void run_parts(const PreactConvWgradParams& params, const WgradPlan& plan, const Beside& beside) {
#if RF_LEVEL >= 4
  if constexpr (sizeof(T) == 2)
    if (MatrixWgrad::fits(params.g) && MatrixWgrad(params, plan).run(beside)) return;
#endif
  direct_wgrad<T>(params, plan, beside);
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
