// What the CUDA kernels offer: POD parameters and one function per primitive that launches it on a stream of
// the current device. Torch-free. Nothing here allocates or synchronises; every function returns the first
// error of its launches.
//
// Activations are dense channels_last of type T (float, bfloat16, float16). Statistics, sums, coefficients
// and bias are float. Pointers to activations and weights of convolutions are multiples of 16 bytes;
// elementwise primitives take any alignment and number of channels, and are faster with a multiple of 16
// bytes.
#pragma once

#include "conv_geometry.h"
#include "cuda/launch.h"
#include "cuda/types.h"

namespace resnet_fused {
namespace cuda {

enum class ParameterType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// ---- elementwise and statistics. partial: room for rows_partial_floats(...) floats where there is a
// reduction.

int64_t rows_partial_floats(int64_t pixels, int64_t channels, int element_bytes, int multiprocessors);

struct ChannelStatsParams {
  int64_t pixels, channels;
  const void* x;
  float* stats;  // [2, C]: mean, M2
  float* partial;
};
template <typename T> cudaError_t channel_stats(const ChannelStatsParams&, Stream);

struct BnActParams {
  int64_t pixels, channels;
  const void* x;
  const float* bn;  // [4, C]: mean, invstd, scale, shift
  float slope;
  const void* da;     // backward only
  const void* dz_in;  // backward only, may be null
  void* out;          // a, or dz
  float* sums;        // backward only: [2, C]
  float* partial;     // backward only
};
template <typename T> cudaError_t bn_act_forward(const BnActParams&, Stream);
template <typename T> cudaError_t bn_act_backward(const BnActParams&, Stream);

struct PreactApplyParams {
  int64_t pixels, channels;
  const void* dz;
  const void* x;
  const float* coefficients;  // [4, C]: A, B, C, mean
  const void* dskip;          // may be null
  void* dx;
};
template <typename T> cudaError_t preact_apply(const PreactApplyParams&, Stream);

struct ResidualAddParams {
  int64_t pixels, pixels_per_image, channels;
  const void* x;
  const void* y;
  const float* affine;    // [2, C], may be null
  const float* gate;      // [N, gate_channels], may be null
  int64_t gate_channels;  // C or 1
  float alpha;
  bool activate;  // apply LeakyReLU(slope) to the sum
  float slope;
  void* out;
  float* stats;  // [2, C], may be null
  float* partial;
};
template <typename T> cudaError_t residual_add(const ResidualAddParams&, Stream);

// ---- finalize: [C] each, one launch

// A vector of parameters of any of the three types, any stride; null data: absent.
struct ParameterVector {
  void* data;
  int64_t stride;
  ParameterType type;
};

struct FinalizeForwardParams {
  int64_t channels, count;
  const float* stats;  // null: running statistics
  ParameterVector running_mean, running_var, weight, bias;
  double eps;
  float* bn;
};
cudaError_t finalize_forward(const FinalizeForwardParams&, Stream);

struct UpdateRunningStatsParams {
  int64_t channels, count;
  const float* stats;
  ParameterVector running_mean, running_var;
  double momentum;
};
cudaError_t update_running_stats(const UpdateRunningStatsParams&, Stream);

struct FinalizeBackwardParams {
  int64_t channels, count;
  const float* sums;
  const float* bn;
  bool training;
  float* coefficients;
};
cudaError_t finalize_backward(const FinalizeBackwardParams&, Stream);

// What a unit does once and not for each BatchNorm, in one launch.
constexpr int kUnitNorms = 8;

// UpdateRunningStatsParams of several, and one more for each counter.
struct UpdateUnitParams {
  int32_t norms, counters;
  UpdateRunningStatsParams norm[kUnitNorms];
  int64_t* counter[kUnitNorms];
};
cudaError_t update_running_stats_of_unit(const UpdateUnitParams&, Stream);

// ---- convolutions (index.h, conv_supported)

// A weight [k, c, r, s] of any strides and of type T or float, as a dense [k, r, s, c] of T.
struct PackWeightParams {
  int64_t k, c, r, s;
  int64_t stride_k, stride_c, stride_r, stride_s;
  const void* weight;
  ParameterType type;
  void* packed;
};
template <typename T> cudaError_t pack_weight(const PackWeightParams&, Stream);

// Before the first convolution of a unit, in one launch: weights packed, BatchNorms finalized, counters zeroed.
constexpr int kUnitWeights = 4;
struct BeginUnitParams {
  int32_t weights, norms;
  PackWeightParams weight[kUnitWeights];
  FinalizeForwardParams norm[kUnitNorms];
  uint32_t* counters;
  int64_t counters_count;
};
template <typename T> cudaError_t begin_unit(const BeginUnitParams&, Stream);

// Partial results of convolutions are merged, and finalized, by the blocks that come last: `counters` are as many
// zeros as the function beside each primitive says, and can be null where it says 0 (more launches merge then).

struct PreactConvForwardParams {
  ConvGeometry g;
  const void* x;
  const float* bn;  // [4, C]; null: plain convolution
  float slope;
  const void* weight;    // dense [k, r, s, c]
  const float* bias;     // [K], may be null
  const void* residual;  // [N, P, Q, K], may be null
  void* y;
  float* stats;    // [2, K], may be null
  float* partial;  // conv_forward_partial_floats
  uint32_t* counters;
  FinalizeForwardParams next;  // of the BatchNorm that reads y, from `stats`; bn null: none
};
int64_t conv_forward_partial_floats(const ConvGeometry&);
int64_t conv_forward_counters(const ConvGeometry&);
template <typename T> cudaError_t preact_conv_forward(const PreactConvForwardParams&, Stream);

struct PreactConvDgradParams {
  ConvGeometry g;
  const void* dy;
  const void* weight;  // dense [k, r, s, c]
  const void* x;
  const float* bn;
  float slope;
  const void* dz_in;  // may be null
  void* dz;
  float* sums;     // [2, C]
  float* partial;  // conv_dgrad_partial_floats
  uint32_t* counters;
  FinalizeBackwardParams centre;  // from `sums`; coefficients null: none
};
int64_t conv_dgrad_partial_floats(const ConvGeometry&);
int64_t conv_dgrad_counters(const ConvGeometry&);
template <typename T> cudaError_t preact_conv_dgrad(const PreactConvDgradParams&, Stream);

// Partial results [groups, k, r, s, c] of a weight gradient, to be added to a weight of any strides and type.
struct WeightOutput {
  void* data;
  ParameterType type;
  int64_t stride_k, stride_c, stride_r, stride_s;
  int32_t c, s, taps;
};
struct WeightMerge {
  const float* partial;
  int64_t groups, columns;
  WeightOutput weight;
};
cudaError_t merge_weight(const WeightMerge&, Stream);

struct PreactConvWgradParams {
  ConvGeometry g;
  const void* dy;
  const void* x;
  const float* bn;  // null: plain convolution
  float slope;
  void* dweight;
  ParameterType type;
  int64_t stride_k, stride_c, stride_r, stride_s;
  float* dbias;    // [2, K], the first row is the gradient; may be null
  float* partial;  // conv_wgrad_partial_floats
};
int64_t conv_wgrad_partial_floats(const ConvGeometry&, int element_bytes, bool want_bias,
                                  int multiprocessors);
// later: where to leave the merge of dweight for the caller to launch, or null: it is launched.
template <typename T> cudaError_t preact_conv_wgrad(const PreactConvWgradParams&, WeightMerge* later, Stream);

// The sum of dy [rows, k] per channel, in the first row of out [2, k].
template <typename T>
cudaError_t bias_gradient(const void* dy, int64_t rows, int64_t k, float* partial, float* out, Stream);

// Both gradients of a convolution that backward_1x1_supported (index.h) takes, in one kernel. The geometries
// and dy, x, bn and slope of the two are the same.
struct Backward1x1Partial {
  int64_t sums, dweight;  // floats
};
Backward1x1Partial backward_1x1_partial_floats(const ConvGeometry&, int element_bytes, bool want_bias,
                                               int multiprocessors);
int64_t backward_1x1_counters(const ConvGeometry&, int multiprocessors);
template <typename T>
cudaError_t preact_conv_backward_1x1(const PreactConvDgradParams&, const PreactConvWgradParams&,
                                     WeightMerge* later, Stream);

// preact_apply, and in the same launch the merges of weight gradients, which nothing waits for.
constexpr int kApplyMerges = 2;
template <typename T>
cudaError_t preact_apply_and_merge(const PreactApplyParams&, const WeightMerge* merges, int count, Stream);

}  // namespace cuda
}  // namespace resnet_fused
