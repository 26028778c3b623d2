// Both gradients of a 1x1 convolution (stride 1, no padding, at most 64 output channels) in one kernel, which
// reads dy and x once: dz = act'(z) * dy W + dz_in with BatchNorm's two sums, dweight = dy^T act(x*scale +
// shift).
//
// A block has 64 input channels and all output channels. It keeps their weights in shared memory and their
// part of dweight in registers, and goes over tiles of 64 pixels while the next tile is on its way.
#include "instructions.h"
#include "kernels/cuda_kernels.h"
#include "finalize.h"
#include "reduction.h"

namespace resnet_fused {
namespace cuda {
namespace {

constexpr int kRows = kBackward1x1Rows;
constexpr int kChannels = 64;  // of x in a block, and at most of dy
constexpr int kThreads = 128;
constexpr int kVectors = kChannels / 8;
constexpr int kLanes = kThreads / kVectors;
constexpr int kSumStride = kChannels + 8;

struct BackwardParams {
  const void* dy;
  const void* weight;  // dense [k, c]
  const void* x;
  const float* bn;
  float slope;
  const void* dz_in;
  void* dz;
  float* sums;     // [programs, 2, C]
  float* dweight;  // [programs, K, C]
  int64_t pixels, tiles;
  int32_t c, k;
  MergeTree tree;
  float* merged_sums;  // [2, C]
  FinalizeBackwardParams centre;
};

template <typename T> struct Layout {
  static constexpr int kWidth = kChannels / kChunk<T>;  // chunks of a row
  static constexpr int kTileBytes = kRows * kChannels * static_cast<int>(sizeof(T));
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kDepth = 32 / static_cast<int>(sizeof(T));  // of one mma
  static constexpr int kSteps = kChannels / kDepth;
  static constexpr int kStepsOfPanel = kRowBytes / 32;
  static constexpr int kCopyRows = kThreads / kWidth;
  static constexpr int kCopies = kRows / kCopyRows;
  // Two stages of dy and x, the activation, the weight, the product as floats, bn.
  static constexpr size_t kShared = size_t{6} * kTileBytes + 4 * (kRows * kSumStride + 4 * kChannels);
  static_assert(kRows == kChannels && kChannels == 64, "a weight's tile is of the same shape");
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) backward_1x1_kernel(const __grid_constant__ BackwardParams p) {
  using L = Layout<T>;
  RF_SHARED_MEMORY(shared);
  char* const activation = shared + 4 * L::kTileBytes;
  char* const weight_tile = shared + 5 * L::kTileBytes;
  float* const product = reinterpret_cast<float*>(shared + 6 * L::kTileBytes);
  float* const bn = product + kRows * kSumStride;  // [4, kChannels]
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int c0 = static_cast<int>(blockIdx.y) * kChannels;
  const int copy_row = tid / L::kWidth, copy_chunk = tid % L::kWidth, copy_channel = copy_chunk * kChunk<T>;
  const bool in_c = c0 + copy_channel < p.c, in_k = copy_channel < p.k;
  const T* const x = static_cast<const T*>(p.x);
  const T* const dy = static_cast<const T*>(p.dy);

  const auto copy = [&](int64_t tile, int stage) {
    char* const to = shared + stage * 2 * L::kTileBytes;
#pragma unroll
    for (int i = 0; i < L::kCopies; ++i) {
      const int row = copy_row + i * L::kCopyRows, at = swizzled_panel(row, copy_chunk, kRows);
      const int64_t pixel = tile * kRows + row;
      const bool inside = tile < p.tiles && pixel < p.pixels;
      copy_async(to + at, inside && in_k ? dy + pixel * p.k + copy_channel : dy, inside && in_k);
      copy_async(to + L::kTileBytes + at, inside && in_c ? x + pixel * p.c + c0 + copy_channel : x,
                 inside && in_c);
    }
    copy_commit();
  };

#pragma unroll
  for (int i = 0; i < L::kCopies; ++i) {
    const int k = copy_row + i * L::kCopyRows;
    const T* const weight = static_cast<const T*>(p.weight);
    const bool wanted = k < p.k && in_c;
    copy_async(weight_tile + swizzled_panel(k, copy_chunk, kRows),
               wanted ? weight + int64_t{k} * p.c + c0 + copy_channel : weight, wanted);
  }
  copy(blockIdx.x, 0);
  for (int i = tid; i < 4 * kChannels; i += kThreads)
    bn[i] = c0 + i % kChannels < p.c ? p.bn[int64_t{i / kChannels} * p.c + c0 + i % kChannels] : 0.0f;
  __syncthreads();
  float scale[kChunk<T>], shift[kChunk<T>];
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) {
    scale[j] = bn[2 * kChannels + copy_channel + j];
    shift[j] = bn[3 * kChannels + copy_channel + j];
  }

