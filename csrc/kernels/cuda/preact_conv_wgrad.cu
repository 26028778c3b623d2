// dweight of a pre-activation convolution, with the activation recomputed from x, and dbias.
//
// A matrix product with a small result and a long reduction: rows are output channels, columns (tap, input
// channel), the reduction runs over output pixels and is split over blocks. Both operands lie in shared
// memory as pixels are in memory, [pixel][channel], and are transposed on the way to the tensor cores. Splits
// are added in order.
#include "instructions.h"
#include "rows.h"

namespace resnet_fused {
namespace cuda {
namespace {

constexpr int kTile = 64;  // output channels, and (tap, input channel) columns
constexpr int kThreads = 128;
constexpr int kStages = 3;

struct WgradParams {
  ConvPlan plan;  // of the forward convolution
  const void* dy;
  const void* x;
  const float* bn;
  float slope;
  float* partial;  // [splits, K, taps * C]
  int64_t steps, steps_per_split;
  int32_t c, k, column_tiles;
  Divisor c_chunks;
};

template <typename T> struct WgradTile {
  static constexpr int kStep = kRowBytes / static_cast<int>(sizeof(T));  // pixels
  static constexpr int kWidth = kTile / kChunk<T>;                       // chunks of a row
  static constexpr int kOperandBytes = kStep * kTile * static_cast<int>(sizeof(T));
  static constexpr int kCopyRows = kThreads / kWidth;
  static constexpr int kCopies = kStep / kCopyRows;
  static constexpr size_t kShared = size_t{2} * kStages * kOperandBytes;
  static_assert(kCopies <= 8 && kStages <= 4);
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kWgradBlocks) wgrad_kernel(const __grid_constant__ WgradParams p) {
  using Tile = WgradTile<T>;
  RF_SHARED_MEMORY(shared);
  const Phase& phase = p.plan.phase[0];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int k0 = static_cast<int>(blockIdx.x) / p.column_tiles * kTile;
  const int column0 = static_cast<int>(blockIdx.x) % p.column_tiles * kTile;
  const int columns = p.plan.taps_total * p.c;
  const int copy_row = tid / Tile::kWidth, copy_chunk = tid % Tile::kWidth;

  // This thread's chunk of dy and of x stays the same: its channels, its tap, its scale and shift.
  const int k = k0 + copy_chunk * kChunk<T>;
  const bool in_k = k < p.k;
  const bool in_column = column0 + copy_chunk * kChunk<T> < columns;
  const int chunk = in_column ? column0 / kChunk<T> + copy_chunk : 0;
  const int tap = static_cast<int>(divide(chunk, p.c_chunks));
  const int c = (chunk - tap * static_cast<int>(p.c_chunks.divisor)) * kChunk<T>;
  const Tap& at_tap = p.plan.tap[tap];
  float scale[kChunk<T>], shift[kChunk<T>];
  if (p.bn) {
    load<float, 4>(p.bn + 2 * p.c + c, scale);
    load<float, 4>(p.bn + 3 * p.c + c, shift);
    if constexpr (kChunk<T> == 8) {
      load<float, 4>(p.bn + 2 * p.c + c + 4, scale + 4);
      load<float, 4>(p.bn + 3 * p.c + c + 4, shift + 4);
    }
  }

  const Piece steps = piece_of(blockIdx.y, p.steps_per_split, p.steps);
  uint32_t copied = 0;  // of x, a byte per stage and a bit per row
  const auto operands = [&](int64_t step) { return shared + step % kStages * (2 * Tile::kOperandBytes); };

  const auto copy = [&](int64_t step) {
    char* const to = operands(step);
    const T* const dy = static_cast<const T*>(p.dy);
    const T* const x = static_cast<const T*>(p.x);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i) {
      const int row = copy_row + i * Tile::kCopyRows;
      const int64_t pixel = (steps.first + step) * Tile::kStep + row;
      const bool inside = pixel < phase.rows;
      const int at = swizzled_panel(row, copy_chunk, Tile::kStep);
      copy_async(to + at, inside && in_k ? dy + pixel * p.k + k : dy, inside && in_k);
      const Source source = conv_source(p.plan, phase, inside ? pixel : 0, at_tap);
      const bool wanted = inside && in_column && source.inside;
      copy_async(to + Tile::kOperandBytes + at, wanted ? x + source.pixel * p.c + c : x, wanted);
      bits |= static_cast<uint32_t>(wanted) << i;
    }
    const int place = static_cast<int>(step % kStages) * 8;
    copied = (copied & ~(0xffu << place)) | bits << place;
    copy_commit();
  };

  const auto normalise = [&](int64_t step) {
    const uint32_t bits = copied >> (static_cast<int>(step % kStages) * 8) & 0xffu;
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i) {
      if (!(bits >> i & 1)) continue;
      Chunk& at =
          *reinterpret_cast<Chunk*>(operands(step) + Tile::kOperandBytes +
                                    swizzled_panel(copy_row + i * Tile::kCopyRows, copy_chunk, Tile::kStep));
      float value[kChunk<T>];
      unpack<T>(at, value);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) value[j] = activate(fmaf(value[j], scale[j], shift[j]), p.slope);
      at = pack<T>(value);
    }
  };

