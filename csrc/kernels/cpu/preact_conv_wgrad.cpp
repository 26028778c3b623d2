// dweight = sum over pixels of dy * act(x*scale + shift), the activation recomputed band by band and never stored.
#include "primitives.h"
#include "wgrad_few_channels.h"
#include "wgrad_product.h"
#include "winograd_wgrad_product.h"

namespace resnet_fused {
namespace RF_VARIANT {

template <typename T> void preact_conv_wgrad(const PreactConvWgradParams& params) {
  if constexpr (kHasWinograd<T>) {
    const WinogradWgradProduct<T> product(params);
    if (product.fits() ? product.run() : winograd_wgrad_fits<T>(params.g) && winograd_wgrad<T>(params)) return;
  }
  if (few_channels_fits<T>(params.g)) return FewChannelsWgrad<T>(params).run();
  if (product_fits<T>(params)) return WgradProductOf<T>(params).run();
  direct_wgrad<T>(params, plan_wgrad<T>(params.g, 0), [](int64_t, int64_t, RunPairs) { return false; });
}

template void preact_conv_wgrad<float>(const PreactConvWgradParams&);
template void preact_conv_wgrad<double>(const PreactConvWgradParams&);
template void preact_conv_wgrad<bf16>(const PreactConvWgradParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
