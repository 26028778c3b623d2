// Index arithmetic of the CUDA kernels, for host and device: tests on the CPU run all of it. Torch-free.
#pragma once

#include <stdint.h>

#include "kernels/conv_geometry.h"
#include "platform.h"

namespace resnet_fused {
namespace cuda {

// ---- division by a number known at launch

// n / d for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery 1994, section 4).
struct Divisor {
  uint32_t divisor, magic, shift;
};

RF_HOST_DEVICE Divisor make_divisor(uint32_t d) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < d) ++shift;
  const uint64_t magic = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1;
  return {d, static_cast<uint32_t>(magic), shift};
}

RF_HOST_DEVICE uint32_t divide(uint32_t n, const Divisor& d) {
  return (static_cast<uint32_t>((uint64_t{n} * d.magic) >> 32) + n) >> d.shift;
}

// ---- shared memory: rows of 128 bytes in chunks of 16

constexpr int kChunkBytes = 16;
constexpr int kChunksPerRow = 8;
constexpr int kRowBytes = kChunkBytes * kChunksPerRow;

// The chunks of a row are permuted by the row, so that eight rows' equal chunks, what ldmatrix reads at once,
// lie in different banks.
RF_HOST_DEVICE int swizzled(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// A tile wider than a row is panels of `rows` rows side by side.
RF_HOST_DEVICE int swizzled_panel(int row, int chunk, int rows) {
  return (chunk / kChunksPerRow) * rows * kRowBytes + swizzled(row, chunk % kChunksPerRow);
}

// ---- fragments of mma.sync m16n8 (16 elements deep for 16-bit types, 8 for TF32; 32 bytes either way)

struct Place {
  int row, chunk;
};

// Whose row a lane gives to ldmatrix.x4 for 16 rows x 32 bytes whose registers come in the order (rows 0-7,
// chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1): the left operand stored [m][k];
// transposed, two right operands stored [k][n].
RF_HOST_DEVICE Place ldmatrix_rows_first(int lane) { return {lane & 15, lane >> 4}; }
// The order (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1): two right
// operands stored [n][k]; transposed, the left operand stored [k][m].
RF_HOST_DEVICE Place ldmatrix_chunks_first(int lane) {
  return {(lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1};
}

// Row and first column (of two) of accumulators 2*half and 2*half + 1.
RF_HOST_DEVICE int accumulator_row(int lane, int half) { return (lane >> 2) + 8 * half; }
RF_HOST_DEVICE int accumulator_column(int lane) { return (lane & 3) * 2; }

// ---- convolutions as matrix products over rows (pixels of an image to be made) and taps

constexpr int kMaxTaps = 9;
constexpr int kMaxPhases = 4;
constexpr int kTileRows = 128;

// Row (i, j) of a phase reads the source image at (i*source_step + source_start + dh, ...) under this tap.
struct Tap {
  int32_t dh, dw;
  int32_t weight;  // r*S + s
};

// Rows that see the same taps. A forward convolution is one phase; the input gradient of a strided one is a
// phase per residue of the input position, since each residue is reached through its own taps.
struct Phase {
  int32_t first_tap, taps;
  int32_t first_tile;
  int32_t rows;              // n * rows_h * rows_w
  int32_t start_h, start_w;  // of the destination
  Divisor plane, width;      // rows_h * rows_w, rows_w
};

struct ConvPlan {
  int32_t source_h, source_w, source_step_h, source_step_w, source_start_h, source_start_w;
  int32_t dest_h, dest_w, dest_step_h, dest_step_w;
  int32_t phases, tiles;
  int32_t taps_total;  // R * S
  Phase phase[kMaxPhases];
  Tap tap[kMaxPhases * kMaxTaps];
};

// Scale and shift of all channels of the source are kept in shared memory.
constexpr int64_t kMaxChannels = 4096;

// What the tensor-core kernels take; everything else is declined to the unfused path.
inline bool conv_supported(const ConvGeometry& g) {
  const bool kernel = (g.r == 1 && g.s == 1) || (g.r == 3 && g.s == 3);
  const int64_t padded = g.n * (g.h + 2 * g.pad_h) * (g.w + 2 * g.pad_w);
  return kernel && g.groups == 1 && g.c % 8 == 0 && g.k % 8 == 0 && g.c <= kMaxChannels && g.k <= kMaxChannels &&
         g.stride_h <= 2 && g.stride_w <= 2 && padded < (int64_t{1} << 31) - (1 << 24);
}

inline void add_phase(ConvPlan& plan, int32_t rows, int64_t rows_h, int64_t rows_w, int64_t start_h,
                      int64_t start_w, int32_t first_tap, int32_t taps) {
  if (rows == 0) return;
  Phase& phase = plan.phase[plan.phases++];
  phase.first_tap = first_tap, phase.taps = taps, phase.first_tile = plan.tiles, phase.rows = rows;
  phase.start_h = static_cast<int32_t>(start_h), phase.start_w = static_cast<int32_t>(start_w);
  phase.plane = make_divisor(static_cast<uint32_t>(rows_h * rows_w));
  phase.width = make_divisor(static_cast<uint32_t>(rows_w));
  plan.tiles += static_cast<int32_t>(divide_up(rows, kTileRows));
}

inline ConvPlan plan_forward(const ConvGeometry& g) {
  ConvPlan plan{};
  plan.source_h = static_cast<int32_t>(g.h), plan.source_w = static_cast<int32_t>(g.w);
  plan.source_step_h = static_cast<int32_t>(g.stride_h),
  plan.source_step_w = static_cast<int32_t>(g.stride_w);
  plan.source_start_h = -static_cast<int32_t>(g.pad_h), plan.source_start_w = -static_cast<int32_t>(g.pad_w);
  plan.dest_h = static_cast<int32_t>(g.p), plan.dest_w = static_cast<int32_t>(g.q);
  plan.dest_step_h = plan.dest_step_w = 1;
  plan.taps_total = static_cast<int32_t>(g.r * g.s);
  for (int64_t r = 0; r < g.r; ++r)
    for (int64_t s = 0; s < g.s; ++s)
      plan.tap[r * g.s + s] = {static_cast<int32_t>(r * g.dilation_h), static_cast<int32_t>(s * g.dilation_w),
                               static_cast<int32_t>(r * g.s + s)};
  add_phase(plan, static_cast<int32_t>(g.n * g.p * g.q), g.p, g.q, 0, 0, 0, plan.taps_total);
  return plan;
}

// dx[h] = sum over r of dy[(h + pad - r*dilation) / stride] where that is a whole number: with h = i*stride +
// f, it is i + (f + pad - r*dilation) / stride, or for no i at all.
inline ConvPlan plan_dgrad(const ConvGeometry& g) {
  ConvPlan plan{};
  plan.source_h = static_cast<int32_t>(g.p), plan.source_w = static_cast<int32_t>(g.q);
  plan.source_step_h = plan.source_step_w = 1;
  plan.dest_h = static_cast<int32_t>(g.h), plan.dest_w = static_cast<int32_t>(g.w);
  plan.dest_step_h = static_cast<int32_t>(g.stride_h), plan.dest_step_w = static_cast<int32_t>(g.stride_w);
  plan.taps_total = static_cast<int32_t>(g.r * g.s);
  int32_t used = 0;
  for (int64_t fh = 0; fh < g.stride_h && fh < g.h; ++fh)
    for (int64_t fw = 0; fw < g.stride_w && fw < g.w; ++fw) {
      const int64_t rows_h = divide_up(g.h - fh, g.stride_h), rows_w = divide_up(g.w - fw, g.stride_w);
      const int32_t first = used;
      for (int64_t r = 0; r < g.r; ++r)
        for (int64_t s = 0; s < g.s; ++s) {
          const int64_t at_h = fh + g.pad_h - r * g.dilation_h, at_w = fw + g.pad_w - s * g.dilation_w;
          if (at_h % g.stride_h != 0 || at_w % g.stride_w != 0) continue;
          plan.tap[used++] = {static_cast<int32_t>(at_h / g.stride_h),
                              static_cast<int32_t>(at_w / g.stride_w), static_cast<int32_t>(r * g.s + s)};
        }
      add_phase(plan, static_cast<int32_t>(g.n * rows_h * rows_w), rows_h, rows_w, fh, fw, first,
                used - first);
    }
  return plan;
}

// Where a row of a tile comes from and goes to.
struct Row {
  int64_t source;  // pixel of the source image that tap (0, 0) would read; may lie outside
  int64_t dest;    // pixel of the destination, -1 past the last row
  uint32_t taps;   // bit t: the phase's tap t lies inside of the source image
};

RF_HOST_DEVICE int phase_of_tile(const ConvPlan& plan, int tile) {
  int phase = 0;
  while (phase + 1 < plan.phases && tile >= plan.phase[phase + 1].first_tile) ++phase;
  return phase;
}

RF_HOST_DEVICE Row conv_row(const ConvPlan& plan, const Phase& phase, int64_t index) {
  if (index >= phase.rows) return {0, -1, 0};
  const uint32_t m = static_cast<uint32_t>(index);
  const uint32_t image = divide(m, phase.plane);
  const uint32_t rest = m - image * phase.plane.divisor;
  const int i = static_cast<int>(divide(rest, phase.width));
  const int j = static_cast<int>(rest) - i * static_cast<int>(phase.width.divisor);
  const int top = i * plan.source_step_h + plan.source_start_h;
  const int left = j * plan.source_step_w + plan.source_start_w;
  Row row;
  row.source = (static_cast<int64_t>(image) * plan.source_h + top) * plan.source_w + left;
  row.dest =
      (static_cast<int64_t>(image) * plan.dest_h + i * plan.dest_step_h + phase.start_h) * plan.dest_w +
      j * plan.dest_step_w + phase.start_w;
  row.taps = 0;
  for (int t = 0; t < phase.taps; ++t) {
    const Tap& tap = plan.tap[phase.first_tap + t];
    const bool inside = static_cast<uint32_t>(top + tap.dh) < static_cast<uint32_t>(plan.source_h) &&
                        static_cast<uint32_t>(left + tap.dw) < static_cast<uint32_t>(plan.source_w);
    row.taps |= static_cast<uint32_t>(inside) << t;
  }
  return row;
}

// The source pixel that output pixel `index` (inside) reads under one tap.
struct Source {
  int64_t pixel;
  bool inside;
};

RF_HOST_DEVICE Source conv_source(const ConvPlan& plan, const Phase& phase, int64_t index, const Tap& tap) {
  const uint32_t m = static_cast<uint32_t>(index);
  const uint32_t image = divide(m, phase.plane);
  const uint32_t rest = m - image * phase.plane.divisor;
  const int i = static_cast<int>(divide(rest, phase.width));
  const int j = static_cast<int>(rest) - i * static_cast<int>(phase.width.divisor);
  const int h = i * plan.source_step_h + plan.source_start_h + tap.dh;
  const int w = j * plan.source_step_w + plan.source_start_w + tap.dw;
  return {(static_cast<int64_t>(image) * plan.source_h + h) * plan.source_w + w,
          static_cast<uint32_t>(h) < static_cast<uint32_t>(plan.source_h) &&
              static_cast<uint32_t>(w) < static_cast<uint32_t>(plan.source_w)};
}

// ---- reductions cut into pieces

// Piece i of `total` things in pieces of `each`, the last smaller; count 0 past the end.
struct Piece {
  int64_t first, count;
};

RF_HOST_DEVICE Piece piece_of(int64_t i, int64_t each, int64_t total) {
  const int64_t first = i * each;
  const int64_t left = total - first;
  return {first, left <= 0 ? 0 : left < each ? left : each};
}

// Partial results [groups][columns] are merged by a launch of its own in one step, or above this many groups in two.
constexpr int64_t kOneStepGroups = 512;
constexpr int64_t kGroupsPerBlock = 128;

// Or inside of the kernel that makes them (reduction.h, climb): the last block of a segment of `each` neighbouring
// groups merges these, the last of all segments merges the segments. Past tree_groups that would take long, and
// the launch of its own short beside the kernel.
#ifdef RF_EMULATE
inline int64_t tree_groups = 4096;  // less in a test
#else
constexpr int64_t tree_groups = 4096;
#endif

struct Segments {
  int32_t groups, each, count;
};

inline Segments merge_segments(int64_t groups) {
  int32_t each = static_cast<int32_t>(groups);
  if (groups > 16) {
    each = 4;
    while (int64_t{each} * each < groups) ++each;
  }
  return {static_cast<int32_t>(groups), each, static_cast<int32_t>(divide_up(groups, each))};
}

// Counters of one column of blocks.
inline int64_t merge_counters(int64_t groups) { return groups <= tree_groups ? merge_segments(groups).count + 1 : 0; }

inline int64_t merge_blocks(int64_t groups) {
  return groups > kOneStepGroups ? divide_up(groups, kGroupsPerBlock) : 1;
}

// A weight gradient: output tiles of 64 x 64, and its reduction over pixels in splits of `steps` steps of 128
// bytes of pixels: four steps at least, and partial results of at most 64 MB. As many splits as leave the busiest
// multiprocessor the least to do.
constexpr int kWgradBlocks = 4;  // at once on a multiprocessor, which fewer do not keep busy
struct WgradSplit {
  int64_t columns, tiles, steps, splits;
};

inline WgradSplit wgrad_split(const ConvGeometry& g, int element_bytes, int multiprocessors) {
  WgradSplit split{};
  split.columns = g.r * g.s * g.c;
  split.tiles = divide_up(g.k, 64) * divide_up(split.columns, 64);
  const int64_t steps = divide_up(g.n * g.p * g.q, kRowBytes / element_bytes);
  const auto least_of = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const int64_t weights = g.k * split.columns;
  int64_t limit = least_of((int64_t{64} << 20) / (4 * weights), least_of(divide_up(steps, 4), kOneStepGroups));
  if (limit < 1) limit = 1;
  int64_t splits = 0;
  double least = 0.0;
  // As many splits as `blocks` blocks for every multiprocessor are.
  for (int64_t i = 0, blocks = divide_up(split.tiles, multiprocessors); i <= 2 * kWgradBlocks; ++i, ++blocks) {
    const int64_t s = least_of(blocks * multiprocessors / split.tiles, limit);
    const int64_t busiest = divide_up(split.tiles * s, multiprocessors);
    // In steps, of about 0.4 us on a busy multiprocessor of an H200: three more are what a block begins and ends
    // with; a partial result is written and read, 8 bytes a weight at 4 TB/s.
    const double time = static_cast<double>(busiest > kWgradBlocks ? busiest : kWgradBlocks) *
                            static_cast<double>(divide_up(steps, s) + 3) +
                        static_cast<double>(s * weights) * 4e-6;
    if (splits == 0 || time < least) splits = s, least = time;
    if (s == limit) break;
  }
  split.steps = divide_up(steps, splits);
  split.splits = divide_up(steps, split.steps);
  return split;
}

// Both gradients of a 1x1 convolution in one kernel: a block has 64 input channels, all output channels, and
// every programs-th tile of 64 pixels.
constexpr int kBackward1x1Rows = 64;

inline bool backward_1x1_supported(const ConvGeometry& g) {
  return conv_supported(g) && g.r == 1 && g.s == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 &&
         g.pad_w == 0 && g.k <= 64;
}

struct Backward1x1Split {
  int64_t tiles, channel_blocks, programs;
};

inline Backward1x1Split backward_1x1_split(const ConvGeometry& g, int multiprocessors) {
  Backward1x1Split split{};
  split.tiles = divide_up(g.n * g.h * g.w, kBackward1x1Rows);
  split.channel_blocks = divide_up(g.c, 64);
  split.programs = divide_up(2 * int64_t{multiprocessors}, split.channel_blocks);
  if (split.programs > split.tiles) split.programs = split.tiles;
  if (split.programs > kOneStepGroups) split.programs = kOneStepGroups;
  return split;
}

}  // namespace cuda
}  // namespace resnet_fused
