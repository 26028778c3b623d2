// Per-channel mean and sum of squared deviations of an activation.
#include "primitives.h"

namespace resnet_fused {

Tensor channel_stats(const Tensor& x) {
  const Activation input = check_activation(x, "input");
  if (input.numel() == 0) return zeros_matrix(2, input.c, acc_dtype(input.dtype));
  const Tensor stats = empty_matrix(2, input.c, acc_dtype(input.dtype));
  const ChannelStatsParams params{input.pixels(), input.c, input.data, stats.mutable_data_ptr(),
                                  torch_parallel()};
  cpu_kernels().channel_stats[index_of(input.dtype)](params);
  return stats;
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) { m.def("channel_stats(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) { m.impl("channel_stats", TORCH_BOX(&channel_stats)); }

}  // namespace resnet_fused
