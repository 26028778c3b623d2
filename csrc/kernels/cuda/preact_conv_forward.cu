// y = conv(act(x*scale + shift)) + bias + residual, rounded once, with the statistics of y.
#include "conv_halo.h"
#include "conv_product.h"
#include "finalize.h"
#include "reduction.h"

namespace resnet_fused {
namespace cuda {
namespace {

template <typename Product> struct ForwardParams {
  Product product;
  const float* bias;
  const void* residual;
  void* y;
  float* partial;  // [tiles, 2, K], null: no statistics
  float* counts;   // [column tiles, tiles], rows of each; null: all are full but the last
  int64_t rows;
  MergeTree tree;
  float* stats;
  FinalizeForwardParams next;
};

template <typename T, typename Tile, typename Product>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    forward_kernel(const __grid_constant__ ForwardParams<typename Product::Params> p) {
  constexpr int kColumns = Tile::kColumns;
  RF_SHARED_MEMORY(shared);
  // Neighbouring blocks share their pixels.
  const int tile = static_cast<int>(blockIdx.x) / p.product.column_tiles;
  const int column = static_cast<int>(blockIdx.x) % p.product.column_tiles * kColumns;
  Product product(p.product, shared, tile, column);
  const float* const sum = product.run();

  const int in_tile = product.vector() * 8, k = column + in_tile;
  const bool active = k < p.product.columns;
  float bias[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) bias[j] = p.bias && active ? p.bias[k + j] : 0.0f;
  float value[Tile::kRowsPerThread][8];
  uint32_t present = 0;
#pragma unroll
  for (int i = 0; i < Tile::kRowsPerThread; ++i) {
    const int row = product.tile_row(i);
    const int64_t pixel = product.dest_row[row];
    if (active && pixel >= 0) {
      present |= 1u << i;
      const int64_t at = pixel * p.product.columns + k;
      float residual[8];
      if (p.residual) load8(static_cast<const T*>(p.residual) + at, residual);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        value[i][j] = sum[row * Tile::kTileStride + in_tile + j] + bias[j];
        if (p.residual) value[i][j] += residual[j];
        value[i][j] = rounded<T>(value[i][j]);
      }
      store8(static_cast<T*>(p.y) + at, value[i]);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) value[i][j] = 0.0f;
    }
  }
  if (!p.partial) return;

  // The mean, then the deviations from it (Chan, Golub and LeVeque 1983, eq. 1.7).
  float a[8], b[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    a[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kRowsPerThread; ++i) a[j] += value[i][j];
  }
  product.give(0, a);
  __syncthreads();
  float* const means = product.sums(2);
  const float n = static_cast<float>(product.rows());
  float* const counts = p.counts ? p.counts + int64_t{column / kColumns} * p.tree.segments.groups : nullptr;
  if (counts && threadIdx.x == 0) counts[tile] = n;
  const int tid = threadIdx.x;
  if (tid < kColumns) means[tid] = product.take(0) / n;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float mean = means[in_tile + j];
    a[j] = b[j] = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kRowsPerThread; ++i) {
      const float d = present >> i & 1 ? value[i][j] - mean : 0.0f;
      a[j] += d;
      b[j] += d * d;
    }
  }
  product.give(0, a);
  product.give(1, b);
  __syncthreads();
  if (tid < kColumns && column + tid < p.product.columns) {
    const float residue = product.take(0), squares = product.take(1);
    float* const out = p.partial + int64_t{tile} * 2 * p.product.columns + column + tid;
    const float shift = residue / n;
    out[0] = means[tid] + shift;
    out[p.product.columns] = corrected_m2(squares, residue, shift);
  }

  MergeStats<Tile::kThreads, kColumns> merge{
      p.partial, counts, p.product.columns, kTileRows, p.rows, column, product.sums(0), 0.0f, 0.0f, 0.0f};
  static_assert(3 * Tile::kThreads <= 2 * Tile::kLanes * kColumns);
  if (!climb(p.tree, column / kColumns, tile, reinterpret_cast<int*>(means), merge)) return;
  if (tid < kColumns && column + tid < p.product.columns) {
    p.stats[column + tid] = merge.mean;
    p.stats[p.product.columns + column + tid] = merge.m2;
    if (p.next.bn) finalize_forward_channel(p.next, column + tid, true, merge.mean, merge.m2);
  }
}

template <typename T, typename Tile, typename Product>
cudaError_t launch_forward(const PreactConvForwardParams& p, typename Product::Params product, int64_t tiles,
                           float* counts, Stream stream) {
  product.bn = p.bn;
  product.slope = p.slope;
  const ForwardParams<typename Product::Params> params{
      product,
      p.bias,
      p.residual,
      p.y,
      p.stats ? p.partial : nullptr,
      counts,
      p.g.n * p.g.p * p.g.q,
      {merge_segments(tiles), tiles <= tree_groups ? p.counters : nullptr},
      p.stats,
      p.next};
  using Layout = typename Product::Layout;
  return launch<forward_kernel<T, Tile, Product>, Layout::max_shared_bytes(kMaxChannels)>(
      dim3(static_cast<unsigned>(tiles * product.column_tiles)), Tile::kThreads,
      Layout::shared_bytes(product.pipeline_bytes, product.depth), stream, params);
}

template <typename T, int kColumns>
cudaError_t forward(const PreactConvForwardParams& p, bool halo, float* counts, Stream stream) {
  using Tile = ConvTile<T, kColumns, false>;
  const ConvGeometry& g = p.g;
  if (halo) {
    const HaloPlan plan = halo_plan(g, true);
    return launch_forward<T, Tile, HaloProduct<Tile, T>>(
        p, halo_params<Tile>(plan, p.x, p.weight, g.c, g.k, kChunk<T>), plan.tiles, counts, stream);
  }
  const ConvPlan plan = plan_forward(g);
  return launch_forward<T, Tile, ConvProduct<Tile, T>>(
      p, product_params<Tile>(plan, p.x, p.weight, g.c, g.k, kChunk<T>), plan.tiles, nullptr, stream);
}

}  // namespace

template <typename T> cudaError_t preact_conv_forward(const PreactConvForwardParams& p, Stream stream) {
  const ConvGeometry& g = p.g;
  const bool halo = halo_fits(g, true);
  const int64_t tiles = halo ? halo_plan(g, true).tiles : plan_forward(g).tiles;
  float* const counts = halo && p.stats ? p.partial + partial_floats(tiles, 2 * g.k) : nullptr;
  const cudaError_t error = g.k <= 32   ? forward<T, 32>(p, halo, counts, stream)
                            : g.k <= 64 ? forward<T, 64>(p, halo, counts, stream)
                                        : forward<T, 128>(p, halo, counts, stream);
  if (error != cudaSuccess || !p.stats || tiles <= tree_groups) return error;
  return merge_stats(p.partial, counts, tiles, g.k, kTileRows, g.n * g.p * g.q, p.stats, p.next, stream);
}
template cudaError_t preact_conv_forward<RF_DTYPE>(const PreactConvForwardParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
