// The matrix product that a convolution's forward and its input gradient share: rows are pixels to be made,
// columns their channels, the reduction runs over (tap, source channel) in chunks of 16 bytes without a gap
// between taps.
//
// A tile of 128 rows x kColumns per block. Raw source pixels and weights come by cp.async, three steps in
// flight. What a thread copied it also normalises, activates and rounds in place, once, before the others
// read it: the left operand in shared memory is then the activation, and a padded pixel stays the 0 that the
// copy left. Tensor cores by mma.sync.
#pragma once

#include "instructions.h"
#include "kernels/cuda_kernels.h"

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
};

// kTransposed: the weight's output channels are the reduction (input gradient).
template <typename T, int kColumnsOfTile, bool kTransposedWeight> struct ConvTile {
  static constexpr int kColumns = kColumnsOfTile;
  static constexpr bool kTransposed = kTransposedWeight;
  static constexpr int kWarpsN = kColumns > 64 ? kColumns / 64 : 1;
  static constexpr int kWarpColumns = kColumns / kWarpsN;
  static constexpr int kThreads = 4 * kWarpsN * 32;
  static constexpr int kStages = 3;
  static constexpr int kStep = kRowBytes / static_cast<int>(sizeof(T));  // elements of the reduction per step
  static constexpr int kCopyRows = kThreads / kChunksPerRow;             // rows that the block copies at once
  static constexpr int kLeftCopies = kTileRows / kCopyRows;

  static constexpr int kLeftBytes = kTileRows * kRowBytes;
  static constexpr int kChunksOfColumns = kColumns / kChunk<T>;
  static constexpr int kPanels = (kChunksOfColumns + kChunksPerRow - 1) / kChunksPerRow;
  static constexpr int kRightBytes = (kTransposed ? kPanels * kStep : kColumns) * kRowBytes;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;

  // The epilogue: the tile as floats, rows padded against bank conflicts, and two values per thread's column.
  static constexpr int kTileStride = kColumns + 8;
  static constexpr int kVectors = kColumns / 8;
  static constexpr int kLanes = kThreads / kVectors;
  static constexpr int kRowsPerThread = kTileRows / kLanes;
  static constexpr int kEpilogueBytes = (kTileRows * kTileStride + 2 * kLanes * kColumns + kColumns) * 4;

  static constexpr int kPipelineBytes =
      kStages * kStageBytes > kEpilogueBytes ? kStages * kStageBytes : kEpilogueBytes;
  static constexpr int kRowBytesOfTable = kTileRows * (8 + 8 + 4);
  static_assert(kPipelineBytes % 128 == 0 || kPipelineBytes % 16 == 0);

  // Plus scale and shift.
  static constexpr size_t shared_bytes(int64_t depth) {
    return static_cast<size_t>(kPipelineBytes + kRowBytesOfTable + 2 * 4 * round_up(depth, 4));
  }
};

#if defined(__CUDACC__) || defined(RF_EMULATE)

template <typename Tile, typename T> struct ConvProduct {
  const ConvProductParams& p;
  const Phase& phase;
  char* const pipeline;
  int64_t* const source_row;
  int64_t* const dest_row;
  uint32_t* const row_taps;
  float* const scale;  // then shift
  const int tid, lane, warp;
  const int column;     // first of the tile
  const int total;      // chunks of the reduction
  uint32_t copied = 0;  // of the left operand, a byte per stage and a bit per copied row
  static_assert(Tile::kLeftCopies <= 8 && Tile::kStages <= 4);

  static constexpr int kFragmentsN = Tile::kWarpColumns / 8;

  // Fills the tables; the block is in step afterwards.
  __device__ ConvProduct(const ConvProductParams& params, char* shared, int tile, int column_)
      : p(params),
        phase(params.plan.phase[phase_of_tile(params.plan, tile)]),
        pipeline(shared),
        source_row(reinterpret_cast<int64_t*>(shared + Tile::kPipelineBytes)),
        dest_row(source_row + kTileRows),
        row_taps(reinterpret_cast<uint32_t*>(dest_row + kTileRows)),
        scale(reinterpret_cast<float*>(row_taps + kTileRows)),
        tid(threadIdx.x),
        lane(tid % 32),
        warp(tid / 32),
        column(column_),
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

  __device__ void multiply(int step, float (&sum)[2][kFragmentsN][4]) const {
    const char* const a_tile = left(step);
    const char* const b_tile = a_tile + Tile::kLeftBytes;
    const int row = warp / Tile::kWarpsN * 32, n = warp % Tile::kWarpsN * Tile::kWarpColumns;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[2][4];
      load_left<T>(a[0], a_tile, row, k, lane);
      load_left<T>(a[1], a_tile, row + 16, k, lane);
#pragma unroll
      for (int j = 0; j < kFragmentsN; j += 2) {
        uint32_t b[4];
        if constexpr (Tile::kTransposed)
          load_right_transposed<T>(b, b_tile, Tile::kStep, n + 8 * j, k, lane);
        else
          load_right<T>(b, b_tile, n + 8 * j, k, lane);
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
    float sum[2][kFragmentsN][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[i][j][k] = 0.0f;

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

    float* const tile = reinterpret_cast<float*>(pipeline);
    const int row = warp / Tile::kWarpsN * 32, n = warp % Tile::kWarpsN * Tile::kWarpColumns;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const at = tile + (row + 16 * i + accumulator_row(lane, half)) * Tile::kTileStride + n +
                            8 * j + accumulator_column(lane);
          at[0] = sum[i][j][2 * half];
          at[1] = sum[i][j][2 * half + 1];
        }
    __syncthreads();
    return tile;
  }

  // ---- for the epilogue: thread (vector, its lane) has kRowsPerThread rows of 8 columns

  __device__ int vector() const { return tid % Tile::kVectors; }
  __device__ int tile_row(int i) const { return tid / Tile::kVectors + i * Tile::kLanes; }
  // Two floats per (lane of rows, column of the tile), then one per column.
  __device__ float* sums(int which) const {
    return reinterpret_cast<float*>(pipeline) + kTileRows * Tile::kTileStride +
           which * Tile::kLanes * Tile::kColumns;
  }
  __device__ void give(int which, const float* values) const {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      sums(which)[(tid / Tile::kVectors) * Tile::kColumns + vector() * 8 + j] = values[j];
  }
  // In order, for thread tid's column.
  __device__ float take(int which) const {
    float total_of_column = 0.0f;
    for (int i = 0; i < Tile::kLanes; ++i) total_of_column += sums(which)[i * Tile::kColumns + tid];
    return total_of_column;
  }
};

#endif

inline ConvProductParams product_params(const ConvPlan& plan, const void* source, const void* weight,
                                        int64_t depth, int64_t columns, int chunk, int tile_columns) {
  ConvProductParams p{};
  p.plan = plan;
  p.source = source;
  p.weight = weight;
  p.depth = static_cast<int32_t>(depth);
  p.columns = static_cast<int32_t>(columns);
  p.column_tiles = static_cast<int32_t>(divide_up(columns, tile_columns));
  p.depth_chunks = make_divisor(static_cast<uint32_t>(depth / chunk));
  return p;
}

}  // namespace cuda
}  // namespace resnet_fused
