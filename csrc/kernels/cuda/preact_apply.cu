// dx = dskip + A*dz + B*(x - mean) + C: BatchNorm's backward and the skip's addition in one pass.
#include "rows.h"
#include "weight_merge.h"

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

template <typename T> struct ApplyAndMergeParams {
  RowsParams<typename Apply<T>::Params> apply;
  int64_t apply_blocks;
  int32_t merges;
  WeightMerge merge[kApplyMerges];
  int64_t merge_blocks[kApplyMerges];
};

// Blocks of the one, then of the other.
template <typename T, int V>
__global__ void __launch_bounds__(kRowsThreads, kRowsBlocks)
    apply_and_merge_kernel(const __grid_constant__ ApplyAndMergeParams<T> p) {
  static_assert(kRowsThreads == kMergeThreads);
  RF_SHARED_MEMORY(shared);
  int64_t block = blockIdx.x;
  if (block < p.apply_blocks) {
    rows_block<Apply<T>, V>(p.apply, block % p.apply.shape.groups, block / p.apply.shape.groups);
    return;
  }
  block -= p.apply_blocks;
  if (block < p.merge_blocks[0])
    merge_weight_block(p.merge[0], block, shared);
  else
    merge_weight_block(p.merge[1], block - p.merge_blocks[0], shared);
}

template <typename T> typename Apply<T>::Params op_params(const PreactApplyParams& p) {
  return {static_cast<const T*>(p.dz), static_cast<const T*>(p.x), static_cast<const T*>(p.dskip),
          p.coefficients, p.channels, static_cast<T*>(p.dx)};
}

inline bool all_aligned(const PreactApplyParams& p) {
  return aligned(p.dz) && aligned(p.x) && aligned(p.dskip) && aligned(p.dx);
}

template <typename T, int V>
cudaError_t launch_apply_and_merge(const PreactApplyParams& p, const WeightMerge* merges, int count,
                                   Stream stream) {
  ApplyAndMergeParams<T> params{};
  params.apply = {rows_shape(p.pixels, p.channels, V, stream.multiprocessors, false), nullptr, op_params<T>(p)};
  const RowsShape& shape = params.apply.shape;
  params.apply_blocks = shape.groups * divide_up(shape.vectors, shape.strip);
  params.merges = count;
  int64_t blocks = params.apply_blocks;
  for (int i = 0; i < count; ++i) {
    params.merge[i] = merges[i];
    blocks += params.merge_blocks[i] = weight_merge_blocks(merges[i]);
  }
  return launch<apply_and_merge_kernel<T, V>>(dim3(static_cast<unsigned>(blocks)), kRowsThreads, kMergeShared,
                                              stream, params);
}

}  // namespace

template <typename T> cudaError_t preact_apply(const PreactApplyParams& p, Stream stream) {
  return launch_rows<T, Apply<T>>(op_params<T>(p), all_aligned(p), p.pixels, p.channels, nullptr, nullptr,
                                  stream);
}

template <typename T>
cudaError_t preact_apply_and_merge(const PreactApplyParams& p, const WeightMerge* merges, int count,
                                   Stream stream) {
  if (count == 0) return preact_apply<T>(p, stream);
  if (all_aligned(p) && p.channels % kChunk<T> == 0)
    return launch_apply_and_merge<T, kChunk<T>>(p, merges, count, stream);
  return launch_apply_and_merge<T, 1>(p, merges, count, stream);
}

template cudaError_t preact_apply<RF_DTYPE>(const PreactApplyParams&, Stream);
template cudaError_t preact_apply_and_merge<RF_DTYPE>(const PreactApplyParams&, const WeightMerge*, int, Stream);

}  // namespace cuda
}  // namespace resnet_fused
