// Index arithmetic of 3x3 convolutions with stride 1 by halo tiles, for host and device. Torch-free.
#pragma once

#include "index.h"

namespace resnet_fused {
namespace cuda {

// A tile is 128 pixels of the destination, `images` images of a rectangle of rows and columns (powers of
// two). Its halo is what its taps read of the source: one more row and column on either side, position by
// position.
struct HaloPlan {
  int32_t source_h, source_w, start_h, start_w;  // of the source, for the first destination pixel's first tap
  int32_t images, dest_h, dest_w;
  int32_t log_h, log_w;          // of the tile
  Divisor tiles_plane, tiles_w;  // tiles of an image, of a row of tiles
  int32_t tiles, positions;
};

constexpr int kMaxPositions = 200;
constexpr int kHaloTaps = 9;

RF_HOST_DEVICE int tile_images(const HaloPlan& plan) { return kTileRows >> (plan.log_h + plan.log_w); }
RF_HOST_DEVICE int halo_width(const HaloPlan& plan) { return (1 << plan.log_w) + 2; }
RF_HOST_DEVICE int halo_plane(const HaloPlan& plan) { return ((1 << plan.log_h) + 2) * halo_width(plan); }

struct HaloTileOrigin {
  int32_t image, h, w;
};
RF_HOST_DEVICE HaloTileOrigin halo_tile(const HaloPlan& plan, int tile) {
  const uint32_t block = divide(static_cast<uint32_t>(tile), plan.tiles_plane);
  const uint32_t rest = static_cast<uint32_t>(tile) - block * plan.tiles_plane.divisor;
  const uint32_t i = divide(rest, plan.tiles_w), j = rest - i * plan.tiles_w.divisor;
  return {static_cast<int32_t>(block) * tile_images(plan), static_cast<int32_t>(i) << plan.log_h,
          static_cast<int32_t>(j) << plan.log_w};
}

// Pixel of the destination of a row of the tile, -1 outside; and the position in the halo of its first tap.
struct HaloRow {
  int64_t dest;
  int32_t position;
};
RF_HOST_DEVICE HaloRow halo_row(const HaloPlan& plan, const HaloTileOrigin& tile, int row) {
  const int j = row & ((1 << plan.log_w) - 1), i = (row >> plan.log_w) & ((1 << plan.log_h) - 1);
  const int n = row >> (plan.log_h + plan.log_w);
  const int64_t image = tile.image + n;
  const bool inside = image < plan.images && tile.h + i < plan.dest_h && tile.w + j < plan.dest_w;
  return {inside ? (image * plan.dest_h + tile.h + i) * plan.dest_w + tile.w + j : -1,
          n * halo_plane(plan) + i * halo_width(plan) + j};
}

// Pixel of the source at a position of the halo, -1 outside.
RF_HOST_DEVICE int64_t halo_source(const HaloPlan& plan, const HaloTileOrigin& tile, int position) {
  const int n = position / halo_plane(plan), rest = position % halo_plane(plan);
  const int h = tile.h + rest / halo_width(plan) + plan.start_h,
            w = tile.w + rest % halo_width(plan) + plan.start_w;
  const int64_t image = tile.image + n;
  const bool inside = image < plan.images &&
                      static_cast<uint32_t>(h) < static_cast<uint32_t>(plan.source_h) &&
                      static_cast<uint32_t>(w) < static_cast<uint32_t>(plan.source_w);
  return inside ? (image * plan.source_h + h) * plan.source_w + w : -1;
}

// From a row's first position to that of tap r*3 + s; the input gradient goes over the taps backwards.
RF_HOST_DEVICE int halo_tap(const HaloPlan& plan, int tap, bool backwards) {
  const int at = backwards ? kHaloTaps - 1 - tap : tap;
  return at / 3 * halo_width(plan) + at % 3;
}

RF_HOST_DEVICE int halo_rows(const HaloPlan& plan, const HaloTileOrigin& tile) {
  const auto least = [](int a, int b) { return a < b ? a : b; };
  return least(tile_images(plan), plan.images - tile.image) * least(1 << plan.log_h, plan.dest_h - tile.h) *
         least(1 << plan.log_w, plan.dest_w - tile.w);
}

// The source's channels are taken in blocks of eight chunks. Within a block the reduction runs over (tap,
// chunk) without a gap, eight of them a step.
struct HaloStep {
  int block, local, chunks;  // chunks of the block
};
RF_HOST_DEVICE int halo_steps(int depth_chunks) {
  const int last = (depth_chunks - 1) % kChunksPerRow + 1;
  return (depth_chunks - last) / kChunksPerRow * kHaloTaps +
         (kHaloTaps * last + kChunksPerRow - 1) / kChunksPerRow;
}
RF_HOST_DEVICE HaloStep halo_step(int step, int depth_chunks) {
  const int last = (depth_chunks - 1) / kChunksPerRow;
  const int block = step / kHaloTaps < last ? step / kHaloTaps : last;
  const int left = depth_chunks - block * kChunksPerRow;
  return {block, step - block * kHaloTaps, left < kChunksPerRow ? left : kChunksPerRow};
}

inline HaloPlan halo_plan(const ConvGeometry& g, bool forward) {
  HaloPlan plan{};
  plan.source_h = static_cast<int32_t>(forward ? g.h : g.p),
  plan.source_w = static_cast<int32_t>(forward ? g.w : g.q);
  plan.dest_h = static_cast<int32_t>(forward ? g.p : g.h),
  plan.dest_w = static_cast<int32_t>(forward ? g.q : g.w);
  // Forward reads x[i - pad + r], the input gradient dy[i + pad - r], r = 0, 1, 2.
  plan.start_h = static_cast<int32_t>(forward ? -g.pad_h : g.pad_h - 2);
  plan.start_w = static_cast<int32_t>(forward ? -g.pad_w : g.pad_w - 2);
  plan.images = static_cast<int32_t>(g.n);
  constexpr int kLogs[][2] = {{3, 4}, {4, 3}, {3, 3}};
  for (const auto& [log_h, log_w] : kLogs) {
    const int64_t images = kTileRows >> (log_h + log_w);
    const int64_t tiles_h = divide_up(plan.dest_h, int64_t{1} << log_h);
    const int64_t tiles_w = divide_up(plan.dest_w, int64_t{1} << log_w);
    const int64_t tiles = divide_up(g.n, images) * tiles_h * tiles_w;
    if (plan.tiles != 0 && tiles >= plan.tiles) continue;
    plan.tiles = static_cast<int32_t>(tiles), plan.log_h = log_h, plan.log_w = log_w;
    plan.tiles_plane = make_divisor(static_cast<uint32_t>(tiles_h * tiles_w));
    plan.tiles_w = make_divisor(static_cast<uint32_t>(tiles_w));
  }
  plan.positions = tile_images(plan) * halo_plane(plan);
  return plan;
}

// Where tiles of rectangles fit: with more than a third of their rows outside, rows in a line are the better
// tile.
inline bool halo_fits(const ConvGeometry& g, bool forward) {
  if (g.r != 3 || g.s != 3 || g.stride_h != 1 || g.stride_w != 1 || g.dilation_h != 1 || g.dilation_w != 1)
    return false;
  const int64_t pixels = forward ? g.n * g.p * g.q : g.n * g.h * g.w;
  return pixels * 3 >= int64_t{halo_plan(g, forward).tiles} * kTileRows * 2;
}

}  // namespace cuda
}  // namespace resnet_fused
