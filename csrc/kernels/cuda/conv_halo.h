// The matrix product of a 3x3 convolution with stride 1, forward or input gradient, by halo tiles: a block of
// source channels comes to shared memory once, is normalised once and is read by all nine taps, while the
// weights of one step after another follow. See conv_product.h for the rest.
#pragma once

#include "conv_tile.h"
#include "halo.h"

namespace resnet_fused {
namespace cuda {

struct HaloProductParams {
  HaloPlan plan;
  const void* source;
  const void* weight;  // dense [k, 3, 3, c]
  int32_t depth, columns, column_tiles;
  int32_t depth_chunks;
  Divisor last_chunks;  // of the last block of channels
  const float* bn;      // of the source; null: taken as it is
  float slope;
  int32_t halos;           // one, or two in turn
  int32_t pipeline_bytes;  // of shared memory, before the tables
};

template <typename Tile> struct HaloTile {
  static constexpr int kHaloBytes = kMaxPositions * kRowBytes;
  static constexpr int kTableBytes = kTileRows * (8 + 4) + kMaxPositions * 8;
  static_assert(Tile::kRightBytes % 16 == 0 && Tile::kEpilogueBytes % 16 == 0 && kTableBytes % 16 == 0);

  static constexpr int pipeline_bytes(int halos) {
    const int copies = Tile::kStages * Tile::kRightBytes + halos * kHaloBytes + kChunkBytes;
    return copies > Tile::kEpilogueBytes ? copies : Tile::kEpilogueBytes;
  }
  // Plus scale and shift.
  static constexpr size_t shared_bytes(int pipeline_bytes, int64_t depth) {
    return static_cast<size_t>(pipeline_bytes + kTableBytes + 2 * 4 * round_up(depth, 4));
  }
  static constexpr size_t max_shared_bytes(int64_t depth) { return shared_bytes(pipeline_bytes(2), depth); }
};

#if defined(__CUDACC__) || defined(RF_EMULATE)

template <typename Tile, typename T> struct HaloProduct : TileOfBlock<Tile> {
  using Params = HaloProductParams;
  using Layout = HaloTile<Tile>;
  using Base = TileOfBlock<Tile>;
  using Base::column, Base::dest_row, Base::lane, Base::pipeline, Base::tid, Base::warp_column,
      Base::warp_row;
  using typename Base::Sums;

  const Params& p;
  const HaloTileOrigin origin;
  char* const halos;          // p.halos
  char* const zeros;          // one chunk
  int64_t* const source_row;  // of a position
  int32_t* const row_position;
  float* const scale;  // then shift

  // Fills the tables; the block is in step afterwards.
  __device__ HaloProduct(const Params& params, char* shared, int tile, int column_)
      : Base(shared, reinterpret_cast<int64_t*>(shared + params.pipeline_bytes), column_),
        p(params),
        origin(halo_tile(params.plan, tile)),
        halos(shared + Tile::kStages * Tile::kRightBytes),
        zeros(halos + params.halos * HaloTile<Tile>::kHaloBytes),
        source_row(dest_row + kTileRows),
        row_position(reinterpret_cast<int32_t*>(source_row + kMaxPositions)),
        scale(reinterpret_cast<float*>(row_position + kTileRows)) {
    for (int i = tid; i < p.plan.positions; i += Tile::kThreads)
      source_row[i] = halo_source(p.plan, origin, i);
    if (tid < kTileRows) {
      const HaloRow row = halo_row(p.plan, origin, tid);
      dest_row[tid] = row.dest;
      row_position[tid] = row.position;
    }
    if (tid < kChunkBytes / 4) reinterpret_cast<uint32_t*>(zeros)[tid] = 0;
    if (p.bn)
      for (int c = tid; c < p.depth; c += Tile::kThreads) {
        scale[c] = p.bn[2 * p.depth + c];
        scale[p.depth + c] = p.bn[3 * p.depth + c];
      }
    __syncthreads();
  }

  __device__ int rows() const { return halo_rows(p.plan, origin); }
  __device__ char* halo(int block) const { return halos + block % 2 * HaloTile<Tile>::kHaloBytes; }
  __device__ char* weights(int step) const { return pipeline + step % Tile::kStages * Tile::kRightBytes; }
  // The tap of the i-th (tap, chunk) of a block.
  __device__ int tap_of(int i, const HaloStep& at) const {
    return at.chunks == kChunksPerRow ? i / kChunksPerRow : static_cast<int>(divide(i, p.last_chunks));
  }

  __device__ void copy_halo(int block) const {
    const int chunk = tid % kChunksPerRow, c = block * Tile::kStep + chunk * kChunk<T>;
    if (c >= p.depth) return;
    const T* const source = static_cast<const T*>(p.source);
    for (int position = tid / kChunksPerRow; position < p.plan.positions; position += Tile::kCopyRows) {
      const int64_t pixel = source_row[position];
      copy_async(halo(block) + swizzled(position, chunk), pixel >= 0 ? source + pixel * p.depth + c : source,
                 pixel >= 0);
    }
  }

  // x -> act(x*scale + shift) of what this thread copied; its copies have arrived. Padding stays 0.
  __device__ void normalise(int block) const {
    const int chunk = tid % kChunksPerRow, c = block * Tile::kStep + chunk * kChunk<T>;
    if (c >= p.depth) return;
    float factor[kChunk<T>], summand[kChunk<T>];
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) factor[j] = scale[c + j], summand[j] = scale[p.depth + c + j];
    for (int position = tid / kChunksPerRow; position < p.plan.positions; position += Tile::kCopyRows) {
      if (source_row[position] < 0) continue;
      Chunk& at = *reinterpret_cast<Chunk*>(halo(block) + swizzled(position, chunk));
      float value[kChunk<T>];
      unpack<T>(at, value);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) value[j] = activate(fmaf(value[j], factor[j], summand[j]), p.slope);
      at = pack<T>(value);
    }
  }

