// What the convolutions' products by rows in a line (conv_product.h) and by halo tiles (conv_halo.h) have in
// common: a tile of 128 rows x kColumns per block of four or eight warps, and the epilogue's access to it.
#pragma once

#include "instructions.h"
#include "kernels/cuda_kernels.h"

namespace resnet_fused {
namespace cuda {

// kTransposed: the weight's output channels are the reduction (input gradient).
template <typename T, int kColumnsOfTile, bool kTransposedWeight> struct ConvTile {
  static constexpr int kColumns = kColumnsOfTile;
  static constexpr bool kTransposed = kTransposedWeight;
  static constexpr int kWarpsN = kColumns > 64 ? kColumns / 64 : 1;
  static constexpr int kWarpColumns = kColumns / kWarpsN;
  static constexpr int kThreads = 4 * kWarpsN * 32;
  // To a multiprocessor: as many as registers are enough for without spilling (float's transposed operands take
  // more), and shared memory on the larger chips.
  static constexpr bool kManyRegisters = kTransposed && sizeof(T) == 4;
  static constexpr int kMinBlocks = kColumns > 64 ? (kManyRegisters ? 1 : 2)
                                    : kColumns > 32 ? (kManyRegisters ? 3 : 4)
                                                    : 5;
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
};

#if defined(__CUDACC__) || defined(RF_EMULATE)

template <typename Tile> struct TileOfBlock {
  static constexpr int kFragmentsN = Tile::kWarpColumns / 8;
  using Sums = float[2][kFragmentsN][4];

  char* const pipeline;     // first the copies, then the tile
  int64_t* const dest_row;  // [128], pixel of the destination, -1: none
  const int tid, lane, warp;
  const int warp_row, warp_column;  // of the warp's part
  const int column;                 // first of the tile

  __device__ TileOfBlock(char* shared, int64_t* dest, int column_)
      : pipeline(shared),
        dest_row(dest),
        tid(threadIdx.x),
        lane(tid % 32),
        warp(tid / 32),
        warp_row(warp / Tile::kWarpsN * 32),
        warp_column(warp % Tile::kWarpsN * Tile::kWarpColumns),
        column(column_) {}

  __device__ static void clear(Sums& sum) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[i][j][k] = 0.0f;
  }

  // The sums as [128][kTileStride] in shared memory that nobody uses any more; the block is in step
  // afterwards.
  __device__ float* store(const Sums& sum) const {
    float* const tile = reinterpret_cast<float*>(pipeline);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const at = tile + (warp_row + 16 * i + accumulator_row(lane, half)) * Tile::kTileStride +
                            warp_column + 8 * j + accumulator_column(lane);
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

}  // namespace cuda
}  // namespace resnet_fused
