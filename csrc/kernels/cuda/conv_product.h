// The matrix product that a convolution's forward and its input gradient share: rows are pixels to be made,
// columns their channels, the reduction runs over (tap, source channel) in chunks of 16 bytes without a gap
// between taps.
//
// Raw source pixels and weights come by cp.async, three steps in flight. What a thread copied it also
// normalises, activates and rounds in place, once, before the others read it: the left operand in shared
// memory is then the activation, and a padded pixel stays the 0 that the copy left. Tensor cores by mma.sync.
#pragma once

#include "conv_tile.h"

namespace resnet_fused {
namespace cuda {

struct ConvProductParams {
  ConvPlan plan;
  const void* source;
  const void* weight;  // dense [k, r, s, c]
  int32_t depth;       // channels of the source
  int32_t columns;     // channels of the destination
  int32_t column_tiles;
  Divisor depth_chunks;  // depth in chunks
  const float* bn;       // of the source; null: taken as it is
  float slope;
  int32_t pipeline_bytes;  // of shared memory, before the tables
};

// Shared memory: what would never be touched is not taken, for more blocks to a multiprocessor.
template <typename Tile> struct LineTile {
  static constexpr int kTableBytes = kTileRows * (8 + 8 + 4);
  static_assert(Tile::kStageBytes % 16 == 0 && Tile::kEpilogueBytes % 16 == 0 && kTableBytes % 16 == 0);

  // Of a reduction of so many steps.
  static constexpr int pipeline_bytes(int64_t steps) {
    const int stages = static_cast<int>(steps < Tile::kStages ? steps : Tile::kStages) * Tile::kStageBytes;
    return stages > Tile::kEpilogueBytes ? stages : Tile::kEpilogueBytes;
  }
  // Plus scale and shift.
  static constexpr size_t shared_bytes(int pipeline_bytes, int64_t depth) {
    return static_cast<size_t>(pipeline_bytes + kTableBytes + 2 * 4 * round_up(depth, 4));
  }
  static constexpr size_t max_shared_bytes(int64_t depth) {
    return shared_bytes(pipeline_bytes(Tile::kStages), depth);
  }
};

#if defined(__CUDACC__) || defined(RF_EMULATE)

template <typename Tile, typename T> struct ConvProduct : TileOfBlock<Tile> {
  using Params = ConvProductParams;
  using Layout = LineTile<Tile>;
  using Base = TileOfBlock<Tile>;
  using Base::column, Base::dest_row, Base::lane, Base::pipeline, Base::tid, Base::warp_column,
      Base::warp_row;
  using typename Base::Sums;

  const Params& p;
  const int tile;
  const Phase& phase;
  int64_t* const source_row;
  uint32_t* const row_taps;
  float* const scale;   // then shift
  const int total;      // chunks of the reduction
  uint32_t copied = 0;  // of the left operand, a byte per stage and a bit per copied row
  static_assert(Tile::kLeftCopies <= 8 && Tile::kStages <= 4);

  // Fills the tables; the block is in step afterwards.
  __device__ ConvProduct(const Params& params, char* shared, int tile_, int column_)
      : Base(shared, reinterpret_cast<int64_t*>(shared + params.pipeline_bytes), column_),
        p(params),
        tile(tile_),
        phase(params.plan.phase[phase_of_tile(params.plan, tile_)]),
        source_row(dest_row + kTileRows),
        row_taps(reinterpret_cast<uint32_t*>(source_row + kTileRows)),
        scale(reinterpret_cast<float*>(row_taps + kTileRows)),
        total(phase.taps * static_cast<int>(params.depth_chunks.divisor)) {
    if (tid < kTileRows) {
      const Row row = conv_row(p.plan, phase, int64_t{tile - phase.first_tile} * kTileRows + tid);
      source_row[tid] = row.source;
      dest_row[tid] = row.dest;
      row_taps[tid] = row.taps;
    }
    if (p.bn)
      for (int c = tid; c < p.depth; c += Tile::kThreads) {
        scale[c] = p.bn[2 * p.depth + c];
        scale[p.depth + c] = p.bn[3 * p.depth + c];
      }
    __syncthreads();
  }

  __device__ char* left(int step) const { return pipeline + step % Tile::kStages * Tile::kStageBytes; }

  // Starts the copies of a step.
  __device__ void copy(int step) {
    char* const to = left(step);
    {
      const int column_chunk = tid % kChunksPerRow, first = tid / kChunksPerRow;
      const int chunk = step * kChunksPerRow + column_chunk;
      const bool inside = chunk < total;
      const int tap = inside ? static_cast<int>(divide(chunk, p.depth_chunks)) : 0;
      const int c = (chunk - tap * static_cast<int>(p.depth_chunks.divisor)) * kChunk<T>;
      const Tap& at = p.plan.tap[phase.first_tap + tap];
      const T* const source = static_cast<const T*>(p.source);
      const int64_t moved = int64_t{at.dh} * p.plan.source_w + at.dw;
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < Tile::kLeftCopies; ++i) {
        const int row = first + i * Tile::kCopyRows;
        const bool wanted = inside && (row_taps[row] >> tap & 1);
        const T* const from = wanted ? source + (source_row[row] + moved) * p.depth + c : source;
        copy_async(to + swizzled(row, column_chunk), from, wanted);
        bits |= static_cast<uint32_t>(wanted) << i;
      }
      const int shift = step % Tile::kStages * 8;
      copied = (copied & ~(0xffu << shift)) | bits << shift;
      if constexpr (!Tile::kTransposed)
        copy_weight(to + Tile::kLeftBytes, column_chunk, first, inside, at.weight, c);
    }
    if constexpr (Tile::kTransposed) copy_weight_transposed(to + Tile::kLeftBytes, step);
    copy_commit();
  }

