// The mean of act(BN(x)) over each image's pixels (global average pooling), and its backward. The activation is not
// stored; neither is its gradient where dx is taken from x at once.
#include "bn_rows.h"
#include "primitives.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

template <typename T> struct BnActPool {
  typedef Acc<T> A;
  typedef Vec<A> V;
  const BnActPoolParams& params;
  const Units& units;
  A* partial;  // [images, 2, columns]: sums of dz and of dz*(x - mean)

  // Sums over the rows of an image by slot: in acc for kTileRows rows, of these in double. An image may have any number
  // of rows, and what is added up is of one sign.
  struct ImageSums {
    A tile[kGroupSlots];
    double total[kGroupSlots];
    int64_t slots;

    explicit ImageSums(int64_t count) : slots(count) {
      memset(tile, 0, slots * sizeof(A));
      memset(total, 0, slots * sizeof(double));
    }
    void close_tile() {
      for (int64_t s = 0; s < slots; ++s) {
        total[s] += tile[s];
        tile[s] = 0;
      }
    }
  };

  // Calls tile(offset, rows) for all rows of a unit, and close() after each kTileRows of them.
  template <typename F, typename G>
  static void for_image_tiles(const Units& units, const Unit& unit, const F& tile, const G& close) {
    for (int64_t begin = unit.begin; begin < unit.end; begin += kTileRows) {
      const int64_t end = unit.end - begin < kTileRows ? unit.end : begin + kTileRows;
      for (int64_t p = begin; p < end; p += units.step)
        tile(p * units.columns + unit.first_column, end - p < units.step ? end - p : units.step);
      close();
    }
  }

  // Adds the tile's activations to slots.
  template <bool kRelu, typename B>
  void forward_tile(int64_t offset, int64_t rows, int64_t slot, const BnRows<T>& bn_rows, A* sum_slots, B block) const {
    constexpr int N = B::kCount;
    constexpr int U = kUnroll<N>;
    const int64_t stride = units.columns;
    const T* x = static_cast<const T*>(params.x) + offset;
    const V slope = splat<A>(static_cast<A>(params.slope));
    V scale[N], shift[N];
    block.load_slots(bn_rows.scale + slot, scale);
    block.load_slots(bn_rows.shift + slot, shift);
    V sum[U][N] = {};
    const auto take = [&](int64_t first, auto count) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int u = 0; u < count.value; ++u) {
        V value[N];
        block.load(x + (first + u) * stride, value);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) sum[u][v] += activate<A>(preact(value[v], scale[v], shift[v]), slope, kRelu);
      }
    };
    int64_t p = 0;
    for (; p + U <= rows; p += U) take(p, Int<U>{});
    for (; p < rows; ++p) take(p, Int<1>{});
    add_to_slots(sum_slots + slot, sum, block);
  }

  // The mean over an image, which is a unit's range of rows.
  template <bool kRelu> static void forward(int64_t index, void* context) {
    const BnActPool& job = *static_cast<const BnActPool*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    const BnRows<T> rows(job.params.bn, units, unit);
    ImageSums sums(slot_count<T>(unit.columns));
    for_image_tiles(
        units, unit,
        [&](int64_t offset, int64_t count) {
          for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
            job.template forward_tile<kRelu>(offset + column, count, slot, rows, sums.tile, block);
          });
        },
        [&] { sums.close_tile(); });
    A means[kGroupSlots];
    for (int64_t s = 0; s < sums.slots; ++s) means[s] = static_cast<A>(sums.total[s] / units.range_rows);
    T* const out = static_cast<T*>(job.params.out) + unit.range * units.columns + unit.first_column;
    for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
      V mean[decltype(block)::kCount];
      block.load_slots(means + slot, mean);
      block.store(out + column, mean);
    });
  }

  // What dz is in an image, by slot: the mean's gradient is the same at all pixels, so dz has two values, and the sum of
  // dz is a matter of counting. Adding up one number many times would round the same way each time.
  struct ImageGradient {
    A active[kGroupSlots], inactive[kGroupSlots];
  };

  template <bool kRelu> void gather_gradient(const Unit& unit, ImageGradient& gradient) const {
    const T* const da = static_cast<const T*>(params.dmeans) + unit.range * units.columns + unit.first_column;
    const V pixels = splat<A>(static_cast<A>(units.range_rows)), slope = splat<A>(static_cast<A>(params.slope));
    for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
      V active[decltype(block)::kCount], inactive[decltype(block)::kCount];
      block.load(da + column, active);
      for (int v = 0; v < block.kCount; ++v) {
        const V value = active[v] / pixels;
        active[v] = rounded<T>(value);
        inactive[v] = kRelu ? V{} : rounded<T>(value * slope);
      }
      block.store_slots(gradient.active + slot, active);
      block.store_slots(gradient.inactive + slot, inactive);
    });
  }

  // As activate_grad has it.
  static auto is_inactive_at(V x, V scale, V shift) { return preact(x, scale, shift) <= V{}; }

  // Adds the tile's active pixels to slots of count, and dz*(x - mean) to slots of dot.
  template <bool kRelu, bool kStore, typename B>
  void backward_tile(int64_t offset, int64_t rows, int64_t slot, const BnRows<T>& bn_rows,
                     const ImageGradient& gradient, A* count_slots, A* dot_slots, B block) const {
    constexpr int N = B::kCount;
    constexpr int U = kUnroll<N>;
    const int64_t stride = units.columns;
    const T* x = static_cast<const T*>(params.x) + offset;
    T* out = kStore ? static_cast<T*>(params.out) + offset : nullptr;
    const V zero = {}, one = splat<A>(A(1));
    V mean[N], scale[N], shift[N], active[N], inactive[N];
    block.load_slots(bn_rows.mean + slot, mean);
    block.load_slots(bn_rows.scale + slot, scale);
    block.load_slots(bn_rows.shift + slot, shift);
    block.load_slots(gradient.active + slot, active);
    if constexpr (!kRelu) block.load_slots(gradient.inactive + slot, inactive);
    V number[U][N] = {}, dot[U][N] = {};
    const auto take = [&](int64_t first, auto count) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int u = 0; u < count.value; ++u) {
        const int64_t i = (first + u) * stride;
        V value[N], dz[N];
        block.load(x + i, value);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
          const auto is_inactive = is_inactive_at(value[v], scale[v], shift[v]);
          dz[v] = select<V>(is_inactive, kRelu ? zero : inactive[v], active[v]);
          number[u][v] += select<V>(is_inactive, zero, one);
          dot[u][v] += dz[v] * (value[v] - mean[v]);
        }
        if constexpr (kStore) block.store(out + i, dz);
      }
    };
    int64_t p = 0;
    for (; p + U <= rows; p += U) take(p, Int<U>{});
    for (; p < rows; ++p) take(p, Int<1>{});
    add_to_slots(count_slots + slot, number, block);
    add_to_slots(dot_slots + slot, dot, block);
  }

  // n times value, of which there may be none.
  static double times(double n, A value) { return n == 0 ? 0 : n * value; }

  template <bool kRelu, bool kStore> static void backward(int64_t index, void* context) {
    const BnActPool& job = *static_cast<const BnActPool*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    const BnRows<T> rows(job.params.bn, units, unit);
    ImageGradient gradient;
    job.template gather_gradient<kRelu>(unit, gradient);
    ImageSums counts(slot_count<T>(unit.columns)), dots(counts.slots);
    for_image_tiles(
        units, unit,
        [&](int64_t offset, int64_t count) {
          for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
            job.template backward_tile<kRelu, kStore>(offset + column, count, slot, rows, gradient, counts.tile,
                                                      dots.tile, block);
          });
        },
        [&] {
          counts.close_tile();
          dots.close_tile();
        });
    for (int64_t s = 0; s < counts.slots; ++s) {
      counts.tile[s] = static_cast<A>(times(counts.total[s], gradient.active[s]) +
                                      times(units.range_rows - counts.total[s], gradient.inactive[s]));
      dots.tile[s] = static_cast<A>(dots.total[s]);
    }
    A* out = job.partial + unit.range * 2 * units.columns + unit.first_column;
    scatter_slots<T>(counts.tile, unit.columns, out);
    scatter_slots<T>(dots.tile, unit.columns, out + units.columns);
  }

  // The coefficients of a unit, by slot; the fourth of them is the mean.
  struct Coefficients {
    A a[kGroupSlots], b[kGroupSlots], c[kGroupSlots];
  };

  template <bool kRelu, typename B>
  void apply_tile(int64_t offset, int64_t rows, int64_t slot, const BnRows<T>& bn_rows,
                  const Coefficients& coefficients, const ImageGradient& gradient, B block) const {
    constexpr int N = B::kCount;
    const int64_t stride = units.columns;
    const T* x = static_cast<const T*>(params.x) + offset;
    T* out = static_cast<T*>(params.out) + offset;
    V mean[N], scale[N], shift[N], active[N], inactive[N], a[N], b[N], c[N];
    block.load_slots(bn_rows.mean + slot, mean);
    block.load_slots(bn_rows.scale + slot, scale);
    block.load_slots(bn_rows.shift + slot, shift);
    block.load_slots(gradient.active + slot, active);
    block.load_slots(gradient.inactive + slot, inactive);
    block.load_slots(coefficients.a + slot, a);
    block.load_slots(coefficients.b + slot, b);
    block.load_slots(coefficients.c + slot, c);
    for (int64_t p = 0; p < rows; ++p) {
      V value[N];
      block.load(x + p * stride, value);
      for (int v = 0; v < N; ++v) {
        const V dz = select<V>(is_inactive_at(value[v], scale[v], shift[v]), inactive[v], active[v]);
        value[v] = dz * a[v] + ((value[v] - mean[v]) * b[v] + c[v]);
      }
      block.store(out + p * stride, value);
    }
  }

  template <bool kRelu> static void apply(int64_t index, void* context) {
    const BnActPool& job = *static_cast<const BnActPool*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    const BnRows<T> rows(job.params.bn, units, unit);
    const A* const from = static_cast<const A*>(job.params.coefficients) + unit.first_channel;
    Coefficients coefficients;
    gather_slots<T>(from, units.channels, unit.columns, coefficients.a);
    gather_slots<T>(from + units.channels, units.channels, unit.columns, coefficients.b);
    gather_slots<T>(from + 2 * units.channels, units.channels, unit.columns, coefficients.c);
    ImageGradient gradient;
    job.template gather_gradient<kRelu>(unit, gradient);
    for (int64_t p = unit.begin; p < unit.end; p += units.step) {
      const int64_t count = unit.end - p < units.step ? unit.end - p : units.step;
      const int64_t offset = p * units.columns + unit.first_column;
      for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
        job.template apply_tile<kRelu>(offset + column, count, slot, rows, coefficients, gradient, block);
      });
    }
  }
};

