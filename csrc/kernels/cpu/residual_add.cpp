// out = act(x + alpha*gate*(affine[0]*y + affine[1])), with the statistics of out; without gate, affine and
// alpha it is x + y.
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
  int64_t image_rows;  // that share a gate

  // scale and bias: of y, for this unit and image, by slot; unused in the plain sum.
  template <bool kPlain, Activation kAct, typename B>
  void tile(int64_t offset, int64_t rows, const A* scale_slots, const A* bias_slots, B block) const {
    constexpr int N = B::kCount;
    const int64_t stride = units.columns;
    const T* x = static_cast<const T*>(params.x) + offset;
    const T* y = static_cast<const T*>(params.y) + offset;
    T* out = static_cast<T*>(params.out) + offset;
    const V slope = splat<A>(static_cast<A>(params.slope));
    V scale[N], bias[N];
    if constexpr (!kPlain) {
      block.load_slots(scale_slots, scale);
      block.load_slots(bias_slots, bias);
    }
    for (int64_t p = 0; p < rows; ++p) {
      V sum[N], branch[N];
      block.load(x + p * stride, sum);
      block.load(y + p * stride, branch);
      for (int v = 0; v < N; ++v) {
        if constexpr (!kPlain) branch[v] = branch[v] * scale[v] + bias[v];
        sum[v] += branch[v];
        if constexpr (kAct != Activation::none) sum[v] = activate<A>(sum[v], slope, kAct == Activation::relu);
      }
      block.store(out + p * stride, sum);
    }
  }

  // alpha * gate * affine of one image, by slot.
  void coefficients(int64_t image, const Unit& unit, A* scale, A* bias) const {
    const A* affine = static_cast<const A*>(params.affine);
    const A* gate = static_cast<const A*>(params.gate);
    const int64_t channels = unit.columns < params.channels ? unit.columns : params.channels;
    A factor[kMaxGroupChannels], shift[kMaxGroupChannels];
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t c = unit.first_channel + i;
      factor[i] = static_cast<A>(params.alpha);
      if (gate) factor[i] *= params.gate_channels == 1 ? gate[image] : gate[image * params.channels + c];
      shift[i] = affine ? factor[i] * affine[params.channels + c] : A(0);
      if (affine) factor[i] *= affine[c];
    }
    gather_slots<T>(factor, channels, unit.columns, scale);
    gather_slots<T>(shift, channels, unit.columns, bias);
  }

  template <bool kPlain, Activation kAct> static void task(int64_t index, void* context) {
    const ResidualAdd& job = *static_cast<const ResidualAdd*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    const T* out = static_cast<const T*>(job.params.out);
    const bool want_stats = job.params.stats != nullptr;
    A scale[kGroupSlots], bias[kGroupSlots];
    UnitStats<A> stats;
    int64_t current = -1;
    for (int64_t p = unit.begin; p < unit.end;) {
      const int64_t image = p / job.image_rows;
      int64_t rows = unit.end - p < kTileRows ? unit.end - p : kTileRows;
      if ((image + 1) * job.image_rows - p < rows) rows = (image + 1) * job.image_rows - p;
      if (!kPlain && image != current) job.coefficients(image, unit, scale, bias);
      current = image;
      const int64_t tile = units.first + p * units.columns + unit.first_column;
      for (int64_t r = 0; r < rows; r += units.step)
        for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
          job.template tile<kPlain, kAct>(tile + r * units.columns + column,
                                          rows - r < units.step ? rows - r : units.step, scale + slot,
                                          bias + slot, block);
        });
      if (want_stats)
        for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
          add_tile(out + tile + column, units.columns, rows, stats, slot, block);
        });
      stats.count += rows;
      p += rows;
    }
    if (want_stats) write_partial<T>(stats, job.partial, units, unit);
  }

  template <bool kPlain> void run() {
    void (*task_of_activation)(int64_t, void*) = &task<kPlain, Activation::none>;
    if (params.activate)
      task_of_activation =
          params.slope == 0 ? &task<kPlain, Activation::relu> : &task<kPlain, Activation::leaky>;
    params.parallel.run(units.count(), task_of_activation, this);
  }
};

}  // namespace

template <typename T> void residual_add(const ResidualAddParams& params) {
  typedef Acc<T> A;
  const bool plain = params.affine == nullptr && params.gate == nullptr && params.alpha == 1;
  const int64_t pixels = params.images * params.pixels_per_image;
  // A gate differs from image to image: a row must not hold pixels of two.
  const Split parts = split<T>(pixels, params.channels, params.gate ? 1 : pixels_per_row<T>(params.channels));
  A* partial = params.stats ? partial_buffer<3, A>(parts) : nullptr;
  for_both<3>(parts, partial, [&](const Units& units, A* out) {
    ResidualAdd<T> job = {params, units, out, params.gate ? params.pixels_per_image : units.rows};
    if (plain)
      job.template run<true>();
    else
      job.template run<false>();
  });
  if (params.stats) {
    StatsReduction<A> reduction = {{partial, parts}, params.channels, pixels, static_cast<A*>(params.stats)};
    reduce(reduction, params.parallel);
  }
}

template void residual_add<float>(const ResidualAddParams&);
template void residual_add<double>(const ResidualAddParams&);
template void residual_add<bf16>(const ResidualAddParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
