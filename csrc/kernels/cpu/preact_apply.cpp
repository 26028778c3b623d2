// dx = dskip + A*dz + B*(x - mean) + C: BN's backward and the skip's addition in one pass.
#include "channel_blocks.h"
#include "primitives.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

template <typename T> struct PreactApply {
  typedef Acc<T> A;
  typedef Vec<A> V;
  const PreactApplyParams& params;
  Units units;

  template <bool kSkip, typename B> void tile(int64_t pixel, int64_t pixels, int64_t channel, B block) const {
    const int64_t stride = units.channels;
    const int64_t offset = pixel * stride + channel;
    const T* dz = static_cast<const T*>(params.dz) + offset;
    const T* x = static_cast<const T*>(params.x) + offset;
    const T* dskip = kSkip ? static_cast<const T*>(params.dskip) + offset : nullptr;
    T* dx = static_cast<T*>(params.dx) + offset;
    const A* rows = static_cast<const A*>(params.coefficients) + channel;
    V a[B::V], b[B::V], c[B::V], mean[B::V];
    for (int v = 0; v < B::V; ++v) {
      a[v] = block.load(rows, v);
      b[v] = block.load(rows + stride, v);
      c[v] = block.load(rows + 2 * stride, v);
      mean[v] = block.load(rows + 3 * stride, v);
    }
    for (int64_t p = 0; p < pixels; ++p)
      for (int v = 0; v < B::V; ++v) {
        V value = (block.load(x + p * stride, v) - mean[v]) * b[v] + c[v];
        value = block.load(dz + p * stride, v) * a[v] + value;
        if constexpr (kSkip) value += block.load(dskip + p * stride, v);
        block.store(dx + p * stride, v, value);
      }
  }

  template <bool kSkip> static void task(int64_t unit, void* context) {
    const PreactApply& job = *static_cast<const PreactApply*>(context);
    const Units& units = job.units;
    const int64_t c0 = units.first_channel(unit);
    const int64_t end = units.last_pixel(unit);
    for (int64_t p = units.first_pixel(unit); p < end; p += kTilePixels)
      for_each_block<A, kBlockVectors>(units.group_channels(unit), [&](auto block, int64_t channel, int64_t) {
        job.template tile<kSkip>(p, end - p < kTilePixels ? end - p : kTilePixels, c0 + channel, block);
      });
  }
};

}  // namespace

template <typename T> void preact_apply(const PreactApplyParams& params) {
  PreactApply<T> job = {params, make_units<T>(params.pixels, params.channels)};
  params.parallel.run(job.units.count(),
                      params.dskip ? &PreactApply<T>::template task<true> : &PreactApply<T>::template task<false>, &job);
}

template void preact_apply<float>(const PreactApplyParams&);
template void preact_apply<double>(const PreactApplyParams&);
template void preact_apply<bf16>(const PreactApplyParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
