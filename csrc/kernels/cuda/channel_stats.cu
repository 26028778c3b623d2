// Mean and sum of squared deviations per channel, in one read.
#include "rows.h"

namespace resnet_fused {
namespace cuda {
namespace {

template <typename T> struct ChannelStats {
  struct Params {
    const T* x;
  };
  static constexpr Reduce kReduce = Reduce::stats;
  static constexpr int kRows = kRowsAtOnce;

  template <int V> struct Channels {
    __device__ Channels(const Params&, int64_t) {}
  };
  template <int V> struct Row {
    Packed<T, V> x;
    __device__ void load(const Params& p, int64_t at) { x.load(p.x + at); }
  };
  template <int V>
  __device__ static void apply(const Params&, const Channels<V>&, const Row<V>& row, int64_t, int64_t,
                               int64_t, float* value, float*) {
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = row.x[j];
  }
};

}  // namespace

template <typename T> cudaError_t channel_stats(const ChannelStatsParams& p, Stream stream) {
  return launch_rows<T, ChannelStats<T>>({static_cast<const T*>(p.x)}, aligned(p.x), p.pixels, p.channels,
                                         p.partial, p.stats, stream);
}
template cudaError_t channel_stats<RF_DTYPE>(const ChannelStatsParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
