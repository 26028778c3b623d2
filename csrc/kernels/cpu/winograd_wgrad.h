// dweight of a 3x3 convolution with stride 1 by Winograd's filtering (winograd.h): the gradient of
// Y = A^T [ (G g G^T) * (B^T d B) ] A with respect to g is
//
//   dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G
//
// The sums over tiles are one matrix product per position, in wgrad_engine.h's register tile.
#pragma once

#include "wgrad_engine.h"

namespace resnet_fused {
namespace RF_VARIANT {

// Whether there are tiles enough: every part of the work writes, reads and adds its 16 or 36 sums per weight. Limits as
// measured, and of the memory that at least 4 parts take.
template <typename T> static bool winograd_wgrad_fits(const ConvGeometry& g) {
  typedef FilterOf<T> F;
  const int64_t tiles = winograd_tiles<T>(g), weights = g.c * g.k;
  return kHasWinograd<T> && winograd_takes(g) && g.c >= 8 && g.k >= 8 && tiles >= 64 &&
         weights <= (F::kTile == 2 ? 300 : 100) * tiles && F::kPositions * weights * 16 <= int64_t(40) << 20;
}

// Half a vector of floats as doubles.
typedef float vfloat_half __attribute__((vector_size(RF_VECTOR_BYTES / 2)));
RF_INLINE vdouble load_wide(const float* p) {
  vfloat_half v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vdouble);
}
RF_INLINE void store_narrow(float* p, vdouble v) {
  const vfloat_half narrow = __builtin_convertvector(v, vfloat_half);
  memcpy(p, &narrow, sizeof narrow);
}

// G^T u G of a vector of input channels, tap by tap. sum_of(position, half): half of the sums of a position, as doubles.
template <typename F, typename SumOf>
RF_INLINE void transform_weight_gradient(float (&taps)[9][kLanes<float>], const SumOf& sum_of) {
  constexpr int L = kLanes<float>, P = F::kPoints;
  for (int half = 0; half < 2; ++half) {
    vdouble columns[P][3];
    for (int j = 0; j < P; ++j) {
      vdouble u[P];
      for (int r = 0; r < P; ++r) u[r] = sum_of(r * P + j, half);
      F::weight_gradient(u, columns[j]);
    }
    for (int r = 0; r < 3; ++r) {
      vdouble row[P], g3[3];
      for (int j = 0; j < P; ++j) row[j] = columns[j][r];
      F::weight_gradient(row, g3);
      for (int s = 0; s < 3; ++s) store_narrow(taps[3 * r + s] + half * L / 2, g3[s]);
    }
  }
}

// A dY A^T of one tile, L outputs of it from k on. dy: its first pixel's outputs; the rows and columns of it that exist; the
// results `step` apart from position to position.
template <typename F, typename T>
RF_INLINE void transform_gradient(float* out, int64_t step, const T* dy, int64_t line, int64_t k, int64_t channels, int64_t rows,
                                  int64_t cols) {
  constexpr int L = kLanes<float>, P = F::kPoints, TILE = F::kTile;
  const int64_t left = channels - k;
  vfloat columns[TILE][P];
#pragma GCC unroll 4
  for (int j = 0; j < TILE; ++j) {
    vfloat y[TILE];
#pragma GCC unroll 4
    for (int r = 0; r < TILE; ++r) {
      const T* const at = dy + r * line + j * channels + k;
      y[r] = r >= rows || j >= cols ? vfloat{} : left >= L ? load(at) : load_partial<T>(at, int(left));
    }
    F::gradient(y, columns[j]);
  }
#pragma GCC unroll 6
  for (int r = 0; r < P; ++r) {
    vfloat row[TILE], z[P];
#pragma GCC unroll 4
    for (int j = 0; j < TILE; ++j) row[j] = columns[j][r];
    F::gradient(row, z);
#pragma GCC unroll 6
    for (int j = 0; j < P; ++j) store(out + (r * P + j) * step, z[j]);
  }
}

template <typename T> struct WinogradWgrad {
  typedef ModeF32 M;
  typedef float A;
  typedef FilterOf<T> F;
  static constexpr int L = kLanes<A>, TILE = F::kTile;

  const PreactConvWgradParams& params;
  const ConvGeometry& g;
  const WgradPlan plan;
  // From position to position of a part's sums; an odd number of vectors, as in a strip.
  const int64_t sum_step = (plan.blocks * g.k | 1) * L;

  // Of a strip: transformed inputs [position][channel block][tile][vector], transformed gradients [position][tile][k].
  // Positions lie an odd number of vectors apart, see winograd_bands.
  struct Strip {
    int64_t tiles, input_step, grad_pixel, grad_step;
    A* input;
    A* grad;
  };
  Strip make_strip(int64_t tiles) const {
    Strip s;
    s.tiles = tiles;
    s.input_step = (plan.blocks * tiles | 1) * L;
    s.grad_pixel = round_up(g.k, L);
    s.grad_step = (divide_up(g.k, L) * tiles | 1) * L;
    s.input = static_cast<A*>(
        thread_scratch(kScratchWinograd, size_t(F::kPositions * (s.input_step + s.grad_step)) * sizeof(A)));
    s.grad = s.input + F::kPositions * s.input_step;
    return s;
  }

  // A dY A^T of a row of tiles. dy: row of the first, [cols][k]; the rows of it that exist.
  void transform_grads(const Strip& s, float* out, const T* dy, int64_t rows, int64_t first_col, int64_t count) const {
    for (int64_t tile = 0; tile < count; ++tile, out += s.grad_pixel) {
      const int64_t col = first_col + TILE * tile;
      for (int64_t k = 0; k < g.k; k += L)
        transform_gradient<F>(out + k, s.grad_step, dy + col * g.k, g.q * g.k, k, g.k, rows, min64(TILE, g.q - col));
    }
  }

  // partial [position, sum_step apart][group of blocks][k][vector of the group] += products of a strip's tiles.
  void multiply(const Strip& s, int64_t tiles, A* partial, bool fresh, Prefetcher& next) const {
    GradTile<M> tile = {};
    tile.images = tile.rows = 1;
    tile.fresh = fresh;
    tile.cols = tiles;
    tile.dy_pixel = s.grad_pixel;
    for (int64_t position = 0; position < F::kPositions; ++position) {
      next.advance();
      for (int64_t block = 0; block < plan.blocks; block += 2) {
        const int vectors = int(min64(2, plan.blocks - block));
        for (int v = 0; v < vectors; ++v)
          tile.a[v] = s.input + position * s.input_step + (block + v) * s.tiles * L;
        const int64_t groups = divide_up(g.k, int64_t(tile_outputs(vectors)));
        for (int64_t i = 0; i < groups; ++i) {
          const int64_t k = split_begin(g.k, groups, i);
          const int outputs = int(split_begin(g.k, groups, i + 1) - k);
          tile.dy = s.grad + position * s.grad_step + k;
          A* const at = partial + position * sum_step + (block * g.k + k * vectors) * L;
          if (vectors == 2)
            run_tile<M, 2>(outputs, tile, at);
          else
            run_tile<M, 1>(outputs, tile, at);
        }
      }
    }
  }

  void add_unit(int64_t unit, A* partial, bool fresh, A* dbias) const {
    const WgradUnit<T> u = wgrad_unit<T>(params, plan, unit);
    if (dbias) add_bias(dbias, u.dy, u.images * u.out_rows * u.out_cols, g.k);
    const Prologue<A> prologue = make_prologue<A>(params.bn, g.c, params.slope);
    const BandLayout layout = make_band<M>(g.c, round_up(u.out_rows, TILE) + 2, plan.cols, 1);
    const int64_t band_size = band_units<M>(layout), line = layout.slots * L;
    A* const bands = static_cast<A*>(thread_scratch(kScratchActivation, size_t(u.images * band_size) * sizeof(A)));
    for (int64_t i = 0; i < u.images; ++i)
      fill_band<M, T>(bands + i * band_size, layout, u.image + i * g.h * g.w * g.c, u.height, u.width, u.row0, u.col0,
                      prologue);

    const WinogradStrips strips = winograd_strips<F>(u.images, u.out_rows, u.out_cols, kWgradStripTiles);
    const Strip s = make_strip(strips.most);
    Prefetcher next = u.next;
    next.divide(strips.count() * F::kPositions);
    for (int64_t strip = 0; strip < strips.count(); ++strip) {
      const int64_t row0 = strip / strips.pieces * strips.rows_per_strip, piece = strip % strips.pieces;
      const int64_t rows = min64(strips.rows_per_strip, strips.rows - row0);
      const int64_t col0 = strips.first_col(piece), cols = strips.first_col(piece + 1) - col0;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t image = (row0 + row) / strips.tile_rows, tile_row = (row0 + row) % strips.tile_rows;
        for (int64_t block = 0; block < plan.blocks; ++block)
          transform_inputs<F>(s.input + (block * s.tiles + row * cols) * L, s.input_step,
                              bands + image * band_size + (block * layout.rows + TILE * tile_row) * line + TILE * col0 * L,
                              line, cols);
        transform_grads(s, s.grad + row * cols * s.grad_pixel, u.dy + (image * g.p + TILE * tile_row) * g.q * g.k,
                        u.out_rows - TILE * tile_row, TILE * col0, cols);
      }
      multiply(s, rows * cols, partial, fresh && strip == 0, next);
    }
  }

