// dx = dskip + A*dz + B*(x - mean) + C: BatchNorm's backward and the skip's addition in one pass.
#include "rows.h"

namespace resnet_fused {
namespace cuda {
namespace {

template <typename T> struct Apply {
  struct Params {
    const T* dz;
    const T* x;
    const T* dskip;
    const float* coefficients;
    int64_t channels;
    T* dx;
  };
  static constexpr Reduce kReduce = Reduce::none;
  static constexpr int kRows = kRowsAtOnce;

  template <int V> struct Channels {
    float a[V], b[V], c[V], mean[V];
    __device__ Channels(const Params& p, int64_t first) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        a[j] = p.coefficients[first + j];
        b[j] = p.coefficients[p.channels + first + j];
        c[j] = p.coefficients[2 * p.channels + first + j];
        mean[j] = p.coefficients[3 * p.channels + first + j];
      }
    }
  };
  template <int V> struct Row {
    Packed<T, V> dz, x, dskip;
    __device__ void load(const Params& p, int64_t at) {
      dz.load(p.dz + at);
      x.load(p.x + at);
      if (p.dskip) dskip.load(p.dskip + at);
    }
  };
  template <int V>
  __device__ static void apply(const Params& p, const Channels<V>& k, const Row<V>& row, int64_t, int64_t,
                               int64_t at, float* value, float*) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      value[j] = fmaf(k.b[j], row.x[j] - k.mean[j], fmaf(k.a[j], row.dz[j], k.c[j]));
      if (p.dskip) value[j] += row.dskip[j];
    }
    store<T, V>(p.dx + at, value);
  }
};

}  // namespace

template <typename T> cudaError_t preact_apply(const PreactApplyParams& p, Stream stream) {
  return launch_rows<T, Apply<T>>(
      {static_cast<const T*>(p.dz), static_cast<const T*>(p.x), static_cast<const T*>(p.dskip),
       p.coefficients, p.channels, static_cast<T*>(p.dx)},
      aligned(p.dz) && aligned(p.x) && aligned(p.dskip) && aligned(p.dx), p.pixels, p.channels, nullptr,
      nullptr, stream);
}
template cudaError_t preact_apply<RF_DTYPE>(const PreactApplyParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
