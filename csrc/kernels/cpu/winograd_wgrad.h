// dweight of a 3x3 convolution with stride 1 by Winograd's filtering (winograd.h): the gradient of
// Y = A^T [ (G g G^T) * (B^T d B) ] A with respect to g is
//
//   dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G
//
// 16 products per 2x2 gradients instead of 36. The sums over tiles are 16 matrix products in wgrad_engine.h's register tile.
#pragma once

#include "wgrad_engine.h"

namespace resnet_fused {
namespace RF_VARIANT {

// Tiles that the register tile passes over before it is added to the partial result.
constexpr int64_t kWgradStripTiles = 64;

template <typename T> struct WinogradWgrad {
  typedef ModeF32 M;
  typedef float A;
  static constexpr int L = kLanes<A>;

  const PreactConvWgradParams& params;
  const ConvGeometry& g;
  const WgradPlan plan;

  // Of a strip: transformed inputs [position][channel block][tile][vector], transformed gradients [position][tile][k].
  // An odd number of vectors from position to position, as in WinogradScratch.
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
        thread_scratch(kScratchWinograd, size_t(kWinogradPositions * (s.input_step + s.grad_step)) * sizeof(A)));
    s.grad = s.input + kWinogradPositions * s.input_step;
    return s;
  }

  // A dY A^T of one row of tiles. dy: row of the first, [cols][k]; `second`: whether the row below exists.
  void transform_grads(A* out, int64_t step, const Strip& s, const T* dy, bool second, int64_t first_col, int64_t count) const {
    const Vec<A> zero = {};
    for (int64_t tile = 0; tile < count; ++tile, out += s.grad_pixel) {
      const int64_t col = first_col + 2 * tile;
      const bool right = col + 1 < g.q;
      const T* const at = dy + col * g.k;
      for (int64_t k = 0; k < g.k; k += L) {
        const auto pixel = [&](bool exists, int64_t offset) __attribute__((always_inline)) {
          if (!exists) return zero;
          return g.k - k >= L ? load(at + offset + k) : load_partial<T>(at + offset + k, int(g.k - k));
        };
        const Vec<A> y00 = pixel(true, 0), y01 = pixel(right, g.k);
        const Vec<A> y10 = pixel(second, g.q * g.k), y11 = pixel(second && right, (g.q + 1) * g.k);
        const Vec<A> rows[4][2] = {{y00, y01}, {y00 + y10, y01 + y11}, {y00 - y10, y01 - y11}, {zero - y10, zero - y11}};
        A* const to = out + k;
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          store(to + (4 * r + 0) * step, rows[r][0]);
          store(to + (4 * r + 1) * step, rows[r][0] + rows[r][1]);
          store(to + (4 * r + 2) * step, rows[r][0] - rows[r][1]);
          store(to + (4 * r + 3) * step, zero - rows[r][1]);
        }
      }
    }
  }

  // partial [position][group of blocks][k][vector of the group] += products of a strip's tiles.
  void multiply(const Strip& s, int64_t tiles, A* partial, Prefetcher& next) const {
    GradTile<M> tile = {};
    tile.images = tile.rows = 1;
    tile.cols = tiles;
    tile.dy_pixel = s.grad_pixel;
    for (int64_t position = 0; position < kWinogradPositions; ++position) {
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
          A* const at = partial + ((position * plan.blocks + block) * g.k + k * vectors) * L;
          if (vectors == 2)
            run_tile<M, 2>(outputs, tile, at);
          else
            run_tile<M, 1>(outputs, tile, at);
        }
      }
    }
  }

  void add_unit(int64_t unit, A* partial, A* dbias) const {
    const WgradUnit<T> u = wgrad_unit<T>(params, plan, unit);
    if (dbias) add_bias(dbias, u.dy, u.images * u.out_rows * u.out_cols, g.k);
    const Prologue<A> prologue = make_prologue<A>(params.bn, g.c, params.slope);
    const BandLayout layout = make_band<M>(g.c, round_up(u.out_rows, 2) + 2, plan.cols, 1);
    const int64_t band_size = band_units<M>(layout), line = layout.slots * L;
    A* const bands = static_cast<A*>(thread_scratch(kScratchActivation, size_t(u.images * band_size) * sizeof(A)));
    for (int64_t i = 0; i < u.images; ++i)
      fill_band<M, T>(bands + i * band_size, layout, u.image + i * g.h * g.w * g.c, u.height, u.width, u.row0, u.col0,
                      prologue);

    // Strips of whole tile rows, which may be of several images, or of pieces of one row.
    const int64_t tile_rows = divide_up(u.out_rows, 2), tile_cols = divide_up(u.out_cols, 2), rows = u.images * tile_rows;
    const int64_t pieces = divide_up(tile_cols, kWgradStripTiles);
    const int64_t rows_per_strip = divide_up(rows, divide_up(rows, max64(1, kWgradStripTiles / tile_cols)));
    const Strip s = make_strip(rows_per_strip * divide_up(tile_cols, pieces));
    Prefetcher next = u.next;
    next.divide(divide_up(rows, rows_per_strip) * pieces * kWinogradPositions);
    for (int64_t first = 0; first < rows; first += rows_per_strip)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t col0 = split_begin(tile_cols, pieces, piece);
        const int64_t cols = split_begin(tile_cols, pieces, piece + 1) - col0;
        const int64_t end = min64(rows, first + rows_per_strip);
        for (int64_t row = first; row < end; ++row) {
          const int64_t image = row / tile_rows, tile_row = row % tile_rows, before = (row - first) * cols;
          for (int64_t block = 0; block < plan.blocks; ++block)
            transform_inputs<A>(s.input + (block * s.tiles + before) * L, s.input_step,
                                bands + image * band_size + (block * layout.rows + 2 * tile_row) * line + 2 * col0 * L, line,
                                cols);
          transform_grads(s.grad + before * s.grad_pixel, s.grad_step, s,
                          u.dy + (image * g.p + 2 * tile_row) * g.q * g.k, 2 * tile_row + 1 < u.out_rows, 2 * col0, cols);
        }
        multiply(s, (end - first) * cols, partial, next);
      }
  }

  // Returns whether all of dweight is finite; dbias is then right too.
  bool run() const {
    const int64_t partial_size = plan.slots * L * g.k, stride = partial_size + g.k;
    A* const partials = static_cast<A*>(thread_scratch(kScratchPartial, size_t(plan.parts * stride) * sizeof(A)));
    parallel_for(params.parallel, plan.parts, [&](int64_t part) {
      A* const partial = partials + part * stride;
      memset(partial, 0, size_t(stride) * sizeof(A));
      const int64_t end = (part + 1) * plan.units / plan.parts;
      for (int64_t unit = part * plan.units / plan.parts; unit < end; ++unit)
        add_unit(unit, partial, params.dbias ? partial + partial_size : nullptr);
    });

    // The parts in order, whichever thread made them, then G^T ... G.
    const WeightLayout& layout = params.weight_layout;
    constexpr int64_t kOutputs = 4;  // per task
    const int64_t outputs = divide_up(g.k, kOutputs), tasks = plan.blocks * outputs;
    bool* const finite = static_cast<bool*>(thread_scratch(kScratchPack, size_t(tasks)));
    parallel_for(params.parallel, tasks, [&](int64_t task) {
      const int64_t block = task / outputs, group = block / 2 * 2, vectors = min64(2, plan.blocks - group);
      const int64_t channel = block * L;
      Vec<A> probe = {};
      for (int64_t k = task % outputs * kOutputs; k < min64(g.k, (task % outputs + 1) * kOutputs); ++k) {
        Vec<A> u[4][4];
        for (int64_t position = 0; position < kWinogradPositions; ++position) {
          const A* from = partials + ((position * plan.blocks + group) * g.k + k * vectors + block - group) * L;
          Vec<A> sum = load(from);
          for (int64_t part = 1; part < plan.parts; ++part) sum += load(from + part * stride);
          u[position / 4][position % 4] = sum;
        }
        const Vec<A> half = splat<A>(A(0.5));
        Vec<A> rows[3][4];
        for (int j = 0; j < 4; ++j) {
          const Vec<A> even = (u[1][j] + u[2][j]) * half;
          rows[0][j] = u[0][j] + even;
          rows[1][j] = (u[1][j] - u[2][j]) * half;
          rows[2][j] = even + u[3][j];
        }
        const int64_t base = channel * layout.stride_c + k * layout.stride_k, lanes = min64(L, g.c - channel);
        for (int r = 0; r < 3; ++r) {
          const Vec<A> even = (rows[r][1] + rows[r][2]) * half;
          const Vec<A> taps[3] = {rows[r][0] + even, (rows[r][1] - rows[r][2]) * half, even + rows[r][3]};
          for (int s = 0; s < 3; ++s) {
            probe += taps[s] * A(0);
            write_weight<T>(params.dweight, layout, base + r * layout.stride_r + s * layout.stride_s, taps[s], lanes);
          }
        }
      }
      A lane_probe[L];
      store(lane_probe, probe);
      finite[task] = true;
      for (int lane = 0; lane < L; ++lane)
        if (lane_probe[lane] != 0) finite[task] = false;
    });
    for (int64_t task = 0; task < tasks; ++task)
      if (!finite[task]) return false;
    if (params.dbias)
      finish_bias(static_cast<A*>(params.dbias), partials + partial_size, stride, plan.parts, g.k);
    return true;
  }
};

// Returns false, with dweight and dbias to be computed again, if not all sums were finite.
template <typename T> static bool winograd_wgrad(const PreactConvWgradParams& params) {
  return WinogradWgrad<T>{params, params.g, plan_wgrad<float>(params.g, true)}.run();
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
