// out = act(x + alpha*gate*(affine[0]*y + affine[1])), with the statistics of out; without gate, affine and alpha it is x + y.
#include "primitives.h"
#include "stats.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

enum class Activation { none, relu, leaky };

template <typename T> struct ResidualAdd {
  typedef Acc<T> A;
  typedef Vec<A> V;
  const ResidualAddParams& params;
  Units units;
  A* partial;

  // scale and bias: of y, for this group and image; unused in the plain sum.
  template <bool kPlain, Activation kAct, typename B>
  void tile(int64_t offset, int64_t pixels, const A* scale, const A* bias, B block) const {
    const int64_t stride = units.channels;
    const T* x = static_cast<const T*>(params.x) + offset;
    const T* y = static_cast<const T*>(params.y) + offset;
    T* out = static_cast<T*>(params.out) + offset;
    const V slope = splat<A>(static_cast<A>(params.slope));
    V m[B::V], b[B::V];
    if constexpr (!kPlain)
      for (int v = 0; v < B::V; ++v) {
        m[v] = block.load(scale, v);
        b[v] = block.load(bias, v);
      }
    for (int64_t p = 0; p < pixels; ++p)
      for (int v = 0; v < B::V; ++v) {
        V sum = block.load(y + p * stride, v);
        if constexpr (!kPlain) sum = sum * m[v] + b[v];
        sum += block.load(x + p * stride, v);
        if constexpr (kAct != Activation::none) sum = activate<A>(sum, slope, kAct == Activation::relu);
        block.store(out + p * stride, v, sum);
      }
  }

  // alpha * gate * affine of one image.
  void coefficients(int64_t image, int64_t c0, int64_t channels, A* scale, A* bias) const {
    const A* affine = static_cast<const A*>(params.affine);
    const A* gate = static_cast<const A*>(params.gate);
    for (int64_t c = 0; c < channels; ++c) {
      A factor = static_cast<A>(params.alpha);
      if (gate) factor *= params.gate_channels == 1 ? gate[image] : gate[image * params.channels + c0 + c];
      scale[c] = affine ? factor * affine[c0 + c] : factor;
      bias[c] = affine ? factor * affine[params.channels + c0 + c] : A(0);
    }
  }

  template <bool kPlain, Activation kAct> static void task(int64_t unit, void* context) {
    const ResidualAdd& job = *static_cast<const ResidualAdd*>(context);
    const Units& units = job.units;
    const int64_t c0 = units.first_channel(unit);
    const int64_t channels = units.group_channels(unit);
    const int64_t end = units.last_pixel(unit);
    // Only a gate differs from image to image.
    const int64_t image_pixels = job.params.gate ? job.params.pixels_per_image : units.pixels;
    const bool want_stats = job.params.stats != nullptr;
    A scale[kMaxGroupChannels], bias[kMaxGroupChannels];
    UnitStats<A> stats;
    int64_t current = -1;
    for (int64_t p = units.first_pixel(unit); p < end;) {
      const int64_t image = p / image_pixels;
      int64_t pixels = end - p < kTilePixels ? end - p : kTilePixels;
      if ((image + 1) * image_pixels - p < pixels) pixels = (image + 1) * image_pixels - p;
      if (!kPlain && image != current) job.coefficients(image, c0, channels, scale, bias);
      current = image;
      const int64_t offset = p * units.channels + c0;
      for_each_block<A, 4>(channels, [&](auto block, int64_t channel, int64_t slot) {
        job.template tile<kPlain, kAct>(offset + channel, pixels, scale + channel, bias + channel, block);
        if (want_stats)
          add_tile(static_cast<const T*>(job.params.out) + offset + channel, units.channels, pixels, stats, slot, block);
      });
      stats.count += pixels;
      p += pixels;
    }
    if (want_stats) write_partial(stats, job.partial, units, unit);
  }

  template <bool kPlain> void run() {
    void (*task_of_activation)(int64_t, void*) = &task<kPlain, Activation::none>;
    if (params.activate)
      task_of_activation = params.slope == 0 ? &task<kPlain, Activation::relu> : &task<kPlain, Activation::leaky>;
    params.parallel.run(units.count(), task_of_activation, this);
  }
};

}  // namespace

template <typename T> void residual_add(const ResidualAddParams& params) {
  typedef Acc<T> A;
  const bool plain = params.affine == nullptr && params.gate == nullptr && params.alpha == 1;
  int64_t pixels = params.images * params.pixels_per_image;
  int64_t channels = params.channels;
  if (plain && !params.stats && channels < kLanes<A>) {
    // Nothing is per channel: rows of any length will do, and a row shorter than a vector is slow.
    const int64_t elements = pixels * channels;
    const int64_t row = elements < kGroupChannels ? elements : kGroupChannels;
    const int64_t rest = elements % row;
    if (rest > 0) {
      ResidualAddParams tail = params;
      const int64_t offset = (elements - rest) * static_cast<int64_t>(sizeof(T));
      tail.x = static_cast<const char*>(params.x) + offset;
      tail.y = static_cast<const char*>(params.y) + offset;
      tail.out = static_cast<char*>(params.out) + offset;
      tail.images = tail.pixels_per_image = 1;
      tail.channels = rest;
      ResidualAdd<T>{tail, make_units<T>(1, rest), nullptr}.template run<true>();
    }
    pixels = elements / row;
    channels = row;
  }
  ResidualAdd<T> job = {params, make_units<T>(pixels, channels), nullptr};
  const Units& units = job.units;
  if (params.stats)
    job.partial = static_cast<A*>(thread_scratch(kScratchPartial, units.ranges * 3 * units.channels * sizeof(A)));
  if (plain) job.template run<true>();
  else job.template run<false>();
  if (params.stats) {
    StatsReduction<A> reduction = {job.partial,  units.ranges,      units.channels,
                                   units.pixels, units.unit_pixels, static_cast<A*>(params.stats)};
    reduce(reduction, params.parallel);
  }
}

template void residual_add<float>(const ResidualAddParams&);
template void residual_add<double>(const ResidualAddParams&);
template void residual_add<bf16>(const ResidualAddParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
