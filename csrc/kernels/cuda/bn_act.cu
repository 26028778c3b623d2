// The elementwise part of the unfused path: a = act(x*scale + shift), and its backward with BatchNorm's two
// sums.
#include "rows.h"

namespace resnet_fused {
namespace cuda {
namespace {

template <int V> struct BnChannels {
  float mean[V], invstd[V], scale[V], shift[V];
  __device__ BnChannels(const float* bn, int64_t channels, int64_t c) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      mean[j] = bn[c + j];
      invstd[j] = bn[channels + c + j];
      scale[j] = bn[2 * channels + c + j];
      shift[j] = bn[3 * channels + c + j];
    }
  }
};

template <typename T> struct Forward {
  struct Params {
    const T* x;
    const float* bn;
    int64_t channels;
    float slope;
    T* out;
  };
  static constexpr Reduce kReduce = Reduce::none;
  static constexpr int kRows = kRowsAtOnce;

  template <int V> struct Channels : BnChannels<V> {
    __device__ Channels(const Params& p, int64_t c) : BnChannels<V>(p.bn, p.channels, c) {}
  };
  template <int V> struct Row {
    Packed<T, V> x;
    __device__ void load(const Params& p, int64_t at) { x.load(p.x + at); }
  };
  template <int V>
  __device__ static void apply(const Params& p, const Channels<V>& bn, const Row<V>& row, int64_t, int64_t,
                               int64_t at, float* value, float*) {
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = activate(fmaf(row.x[j], bn.scale[j], bn.shift[j]), p.slope);
    store<T, V>(p.out + at, value);
  }
};

template <typename T> struct Backward {
  struct Params {
    const T* da;
    const T* x;
    const T* dz_in;
    const float* bn;
    int64_t channels;
    float slope;
    T* dz;
  };
  static constexpr Reduce kReduce = Reduce::sums;
  static constexpr int kRows = kRowsAtOnce / 2;  // of three tensors: registers for four would spill

  template <int V> struct Channels : BnChannels<V> {
    __device__ Channels(const Params& p, int64_t c) : BnChannels<V>(p.bn, p.channels, c) {}
  };
  template <int V> struct Row {
    Packed<T, V> da, x, dz_in;
    __device__ void load(const Params& p, int64_t at) {
      da.load(p.da + at);
      x.load(p.x + at);
      if (p.dz_in) dz_in.load(p.dz_in + at);
    }
  };
  template <int V>
  __device__ static void apply(const Params& p, const Channels<V>& bn, const Row<V>& row, int64_t, int64_t,
                               int64_t at, float* value, float* second) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float d = activate_backward(row.da[j], fmaf(row.x[j], bn.scale[j], bn.shift[j]), p.slope);
      if (p.dz_in) d += row.dz_in[j];
      value[j] = rounded<T>(d);
      second[j] = value[j] * ((row.x[j] - bn.mean[j]) * bn.invstd[j]);
    }
    store<T, V>(p.dz + at, value);
  }
};

}  // namespace

template <typename T> cudaError_t bn_act_forward(const BnActParams& p, Stream stream) {
  return launch_rows<T, Forward<T>>(
      {static_cast<const T*>(p.x), p.bn, p.channels, p.slope, static_cast<T*>(p.out)},
      aligned(p.x) && aligned(p.out), p.pixels, p.channels, nullptr, nullptr, stream);
}

template <typename T> cudaError_t bn_act_backward(const BnActParams& p, Stream stream) {
  return launch_rows<T, Backward<T>>(
      {static_cast<const T*>(p.da), static_cast<const T*>(p.x), static_cast<const T*>(p.dz_in), p.bn,
       p.channels, p.slope, static_cast<T*>(p.out)},
      aligned(p.da) && aligned(p.x) && aligned(p.dz_in) && aligned(p.out), p.pixels, p.channels, p.partial,
      p.sums, stream);
}

template cudaError_t bn_act_forward<RF_DTYPE>(const BnActParams&, Stream);
template cudaError_t bn_act_backward<RF_DTYPE>(const BnActParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
