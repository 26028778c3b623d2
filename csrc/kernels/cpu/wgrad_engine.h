// What the two weight-gradient algorithms share: how the work is cut up, and the register tile.
//
// The reduction runs over pixels, so the register tile is [output channels][vectors of input channels], where a vector is
// one block of input channels under one tap. Work is split over bands of images into a number of parts that depends on the
// shape alone; every part has a partial result of its own, and these are added in order (deterministic split-K).
#pragma once

#include "conv_engine.h"
#include "weight_writer.h"
#include "winograd.h"

namespace resnet_fused {
namespace RF_VARIANT {

// How sums over pixels form their products.
template <typename T> struct PixelModeOf { typedef typename ModeOf<T>::type type; };
#if RF_LEVEL >= 3
// A unit is a pair of neighbouring pixels of one channel.
struct ModePixelPair : ModeBf16Pair {};
template <> struct PixelModeOf<bf16> { typedef ModePixelPair type; };
#endif

constexpr int kTileVectors = 3;
constexpr int tile_outputs(int vectors) {
  return RF_VECTOR_REGISTERS == 32 ? (vectors == 3 ? 9 : 14) : (vectors == 3 ? 4 : 6);
}

template <typename M> struct GradTile {
  const typename M::Unit* a[kTileVectors];
  int64_t a_image, a_row;  // units from one image, one output row, to the next
  const typename M::Unit* dy;
  int64_t dy_image, dy_row, dy_pixel;
  int64_t images, rows, cols;
  bool fresh;  // partial holds nothing yet
};

// partial[k][v] += sum over the pixels of dy[k] * a[v]. The tile starts from zero: two-level summation.
template <typename M, int NK, int NV>
__attribute__((noinline)) void wgrad_tile(const GradTile<M>& t, typename M::A* partial) {
  typedef typename M::A A;
  constexpr int L = kLanes<A>;
  Vec<A> acc[NK][NV];
#pragma GCC unroll 16
  for (int k = 0; k < NK; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[k][v] = Vec<A>{};
  for (int64_t line = 0; line < t.images * t.rows; ++line) {
    const int64_t image = line / t.rows, row = line % t.rows;
    const typename M::Unit* d = t.dy + image * t.dy_image + row * t.dy_row;
    const typename M::Unit* a[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) a[v] = t.a[v] + image * t.a_image + row * t.a_row;
    for (int64_t col = 0; col < t.cols; ++col, d += t.dy_pixel) {
      typename M::UnitVec av[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) av[v] = load_units<M>(a[v] + col * L);
#pragma GCC unroll 16
      for (int k = 0; k < NK; ++k) {
        const typename M::Unit unit = d[k];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[k][v] = M::fma(acc[k][v], unit, av[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < NK; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      A* const at = partial + (k * NV + v) * L;
      store(at, t.fresh ? acc[k][v] : load(at) + acc[k][v]);
    }
}

template <typename M, int NV> static void run_tile(int outputs, const GradTile<M>& t, typename M::A* partial) {
  switch (outputs) {
    case 1: return wgrad_tile<M, 1, NV>(t, partial);
    case 2: return wgrad_tile<M, 2, NV>(t, partial);
    case 3: return wgrad_tile<M, 3, NV>(t, partial);
    case 4: return wgrad_tile<M, 4, NV>(t, partial);
    default: break;
  }
  if constexpr (tile_outputs(NV) >= 6) {
    if (outputs == 5) return wgrad_tile<M, 5, NV>(t, partial);
    if (outputs == 6) return wgrad_tile<M, 6, NV>(t, partial);
  }
  if constexpr (tile_outputs(NV) >= 9) {
    if (outputs == 7) return wgrad_tile<M, 7, NV>(t, partial);
    if (outputs == 8) return wgrad_tile<M, 8, NV>(t, partial);
    if (outputs == 9) return wgrad_tile<M, 9, NV>(t, partial);
  }
  if constexpr (tile_outputs(NV) >= 14) {
    if (outputs == 10) return wgrad_tile<M, 10, NV>(t, partial);
    if (outputs == 11) return wgrad_tile<M, 11, NV>(t, partial);
    if (outputs == 12) return wgrad_tile<M, 12, NV>(t, partial);
    if (outputs == 13) return wgrad_tile<M, 13, NV>(t, partial);
    if (outputs == 14) return wgrad_tile<M, 14, NV>(t, partial);
  }
}

// Tiles of Winograd's that the register tile passes over before it is added to the partial result.
constexpr int64_t kWgradStripTiles = 64;

// Pixels that a register tile should at least pass over before it is added to the partial result.
constexpr int64_t kTilePass = 256;
// The same of several images: float32 sums must not be much longer than the library's, which are of one (see kProductPass).
template <typename T> constexpr int64_t kImagesPass = sizeof(T) == sizeof(float) ? kTilePass / 4 : kTilePass;

// Tiles of Winograd's that a part should at least have: its sums, 16 or 36 per weight, are written, read and added once more.
constexpr int64_t kPartTiles = 256;

// How one primitive call is cut up; a function of the shape alone.
struct WgradPlan {
  bool pointwise;
  int64_t pixels, chunk;     // pointwise: runs of pixels
  int64_t bands, band_rows;  // otherwise: rows of an image,
  int64_t images;            // or several whole images: a tile's sums cost a pass over the partial result
  int64_t units, parts;
  int64_t rows, cols;        // of the largest input band
  int64_t blocks, slots;     // channel blocks; slot = tap * blocks + block
};

constexpr int64_t kMostParts = 64;

// The number of parts with a partial result of so many values each. A part's result is written once and read once: all of them
// a quarter of what the parts read, if that leaves 16 of them.
template <typename T>
static int64_t wgrad_parts(const ConvGeometry& g, int64_t partial_values, int64_t units, int64_t limit = kMostParts) {
  const int64_t partial_bytes = partial_values * int64_t(sizeof(Acc<T>));
  const int64_t input_bytes = (g.n * g.h * g.w * g.c + g.n * g.p * g.q * g.k) * int64_t(sizeof(T));
  int64_t most = min64(kMostParts, (int64_t(32) << 20) / partial_bytes);
  most = max64(4, min64(limit, min64(most, max64(16, input_bytes / 4 / partial_bytes))));
  int64_t parts = 4;  // a power of two, so that the parts come out even on any usual number of threads
  while (parts * 2 <= most) parts *= 2;
  return min64(parts, units);
}

// winograd: the side of a tile of Winograd's, 0 for the direct algorithm.
template <typename T> static WgradPlan plan_wgrad(const ConvGeometry& g, int64_t winograd) {
  typedef Acc<T> A;
  WgradPlan plan = {};
  constexpr int64_t L = kLanes<A>;
  plan.pointwise = is_pointwise(g);
  plan.blocks = divide_up(g.c, L);
  plan.slots = plan.blocks * (winograd ? (winograd + 2) * (winograd + 2) : g.r * g.s);
  if (plan.pointwise) {
    plan.pixels = g.n * g.h * g.w;
    // Of pairs, the sums of 32 x 32 weights are read and written once for a whole run.
    const bool tiled = RF_LEVEL >= 4 && sizeof(T) == 2;
    const int64_t pixel_bytes = (plan.blocks * L + g.k) * int64_t(tiled ? sizeof(T) : 2 * sizeof(A)), even = tiled ? 32 : 8;
    plan.chunk = max64(64, min64(1024, kBandBytes / pixel_bytes / even * even));
    plan.units = divide_up(plan.pixels, plan.chunk);
    plan.rows = 1;
    plan.cols = plan.chunk;
  } else {
    const BandSteps steps = band_steps(g);
    const int64_t halo_h = g.dilation_h * (g.r - 1) + 1;
    plan.cols = winograd ? round_up(g.q, winograd) + 2 : (g.q - 1) * steps.stride_w + g.dilation_w * (g.s - 1) + 1;
    const int64_t row_bytes = plan.blocks * round_up(plan.cols, steps.stride_w) * RF_VECTOR_BYTES;
    plan.band_rows = rows_per_band(g.p, row_bytes, steps.stride_h, halo_h - steps.stride_h);
    if (winograd) plan.band_rows = round_up(plan.band_rows, winograd);
    plan.bands = divide_up(g.p, plan.band_rows);
    plan.rows = (plan.band_rows - 1) * steps.stride_h + halo_h;
    plan.images = 1;
    if (plan.bands == 1) {
      const int64_t wanted =
          winograd ? divide_up(kWgradStripTiles, divide_up(g.p, winograd) * divide_up(g.q, winograd))
                   : divide_up(kImagesPass<T>, g.p * g.q);
      plan.images = max64(1, min64(min64(wanted, g.n), kBandBytes / max64(1, row_bytes * plan.rows)));
    }
    plan.units = divide_up(g.n, plan.images) * plan.bands;
  }
  const int64_t most = winograd ? g.n * divide_up(g.p, winograd) * divide_up(g.q, winograd) / kPartTiles : kMostParts;
  plan.parts = wgrad_parts<T>(g, plan.slots * L * g.k, plan.units, most);
  return plan;
}

// What one unit of work reads, and what the next one will.
template <typename T> struct WgradUnit {
  int64_t images, out_rows, out_cols;
  int64_t height, width, row0, col0;  // the band's place in its image
  const T* image;
  const T* dy;
  Prefetcher next;
};

template <typename T>
static WgradUnit<T> wgrad_unit(const PreactConvWgradParams& params, const WgradPlan& plan, int64_t unit) {
  const ConvGeometry& g = params.g;
  const T* const x = static_cast<const T*>(params.x);
  const T* const dy = static_cast<const T*>(params.dy);
  WgradUnit<T> u = {1, 1, 0, 1, 0, 0, 0, nullptr, nullptr, {}};
  int64_t next_x, next_dy, past_x, past_dy;  // pixels that the next unit reads
  if (plan.pointwise) {
    const int64_t first = unit * plan.chunk;
    u.out_cols = u.width = min64(plan.chunk, plan.pixels - first);
    u.image = x + first * g.c;
    u.dy = dy + first * g.k;
    next_x = next_dy = first + u.out_cols;
    past_x = past_dy = min64(plan.pixels, next_x + plan.chunk);
  } else {
    const int64_t index = unit / plan.bands * plan.images, p0 = unit % plan.bands * plan.band_rows;
    u.images = min64(plan.images, g.n - index);
    u.out_rows = min64(plan.band_rows, g.p - p0);
    u.out_cols = g.q;
    u.height = g.h;
    u.width = g.w;
    u.row0 = p0 * g.stride_h - g.pad_h;
    u.col0 = -g.pad_w;
    u.image = x + index * g.h * g.w * g.c;
    u.dy = dy + (index * g.p + p0) * g.q * g.k;
    // Rows that follow: they are of the next band, or of the next images.
    next_x = min64(g.n * g.h, (index + u.images - 1) * g.h + max64(0, (p0 + u.out_rows) * g.stride_h)) * g.w;
    past_x = min64(g.n * g.h * g.w, next_x + u.images * plan.rows * band_steps(g).row * g.w);
    next_dy = ((index + u.images - 1) * g.p + p0 + u.out_rows) * g.q;
    past_dy = min64(g.n * g.p * g.q, next_dy + u.images * u.out_rows * g.q);
  }
  u.next.add_input(g, x, next_x, past_x);
  if (const PreactApplyParams* const from = params.dy_from) {
    const int64_t begin = next_dy * g.k, end = past_dy * g.k;
    const auto add = [&](const void* tensor) {
      if (tensor) u.next.add(static_cast<const T*>(tensor) + begin, static_cast<const T*>(tensor) + end);
    };
    add(from->dz);
    add(from->x);
    add(from->dskip);
    const T* const dx = static_cast<const T*>(from->dx);
    if (dx != from->dz && dx != from->x) u.next.add_output(dx + begin, dx + end);
  } else {
    u.next.add(dy + next_dy * g.k, dy + past_dy * g.k);
  }
  return u;
}

template <typename T> static void add_bias(Acc<T>* dbias, const T* dy, int64_t pixels, int64_t channels) {
  typedef Acc<T> A;
  constexpr int L = kLanes<A>;
  for (int64_t k = 0; k < channels; k += L) {
    if (channels - k >= L) {
      Vec<A> sum = {};
      for (int64_t p = 0; p < pixels; ++p) sum += load(dy + p * channels + k);
      store(dbias + k, load(dbias + k) + sum);
    } else {
      for (int64_t lane = k; lane < channels; ++lane) {
        A sum = 0;
        for (int64_t p = 0; p < pixels; ++p) sum += load1(dy + p * channels + lane);
        dbias[lane] += sum;
      }
    }
  }
}

// dbias of all pixels.
template <typename T> static void whole_bias(const PreactConvWgradParams& params) {
  const ConvGeometry& g = params.g;
  const int64_t pixels = g.n * g.p * g.q;
  Acc<T>* const dbias = static_cast<Acc<T>*>(params.dbias);
  memset(dbias, 0, size_t(g.k) * sizeof(Acc<T>));
  for (int64_t pixel = 0; pixel < pixels; pixel += kTilePass)
    add_bias(dbias, static_cast<const T*>(params.dy) + pixel * g.k, min64(kTilePass, pixels - pixel), g.k);
}

// The parts' dbias in order, whichever thread made them; `partials`: the first part's, `stride` from part to part.
template <typename A> static void finish_bias(A* dbias, const A* partials, int64_t stride, int64_t parts, int64_t channels) {
  for (int64_t k = 0; k < channels; ++k) {
    A sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partials[part * stride + k];
    dbias[k] = sum;
  }
}

// dweight from the parts' sums, added in order; `partials`: the first part's, `stride` from part to part. place(tap, block, k):
// of a vector of input channels in them; the next output's lies where place(tap, block, k + 1) says. Returns whether all are
// finite.
constexpr int64_t kMergedOutputs = 4;  // per task
template <typename T, typename Place>
static bool sum_parts(const PreactConvWgradParams& params, const WgradPlan& plan, const Acc<T>* partials, int64_t stride,
                      const Place& place) {
  typedef Acc<T> A;
  constexpr int64_t L = kLanes<A>;
  const ConvGeometry& g = params.g;
  const int64_t taps = g.r * g.s, outputs = divide_up(g.k, kMergedOutputs);
  const WeightWriter<T> writer(params, false);
  return parallel_all(params.parallel, plan.blocks * outputs, [&](int64_t task) {
    const int64_t block = task / outputs, first = task % outputs * kMergedOutputs, last = min64(g.k, first + kMergedOutputs);
    A* const sums = static_cast<A*>(thread_scratch(kScratchTile, size_t(kMergedOutputs * taps * L) * sizeof(A)));
    Vec<A> probe = {};
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t k = first; k < last; ++k) {
        const A* const from = partials + place(tap, block, k);
        Vec<A> sum = load(from);
        for (int64_t part = 1; part < plan.parts; ++part) sum += load(from + part * stride);
        probe += sum - sum;
        store(sums + ((k - first) * taps + tap) * L, sum);
      }
    for (int64_t k = first; k < last; ++k) writer.write(k, block, 1, sums + (k - first) * taps * L, L, 0);
    return is_zero(probe);
  });
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
