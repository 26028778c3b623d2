// How much room the convolutions' partial results take; the same arithmetic as their launches.
#include "halo.h"
#include "reduction.h"
#include "rows.h"

namespace resnet_fused {
namespace cuda {

int64_t conv_forward_partial_floats(const ConvGeometry& g) {
  if (!halo_fits(g, true)) return partial_floats(plan_forward(g).tiles, 2 * g.k);
  const int64_t tiles = halo_plan(g, true).tiles;
  return partial_floats(tiles, 2 * g.k) + partial_floats(tiles, 1);
}

int64_t conv_dgrad_partial_floats(const ConvGeometry& g) {
  return partial_floats(halo_fits(g, false) ? halo_plan(g, false).tiles : plan_dgrad(g).tiles, 2 * g.c);
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
