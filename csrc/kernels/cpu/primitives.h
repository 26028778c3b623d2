// The primitives of one SIMD level: each is defined, and instantiated for float, double and bf16, in the file
// of its name (bn_act.cpp, bn_act_pool.cpp and max_pool.cpp hold both directions).
#pragma once

#include "../cpu_kernels.h"
#include "simd.h"

namespace resnet_fused {
namespace RF_VARIANT {

template <typename T> void channel_stats(const ChannelStatsParams& params);
template <typename T> void bn_act_forward(const BnActParams& params);
template <typename T> void bn_act_backward(const BnActParams& params);
template <typename T> void bn_act_pool_forward(const BnActPoolParams& params);
template <typename T> void bn_act_pool_backward(const BnActPoolParams& params);
template <typename T> void bn_act_pool_apply(const BnActPoolParams& params);
template <typename T> void preact_apply(const PreactApplyParams& params);
// The same of some pixels, by this thread.
template <typename T> void preact_apply_run(const PreactApplyParams& params, int64_t first_pixel, int64_t pixels);
template <typename T> void residual_add(const ResidualAddParams& params);
template <typename T> void max_pool_forward(const MaxPoolParams& params);
template <typename T> void max_pool_backward(const MaxPoolParams& params);
template <typename T> void preact_conv_forward(const PreactConvForwardParams& params);
template <typename T> void preact_conv_dgrad(const PreactConvDgradParams& params);
template <typename T> void preact_conv_wgrad(const PreactConvWgradParams& params);
template <typename T>
void preact_conv_backward_1x1(const PreactConvDgradParams& dgrad, const PreactConvWgradParams& wgrad);

#if RF_LEVEL >= 4
void add_kernels(CpuKernels& table);
#else
const CpuKernels& kernels();
#endif

}  // namespace RF_VARIANT
}  // namespace resnet_fused