  __device__ void copy_weights(int step) const {
    const HaloStep at = halo_step(step, p.depth_chunks);
    const T* const weight = static_cast<const T*>(p.weight);
    const int last = kHaloTaps * at.chunks;
    if constexpr (Tile::kTransposed) {
      constexpr int kWidth = Tile::kChunksOfColumns;
#pragma unroll
      for (int i = tid; i < Tile::kStep * kWidth; i += Tile::kThreads) {
        const int row = i / kWidth, column_chunk = i % kWidth;
        const int which = at.local * kChunksPerRow + row / kChunk<T>;
        const int tap = tap_of(which, at);
        const int k = at.block * Tile::kStep + (which - tap * at.chunks) * kChunk<T> + row % kChunk<T>;
        const int c = column + column_chunk * kChunk<T>;
        const bool wanted = which < last && c < p.columns;
        copy_async(weights(step) + swizzled_panel(row, column_chunk, Tile::kStep),
                   wanted ? weight + (int64_t{k} * kHaloTaps + tap) * p.columns + c : weight, wanted);
      }
    } else {
      const int column_chunk = tid % kChunksPerRow;
      const int which = at.local * kChunksPerRow + column_chunk;
      const int tap = tap_of(which, at);
      const int c = at.block * Tile::kStep + (which - tap * at.chunks) * kChunk<T>;
#pragma unroll
      for (int row = tid / kChunksPerRow; row < Tile::kColumns; row += Tile::kCopyRows) {
        const bool wanted = which < last && column + row < p.columns;
        copy_async(weights(step) + swizzled(row, column_chunk),
                   wanted ? weight + (int64_t{column + row} * kHaloTaps + tap) * p.depth + c : weight,
                   wanted);
      }
    }
  }

  __device__ void multiply(int step, const int (&position)[2], Sums& sum) const {
    const HaloStep at = halo_step(step, p.depth_chunks);
    const char* const activation = halo(at.block);
    const char* const right = weights(step);
    const int last = kHaloTaps * at.chunks;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int first = at.local * kChunksPerRow + 2 * k;
      if (first >= last) break;
      // This lane's rows of ldmatrix; past the last (tap, chunk), where the weights are 0, they are 0 too.
      const int which = first + ldmatrix_rows_first(lane).chunk;
      const int tap = tap_of(which, at), chunk = which - tap * at.chunks;
      const int moved = halo_tap(p.plan, tap, Tile::kTransposed);
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix(a[i], which < last ? activation + swizzled(position[i] + moved, chunk) : zeros);
        round_operands<T>(a[i], 4);
      }
#pragma unroll
      for (int j = 0; j < Base::kFragmentsN; j += 2) {
        uint32_t b[4];
        if constexpr (Tile::kTransposed)
          load_right_transposed<T>(b, right, Tile::kStep, warp_column + 8 * j, k, lane);
        else
          load_right<T>(b, right, warp_column + 8 * j, k, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma(sum[i][j], a[i], b, T{});
          mma(sum[i][j + 1], a[i], b + 2, T{});
        }
      }
    }
  }

  // As ConvProduct::run.
  __device__ float* run() {
    Sums sum;
    Base::clear(sum);
    const int place = ldmatrix_rows_first(lane).row;
    const int position[2] = {row_position[warp_row + place], row_position[warp_row + 16 + place]};
    const int steps = halo_steps(p.depth_chunks);
    static_assert(Tile::kStages == 3);
    copy_halo(0);
    copy_weights(0);
    copy_commit();
    if (steps > 1) copy_weights(1);
    copy_commit();
    for (int step = 0; step < steps; ++step) {
      const HaloStep at = halo_step(step, p.depth_chunks);
      copy_wait<1>();
      if (at.local == 0 && p.bn) normalise(at.block);
      // Everybody's copies are there, and everybody has done with what the next copies go to.
      __syncthreads();
      // The next halo is of a block that begins nine steps later.
      if (at.local == 0 && (at.block + 1) * kChunksPerRow < p.depth_chunks) copy_halo(at.block + 1);
      if (step + 2 < steps) copy_weights(step + 2);
      copy_commit();
      multiply(step, position, sum);
    }
    copy_wait<0>();
    __syncthreads();
    return this->store(sum);
  }
};

#endif

template <typename Tile>
HaloProductParams halo_params(const HaloPlan& plan, const void* source, const void* weight, int64_t depth,
                              int64_t columns, int chunk) {
  HaloProductParams p{};
  p.plan = plan;
  p.source = source;
  p.weight = weight;
  p.depth = static_cast<int32_t>(depth);
  p.columns = static_cast<int32_t>(columns);
  p.column_tiles = static_cast<int32_t>(divide_up(columns, Tile::kColumns));
  p.depth_chunks = static_cast<int32_t>(depth / chunk);
  p.last_chunks = make_divisor(static_cast<uint32_t>((p.depth_chunks - 1) % kChunksPerRow + 1));
  p.halos = p.depth_chunks > kChunksPerRow ? 2 : 1;
  p.pipeline_bytes = HaloTile<Tile>::pipeline_bytes(p.halos);
  return p;
}

}  // namespace cuda
}  // namespace resnet_fused
