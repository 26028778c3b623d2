// y = conv(act(x*scale + shift)) + bias + residual, rounded once, with the statistics of y.
#include "conv_product.h"
#include "reduction.h"

namespace resnet_fused {
namespace cuda {
namespace {

struct ForwardParams {
  ConvProductParams product;
  const float* bias;
  const void* residual;
  void* y;
  float* partial;  // [tiles, 2, K], null: no statistics
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(ConvTile<T, kColumns, false>::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p) {
  using Tile = ConvTile<T, kColumns, false>;
  RF_SHARED_MEMORY(shared);
  // Neighbouring blocks share their pixels.
  const int tile = static_cast<int>(blockIdx.x) / p.product.column_tiles;
  const int column = static_cast<int>(blockIdx.x) % p.product.column_tiles * kColumns;
  ConvProduct<Tile, T> product(p.product, shared, tile, column);
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
  const Piece rows = piece_of(tile, kTileRows, product.phase.rows);
  const float n = static_cast<float>(rows.count);
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
    out[0] = means[tid] + residue / n;
    out[p.product.columns] = corrected_m2(squares, residue, n);
  }
}

template <typename T, int kColumns>
cudaError_t forward(const PreactConvForwardParams& p, const ConvPlan& plan, Stream stream) {
  ForwardParams params{product_params(plan, p.x, p.weight, p.g.c, p.g.k, kChunk<T>, kColumns), p.bias,
                       p.residual, p.y, p.stats ? p.partial : nullptr};
  params.product.bn = p.bn;
  params.product.slope = p.slope;
  using Tile = ConvTile<T, kColumns, false>;
  const int64_t blocks = int64_t{plan.tiles} * params.product.column_tiles;
  return launch<forward_kernel<T, kColumns>>(dim3(static_cast<unsigned>(blocks)), Tile::kThreads,
                                             Tile::shared_bytes(p.g.c), stream, params);
}

}  // namespace

template <typename T> cudaError_t preact_conv_forward(const PreactConvForwardParams& p, Stream stream) {
  const ConvPlan plan = plan_forward(p.g);
  const cudaError_t error = p.g.k <= 32   ? forward<T, 32>(p, plan, stream)
                            : p.g.k <= 64 ? forward<T, 64>(p, plan, stream)
                                          : forward<T, 128>(p, plan, stream);
  if (error != cudaSuccess || !p.stats) return error;
  return merge_stats(p.partial, plan.tiles, p.g.k, kTileRows, plan.phase[0].rows, p.stats, stream);
}
template cudaError_t preact_conv_forward<RF_DTYPE>(const PreactConvForwardParams&, Stream);

}  // namespace cuda
}  // namespace resnet_fused