  // Returns whether all of dweight is finite; dbias is then right too.
  bool run() const {
    const int64_t partial_size = F::kPositions * sum_step, stride = partial_size + round_up(g.k, L);
    A* const partials = static_cast<A*>(thread_scratch(kScratchPartial, size_t(plan.parts * stride) * sizeof(A)));
    parallel_for(params.parallel, plan.parts, [&](int64_t part) {
      A* const partial = partials + part * stride;
      memset(partial + partial_size, 0, size_t(g.k) * sizeof(A));
      const int64_t first = part * plan.units / plan.parts, end = (part + 1) * plan.units / plan.parts;
      for (int64_t unit = first; unit < end; ++unit)
        add_unit(unit, partial, unit == first, params.dbias ? partial + partial_size : nullptr);
    });

    // The parts in order, whichever thread made them, then G^T ... G.
    const WeightWriter<T> writer(params, false);
    constexpr int64_t kOutputs = 4;  // per task
    const int64_t outputs = divide_up(g.k, kOutputs), tasks = plan.blocks * outputs;
    const bool finite = parallel_all(params.parallel, tasks, [&](int64_t task) {
      const int64_t block = task / outputs, group = block / 2 * 2, vectors = min64(2, plan.blocks - group);
      Vec<A> probe = {};
      for (int64_t k = task % outputs * kOutputs; k < min64(g.k, (task % outputs + 1) * kOutputs); ++k) {
        const A* const first = partials + (group * g.k + k * vectors + block - group) * L;
        A taps[9][L];
        transform_weight_gradient<F>(taps, [&](int64_t position, int half) __attribute__((always_inline)) {
          vdouble sum = {};
          for (int64_t part = 0; part < plan.parts; ++part)
            sum += load_wide(first + position * sum_step + part * stride + half * L / 2);
          return sum;
        });
        for (int tap = 0; tap < 9; ++tap) probe += load(taps[tap]) * 0.f;
        writer.write(k, block, 1, taps[0], L, 0);
      }
      return is_zero(probe);
    });
    if (finite && params.dbias)
      finish_bias(static_cast<A*>(params.dbias), partials + partial_size, stride, plan.parts, g.k);
    return finite;
  }
};

// Returns false, with dweight and dbias to be computed again, if not all sums were finite.
template <typename T> static bool winograd_wgrad(const PreactConvWgradParams& params) {
  return WinogradWgrad<T>{params, params.g, plan_wgrad<T>(params.g, FilterOf<T>::kTile)}.run();
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
