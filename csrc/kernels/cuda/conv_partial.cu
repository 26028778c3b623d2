// How much room the convolutions' partial results take; the same arithmetic as their launches.
#include "halo.h"
#include "reduction.h"
#include "rows.h"

namespace resnet_fused {
namespace cuda {

namespace {

// Columns of a tile of `columns` output channels, as the kernels' launches choose it.
int64_t column_tiles(int64_t columns) {
  return divide_up(columns, columns <= 32 ? 32 : columns <= 64 ? 64 : 128);
}
int64_t forward_tiles(const ConvGeometry& g) {
  return halo_fits(g, true) ? halo_plan(g, true).tiles : plan_forward(g).tiles;
}
int64_t dgrad_tiles(const ConvGeometry& g) {
  return halo_fits(g, false) ? halo_plan(g, false).tiles : plan_dgrad(g).tiles;
}

}  // namespace

int64_t conv_forward_partial_floats(const ConvGeometry& g) {
  const int64_t tiles = forward_tiles(g), floats = partial_floats(tiles, 2 * g.k);
  // Rows of each tile, for each column of tiles.
  return halo_fits(g, true) ? floats + partial_floats(tiles, 1) * column_tiles(g.k) : floats;
}

int64_t conv_forward_counters(const ConvGeometry& g) {
  return merge_counters(forward_tiles(g)) * column_tiles(g.k);
}
int64_t conv_dgrad_counters(const ConvGeometry& g) {
  return merge_counters(dgrad_tiles(g)) * column_tiles(g.c);
}
int64_t backward_1x1_counters(const ConvGeometry& g, int multiprocessors) {
  const Backward1x1Split split = backward_1x1_split(g, multiprocessors);
  return (merge_segments(split.programs).count + 1) * split.channel_blocks;  // programs are few
}

int64_t conv_dgrad_partial_floats(const ConvGeometry& g) {
  return partial_floats(dgrad_tiles(g), 2 * g.c);
}

int64_t conv_wgrad_partial_floats(const ConvGeometry& g, int element_bytes, bool want_bias,
                                  int multiprocessors) {
  const WgradSplit split = wgrad_split(g, element_bytes, multiprocessors);
  const int64_t weight = partial_floats(split.splits, g.k * split.columns);
  const int64_t bias =
      want_bias ? rows_partial_floats(g.n * g.p * g.q, g.k, element_bytes, multiprocessors) : 0;
  return weight > bias ? weight : bias;
}

Backward1x1Partial backward_1x1_partial_floats(const ConvGeometry& g, int element_bytes, bool want_bias,
                                               int multiprocessors) {
  const int64_t programs = backward_1x1_split(g, multiprocessors).programs;
  const int64_t weight = partial_floats(programs, g.k * g.c);
  const int64_t bias =
      want_bias ? rows_partial_floats(g.n * g.h * g.w, g.k, element_bytes, multiprocessors) : 0;
  return {partial_floats(programs, 2 * g.c), weight > bias ? weight : bias};
}

}  // namespace cuda
}  // namespace resnet_fused