// With the images as ranges of rows.
template <typename T> Split split_into_images(const BnActPoolParams& params) {
  Split s = split<T>(params.images * params.image_pixels, params.channels, 1);
  s.body.range_rows = params.image_pixels;
  s.body.ranges = params.images;
  return s;
}

template <typename T> void run(const BnActPoolParams& params, void (*task)(int64_t, void*)) {
  for_both<0>(split_into_images<T>(params), static_cast<Acc<T>*>(nullptr), [&](const Units& units, Acc<T>*) {
    BnActPool<T> job = {params, units, nullptr};
    params.parallel.run(units.count(), task, &job);
  });
}

template <typename T, bool kRelu> auto backward_task(const BnActPoolParams& params) {
  typedef BnActPool<T> Job;
  return params.out ? &Job::template backward<kRelu, true> : &Job::template backward<kRelu, false>;
}

}  // namespace

template <typename T> void bn_act_pool_forward(const BnActPoolParams& params) {
  typedef BnActPool<T> Job;
  run<T>(params, params.slope == 0 ? &Job::template forward<true> : &Job::template forward<false>);
}

template <typename T> void bn_act_pool_backward(const BnActPoolParams& params) {
  typedef Acc<T> A;
  const Split parts = split_into_images<T>(params);
  A* partial = partial_buffer<2, A>(parts);
  const auto task = params.slope == 0 ? backward_task<T, true>(params) : backward_task<T, false>(params);
  for_both<2>(parts, partial, [&](const Units& units, A* out) {
    BnActPool<T> job = {params, units, out};
    params.parallel.run(units.count(), task, &job);
  });
  const A* invstd = static_cast<const A*>(params.bn) + params.channels;
  SumReduction<A> reduction = {{partial, parts}, params.channels, invstd, static_cast<A*>(params.sums)};
  reduce(reduction, params.parallel);
}

template <typename T> void bn_act_pool_apply(const BnActPoolParams& params) {
  typedef BnActPool<T> Job;
  run<T>(params, params.slope == 0 ? &Job::template apply<true> : &Job::template apply<false>);
}

template void bn_act_pool_forward<float>(const BnActPoolParams&);
template void bn_act_pool_forward<double>(const BnActPoolParams&);
template void bn_act_pool_forward<bf16>(const BnActPoolParams&);
template void bn_act_pool_backward<float>(const BnActPoolParams&);
template void bn_act_pool_backward<double>(const BnActPoolParams&);
template void bn_act_pool_backward<bf16>(const BnActPoolParams&);
template void bn_act_pool_apply<float>(const BnActPoolParams&);
template void bn_act_pool_apply<double>(const BnActPoolParams&);
template void bn_act_pool_apply<bf16>(const BnActPoolParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
