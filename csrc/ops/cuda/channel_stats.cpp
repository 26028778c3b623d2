// Per-channel mean and sum of squared deviations of an activation.
#include "primitives.h"

namespace resnet_fused {
namespace cuda {

Tensor channel_stats_of(const Tensor& x) {
  const Activation input = check_activation(x, "input");
  const Target target(x);
  if (input.numel() == 0) return zeros_matrix(2, input.c, x);
  const Tensor stats = empty_matrix(2, input.c, x);
  const Tensor partial = partial_for(input, target.stream());
  const ChannelStatsParams params{input.pixels(), input.c, input.data(), mutable_floats(stats),
                                  mutable_floats(partial)};
  with_type(input.dtype, [&](auto type) { check(channel_stats<decltype(type)>(params, target.stream())); });
  return stats;
}

STABLE_TORCH_LIBRARY_FRAGMENT(RF_LIBRARY, m) { m.def("channel_stats(Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(RF_LIBRARY, RF_KEY, m) { m.impl("channel_stats", TORCH_BOX(&channel_stats_of)); }

}  // namespace cuda
}  // namespace resnet_fused