  // [columns][step]: the chunk of the reduction is the same as on the left.
  __device__ void copy_weight(char* to, int column_chunk, int first, bool inside, int tap, int c) const {
    const T* const weight = static_cast<const T*>(p.weight);
#pragma unroll
    for (int row = first; row < Tile::kColumns; row += Tile::kCopyRows) {
      const bool wanted = inside && column + row < p.columns;
      const T* const from =
          wanted ? weight + (int64_t{column + row} * p.plan.taps_total + tap) * p.depth + c : weight;
      copy_async(to + swizzled(row, column_chunk), from, wanted);
    }
  }

  // [step][columns].
  __device__ void copy_weight_transposed(char* to, int step) const {
    const T* const weight = static_cast<const T*>(p.weight);
    constexpr int kWidth = Tile::kChunksOfColumns;
#pragma unroll
    for (int i = tid; i < Tile::kStep * kWidth; i += Tile::kThreads) {
      const int row = i / kWidth, column_chunk = i % kWidth;
      const int chunk = step * kChunksPerRow + row / kChunk<T>;
      const int tap = chunk < total ? static_cast<int>(divide(chunk, p.depth_chunks)) : 0;
      const int k = (chunk - tap * static_cast<int>(p.depth_chunks.divisor)) * kChunk<T> + row % kChunk<T>;
      const int c = column + column_chunk * kChunk<T>;
      const bool wanted = chunk < total && c < p.columns;
      const int at = p.plan.tap[phase.first_tap + tap].weight;
      const T* const from = wanted ? weight + (int64_t{k} * p.plan.taps_total + at) * p.columns + c : weight;
      copy_async(to + swizzled_panel(row, column_chunk, Tile::kStep), from, wanted);
    }
  }

