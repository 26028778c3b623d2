// a = act(x*scale + shift), and dz = da*act'(z) + dz_in with the sums of dz and dz*xhat.
#include "bn_rows.h"
#include "primitives.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

template <typename T> struct BnAct {
  typedef Acc<T> A;
  typedef Vec<A> V;
  const BnActParams& params;
  Units units;
  A* partial;  // [ranges, 2, columns]: sums of dz and of dz*(x - mean)

  template <bool kRelu, typename B>
  void forward_tile(int64_t offset, int64_t rows, const A* scale_slots, const A* shift_slots, B block) const {
    constexpr int N = B::kCount;
    const int64_t stride = units.columns;
    const T* x = static_cast<const T*>(params.x) + offset;
    T* out = static_cast<T*>(params.out) + offset;
    const V slope = splat<A>(static_cast<A>(params.slope));
    V scale[N], shift[N];
    block.load_slots(scale_slots, scale);
    block.load_slots(shift_slots, shift);
    for (int64_t p = 0; p < rows; ++p) {
      V value[N];
      block.load(x + p * stride, value);
      for (int v = 0; v < N; ++v) value[v] = activate<A>(preact(value[v], scale[v], shift[v]), slope, kRelu);
      block.store(out + p * stride, value);
    }
  }

  template <bool kRelu> static void forward(int64_t index, void* context) {
    const BnAct& job = *static_cast<const BnAct*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    const BnRows<T> rows(job.params.bn, units, unit);
    for (int64_t p = unit.begin; p < unit.end; p += units.step) {
      const int64_t count = unit.end - p < units.step ? unit.end - p : units.step;
      const int64_t offset = units.first + p * units.columns + unit.first_column;
      for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
        job.template forward_tile<kRelu>(offset + column, count, rows.scale + slot, rows.shift + slot, block);
      });
    }
  }

  // Adds the tile's sums to slots of sum and dot.
  template <bool kRelu, bool kDzIn, typename B>
  void backward_tile(int64_t offset, int64_t rows, int64_t slot, const BnRows<T>& bn_rows, A* sum_slots,
                     A* dot_slots, B block) const {
    constexpr int N = B::kCount;
    constexpr int U = kUnroll<N>;
    const int64_t stride = units.columns;
    const T* x = static_cast<const T*>(params.x) + offset;
    const T* da = static_cast<const T*>(params.da) + offset;
    const T* dz_in = kDzIn ? static_cast<const T*>(params.dz_in) + offset : nullptr;
    T* out = static_cast<T*>(params.out) + offset;
    const V slope = splat<A>(static_cast<A>(params.slope));
    V mean[N], scale[N], shift[N];
    block.load_slots(bn_rows.mean + slot, mean);
    block.load_slots(bn_rows.scale + slot, scale);
    block.load_slots(bn_rows.shift + slot, shift);
    V sum[U][N] = {}, dot[U][N] = {};
    const auto take = [&](int64_t first, auto count) __attribute__((always_inline)) {
    // The unrolling is asked for by name: GCC would leave the accumulators in memory.
#pragma GCC unroll 4
      for (int u = 0; u < count.value; ++u) {
        const int64_t i = (first + u) * stride;
        V value[N], dz[N], add[N];
        block.load(x + i, value);
        block.load(da + i, dz);
        if constexpr (kDzIn) block.load(dz_in + i, add);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
          dz[v] = activate_grad<A>(preact(value[v], scale[v], shift[v]), dz[v], slope, kRelu);
          if constexpr (kDzIn) dz[v] += add[v];
        }
        block.store(out + i, dz);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
          sum[u][v] += dz[v];
          dot[u][v] += dz[v] * (value[v] - mean[v]);
        }
      }
    };
    int64_t p = 0;
    for (; p + U <= rows; p += U) take(p, Int<U>{});
    for (; p < rows; ++p) take(p, Int<1>{});
    add_to_slots(sum_slots + slot, sum, block);
    add_to_slots(dot_slots + slot, dot, block);
  }

  template <bool kRelu, bool kDzIn> static void backward(int64_t index, void* context) {
    const BnAct& job = *static_cast<const BnAct*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    const BnRows<T> rows(job.params.bn, units, unit);
    A sums[kGroupSlots], dots[kGroupSlots];
    memset(sums, 0, slot_count<T>(unit.columns) * sizeof(A));
    memset(dots, 0, slot_count<T>(unit.columns) * sizeof(A));
    for (int64_t p = unit.begin; p < unit.end; p += units.step) {
      const int64_t count = unit.end - p < units.step ? unit.end - p : units.step;
      const int64_t offset = units.first + p * units.columns + unit.first_column;
      for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
        job.template backward_tile<kRelu, kDzIn>(offset + column, count, slot, rows, sums, dots, block);
      });
    }
    A* out = job.partial + unit.range * 2 * units.columns + unit.first_column;
    scatter_slots<T>(sums, unit.columns, out);
    scatter_slots<T>(dots, unit.columns, out + units.columns);
  }
};

template <typename T> Split split_of(const BnActParams& params) {
  return split<T>(params.pixels, params.channels, pixels_per_row<T>(params.channels));
}

}  // namespace

template <typename T> void bn_act_forward(const BnActParams& params) {
  typedef BnAct<T> Job;
  const bool relu = params.slope == 0;
  const auto task = relu ? &Job::template forward<true> : &Job::template forward<false>;
  for_both<0>(split_of<T>(params), static_cast<Acc<T>*>(nullptr), [&](const Units& units, Acc<T>*) {
    Job job = {params, units, nullptr};
    params.parallel.run(units.count(), task, &job);
  });
}

template <typename T, bool kRelu> static auto backward_task(const BnActParams& params) {
  typedef BnAct<T> Job;
  return params.dz_in != nullptr ? &Job::template backward<kRelu, true> : &Job::template backward<kRelu, false>;
}

template <typename T> void bn_act_backward(const BnActParams& params) {
  typedef Acc<T> A;
  const Split parts = split_of<T>(params);
  A* partial = partial_buffer<2, A>(parts);
  const auto task = params.slope == 0 ? backward_task<T, true>(params) : backward_task<T, false>(params);
  for_both<2>(parts, partial, [&](const Units& units, A* out) {
    BnAct<T> job = {params, units, out};
    params.parallel.run(units.count(), task, &job);
  });
  const A* invstd = static_cast<const A*>(params.bn) + params.channels;
  SumReduction<A> reduction = {{partial, parts}, params.channels, invstd, static_cast<A*>(params.sums)};
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
