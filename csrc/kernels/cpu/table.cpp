// The table of this SIMD level's primitives.
#include "primitives.h"

namespace resnet_fused {
namespace RF_VARIANT {

#define RF_STRING_(x) #x
#define RF_STRING(x) RF_STRING_(x)
#if RF_LEVEL >= 4
// What it has of its own, products of bf16, in the place of the level before's.
void add_kernels(CpuKernels& table) {
  constexpr int kBf16 = static_cast<int>(DType::bfloat16);
  table.level = RF_LEVEL;
  table.name = RF_STRING(RF_VARIANT);
  table.preact_conv_forward[kBf16] = &preact_conv_forward<bf16>;
  table.preact_conv_dgrad[kBf16] = &preact_conv_dgrad<bf16>;
  table.preact_conv_wgrad[kBf16] = &preact_conv_wgrad<bf16>;
  table.preact_conv_backward_1x1[kBf16] = &preact_conv_backward_1x1<bf16>;
}
#else
// In the order of DType.
#define RF_DTYPES(primitive) {&primitive<float>, &primitive<double>, &primitive<bf16>}

static constexpr CpuKernels kTable = {
    .level = RF_LEVEL,
    .name = RF_STRING(RF_VARIANT),
    .channel_stats = RF_DTYPES(channel_stats),
    .bn_act_forward = RF_DTYPES(bn_act_forward),
    .bn_act_backward = RF_DTYPES(bn_act_backward),
    .bn_act_pool_forward = RF_DTYPES(bn_act_pool_forward),
    .bn_act_pool_backward = RF_DTYPES(bn_act_pool_backward),
    .bn_act_pool_apply = RF_DTYPES(bn_act_pool_apply),
    .preact_apply = RF_DTYPES(preact_apply),
    .residual_add = RF_DTYPES(residual_add),
    .max_pool_forward = RF_DTYPES(max_pool_forward),
    .max_pool_backward = RF_DTYPES(max_pool_backward),
    .preact_conv_forward = RF_DTYPES(preact_conv_forward),
    .preact_conv_dgrad = RF_DTYPES(preact_conv_dgrad),
    .preact_conv_wgrad = RF_DTYPES(preact_conv_wgrad),
    .preact_conv_backward_1x1 = RF_DTYPES(preact_conv_backward_1x1),
};

const CpuKernels& kernels() { return kTable; }
#endif

}  // namespace RF_VARIANT
}  // namespace resnet_fused