  // x -> act(x*scale + shift) of what this thread copied; its copies have arrived.
  __device__ void normalise(int step) {
    const int column_chunk = tid % kChunksPerRow, first = tid / kChunksPerRow;
    const uint32_t bits = copied >> (step % Tile::kStages * 8) & 0xffu;
    if (bits == 0) return;  // a chunk past the last among them
    const int chunk = step * kChunksPerRow + column_chunk;
    const int tap = static_cast<int>(divide(chunk, p.depth_chunks));
    const int c = (chunk - tap * static_cast<int>(p.depth_chunks.divisor)) * kChunk<T>;
    float factor[kChunk<T>], summand[kChunk<T>];
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) factor[j] = scale[c + j], summand[j] = scale[p.depth + c + j];
#pragma unroll
    for (int i = 0; i < Tile::kLeftCopies; ++i) {
      if (!(bits >> i & 1)) continue;
      Chunk& at = *reinterpret_cast<Chunk*>(left(step) + swizzled(first + i * Tile::kCopyRows, column_chunk));
      float value[kChunk<T>];
      unpack<T>(at, value);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) value[j] = activate(fmaf(value[j], factor[j], summand[j]), p.slope);
      at = pack<T>(value);
    }
  }

  __device__ void multiply(int step, Sums& sum) const {
    const char* const a_tile = left(step);
    const char* const b_tile = a_tile + Tile::kLeftBytes;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (step * kChunksPerRow + 2 * k >= total) break;
      uint32_t a[2][4];
      load_left<T>(a[0], a_tile, warp_row, k, lane);
      load_left<T>(a[1], a_tile, warp_row + 16, k, lane);
#pragma unroll
      for (int j = 0; j < Base::kFragmentsN; j += 2) {
        uint32_t b[4];
        if constexpr (Tile::kTransposed)
          load_right_transposed<T>(b, b_tile, Tile::kStep, warp_column + 8 * j, k, lane);
        else
          load_right<T>(b, b_tile, warp_column + 8 * j, k, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma(sum[i][j], a[i], b, T{});
          mma(sum[i][j + 1], a[i], b + 2, T{});
        }
      }
    }
  }

  // The tile as floats in shared memory, [128][kTileStride]; the block is in step afterwards.
  __device__ float* run() {
    Sums sum;
    Base::clear(sum);
    const int steps = (total + kChunksPerRow - 1) / kChunksPerRow;
#pragma unroll
    for (int step = 0; step < Tile::kStages - 1; ++step) {
      if (step < steps)
        copy(step);
      else
        copy_commit();
    }
    for (int step = 0; step < steps; ++step) {
      copy_wait<Tile::kStages - 2>();
      if (p.bn) normalise(step);
      // Everybody's copies are there, and everybody has done with the stage that the next copies go to.
      __syncthreads();
      if (step + Tile::kStages - 1 < steps)
        copy(step + Tile::kStages - 1);
      else
        copy_commit();
      multiply(step, sum);
    }
    copy_wait<0>();
    __syncthreads();
    return this->store(sum);
  }

  // Rows of the tile that are pixels.
  __device__ int rows() const {
    return static_cast<int>(piece_of(tile - phase.first_tile, kTileRows, phase.rows).count);
  }
};

#endif

template <typename Tile>
ConvProductParams product_params(const ConvPlan& plan, const void* source, const void* weight, int64_t depth,
                                 int64_t columns, int chunk) {
  ConvProductParams p{};
  p.plan = plan;
  p.source = source;
  p.weight = weight;
  p.depth = static_cast<int32_t>(depth);
  p.columns = static_cast<int32_t>(columns);
  p.column_tiles = static_cast<int32_t>(divide_up(columns, Tile::kColumns));
  p.depth_chunks = make_divisor(static_cast<uint32_t>(depth / chunk));
  int taps = 0;
  for (int i = 0; i < plan.phases; ++i) taps = plan.phase[i].taps > taps ? plan.phase[i].taps : taps;
  p.pipeline_bytes = LineTile<Tile>::pipeline_bytes(divide_up(taps * (depth / chunk), kChunksPerRow));
  return p;
}

}  // namespace cuda
}  // namespace resnet_fused