  float sum[2][4][4];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q) sum[i][j][q] = 0.0f;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  const bool multiplies = k0 + warp_row < p.k && column0 + warp_column < columns;

#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps.count)
      copy(step);
    else
      copy_commit();
  }
  for (int64_t step = 0; step < steps.count; ++step) {
    copy_wait<kStages - 2>();
    if (p.bn) normalise(step);
    // Everybody's copies are there, and everybody has done with the stage that the next copies go to.
    __syncthreads();
    if (step + kStages - 1 < steps.count)
      copy(step + kStages - 1);
    else
      copy_commit();
    const char* const dy = operands(step);
    const char* const a = dy + Tile::kOperandBytes;
    if (!multiplies) continue;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint32_t left[2][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_left_transposed<T>(left[i], dy, Tile::kStep, warp_row + 16 * i, q, lane);
        load_right_transposed<T>(right[i], a, Tile::kStep, warp_column + 16 * i, q, lane);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sum[i][j], left[i], right[j / 2] + j % 2 * 2, T{});
    }
  }

  float* const out = p.partial + int64_t{blockIdx.y} * p.k * columns;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = k0 + warp_row + 16 * i + accumulator_row(lane, half);
        const int column = column0 + warp_column + 8 * j + accumulator_column(lane);
        if (row < p.k && column < columns) {
          float* const at = out + int64_t{row} * columns + column;
          at[0] = sum[i][j][2 * half];
          at[1] = sum[i][j][2 * half + 1];
        }
      }
}

// Sum of dy per channel; the second sum is not used.
template <typename T> struct BiasGradient {
  struct Params {
    const T* dy;
  };
  static constexpr Reduce kReduce = Reduce::sums;
  static constexpr int kRows = kRowsAtOnce;

  template <int V> struct Channels {
    __device__ Channels(const Params&, int64_t) {}
  };
  template <int V> struct Row {
    Packed<T, V> dy;
    __device__ void load(const Params& p, int64_t at) { dy.load(p.dy + at); }
  };
  template <int V>
  __device__ static void apply(const Params&, const Channels<V>&, const Row<V>& row, int64_t, int64_t,
                               int64_t, float* value, float* second) {
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = row.dy[j], second[j] = 0.0f;
  }
};

}  // namespace

template <typename T>
cudaError_t preact_conv_wgrad(const PreactConvWgradParams& p, WeightMerge* later, Stream stream) {
  const WgradSplit split = wgrad_split(p.g, static_cast<int>(sizeof(T)), stream.multiprocessors);
  WgradParams params{};
  params.plan = plan_forward(p.g);
  params.dy = p.dy, params.x = p.x, params.bn = p.bn, params.slope = p.slope, params.partial = p.partial;
  params.steps = divide_up(params.plan.phase[0].rows, WgradTile<T>::kStep);
  params.steps_per_split = split.steps;
  params.c = static_cast<int32_t>(p.g.c), params.k = static_cast<int32_t>(p.g.k);
  params.column_tiles = static_cast<int32_t>(divide_up(split.columns, kTile));
  params.c_chunks = make_divisor(static_cast<uint32_t>(p.g.c / kChunk<T>));
  const dim3 grid(static_cast<unsigned>(split.tiles), static_cast<unsigned>(split.splits));
  constexpr size_t kShared = WgradTile<T>::kShared;
  cudaError_t error = launch<wgrad_kernel<T>, kShared>(grid, kThreads, kShared, stream, params);
  if (error != cudaSuccess) return error;
  const WeightOutput weight{p.dweight,
                            p.type,
                            p.stride_k,
                            p.stride_c,
                            p.stride_r,
                            p.stride_s,
                            params.c,
                            static_cast<int32_t>(p.g.s),
                            params.plan.taps_total};
  const WeightMerge merge{p.partial, split.splits, p.g.k * split.columns, weight};
  if (later)
    *later = merge;
  else
    error = merge_weight(merge, stream);
  if (error != cudaSuccess || !p.dbias) return error;
  return bias_gradient<T>(p.dy, params.plan.phase[0].rows, p.g.k, p.partial, p.dbias, stream);
}

template <typename T>
cudaError_t bias_gradient(const void* dy, int64_t rows, int64_t k, float* partial, float* out,
                          Stream stream) {
  return launch_rows<T, BiasGradient<T>>({static_cast<const T*>(dy)}, aligned(dy), rows, k, partial, out,
                                         stream);
}

template cudaError_t bias_gradient<RF_DTYPE>(const void*, int64_t, int64_t, float*, float*, Stream);
template cudaError_t preact_conv_wgrad<RF_DTYPE>(const PreactConvWgradParams&, WeightMerge*, Stream);

}  // namespace cuda
}  // namespace resnet_fused
