// Mean and sum of squared deviations per channel: per-tile two-pass, merged with Chan's formula in a fixed
// order.
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

  static void task(int64_t index, void* context) {
    const ChannelStats& job = *static_cast<const ChannelStats*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    const T* x = static_cast<const T*>(job.params.x) + units.first + unit.first_column;
    UnitStats<A> stats;
    for (int64_t p = unit.begin; p < unit.end; p += kTileRows) {
      const int64_t rows = unit.end - p < kTileRows ? unit.end - p : kTileRows;
      if (units.step < kTileRows) fetch(x + p * units.columns, units.columns, rows, unit.columns);
      for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
        add_tile(x + p * units.columns + column, units.columns, rows, stats, slot, block);
      });
      stats.count += rows;
    }
    write_partial<T>(stats, job.partial, units, unit);
  }

  // The blocks would read memory in strides: bring the tile in by rows.
  static void fetch(const T* x, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t p = 0; p < rows; ++p)
      for (int64_t c = 0; c < columns; c += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(x + p * stride + c);
  }
};

}  // namespace

template <typename T> void channel_stats(const ChannelStatsParams& params) {
  typedef Acc<T> A;
  const Split parts = split<T>(params.pixels, params.channels, pixels_per_row<T>(params.channels));
  A* partial = partial_buffer<3, A>(parts);
  for_both<3>(parts, partial, [&](const Units& units, A* out) {
    ChannelStats<T> job = {params, units, out};
    params.parallel.run(units.count(), &ChannelStats<T>::task, &job);
  });
  StatsReduction<A> reduction = {
      {partial, parts}, params.channels, params.pixels, static_cast<A*>(params.stats)};
  reduce(reduction, params.parallel);
}

template void channel_stats<float>(const ChannelStatsParams&);
template void channel_stats<double>(const ChannelStatsParams&);
template void channel_stats<bf16>(const ChannelStatsParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
