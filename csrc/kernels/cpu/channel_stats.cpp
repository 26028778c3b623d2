// Mean and sum of squared deviations per channel: per-tile two-pass, merged with Chan's formula in a fixed order.
#include "primitives.h"
#include "stats.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

template <typename T> struct ChannelStats {
  typedef Acc<T> A;
  const ChannelStatsParams& params;
  Units units;
  A* partial;

  static void task(int64_t unit, void* context) {
    const ChannelStats& job = *static_cast<const ChannelStats*>(context);
    const Units& units = job.units;
    const int64_t stride = units.channels;
    const int64_t end = units.last_pixel(unit);
    UnitStats<A> stats;
    for (int64_t p = units.first_pixel(unit); p < end; p += kTilePixels) {
      const int64_t pixels = end - p < kTilePixels ? end - p : kTilePixels;
      const T* x = static_cast<const T*>(job.params.x) + p * stride + units.first_channel(unit);
      for_each_block<A, 4>(units.group_channels(unit), [&](auto block, int64_t channel, int64_t slot) {
        add_tile(x + channel, stride, pixels, stats, slot, block);
      });
      stats.count += pixels;
    }
    write_partial(stats, job.partial, units, unit);
  }
};

}  // namespace

template <typename T> void channel_stats(const ChannelStatsParams& params) {
  typedef Acc<T> A;
  ChannelStats<T> job = {params, make_units<T>(params.pixels, params.channels), nullptr};
  const Units& units = job.units;
  job.partial = static_cast<A*>(thread_scratch(kScratchPartial, units.ranges * 3 * units.channels * sizeof(A)));
  params.parallel.run(units.count(), &ChannelStats<T>::task, &job);
  StatsReduction<A> reduction = {job.partial,  units.ranges,      units.channels,
                                 units.pixels, units.unit_pixels, static_cast<A*>(params.stats)};
  reduce(reduction, params.parallel);
}

template void channel_stats<float>(const ChannelStatsParams&);
template void channel_stats<double>(const ChannelStatsParams&);
template void channel_stats<bf16>(const ChannelStatsParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
