// a = act(x*scale + shift), and dz = da*act'(z) + dz_in with the sums of dz and dz*xhat; or with the mean of a over an
// image's pixels, which is then all that is stored of a, and whose gradient is spread over them.
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
  A* partial;  // [ranges, 2, columns]: sums of dz and of dz*(x - mean)

  const A* bn(int row) const { return static_cast<const A*>(params.bn) + row * units.channels; }

  // BN's rows of a unit, by slot.
  struct Rows {
    A mean[kGroupSlots], scale[kGroupSlots], shift[kGroupSlots];
  };
  void gather(const Unit& unit, Rows& rows) const {
    gather_slots<T>(bn(0) + unit.first_channel, units.channels, unit.columns, rows.mean);
    gather_slots<T>(bn(2) + unit.first_channel, units.channels, unit.columns, rows.scale);
    gather_slots<T>(bn(3) + unit.first_channel, units.channels, unit.columns, rows.shift);
  }

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
    Rows rows;
    job.gather(unit, rows);
    for (int64_t p = unit.begin; p < unit.end; p += units.step) {
      const int64_t count = unit.end - p < units.step ? unit.end - p : units.step;
      const int64_t offset = units.first + p * units.columns + unit.first_column;
      for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
        job.template forward_tile<kRelu>(offset + column, count, rows.scale + slot, rows.shift + slot, block);
      });
    }
  }

  template <int U, int N, typename B> static void add_to_slots(A* slots, V (&sum)[U][N], B block) {
    V total[N];
    block.load_slots(slots, total);
    for (int v = 0; v < N; ++v) {
      for (int u = 1; u < U; ++u) sum[0][v] += sum[u][v];
      total[v] += sum[0][v];
    }
    block.store_slots(slots, total);
  }

  // Adds the tile's sums to slots of sum and dot.
  template <bool kRelu, bool kDzIn, typename B>
  void backward_tile(int64_t offset, int64_t rows, int64_t slot, const Rows& bn_rows, A* sum_slots,
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
    Rows rows;
    job.gather(unit, rows);
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
  template <typename F, typename G> void for_image_tiles(const Unit& unit, const F& tile, const G& close) const {
    for (int64_t begin = unit.begin; begin < unit.end; begin += kTileRows) {
      const int64_t end = unit.end - begin < kTileRows ? unit.end : begin + kTileRows;
      for (int64_t p = begin; p < end; p += units.step)
        tile(p * units.columns + unit.first_column, end - p < units.step ? end - p : units.step);
      close();
    }
  }

  // Adds the tile's activations to slots.
  template <bool kRelu, typename B>
  void pool_tile(int64_t offset, int64_t rows, int64_t slot, const Rows& bn_rows, A* sum_slots, B block) const {
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
  template <bool kRelu> static void pool(int64_t index, void* context) {
    const BnAct& job = *static_cast<const BnAct*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    Rows rows;
    job.gather(unit, rows);
    ImageSums sums(slot_count<T>(unit.columns));
    job.for_image_tiles(
        unit,
        [&](int64_t offset, int64_t count) {
          for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
            job.template pool_tile<kRelu>(offset + column, count, slot, rows, sums.tile, block);
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
    const T* const da = static_cast<const T*>(params.da) + unit.range * units.columns + unit.first_column;
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

  // Adds the tile's active pixels to slots of count, and dz*(x - mean) to slots of dot.
  template <bool kRelu, typename B>
  void pool_backward_tile(int64_t offset, int64_t rows, int64_t slot, const Rows& bn_rows,
                          const ImageGradient& gradient, A* count_slots, A* dot_slots, B block) const {
    constexpr int N = B::kCount;
    constexpr int U = kUnroll<N>;
    const int64_t stride = units.columns;
    const T* x = static_cast<const T*>(params.x) + offset;
    T* out = static_cast<T*>(params.out) + offset;
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
          // As activate_grad has it.
          const auto is_inactive = preact(value[v], scale[v], shift[v]) <= zero;
          dz[v] = select<V>(is_inactive, kRelu ? zero : inactive[v], active[v]);
          number[u][v] += select<V>(is_inactive, zero, one);
          dot[u][v] += dz[v] * (value[v] - mean[v]);
        }
        block.store(out + i, dz);
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

  template <bool kRelu> static void pool_backward(int64_t index, void* context) {
    const BnAct& job = *static_cast<const BnAct*>(context);
    const Units& units = job.units;
    const Unit unit(units, index);
    Rows rows;
    job.gather(unit, rows);
    ImageGradient gradient;
    job.template gather_gradient<kRelu>(unit, gradient);
    ImageSums counts(slot_count<T>(unit.columns)), dots(counts.slots);
    job.for_image_tiles(
        unit,
        [&](int64_t offset, int64_t count) {
          for_each_block<T>(unit.columns, [&](auto block, int64_t column, int64_t slot) {
            job.template pool_backward_tile<kRelu>(offset + column, count, slot, rows, gradient, counts.tile, dots.tile,
                                                   block);
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
};

// As split(), or with the images as ranges where a mean is taken over each.
template <typename T> Split split_for(const BnActParams& params) {
  if (params.pool_pixels == 0) return split<T>(params.pixels, params.channels, pixels_per_row<T>(params.channels));
  Split s = split<T>(params.pixels, params.channels, 1);
  s.body.range_rows = params.pool_pixels;
  s.body.ranges = s.body.rows / s.body.range_rows;
  return s;
}

}  // namespace

template <typename T> void bn_act_forward(const BnActParams& params) {
  typedef BnAct<T> Job;
  const bool relu = params.slope == 0;
  const auto task = params.pool_pixels != 0 ? relu ? &Job::template pool<true> : &Job::template pool<false>
                    : relu                  ? &Job::template forward<true>
                                            : &Job::template forward<false>;
  for_both<0>(split_for<T>(params), static_cast<Acc<T>*>(nullptr), [&](const Units& units, Acc<T>*) {
    Job job = {params, units, nullptr};
    params.parallel.run(units.count(), task, &job);
  });
}

template <typename T, bool kRelu> static auto backward_task(const BnActParams& params) {
  typedef BnAct<T> Job;
  return params.pool_pixels != 0   ? &Job::template pool_backward<kRelu>
         : params.dz_in != nullptr ? &Job::template backward<kRelu, true>
                                   : &Job::template backward<kRelu, false>;
}

template <typename T> void bn_act_backward(const BnActParams& params) {
  typedef Acc<T> A;
  const Split parts = split_for<T>(params);
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
