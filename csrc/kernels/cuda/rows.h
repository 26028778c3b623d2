// The shape that all elementwise and per-channel kernels share: rows (pixels) of channels, a block per group
// of rows and strip of channels, V channels per thread; per-channel sums or statistics of a group go to a
// partial result.
#pragma once

#include "index.h"
#include "reduction.h"
#include "types.h"

namespace resnet_fused {
namespace cuda {

constexpr int kRowsThreads = 256;
constexpr int kRowsBlocks = 2;  // on a multiprocessor at once
constexpr int kRowsAtOnce = 4;  // of one thread: independent loads in flight

enum class Reduce { none, sums, stats };

struct RowsShape {
  int64_t rows, rows_per_group, groups;
  int32_t channels, vectors, strip;  // strip: vectors side by side, a power of two
};

inline RowsShape rows_shape(int64_t rows, int64_t channels, int vector, int multiprocessors, bool reduces) {
  RowsShape shape{};
  shape.rows = rows;
  shape.channels = static_cast<int32_t>(channels);
  shape.vectors = static_cast<int32_t>(divide_up(channels, vector));
  shape.strip = 1;
  while (shape.strip < 32 && shape.strip < shape.vectors) shape.strip *= 2;
  const int64_t strips = divide_up(shape.vectors, shape.strip);
  const int64_t at_once = int64_t{kRowsThreads} / shape.strip * kRowsAtOnce;
  // Few partial results where there are any, so that merging them is one short step.
  const int64_t blocks = int64_t{multiprocessors} * (reduces ? kRowsBlocks : 16);
  int64_t groups = divide_up(blocks, strips);
  if (groups > divide_up(rows, at_once)) groups = divide_up(rows, at_once);
  shape.rows_per_group = round_up(divide_up(rows, groups), at_once);
  shape.groups = divide_up(rows, shape.rows_per_group);
  return shape;
}

#if defined(__CUDACC__) || defined(RF_EMULATE)

template <typename Params> struct RowsParams {
  RowsShape shape;
  float* partial;  // [groups, 2, channels]
  Params op;
};

// Folds n and two values for each of V columns over a block's lanes: lane i takes those of lane i + half by
// merge(n, a, b), with a[j * kRowsThreads] and b likewise; then half as many lanes remain. True in the first, which
// has the result.
template <int V, typename Merge>
__device__ __forceinline__ bool fold_lanes(const RowsShape& shape, const float& n, const float* a, const float* b,
                                           Merge&& merge) {
  RF_SHARED_MEMORY(shared);
  float* const cells = reinterpret_cast<float*>(shared);
  float* const counts = cells + 2 * kRowsThreads * V;
  const int tid = threadIdx.x, lane = tid / shape.strip;
  for (int half = kRowsThreads / shape.strip / 2; half > 0; half /= 2) {
    // Others may still read the level before: its cells are those of later lanes.
    if (lane >= half && lane < 2 * half) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        cells[j * kRowsThreads + tid] = a[j];
        cells[(V + j) * kRowsThreads + tid] = b[j];
      }
      counts[tid] = n;
    }
    __syncthreads();
    const int other = tid + half * shape.strip;
    if (lane < half) merge(counts[other], cells + other, cells + V * kRowsThreads + other);
  }
  return lane == 0;
}

