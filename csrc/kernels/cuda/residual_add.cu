// out = act(x + alpha * gate[n, c] * (affine[0, c]*y + affine[1, c])), with the statistics of out.
#include "rows.h"

namespace resnet_fused {
namespace cuda {
namespace {

template <typename T, bool kStats> struct Add {
  struct Params {
    const T* x;
    const T* y;
    const float* affine;
    const float* gate;
    int64_t channels, gate_channels;
    Divisor pixels_per_image;
    float alpha, slope;
    bool activate;
    T* out;
  };
  static constexpr Reduce kReduce = kStats ? Reduce::stats : Reduce::none;
  // Registers for four would be more than two blocks a multiprocessor have.
  static constexpr int kRows = kStats ? kRowsAtOnce / 2 : kRowsAtOnce;

  template <int V> struct Channels {
    float factor[V], summand[V];
    __device__ Channels(const Params& p, int64_t c) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        factor[j] = p.affine ? p.affine[c + j] : 1.0f;
        summand[j] = p.affine ? p.affine[p.channels + c + j] : 0.0f;
      }
    }
  };
  template <int V> struct Row {
    Packed<T, V> x, y;
    __device__ void load(const Params& p, int64_t at) {
      x.load(p.x + at);
      y.load(p.y + at);
    }
  };
  template <int V>
  __device__ static void apply(const Params& p, const Channels<V>& k, const Row<V>& row, int64_t index,
                               int64_t c, int64_t at, float* value, float*) {
    const float* gate = nullptr;
    if (p.gate) {
      const int64_t image = divide(static_cast<uint32_t>(index), p.pixels_per_image);
      gate = p.gate + image * p.gate_channels + (p.gate_channels == 1 ? 0 : c);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float branch = p.affine ? fmaf(row.y[j], k.factor[j], k.summand[j]) : row.y[j];
      if (gate) branch *= gate[p.gate_channels == 1 ? 0 : j];
      float sum = row.x[j] + (p.alpha == 1.0f ? branch : p.alpha * branch);
      if (p.activate) sum = cuda::activate(sum, p.slope);
      value[j] = rounded<T>(sum);
    }
    store<T, V>(p.out + at, value);
  }
};

template <typename T, bool kStats> cudaError_t add(const ResidualAddParams& p, Stream stream) {
  return launch_rows<T, Add<T, kStats>>(
      {static_cast<const T*>(p.x), static_cast<const T*>(p.y), p.affine, p.gate, p.channels, p.gate_channels,
       make_divisor(static_cast<uint32_t>(p.pixels_per_image)), p.alpha, p.slope, p.activate,
       static_cast<T*>(p.out)},
      aligned(p.x) && aligned(p.y) && aligned(p.out), p.pixels, p.channels, p.partial, p.stats, stream);
}

}  // namespace

template <typename T> cudaError_t residual_add(const ResidualAddParams& p, Stream stream) {
  return p.stats ? add<T, true>(p, stream) : add<T, false>(p, stream);
}
template cudaError_t residual_add<RF_DTYPE>(const ResidualAddParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