  float dweight[2][4][4], sum_dz[8], sum_dz_xhat[8];
#pragma unroll
  for (int i = 0; i < 32; ++i) dweight[i / 16][i / 4 % 4][i % 4] = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum_dz[j] = sum_dz_xhat[j] = 0.0f;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  const int vector = tid % kVectors * 8, c = c0 + vector;

  int stage = 0;
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, stage ^= 1) {
    const char* const dy_tile = shared + stage * 2 * L::kTileBytes;
    const char* const x_tile = dy_tile + L::kTileBytes;
    copy_wait<0>();
    // What this thread copied, activated; past the last pixel and channel 0, not act(shift).
#pragma unroll
    for (int i = 0; i < L::kCopies; ++i) {
      const int row = copy_row + i * L::kCopyRows, at = swizzled_panel(row, copy_chunk, kRows);
      float value[kChunk<T>];
      unpack<T>(*reinterpret_cast<const Chunk*>(x_tile + at), value);
      const bool inside = tile * kRows + row < p.pixels && in_c;
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j)
        value[j] = inside ? activate(fmaf(value[j], scale[j], shift[j]), p.slope) : 0.0f;
      *reinterpret_cast<Chunk*>(activation + at) = pack<T>(value);
    }
    // Everybody's copies and activations are there; everybody has done with the other stage and with
    // `product`.
    __syncthreads();
    copy(tile + gridDim.x, stage ^ 1);

