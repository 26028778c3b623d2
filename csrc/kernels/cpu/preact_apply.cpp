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

  // The coefficients of a unit, by slot.
  struct Rows {
    A a[kGroupSlots], b[kGroupSlots], c[kGroupSlots], mean[kGroupSlots];
  };

  template <bool kSkip, typename B>
  void tile(int64_t offset, int64_t count, int64_t slot, const Rows& rows, B block) const {
    constexpr int N = B::kCount;
    const int64_t stride = units.columns;
    const T* dz = static_cast<const T*>(params.dz) + offset;
    const T* x = static_cast<const T*>(params.x) + offset;
    const T* dskip = kSkip ? static_cast<const T*>(params.dskip) + offset : nullptr;
    T* dx = static_cast<T*>(params.dx) + offset;
    V a[N], b[N], c[N], mean[N];
    block.load_slots(rows.a + slot, a);
    block.load_slots(rows.b + slot, b);
    block.load_slots(rows.c + slot, c);
    block.load_slots(rows.mean + slot, mean);
    for (int64_t p = 0; p < count; ++p) {
      V value[N], gradient[N], skip[N];
      block.load(x + p * stride, value);
      block.load(dz + p * stride, gradient);
      if constexpr (kSkip) block.load(dskip + p * stride, skip);
      for (int v = 0; v < N; ++v) {
        value[v] = gradient[v] * a[v] + ((value[v] - mean[v]) * b[v] + c[v]);
        if constexpr (kSkip) value[v] += skip[v];
      }
      block.store(dx + p * stride, value);
    }
  }

  template <bool kSkip> static void task(int64_t index, void* context) {
    const PreactApply& job = *static_cast<const PreactApply*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    const A* coefficients = static_cast<const A*>(job.params.coefficients) + unit.first_channel;
    Rows rows;
    gather_slots<T>(coefficients, units.channels, unit.columns, rows.a);
    gather_slots<T>(coefficients + units.channels, units.channels, unit.columns, rows.b);
    gather_slots<T>(coefficients + 2 * units.channels, units.channels, unit.columns, rows.c);
    gather_slots<T>(coefficients + 3 * units.channels, units.channels, unit.columns, rows.mean);
    for (int64_t p = unit.begin; p < unit.end; p += units.step) {
      const int64_t count = unit.end - p < units.step ? unit.end - p : units.step;
      const int64_t offset = units.first + p * units.columns + unit.first_column;
      for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
        job.template tile<kSkip>(offset + column, count, slot, rows, block);
      });
    }
  }
};

}  // namespace

template <typename T> void preact_apply(const PreactApplyParams& params) {
  const Split parts = split<T>(params.pixels, params.channels, pixels_per_row<T>(params.channels));
  for_both<0>(parts, static_cast<Acc<T>*>(nullptr), [&](const Units& units, Acc<T>*) {
    PreactApply<T> job = {params, units};
    params.parallel.run(
        units.count(),
        params.dskip ? &PreactApply<T>::template task<true> : &PreactApply<T>::template task<false>, &job);
  });
}

template <typename T>
void preact_apply_run(const PreactApplyParams& params, int64_t first_pixel, int64_t pixels) {
  const int64_t first = first_pixel * params.channels;
  PreactApplyParams run = params;
  run.pixels = pixels;
  run.dz = static_cast<const T*>(params.dz) + first;
  run.x = static_cast<const T*>(params.x) + first;
  if (params.dskip) run.dskip = static_cast<const T*>(params.dskip) + first;
  run.dx = static_cast<T*>(params.dx) + first;
  run.parallel.run = [](int64_t tasks, void (*task)(int64_t, void*), void* context) {
    for (int64_t i = 0; i < tasks; ++i) task(i, context);
  };
  preact_apply<T>(run);
}

#if RF_LEVEL < 4
template void preact_apply<float>(const PreactApplyParams&);
template void preact_apply<double>(const PreactApplyParams&);
template void preact_apply_run<float>(const PreactApplyParams&, int64_t, int64_t);
template void preact_apply_run<double>(const PreactApplyParams&, int64_t, int64_t);
#endif
template void preact_apply<bf16>(const PreactApplyParams&);
template void preact_apply_run<bf16>(const PreactApplyParams&, int64_t, int64_t);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
