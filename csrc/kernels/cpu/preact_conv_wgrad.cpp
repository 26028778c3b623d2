// dweight = sum over pixels of dy * act(x*scale + shift), the activation recomputed band by band and never stored.
#include "primitives.h"
#include "wgrad_few_channels.h"
#include "wgrad_matrix.h"
#include "winograd_wgrad_product.h"

namespace resnet_fused {
namespace RF_VARIANT {

template <typename T> void preact_conv_wgrad(const PreactConvWgradParams& params) {
  if constexpr (kHasWinograd<T>) {
    const WinogradWgradProduct<T> product(params);
    if (product.fits() ? product.run() : winograd_wgrad_fits<T>(params.g) && winograd_wgrad<T>(params)) return;
  }
  if (few_channels_fits<T>(params.g)) return FewChannelsWgrad<T>(params).run();
  if (product_fits<T>(params)) return run_product<T>(params);
  run_parts<T>(params, plan_wgrad<T>(params.g, 0), [](int64_t, int64_t, RunPairs) { return false; });
}

#if RF_LEVEL < 4
template void preact_conv_wgrad<float>(const PreactConvWgradParams&);
template void preact_conv_wgrad<double>(const PreactConvWgradParams&);
#endif
template void preact_conv_wgrad<bf16>(const PreactConvWgradParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
