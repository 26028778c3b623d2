// dz = act'(z) * conv_transpose(dy, weight) + dz_in, rounded once, with BatchNorm's two sums over dz.
#include "conv_halo.h"
#include "conv_product.h"
#include "finalize.h"
#include "reduction.h"

namespace resnet_fused {
namespace cuda {
namespace {

template <typename Product> struct DgradParams {
  Product product;
  const void* x;
  const float* bn;
  float slope;
  const void* dz_in;
  void* dz;
  float* partial;  // [tiles, 2, C]
  MergeTree tree;
  float* sums;
  FinalizeBackwardParams centre;
};

template <typename T, typename Tile, typename Product>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    dgrad_kernel(const __grid_constant__ DgradParams<typename Product::Params> p) {
  constexpr int kColumns = Tile::kColumns;
  RF_SHARED_MEMORY(shared);
  const int tile = static_cast<int>(blockIdx.x) / p.product.column_tiles;
  const int column = static_cast<int>(blockIdx.x) % p.product.column_tiles * kColumns;
  const int channels = p.product.columns;
  Product product(p.product, shared, tile, column);
  const float* const sum = product.run();

  const int in_tile = product.vector() * 8, c = column + in_tile;
  float sum_dz[8], sum_dz_xhat[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) sum_dz[j] = sum_dz_xhat[j] = 0.0f;
  if (c < channels) {
    float mean[8], invstd[8], scale[8], shift[8];
    load8(p.bn + c, mean);
    load8(p.bn + channels + c, invstd);
    load8(p.bn + 2 * channels + c, scale);
    load8(p.bn + 3 * channels + c, shift);
#pragma unroll
    for (int i = 0; i < Tile::kRowsPerThread; ++i) {
      const int row = product.tile_row(i);
      const int64_t pixel = product.dest_row[row];
      if (pixel < 0) continue;
      const int64_t at = pixel * channels + c;
      float x[8], dz_in[8], value[8];
      load8(static_cast<const T*>(p.x) + at, x);
      if (p.dz_in) load8(static_cast<const T*>(p.dz_in) + at, dz_in);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        value[j] = activate_backward(sum[row * Tile::kTileStride + in_tile + j],
                                     fmaf(x[j], scale[j], shift[j]), p.slope);
        if (p.dz_in) value[j] += dz_in[j];
        value[j] = rounded<T>(value[j]);
        sum_dz[j] += value[j];
        sum_dz_xhat[j] += value[j] * ((x[j] - mean[j]) * invstd[j]);
      }
      store8(static_cast<T*>(p.dz) + at, value);
    }
  }
  product.give(0, sum_dz);
  product.give(1, sum_dz_xhat);
  __syncthreads();
  const int tid = threadIdx.x;
  if (tid < kColumns && column + tid < channels) {
    float* const out = p.partial + int64_t{tile} * 2 * channels + column + tid;
    out[0] = product.take(0);
    out[channels] = product.take(1);
  }

  MergeTwoSums<Tile::kThreads, kColumns> merge{p.partial, channels, column, product.sums(0), 0.0f, 0.0f};
  static_assert(2 * Tile::kThreads <= 2 * Tile::kLanes * kColumns);
  if (!climb(p.tree, column / kColumns, tile, reinterpret_cast<int*>(product.sums(2)), merge)) return;
  if (tid < kColumns && column + tid < channels) {
    p.sums[column + tid] = merge.a;
    p.sums[channels + column + tid] = merge.b;
    if (p.centre.coefficients) {
      finalize_backward_channel(p.centre, column + tid, 0, merge.a);
      finalize_backward_channel(p.centre, column + tid, 1, merge.b);
    }
  }
}

template <typename T, typename Tile, typename Product>
cudaError_t launch_dgrad(const PreactConvDgradParams& p, const typename Product::Params& product,
                         int64_t tiles, Stream stream) {
  const DgradParams<typename Product::Params> params{
      product,
      p.x,
      p.bn,
      p.slope,
      p.dz_in,
      p.dz,
      p.partial,
      {merge_segments(tiles), tiles <= tree_groups ? p.counters : nullptr},
      p.sums,
      p.centre};
  using Layout = typename Product::Layout;
  return launch<dgrad_kernel<T, Tile, Product>, Layout::max_shared_bytes(0)>(
      dim3(static_cast<unsigned>(tiles * product.column_tiles)), Tile::kThreads,
      Layout::shared_bytes(product.pipeline_bytes, 0), stream, params);
}

template <typename T, int kColumns>
cudaError_t dgrad(const PreactConvDgradParams& p, bool halo, Stream stream) {
  using Tile = ConvTile<T, kColumns, true>;
  const ConvGeometry& g = p.g;
  if (halo) {
    const HaloPlan plan = halo_plan(g, false);
    return launch_dgrad<T, Tile, HaloProduct<Tile, T>>(
        p, halo_params<Tile>(plan, p.dy, p.weight, g.k, g.c, kChunk<T>), plan.tiles, stream);
  }
  const ConvPlan plan = plan_dgrad(g);
  return launch_dgrad<T, Tile, ConvProduct<Tile, T>>(
      p, product_params<Tile>(plan, p.dy, p.weight, g.k, g.c, kChunk<T>), plan.tiles, stream);
}

}  // namespace

template <typename T> cudaError_t preact_conv_dgrad(const PreactConvDgradParams& p, Stream stream) {
  const ConvGeometry& g = p.g;
  const bool halo = halo_fits(g, false);
  const cudaError_t error = g.c <= 32   ? dgrad<T, 32>(p, halo, stream)
                            : g.c <= 64 ? dgrad<T, 64>(p, halo, stream)
                                        : dgrad<T, 128>(p, halo, stream);
  const int64_t tiles = halo ? halo_plan(g, false).tiles : plan_dgrad(g).tiles;
  if (error != cudaSuccess || tiles <= tree_groups) return error;
  return merge_sums(p.partial, tiles, 2 * g.c, p.sums, p.centre, stream);
}
template cudaError_t preact_conv_dgrad<RF_DTYPE>(const PreactConvDgradParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
