// dweight = sum over pixels of dy * act(x*scale + shift), the activation recomputed band by band and never stored.
//
// The reduction runs over pixels, so the register tile is [output channels][vectors of input channels], where a vector is
// one block of input channels under one tap. Work is split over bands of images into a number of parts that depends on the
// shape alone; every part has a partial result of its own, and these are added in order (deterministic split-K).
#include "conv_engine.h"
#include "primitives.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

#if RF_LEVEL >= 3
// A unit is a pair of neighbouring pixels of one channel.
struct ModePixelPair : ModeBf16Pair {};
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
      store(at, load(at) + acc[k][v]);
    }
}

template <typename M, int NV> void run_tile(int outputs, const GradTile<M>& t, typename M::A* partial) {
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

// Pixels that a register tile should at least pass over before it is added to the partial result.
constexpr int64_t kTilePass = 256;

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

template <typename A> WgradPlan plan_wgrad(const ConvGeometry& g) {
  WgradPlan plan = {};
  constexpr int64_t L = kLanes<A>;
  plan.pointwise = g.r == 1 && g.s == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
  plan.blocks = divide_up(g.c, L);
  plan.slots = plan.blocks * g.r * g.s;
  if (plan.pointwise) {
    plan.pixels = g.n * g.h * g.w;
    const int64_t pixel_bytes = (plan.blocks * L + g.k) * int64_t(sizeof(A));
    plan.chunk = max64(64, min64(1024, kBandBytes / 2 / pixel_bytes / 8 * 8));
    plan.units = divide_up(plan.pixels, plan.chunk);
    plan.rows = 1;
    plan.cols = plan.chunk;
  } else {
    const int64_t halo_h = g.dilation_h * (g.r - 1) + 1;
    plan.cols = (g.q - 1) * g.stride_w + g.dilation_w * (g.s - 1) + 1;
    const int64_t row_bytes = plan.blocks * round_up(plan.cols, g.stride_w) * RF_VECTOR_BYTES;
    plan.band_rows = rows_per_band(g.p, row_bytes, g.stride_h, halo_h - g.stride_h);
    plan.bands = divide_up(g.p, plan.band_rows);
    plan.rows = (plan.band_rows - 1) * g.stride_h + halo_h;
    plan.images = 1;
    if (plan.bands == 1) {
      const int64_t wanted = divide_up(kTilePass, g.p * g.q);
      plan.images = max64(1, min64(min64(wanted, g.n), kBandBytes / max64(1, row_bytes * plan.rows)));
    }
    plan.units = divide_up(g.n, plan.images) * plan.bands;
  }
  const int64_t partial_bytes = plan.slots * L * g.k * int64_t(sizeof(A));
  const int64_t most = max64(4, min64(64, (int64_t(32) << 20) / partial_bytes));
  plan.parts = 4;  // a power of two, so that the parts come out even on any usual number of threads
  while (plan.parts * 2 <= most) plan.parts *= 2;
  plan.parts = min64(plan.parts, plan.units);
  return plan;
}

#if RF_LEVEL >= 3
// A band as fill_band makes it, but of pairs of neighbouring slots (2j, 2j + 1) of each residue plane, [channel block][row]
// [residue][pair][channel]: two bf16 values to a unit. `odd`, if not null, gets the pairs (2j + 1, 2j + 2), which the taps at
// an odd offset read.
void fill_pairs(uint32_t* even, uint32_t* odd, const BandLayout& b, int64_t pairs, const bf16* image, int64_t height,
                int64_t width, int64_t row0, int64_t col0, const Prologue<float>& prologue) {
  constexpr int L = kLanes<float>;
  alignas(64) uint16_t order[2 * L];  // lane i of the first, lane i of the second, ...
  for (int i = 0; i < L; ++i) {
    order[2 * i] = uint16_t(i);
    order[2 * i + 1] = uint16_t(L + i);
  }
  const __m512i interleave = _mm512_load_si512(order);
  for (int64_t block = 0; block < b.blocks; ++block) {
    const int64_t channel = block * L;
    const int valid = int(min64(L, b.channels - channel));
    for (int64_t row = 0; row < b.rows; ++row)
      for (int64_t residue = 0; residue < b.col_stride; ++residue) {
        const int64_t line = ((block * b.rows + row) * b.col_stride + residue) * pairs * L, h = row0 + row;
        if (h < 0 || h >= height) {
          memset(even + line, 0, size_t(pairs) * L * sizeof(uint32_t));
          if (odd) memset(odd + line, 0, size_t(pairs) * L * sizeof(uint32_t));
          continue;
        }
        const bf16* const in = image + h * width * b.channels + channel;
        const auto slot = [&](int64_t index) {
          const int64_t column = index * b.col_stride + residue + col0;
          if (column < 0 || column >= width) return vfloat{};
          return load_activation<bf16>(in + column * b.channels, channel, valid, prologue);
        };
        vuint32 before = {};
        for (int64_t j = 0; j < pairs; ++j) {
          const __m512bh both = _mm512_cvtne2ps_pbh((__m512)slot(2 * j + 1), (__m512)slot(2 * j));
          const vuint32 pair = (vuint32)_mm512_permutexvar_epi16(interleave, (__m512i)both);
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

// dy rows [cols][k] -> [pairs][k] of neighbouring pixels; a missing last pixel is 0.
void pair_pixels(uint32_t* out, const bf16* dy, int64_t rows, int64_t cols, int64_t k) {
  const int64_t pairs = divide_up(cols, 2);
  for (int64_t row = 0; row < rows; ++row, dy += cols * k)
    for (int64_t j = 0; j < pairs; ++j, out += k) {
      const bf16* lo = dy + 2 * j * k;
      const bf16* hi = 2 * j + 1 < cols ? lo + k : nullptr;
      int64_t i = 0;
      for (; hi && i + kLanes<float> <= k; i += kLanes<float>) {
        const vuint32 both = (vuint32)load(lo + i) >> 16 | (vuint32)load(hi + i);
        memcpy(out + i, &both, sizeof both);
      }
      for (; i < k; ++i) out[i] = uint32_t(lo[i].bits) | (hi ? uint32_t(hi[i].bits) << 16 : 0u);
    }
}
#endif

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

  // One band of rows or run of pixels, added to `partial` [slot group][k][vectors] and, if wanted, to dbias.
  void add_unit(int64_t unit, A* partial, A* dbias) const {
    int64_t next_x = 0, next_dy = 0, past_x = 0, past_dy = 0;  // pixels that the next unit reads
    const Prologue<A> prologue = make_prologue<A>(params.bn, g.c, params.slope);
    const T* const x = static_cast<const T*>(params.x);
    int64_t images = 1, out_rows = 1, out_cols, height = 1, width, row0 = 0, col0 = 0;
    BandLayout layout;
    const T* image;
    const T* dy;
    if (plan.pointwise) {
      const int64_t first = unit * plan.chunk;
      out_cols = width = min64(plan.chunk, plan.pixels - first);
      layout = make_band<FillMode>(g.c, 1, out_cols, 1);
      image = x + first * g.c;
      dy = static_cast<const T*>(params.dy) + first * g.k;
      next_x = next_dy = first + out_cols;
      past_x = past_dy = min64(plan.pixels, next_x + plan.chunk);
    } else {
      const int64_t index = unit / plan.bands * plan.images, p0 = unit % plan.bands * plan.band_rows;
      images = min64(plan.images, g.n - index);
      out_rows = min64(plan.band_rows, g.p - p0);
      out_cols = g.q;
      height = g.h;
      width = g.w;
      row0 = p0 * g.stride_h - g.pad_h;
      col0 = -g.pad_w;
      layout = make_band<FillMode>(g.c, (out_rows - 1) * g.stride_h + g.dilation_h * (g.r - 1) + 1, plan.cols, g.stride_w);
      image = x + index * g.h * g.w * g.c;
      dy = static_cast<const T*>(params.dy) + (index * g.p + p0) * g.q * g.k;
      // Rows that follow: they are of the next band, or of the next images.
      next_x = min64(g.n * g.h, (index + images - 1) * g.h + max64(0, (p0 + out_rows) * g.stride_h)) * g.w;
      past_x = min64(g.n * g.h * g.w, next_x + images * layout.rows * g.w);
      next_dy = ((index + images - 1) * g.p + p0 + out_rows) * g.q;
      past_dy = min64(g.n * g.p * g.q, next_dy + images * out_rows * g.q);
    }
    // With several images per unit a band is a whole image, so their dy rows are contiguous.
    const int64_t dy_rows = images * out_rows;
    if (dbias) add_bias(dbias, dy, dy_rows * out_cols);

    GradTile<M> tile = {};
    const Unit* a_base;
    int64_t copy_stride = 0, line, plane, block_stride;  // units
    if constexpr (kPairs) {
#if RF_LEVEL >= 3
      const int64_t pairs = max_pairs(layout);
      line = layout.col_stride * pairs * L;
      plane = pairs * L;
      block_stride = layout.rows * line;
      copy_stride = images * layout.blocks * block_stride;
      tile.a_image = layout.blocks * block_stride;
      const int64_t dy_units = dy_rows * divide_up(out_cols, 2) * g.k;
      const bool odd = has_odd_offset();
      uint32_t* const paired = static_cast<uint32_t*>(
          thread_scratch(kScratchTile, size_t(copy_stride * (odd ? 2 : 1) + dy_units) * sizeof(uint32_t)));
      for (int64_t i = 0; i < images; ++i) {
        uint32_t* const even = paired + i * tile.a_image;
        fill_pairs(even, odd ? even + copy_stride : nullptr, layout, pairs, image + i * g.h * g.w * g.c, height, width,
                   row0, col0, prologue);
      }
      uint32_t* const dy_pairs = paired + copy_stride * (odd ? 2 : 1);
      pair_pixels(dy_pairs, dy, dy_rows, out_cols, g.k);
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
        fill_band<FillMode, T>(bands + i * tile.a_image, layout, image + i * g.h * g.w * g.c, height, width, row0, col0,
                               prologue);
      a_base = bands;
      tile.cols = out_cols;
      if constexpr (sizeof(T) == sizeof(A)) {
        tile.dy = dy;
      } else {
        A* const widened = static_cast<A*>(thread_scratch(kScratchTile, size_t(dy_rows * out_cols * g.k) * sizeof(A)));
        for (int64_t i = 0; i < dy_rows * out_cols * g.k; ++i) widened[i] = load1(dy + i);
        tile.dy = widened;
      }
    }
    tile.images = images;
    tile.dy_pixel = g.k;
    tile.dy_row = tile.cols * g.k;
    tile.dy_image = out_rows * tile.dy_row;
    tile.a_row = g.stride_h * line;

    // Rows at a time such that inputs and gradients stay in the L1 cache while all tiles pass over them.
    const int64_t row_bytes = (layout.blocks * layout.slots * L * g.stride_h + tile.cols * g.k) * int64_t(sizeof(Unit));
    const int64_t step = min64(out_rows, max64(divide_up(kTilePass / 4, tile.cols), 24 * 1024 / max64(1, row_bytes)));
    // A pointwise run is one long row: cut it the same way.
    const int64_t col_step =
        plan.pointwise ? max64(kTilePass / 4, 24 * 1024 / max64(1, (layout.blocks * L + g.k) * int64_t(sizeof(Unit)))) : tile.cols;
    const int64_t all_cols = tile.cols;
    const Unit* const dy_base = tile.dy;
    Prefetcher next;
    next.add(x + next_x * g.c, x + past_x * g.c);
    next.add(static_cast<const T*>(params.dy) + next_dy * g.k, static_cast<const T*>(params.dy) + past_dy * g.k);
    next.divide(divide_up(out_rows, step) * divide_up(all_cols, col_step) * divide_up(plan.slots, vectors_at(0)) *
                divide_up(g.k, int64_t(tile_outputs(int(vectors_at(0))))));
    for (int64_t row = 0; row < out_rows; row += step)
      for (int64_t col = 0; col < all_cols; col += col_step) {
        tile.rows = min64(step, out_rows - row);
        tile.cols = min64(col_step, all_cols - col);
        for (int64_t slot = 0; slot < plan.slots;) {
          const int vectors = int(vectors_at(slot));
          for (int v = 0; v < vectors; ++v) {
            const int64_t tap = (slot + v) / plan.blocks, block = (slot + v) % plan.blocks;
            const int64_t r = tap / g.s * g.dilation_h, s = tap % g.s * g.dilation_w;
            const int64_t offset = s / g.stride_w;
            const int64_t column = kPairs ? (offset & 1) * copy_stride + offset / 2 * L : offset * L;
            tile.a[v] = a_base + block * block_stride + r * line + (s % g.stride_w) * plane + column +
                        row * tile.a_row + col * L;
          }
          const int64_t tiles = divide_up(g.k, int64_t(tile_outputs(vectors)));
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t k = split_begin(g.k, tiles, i);
            const int outputs = int(split_begin(g.k, tiles, i + 1) - k);
            next.advance();
            tile.dy = dy_base + row * tile.dy_row + col * g.k + k;
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

  bool has_odd_offset() const {
    for (int64_t s = 0; s < g.s; ++s)
      if (s * g.dilation_w / g.stride_w & 1) return true;
    return false;
  }

  void add_bias(A* dbias, const T* dy, int64_t pixels) const {
    for (int64_t k = 0; k < g.k; k += L) {
      if (g.k - k >= L) {
        Vec<A> sum = {};
        for (int64_t p = 0; p < pixels; ++p) sum += load(dy + p * g.k + k);
        store(dbias + k, load(dbias + k) + sum);
      } else {
        for (int64_t lane = k; lane < g.k; ++lane) {
          A sum = 0;
          for (int64_t p = 0; p < pixels; ++p) sum += load1(dy + p * g.k + lane);
          dbias[lane] += sum;
        }
      }
    }
  }

  void run() const {
    const int64_t partial_size = plan.slots * L * g.k, stride = partial_size + g.k;
    A* const partials = static_cast<A*>(thread_scratch(kScratchPartial, size_t(plan.parts * stride) * sizeof(A)));
    parallel_for(params.parallel, plan.parts, [&](int64_t part) {
      A* const partial = partials + part * stride;
      memset(partial, 0, size_t(stride) * sizeof(A));
      const int64_t end = (part + 1) * plan.units / plan.parts;  // neighbours differ by at most one, evenly spread
      for (int64_t unit = part * plan.units / plan.parts; unit < end; ++unit)
        add_unit(unit, partial, params.dbias ? partial + partial_size : nullptr);
    });

    // The parts in order, whichever thread made them.
    const WeightLayout& layout = params.weight_layout;
    parallel_for(params.parallel, plan.slots, [&](int64_t slot) {
      int64_t group = 0;
      while (group + vectors_at(group) <= slot) group += vectors_at(group);
      const int64_t vectors = vectors_at(group), tap = slot / plan.blocks, channel = slot % plan.blocks * L;
      const int64_t lanes = min64(L, g.c - channel);
      const int64_t base = tap / g.s * layout.stride_r + tap % g.s * layout.stride_s + channel * layout.stride_c;
      for (int64_t k = 0; k < g.k; ++k) {
        const A* from = partials + (group * g.k + k * vectors + slot - group) * L;
        Vec<A> sum = load(from);
        for (int64_t part = 1; part < plan.parts; ++part) sum += load(from + part * stride);
        A lane_sum[L];
        store(lane_sum, sum);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t at = base + k * layout.stride_k + lane * layout.stride_c;
          if (layout.is_acc)
            static_cast<A*>(params.dweight)[at] = lane_sum[lane];
          else
            store1(static_cast<T*>(params.dweight) + at, lane_sum[lane]);
        }
      }
    });
    if (params.dbias) {
      A* const dbias = static_cast<A*>(params.dbias);
      for (int64_t k = 0; k < g.k; ++k) {
        A sum = 0;
        for (int64_t part = 0; part < plan.parts; ++part) sum += partials[part * stride + partial_size + k];
        dbias[k] = sum;
      }
    }
  }
};

}  // namespace

template <typename T> void preact_conv_wgrad(const PreactConvWgradParams& params) {
  const WgradPlan plan = plan_wgrad<Acc<T>>(params.g);
#if RF_LEVEL >= 3
  // With an odd width a pair would take in a pixel that belongs to no product, and 0 * Inf is NaN.
  if constexpr (sizeof(T) == 2)
    if (plan.pointwise || params.g.q % 2 == 0) return Wgrad<ModePixelPair, T>{params, params.g, plan}.run();
#endif
  Wgrad<typename ModeOf<Acc<T>>::type, T>{params, params.g, plan}.run();
}

template void preact_conv_wgrad<float>(const PreactConvWgradParams&);
template void preact_conv_wgrad<double>(const PreactConvWgradParams&);
template void preact_conv_wgrad<bf16>(const PreactConvWgradParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