    float sum[2][4][4];
#pragma unroll
    for (int i = 0; i < 32; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
#pragma unroll
    for (int q = 0; q < L::kSteps; ++q) {
      if (q * L::kDepth >= p.k) break;
      const char* const panel = dy_tile + q / L::kStepsOfPanel * L::kPanelBytes;
      uint32_t left[2][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_left<T>(left[i], panel, warp_row + 16 * i, q % L::kStepsOfPanel, lane);
        load_right_transposed<T>(right[i], weight_tile, kRows, warp_column + 16 * i, q, lane);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sum[i][j], left[i], right[j / 2] + j % 2 * 2, T{});
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const at = product + (warp_row + 16 * i + accumulator_row(lane, half)) * kSumStride +
                            warp_column + 8 * j + accumulator_column(lane);
          at[0] = sum[i][j][2 * half];
          at[1] = sum[i][j][2 * half + 1];
        }
    if (warp_row < p.k) {
#pragma unroll
      for (int q = 0; q < L::kSteps; ++q) {
        uint32_t left[2][4], right[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          load_left_transposed<T>(left[i], dy_tile, kRows, warp_row + 16 * i, q, lane);
          load_right_transposed<T>(right[i], activation, kRows, warp_column + 16 * i, q, lane);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) mma(dweight[i][j], left[i], right[j / 2] + j % 2 * 2, T{});
      }
    }
    // `product` is whole, and nobody needs the activation any more.
    __syncthreads();
    if (c < p.c) {
#pragma unroll
      for (int i = 0; i < kRows / kLanes; ++i) {
        const int row = tid / kVectors + i * kLanes;
        const int64_t pixel = tile * kRows + row;
        if (pixel >= p.pixels) continue;
        const int64_t at = pixel * p.c + c;
        float x_row[8], dz_in[8], value[8];
#pragma unroll
        for (int j = 0; j < 8; j += kChunk<T>)
          unpack<T>(
              *reinterpret_cast<const Chunk*>(x_tile + swizzled_panel(row, (vector + j) / kChunk<T>, kRows)),
              x_row + j);
        if (p.dz_in) load8(static_cast<const T*>(p.dz_in) + at, dz_in);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float* const channel = bn + vector + j;
          const float z = fmaf(x_row[j], channel[2 * kChannels], channel[3 * kChannels]);
          value[j] = activate_backward(product[row * kSumStride + vector + j], z, p.slope);
          if (p.dz_in) value[j] += dz_in[j];
          value[j] = rounded<T>(value[j]);
          sum_dz[j] += value[j];
          sum_dz_xhat[j] += value[j] * ((x_row[j] - channel[0]) * channel[kChannels]);
        }
        store8(static_cast<T*>(p.dz) + at, value);
      }
    }
  }
  copy_wait<0>();
  __syncthreads();

#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float* const at = product + (tid / kVectors) * kChannels + vector + j;
    at[0] = sum_dz[j];
    at[kLanes * kChannels] = sum_dz_xhat[j];
  }
  __syncthreads();
  static_assert(kThreads == 2 * kChannels && 2 * kLanes * kChannels <= kRows * kSumStride);
  const int which = tid / kChannels, column = tid % kChannels;
  if (c0 + column < p.c) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += product[(which * kLanes + i) * kChannels + column];
    p.sums[(int64_t{blockIdx.x} * 2 + which) * p.c + c0 + column] = total;
  }
  float* const out = p.dweight + int64_t{blockIdx.x} * p.k * p.c;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = warp_row + 16 * i + accumulator_row(lane, half);
        const int channel = c0 + warp_column + 8 * j + accumulator_column(lane);
        if (k < p.k && channel < p.c) {
          float* const at = out + int64_t{k} * p.c + channel;
          at[0] = dweight[i][j][2 * half];
          at[1] = dweight[i][j][2 * half + 1];
        }
      }

  MergeTwoSums<kThreads, kChannels> merge{p.sums, p.c, c0, product, 0.0f, 0.0f};
  static_assert(2 * kThreads <= kRows * kSumStride);
  if (!climb(p.tree, blockIdx.y, blockIdx.x, reinterpret_cast<int*>(bn), merge)) return;
  if (tid < kChannels && c0 + tid < p.c) {
    p.merged_sums[c0 + tid] = merge.a;
    p.merged_sums[p.c + c0 + tid] = merge.b;
    if (p.centre.coefficients) {
      finalize_backward_channel(p.centre, c0 + tid, 0, merge.a);
      finalize_backward_channel(p.centre, c0 + tid, 1, merge.b);
    }
  }
}

}  // namespace

template <typename T>
cudaError_t preact_conv_backward_1x1(const PreactConvDgradParams& d, const PreactConvWgradParams& w,
                                     WeightMerge* later, Stream stream) {
  const Backward1x1Split split = backward_1x1_split(d.g, stream.multiprocessors);
  const ConvGeometry& g = d.g;
  const BackwardParams params{d.dy,
                              d.weight,
                              d.x,
                              d.bn,
                              d.slope,
                              d.dz_in,
                              d.dz,
                              d.partial,
                              w.partial,
                              g.n * g.h * g.w,
                              split.tiles,
                              static_cast<int32_t>(g.c),
                              static_cast<int32_t>(g.k),
                              {merge_segments(split.programs), d.counters},
                              d.sums,
                              d.centre};
  const dim3 grid(static_cast<unsigned>(split.programs), static_cast<unsigned>(split.channel_blocks));
  constexpr size_t kShared = Layout<T>::kShared;
  cudaError_t error = launch<backward_1x1_kernel<T>, kShared>(grid, kThreads, kShared, stream, params);
  if (error != cudaSuccess) return error;
  const WeightOutput weight{
      w.dweight, w.type, w.stride_k, w.stride_c, w.stride_r, w.stride_s, static_cast<int32_t>(g.c), 1, 1};
  const WeightMerge merge{w.partial, split.programs, g.k * g.c, weight};
  if (later)
    *later = merge;
  else
    error = merge_weight(merge, stream);
  if (error != cudaSuccess || !w.dbias) return error;
  return bias_gradient<T>(d.dy, g.n * g.h * g.w, g.k, w.partial, w.dbias, stream);
}
template cudaError_t preact_conv_backward_1x1<RF_DTYPE>(const PreactConvDgradParams&,
                                                        const PreactConvWgradParams&, WeightMerge*,
                                                        Stream);

}  // namespace cuda
}  // namespace resnet_fused
