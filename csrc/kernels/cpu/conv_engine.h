// What the three convolution kernels share beside the register tile (conv_tile.h): a padded, channel-blocked copy of a band of
// input rows in thread-local scratch, normalised and activated on the way; how outputs are stored, and how work is cut up.
//
// Scratch layout: [channel block][row][column slot][one vector]. The distance between neighbouring columns is one
// vector, a compile-time constant, so that every operand address of the register tile is base + displacement.
// Columns are grouped by their residue modulo the stride, which makes a strided convolution read neighbours too.
#pragma once

#include "bf16_pairs.h"
#include "conv_matrix_tile.h"

namespace resnet_fused {
namespace RF_VARIANT {

// Runs a lambda over tasks on the caller's threads.
template <typename F> static void parallel_for(const Parallel& parallel, int64_t tasks, const F& body) {
  parallel.run(
      tasks, [](int64_t index, void* context) { (*static_cast<const F*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

RF_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
RF_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---------------------------------------------------------------------------------------------------------- scratch

// From one row and column of a band to the next, in the image, and from one output to the next, in the band. Where a kernel
// has one tap, a strided convolution keeps only what it reads.
struct BandSteps {
  int64_t row, col;
  int64_t stride_h, stride_w;
};
RF_INLINE BandSteps band_steps(const ConvGeometry& g) {
  const int64_t row = g.r == 1 ? g.stride_h : 1, col = g.s == 1 ? g.stride_w : 1;
  return {row, col, g.stride_h / row, g.stride_w / col};
}

// Rows row0 + i * row_step and columns col0 + j * col_step of an image, in coordinates that may lie outside.
struct BandLayout {
  int64_t channels;        // of the image
  int64_t first_channel;   // the band's first; its blocks need not reach the image's last
  int64_t rows, cols;
  int64_t row_step, col_step;
  int64_t col_stride;      // columns are grouped by residue modulo this
  int64_t plane;           // column slots per residue
  int64_t slots;           // col_stride * plane
  int64_t blocks;          // channel blocks
};

template <typename M>
static BandLayout make_band(int64_t channels, int64_t rows, int64_t cols, int64_t col_stride, int64_t row_step = 1,
                            int64_t col_step = 1) {
  BandLayout b;
  b.channels = channels;
  b.first_channel = 0;
  b.rows = rows;
  b.cols = cols;
  b.row_step = row_step;
  b.col_step = col_step;
  b.col_stride = col_stride;
  b.plane = divide_up(cols, col_stride);
  b.slots = b.plane * col_stride;
  b.blocks = divide_up(channels, int64_t(kBlock<M>) * M::kUnitChannels);
  return b;
}
template <typename M> static int64_t band_units(const BandLayout& b) { return b.blocks * b.rows * b.slots * kBlock<M>; }
// Of so many bands, with what a tile may read behind them.
template <typename M> static int64_t band_scratch_units(const BandLayout& b, int64_t images = 1) {
  return images * band_units<M>(b) + (M::kUnitChannels == 2 ? kOverreadUnits : 0);
}

// Null bn means none.
template <typename A> static Prologue<A> make_prologue(const void* bn, int64_t channels, double slope) {
  const A* rows = static_cast<const A*>(bn);
  return Prologue<A>{rows ? rows + 2 * channels : nullptr, rows ? rows + 3 * channels : nullptr, A(slope), slope == 0};
}

// One vector of channels of one pixel, normalised and activated; `valid` channels, the rest 0.
template <typename T>
RF_INLINE Vec<Acc<T>> load_activation(const T* x, int64_t channel, int valid, const Prologue<Acc<T>>& pro) {
  typedef Acc<T> A;
  constexpr int L = kLanes<A>;
  if (valid >= L) {
    Vec<A> v = load(x);
    if (pro.scale)
      v = activate<A>(preact(v, load(pro.scale + channel), load(pro.shift + channel)), splat<A>(pro.slope), pro.relu);
    return v;
  }
  A buffer[L] = {};
  for (int i = 0; i < valid; ++i) {
    A v = load1(x + i);
    if (pro.scale) v = activate1<A>(preact(v, pro.scale[channel + i], pro.shift[channel + i]), pro.slope, pro.relu);
    buffer[i] = v;
  }
  return load(buffer);
}

// Notes the largest magnitudes that go into a band, kNotePixels neighbours of a row together, or does not.
constexpr int64_t kNotePixels = 4;
struct NotNoted {
  static constexpr bool kNotes = false;
};
struct LargestMagnitudes {
  static constexpr bool kNotes = true;
  float* at;      // [row][group of pixels][vector]; of all channel blocks so far
  int64_t groups;
  RF_INLINE_METHOD float* of(int64_t row, int64_t col) const {
    return at + (row * groups + col / kNotePixels) * kLanes<float>;
  }
};

// One block (a vector of units) of each of `pixels` pixels, `step` apart in x. note: of `row`, the first one in `col`.
template <typename M, typename T, typename Note>
RF_INLINE void fill_blocks(typename M::Unit* out, const T* x, int64_t step, int64_t pixels, int64_t channel, int64_t channels,
                           const Prologue<Acc<T>>& pro, const Note& note, int64_t row, int64_t col) {
  if constexpr (M::kUnitChannels == 1) {
    constexpr int L = kLanes<Acc<T>>;
    const int valid = int(min64(L, channels - channel));
    const auto fill = [&](int64_t p) __attribute__((always_inline)) {
      const Vec<Acc<T>> v = rounded_activation<T>(load_activation<T>(x + p * step + channel, channel, valid, pro));
      store(out + p * L, v);
      return v;
    };
    if constexpr (Note::kNotes) {
      for (int64_t p = 0; p < pixels;) {
        float* const at = note.of(row, col + p);
        const int64_t end = min64(pixels, p + kNotePixels - (col + p) % kNotePixels);
        vfloat most = load(at);
        for (; p < end; ++p) most = larger(most, magnitude(fill(p)));
        store(at, most);
      }
    } else {
      for (int64_t p = 0; p < pixels; ++p) fill(p);
    }
  } else {
#if RF_LEVEL >= 3
    fill_words(out, x + channel, step, pixels, channel, min64(kWordChannels, channels - channel), pro);
#endif
  }
}

// Fills a band from an image [height, width, channels]. Outside the image: zero, for padding comes after the activation.
template <typename M, typename T, typename Note = NotNoted>
static void fill_band(typename M::Unit* scratch, const BandLayout& b, const T* image, int64_t height, int64_t width,
                      int64_t row0, int64_t col0, const Prologue<Acc<T>>& pro, Note note = {}) {
  constexpr int B = kBlock<M>;
  const int64_t block_channels = int64_t(B) * M::kUnitChannels;
  const int64_t inside_begin = min64(b.cols, divide_up(max64(0, -col0), b.col_step));
  const int64_t inside_end = max64(inside_begin, min64(b.cols, divide_up(max64(0, width - col0), b.col_step)));
  const int64_t step = b.col_step * b.channels;
  for (int64_t block = 0; block < b.blocks; ++block) {
    const int64_t channel = b.first_channel + block * block_channels;
    for (int64_t row = 0; row < b.rows; ++row) {
      typename M::Unit* out = scratch + (block * b.rows + row) * b.slots * B;
      const int64_t h = row0 + row * b.row_step;
      if (h < 0 || h >= height) {
        memset(out, 0, size_t(b.slots) * B * sizeof(typename M::Unit));
        continue;
      }
      const T* in = image + (h * width + col0) * b.channels;
      for (int64_t residue = 0; residue < b.col_stride; ++residue, out += b.plane * B) {
        const int64_t begin = divide_up(max64(0, inside_begin - residue), b.col_stride);
        const int64_t end = max64(begin, divide_up(max64(0, inside_end - residue), b.col_stride));
        memset(out, 0, size_t(begin) * B * sizeof(typename M::Unit));
        fill_blocks<M, T>(out + begin * B, in + (begin * b.col_stride + residue) * step, b.col_stride * step, end - begin,
                          channel, b.channels, pro, note, row, begin);
        memset(out + end * B, 0, size_t(b.plane - end) * B * sizeof(typename M::Unit));
      }
    }
  }
}

// --------------------------------------------------------------------------------------------- stores and plans

// Whether an output is written past the caches (stream_bytes): only where every vector is whole and aligned.
template <typename T> RF_INLINE bool should_stream(const T* out, int64_t pixels, int64_t channels) {
  const int64_t line = kLanes<Acc<T>> * (kCanStreamPairs<T> ? 2 : 1);
  return (kCanStream<T> || kCanStreamPairs<T>) && pixels * channels * int64_t(sizeof(T)) >= stream_bytes() &&
         channels % line == 0 && reinterpret_cast<uintptr_t>(out) % RF_VECTOR_BYTES == 0;
}

// Stores one vector of channels of NP pixels, `step` apart, as the next reader sees them; column becomes what was stored.
// Streamed bf16 waits in `lines` ([pixel][two vectors], of the calling task) for the other vector of its line, which must be the
// next that is stored.
template <typename T, int NP>
RF_INLINE void store_column(T* out, int64_t channel, int64_t step, Vec<Acc<T>> (&column)[NP], bool streamed, T* lines) {
  constexpr int L = kLanes<Acc<T>>;
  if (kCanStream<T> && streamed) {
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) stream<T>(out + p * step + channel, column[p]);
  } else if (kCanStreamPairs<T> && streamed) {
    const int64_t half = channel / L % 2;
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) column[p] = store_product(lines + p * 2 * L + half * L, column[p]);
    if constexpr (kCanStreamPairs<T>)
      if (half == 1)
#pragma GCC unroll 16
        for (int p = 0; p < NP; ++p) stream_pair(out + p * step + channel - L, lines + p * 2 * L);
  } else {
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) column[p] = store_product(out + p * step + channel, column[p]);
  }
}

// Asks for memory that the next task will use, a little with every tile, so that it arrives while this task multiplies.
class Prefetcher {
 public:
  // [begin, end) will be read.
  void add(const void* begin, const void* end) { add(begin, end, false); }
  // It will be written: through the caches, where a line that is in none is read first.
  void add_output(const void* begin, const void* end) { add(begin, end, true); }
  // Pixels [begin, end) of images x will be read by a convolution: where it has a single tap, those that it stands on.
  template <typename T> void add_input(const ConvGeometry& g, const T* x, int64_t begin, int64_t end) {
    const BandSteps steps = band_steps(g);
    if (steps.row * steps.col == 1 || g.r * g.s > 1 || g.pad_h != 0 || g.pad_w != 0 || g.h % steps.row != 0)
      return add(x + begin * g.c, x + end * g.c);
    if (begin >= end || grids_ == kMostGrids) return;
    const int64_t pixel = g.c * int64_t(sizeof(T)), row = steps.row * g.w;
    const char* const at = reinterpret_cast<const char*>(x + begin * g.c);
    grid_[grids_++] = {at, at + pixel, pixel, steps.col * pixel, row * pixel, g.q, (end - begin) / row, 0, 0};
  }
  // A share of each with each of `steps` calls of advance().
  void divide(int64_t steps) {
    for (int i = 0; i < streams_; ++i) share_[i] = round_up(divide_up(end_[i] - at_[i], max64(1, steps)), 64);
    for (int i = 0; i < grids_; ++i) grid_[i].share = divide_up(grid_[i].lines(), max64(1, steps));
  }
  RF_INLINE_METHOD void advance() {
    for (int i = 0; i < streams_; ++i) {
      const char* const stop = end_[i] - at_[i] < share_[i] ? end_[i] : at_[i] + share_[i];
      if (written_[i])
        for (; at_[i] < stop; at_[i] += 64) __builtin_prefetch(at_[i], 1);
      else
        for (; at_[i] < stop; at_[i] += 64) __builtin_prefetch(at_[i], 0, 2);
    }
    for (int i = 0; i < grids_; ++i) grid_[i].advance();
  }

 private:
  // Rows of pixels, each some bytes after the one before.
  struct Grid {
    const char *at, *end;  // of the pixel that has its turn
    int64_t pixel, col_step, row_step, cols, rows, col, share;

    int64_t lines() const { return divide_up(pixel, int64_t(64)) * cols * rows; }
    void advance() {
      for (int64_t line = 0; line < share && rows > 0; ++line) {
        __builtin_prefetch(at, 0, 2);
        at += 64;
        if (at < end) continue;
        end += col_step;
        if (++col == cols) {
          col = 0;
          --rows;
          end += row_step - cols * col_step;
        }
        at = end - pixel;
      }
    }
  };
  void add(const void* begin, const void* end, bool written) {
    if (begin == nullptr || streams_ == kMost) return;
    at_[streams_] = static_cast<const char*>(begin);
    end_[streams_] = static_cast<const char*>(end);
    written_[streams_++] = written;
  }

  static constexpr int kMost = 5, kMostGrids = 2;
  int streams_ = 0, grids_ = 0;
  bool written_[kMost];
  const char* at_[kMost];
  const char* end_[kMost];
  int64_t share_[kMost];
  Grid grid_[kMostGrids];
};

// A band's scratch should stay in a core's L2 cache beside the weights.
constexpr int64_t kBandBytes = 256 * 1024;

// 1x1, stride 1, no padding: pixels need not respect image borders.
RF_INLINE bool is_pointwise(const ConvGeometry& g) {
  return g.r == 1 && g.s == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
}

// How a pointwise convolution is cut up, by its shape alone: runs of pixels, which need not respect
// image borders, and for few of them groups of blocks of output channels, each of which prepares the run anew.
struct PointwisePlan {
  int64_t pixels, runs, blocks, groups;

  int64_t tasks() const { return runs * groups; }
  int64_t run(int64_t task) const { return task / groups; }
  int64_t first_pixel(int64_t run) const { return split_begin(pixels, runs, run); }
  int64_t pixel_count(int64_t run) const { return first_pixel(run + 1) - first_pixel(run); }
  int64_t first_block(int64_t task) const { return split_begin(blocks, groups, task % groups); }
  int64_t last_block(int64_t task) const { return split_begin(blocks, groups, task % groups + 1); }
};
constexpr int64_t kEvenTasks = 32;      // fewer runs than this come in a power of two, so that threads get equal shares
constexpr int64_t kGroupBlocks = 8;     // of a group at least: the preparation is repeated for each
template <typename M> static PointwisePlan plan_pointwise(int64_t pixels, int64_t in_channels, int64_t out_blocks) {
  const int64_t pixel_bytes = divide_up(in_channels, int64_t(kBlock<M>) * M::kUnitChannels) * RF_VECTOR_BYTES;
  const int64_t tile = tile_pixels<M>(divide_up(in_channels, M::kUnitChannels)), fit = kBandBytes / 2 / pixel_bytes / tile;
  PointwisePlan plan = {pixels, divide_up(pixels, tile * max64(4, min64(fit, 24))), out_blocks, 1};
  if (plan.runs < kEvenTasks) {
    int64_t even = 1;
    while (even < plan.runs) even *= 2;
    plan.runs = even;
    while (plan.tasks() < kEvenTasks && 2 * plan.groups * kGroupBlocks <= out_blocks) plan.groups *= 2;
  } else {
    plan.runs = round_up(plan.runs, int64_t(8));
  }
  plan.runs = min64(plan.runs, pixels);
  return plan;
}

// Output rows per band.
RF_INLINE int64_t rows_per_band(int64_t out_rows, int64_t row_bytes, int64_t row_step, int64_t halo_rows) {
  const int64_t fit = max64(1, (kBandBytes / max64(1, row_bytes) - halo_rows) / row_step);
  const int64_t bands = divide_up(out_rows, min64(fit, out_rows));
  return divide_up(out_rows, bands);
}

// How a convolution is cut up otherwise, by its shape alone: parts are bands of output rows of an image, or several whole images.
// The latter take turns with each block of output channels, whose weights are read once for all of them; and where parts are few
// then, tasks are groups of blocks, each of which prepares the images anew.
struct BandPlan {
  int64_t images, out_rows;            // of all
  int64_t band_rows, bands;            // of one image
  int64_t parts, most_images, blocks, groups;

  // Part after part of the same blocks: their weights lie in the cache.
  int64_t tasks() const { return groups * parts; }
  int64_t part(int64_t task) const { return task % parts; }
  int64_t first_block(int64_t task) const { return split_begin(blocks, groups, task / parts); }
  int64_t last_block(int64_t task) const { return split_begin(blocks, groups, task / parts + 1); }
  int64_t first_image(int64_t part) const { return bands > 1 ? part / bands : split_begin(images, parts, part); }
  int64_t image_count(int64_t part) const { return bands > 1 ? 1 : first_image(part + 1) - first_image(part); }
  int64_t first_row(int64_t part) const { return bands > 1 ? part % bands * band_rows : 0; }
  int64_t row_count(int64_t part) const { return min64(band_rows, out_rows - first_row(part)); }
};
constexpr int64_t kCachedWeightBytes = int64_t(512) << 10;  // stay in a core's cache from image to image
constexpr int64_t kGroupBandBytes = RF_LEVEL >= 2 ? 2 * kBandBytes : kBandBytes;
constexpr int64_t kImageGroupBlocks = 4;                    // as kGroupBlocks
static inline BandPlan plan_bands(int64_t images, int64_t out_rows, int64_t band_rows, int64_t band_bytes, int64_t blocks,
                                  int64_t weight_bytes) {
  BandPlan plan = {images, out_rows, band_rows, divide_up(out_rows, band_rows), 0, 1, blocks, 1};
  plan.parts = images * plan.bands;
  if (plan.bands > 1 || weight_bytes <= kCachedWeightBytes) return plan;
  const int64_t parts = divide_up(images, max64(1, kGroupBandBytes / band_bytes));
  plan.parts = 1;
  while (plan.parts < min64(parts, kEvenTasks)) plan.parts *= 2;
  plan.parts = min64(images, parts > kEvenTasks ? round_up(parts, int64_t(8)) : plan.parts);
  plan.most_images = divide_up(images, plan.parts);
  while (plan.tasks() < kEvenTasks && 2 * plan.groups * kImageGroupBlocks <= blocks) plan.groups *= 2;
  return plan;
}

}  // namespace RF_VARIANT
}  // namespace resnet_fused
