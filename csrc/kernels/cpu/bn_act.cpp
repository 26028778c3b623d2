// a = act(x*scale + shift), and dz = da*act'(z) + dz_in with the sums of dz and dz*xhat.
#include "channel_blocks.h"
#include "primitives.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

template <typename T> struct BnAct {
  typedef Acc<T> A;
  typedef Vec<A> V;
  const BnActParams& params;
  Units units;
  A* partial;  // [ranges, 2, C]: sums of dz and of dz*(x - mean)

  const A* bn(int row) const { return static_cast<const A*>(params.bn) + row * units.channels; }

  template <bool kRelu, typename B>
  void forward_tile(int64_t pixel, int64_t pixels, int64_t channel, B block) const {
    const int64_t stride = units.channels;
    const T* x = static_cast<const T*>(params.x) + pixel * stride + channel;
    T* out = static_cast<T*>(params.out) + pixel * stride + channel;
    const V slope = splat<A>(static_cast<A>(params.slope));
    V scale[B::V], shift[B::V];
    for (int v = 0; v < B::V; ++v) {
      scale[v] = block.load(bn(2) + channel, v);
      shift[v] = block.load(bn(3) + channel, v);
    }
    for (int64_t p = 0; p < pixels; ++p)
      for (int v = 0; v < B::V; ++v) {
        const V z = preact(block.load(x + p * stride, v), scale[v], shift[v]);
        block.store(out + p * stride, v, activate<A>(z, slope, kRelu));
      }
  }

  template <bool kRelu> static void forward(int64_t unit, void* context) {
    const BnAct& job = *static_cast<const BnAct*>(context);
    const Units& units = job.units;
    const int64_t c0 = units.first_channel(unit);
    const int64_t end = units.last_pixel(unit);
    for (int64_t p = units.first_pixel(unit); p < end; p += kTilePixels)
      for_each_block<A, 4>(units.group_channels(unit), [&](auto block, int64_t channel, int64_t) {
        job.template forward_tile<kRelu>(p, end - p < kTilePixels ? end - p : kTilePixels, c0 + channel, block);
      });
  }

  // Adds the tile's sums to two vectors of slots.
  template <bool kRelu, bool kDzIn, typename B>
  void backward_tile(int64_t pixel, int64_t pixels, int64_t channel, A* sum_slots, A* dot_slots, B block) const {
    constexpr int U = kUnroll<B::V>;
    const int64_t stride = units.channels;
    const int64_t offset = pixel * stride + channel;
    const T* x = static_cast<const T*>(params.x) + offset;
    const T* da = static_cast<const T*>(params.da) + offset;
    const T* dz_in = kDzIn ? static_cast<const T*>(params.dz_in) + offset : nullptr;
    T* out = static_cast<T*>(params.out) + offset;
    const V slope = splat<A>(static_cast<A>(params.slope));
    V mean[B::V], scale[B::V], shift[B::V];
    for (int v = 0; v < B::V; ++v) {
      mean[v] = block.load(bn(0) + channel, v);
      scale[v] = block.load(bn(2) + channel, v);
      shift[v] = block.load(bn(3) + channel, v);
    }
    V sum[U][B::V] = {}, dot[U][B::V] = {};
    const auto step = [&](int64_t p, int v, V& total, V& product) __attribute__((always_inline)) {
      const V value = block.load(x + p * stride, v);
      V dz = activate_grad<A>(preact(value, scale[v], shift[v]), block.load(da + p * stride, v), slope, kRelu);
      if constexpr (kDzIn) dz += block.load(dz_in + p * stride, v);
      dz = rounded<T>(dz);
      block.store(out + p * stride, v, dz);
      total += dz;
      product += dz * (value - mean[v]);
    };
    int64_t p = 0;
    for (; p + U <= pixels; p += U)
      for (int u = 0; u < U; ++u)
        for (int v = 0; v < B::V; ++v) step(p + u, v, sum[u][v], dot[u][v]);
    for (; p < pixels; ++p)
      for (int v = 0; v < B::V; ++v) step(p, v, sum[0][v], dot[0][v]);
    for (int v = 0; v < B::V; ++v) {
      V total = sum[0][v], product = dot[0][v];
      for (int u = 1; u < U; ++u) {
        total += sum[u][v];
        product += dot[u][v];
      }
      constexpr int L = kLanes<A>;
      store(sum_slots + v * L, load(sum_slots + v * L) + total);
      store(dot_slots + v * L, load(dot_slots + v * L) + product);
    }
  }

  template <bool kRelu, bool kDzIn> static void backward(int64_t unit, void* context) {
    const BnAct& job = *static_cast<const BnAct*>(context);
    const Units& units = job.units;
    const int64_t c0 = units.first_channel(unit);
    const int64_t channels = units.group_channels(unit);
    const int64_t end = units.last_pixel(unit);
    A sums[kGroupSlots], dots[kGroupSlots];
    memset(sums, 0, sizeof sums);
    memset(dots, 0, sizeof dots);
    for (int64_t p = units.first_pixel(unit); p < end; p += kTilePixels)
      for_each_block<A, kBlockVectors>(channels, [&](auto block, int64_t channel, int64_t slot) {
        job.template backward_tile<kRelu, kDzIn>(p, end - p < kTilePixels ? end - p : kTilePixels, c0 + channel,
                                                 sums + slot, dots + slot, block);
      });
    A* out = job.partial + units.range(unit) * 2 * units.channels + c0;
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = sums[slot_of<A>(c, channels)];
      out[units.channels + c] = dots[slot_of<A>(c, channels)];
    }
  }
};

}  // namespace

template <typename T> void bn_act_forward(const BnActParams& params) {
  BnAct<T> job = {params, make_units<T>(params.pixels, params.channels), nullptr};
  params.parallel.run(job.units.count(),
                      params.slope == 0 ? &BnAct<T>::template forward<true> : &BnAct<T>::template forward<false>, &job);
}

template <typename T> void bn_act_backward(const BnActParams& params) {
  typedef Acc<T> A;
  BnAct<T> job = {params, make_units<T>(params.pixels, params.channels), nullptr};
  const Units& units = job.units;
  job.partial = static_cast<A*>(thread_scratch(kScratchPartial, units.ranges * 2 * units.channels * sizeof(A)));
  const bool relu = params.slope == 0;
  params.parallel.run(units.count(),
                      params.dz_in == nullptr ? relu ? &BnAct<T>::template backward<true, false>
                                                     : &BnAct<T>::template backward<false, false>
                                              : relu ? &BnAct<T>::template backward<true, true>
                                                     : &BnAct<T>::template backward<false, true>,
                      &job);
  SumReduction<A> reduction = {job.partial, units.ranges, units.channels, job.bn(1), static_cast<A*>(params.sums)};
  reduce(reduction, params.parallel);
}

template void bn_act_forward<float>(const BnActParams&);
template void bn_act_forward<double>(const BnActParams&);
template void bn_act_forward<bf16>(const BnActParams&);
template void bn_act_backward<float>(const BnActParams&);
template void bn_act_backward<double>(const BnActParams&);
template void bn_act_backward<bf16>(const BnActParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