// Op: Params; kReduce; kRows, rows that a thread reads at once, a divisor of kRowsAtOnce; Channels<V>{params,
// first channel}; Row<V>{params, element offset} loads; apply(params, channels, row, row index, first
// channel, offset, value, second) stores what there is to store and gives the value, as rounded, and for sums
// the second value.
template <typename Op, int V>
__device__ __forceinline__ void rows_block(const RowsParams<typename Op::Params>& p, int64_t block_x,
                                           int64_t block_y) {
  const RowsShape& shape = p.shape;
  const int tid = threadIdx.x, lane = tid / shape.strip, lanes = kRowsThreads / shape.strip;
  const int64_t vector = block_y * shape.strip + tid % shape.strip;
  const int64_t c = vector * V;
  const Piece group = piece_of(block_x, shape.rows_per_group, shape.rows);
  const bool active = vector < shape.vectors;
  float a[V], b[V];  // sums, or mean and M2
  float n = 0.0f;
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] = b[j] = 0.0f;
  if (active) {
    const typename Op::template Channels<V> channels(p.op, c);
    for (int64_t first = lane; first < group.count; first += lanes * Op::kRows) {
      typename Op::template Row<V> row[Op::kRows];
#pragma unroll
      for (int i = 0; i < Op::kRows; ++i)
        if (first + i * lanes < group.count)
          row[i].load(p.op, (group.first + first + i * lanes) * shape.channels + c);
      float value[Op::kRows][V], second[V];
      float count = 0.0f;
#pragma unroll
      for (int i = 0; i < Op::kRows; ++i) {
        const bool inside = first + i * lanes < group.count;
        if (inside) {
          const int64_t index = group.first + first + i * lanes;
          Op::template apply<V>(p.op, channels, row[i], index, c, index * shape.channels + c, value[i],
                                second);
          count += 1.0f;
          if constexpr (Op::kReduce == Reduce::sums) {
#pragma unroll
            for (int j = 0; j < V; ++j) a[j] += value[i][j], b[j] += second[j];
          }
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j) value[i][j] = 0.0f;
        }
      }
      if constexpr (Op::kReduce == Reduce::stats) {
        const float inverse = 1.0f / count, share = count / (n + count);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          float mean = 0.0f, squares = 0.0f, residue = 0.0f;
#pragma unroll
          for (int i = 0; i < Op::kRows; ++i) mean += value[i][j];
          mean *= inverse;
#pragma unroll
          for (int i = 0; i < Op::kRows; ++i) {
            const float d = first + i * lanes < group.count ? value[i][j] - mean : 0.0f;
            residue += d;
            squares += d * d;
          }
          const float shift = residue * inverse, m2 = corrected_m2(squares, residue, shift);
          if (n == 0.0f)
            a[j] = mean + shift, b[j] = m2;
          else
            merge_moments_by(n, share, a[j], b[j], mean + shift, m2);
        }
        n += count;
      }
    }
  }
  if constexpr (Op::kReduce != Reduce::none) {
    const bool first = fold_lanes<V>(shape, n, a, b, [&](float n_b, const float* a_b, const float* b_b) {
      if constexpr (Op::kReduce == Reduce::sums) {
#pragma unroll
        for (int j = 0; j < V; ++j) a[j] += a_b[j * kRowsThreads], b[j] += b_b[j * kRowsThreads];
      } else if (n_b != 0.0f) {
        const float share = n_b / (n + n_b);
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (n == 0.0f)
            a[j] = a_b[j * kRowsThreads], b[j] = b_b[j * kRowsThreads];
          else
            merge_moments_by(n, share, a[j], b[j], a_b[j * kRowsThreads], b_b[j * kRowsThreads]);
        n += n_b;
      }
    });
    if (!first || !active) return;
    float* const out = p.partial + block_x * 2 * shape.channels + c;
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = a[j], out[shape.channels + j] = b[j];
  }
}

template <typename Op, int V>
__global__ void __launch_bounds__(kRowsThreads, kRowsBlocks)
    rows_kernel(const __grid_constant__ RowsParams<typename Op::Params> p) {
  rows_block<Op, V>(p, blockIdx.x, blockIdx.y);
}

template <typename Op, int V>
cudaError_t launch_rows_of(const typename Op::Params& op, int64_t rows, int64_t channels, float* partial,
                           float* out, Stream stream) {
  constexpr bool reduces = Op::kReduce != Reduce::none;
  RowsParams<typename Op::Params> p{rows_shape(rows, channels, V, stream.multiprocessors, reduces), partial,
                                    op};
  const dim3 grid(static_cast<unsigned>(p.shape.groups),
                  static_cast<unsigned>(divide_up(p.shape.vectors, p.shape.strip)));
  const size_t shared = reduces ? (size_t{2} * V + 1) * kRowsThreads * sizeof(float) : 0;
  const cudaError_t error = launch<rows_kernel<Op, V>>(grid, kRowsThreads, shared, stream, p);
  if (error != cudaSuccess || !reduces) return error;
  return Op::kReduce == Reduce::stats ? merge_stats(partial, nullptr, p.shape.groups, channels,
                                                    p.shape.rows_per_group, rows, out, {}, stream)
                                      : merge_sums(partial, p.shape.groups, 2 * channels, out, {}, stream);
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// 16 bytes at a time where channels and every pointer allow it. out: [2, C] of the reduction.
template <typename T, typename Op>
cudaError_t launch_rows(const typename Op::Params& op, bool all_aligned, int64_t rows, int64_t channels,
                        float* partial, float* out, Stream stream) {
  if (all_aligned && channels % kChunk<T> == 0)
    return launch_rows_of<Op, kChunk<T>>(op, rows, channels, partial, out, stream);
  return launch_rows_of<Op, 1>(op, rows, channels, partial, out, stream);
}

#endif

}  // namespace cuda
}  // namespace resnet_fused
