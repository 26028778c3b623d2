// What the C++ CPU backend offers: POD parameters and one table of entry points per SIMD level. Torch-free.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "conv_geometry.h"

namespace resnet_fused {

enum class DType : int32_t { float32 = 0, float64 = 1, bfloat16 = 2 };
constexpr int kDTypes = 3;

// Runs task(0..tasks-1, context) on the caller's thread pool; returns when all are done. Which thread runs which task is
// free, so a kernel never keeps a result per thread: that is what makes results independent of the number of threads.
struct Parallel {
  void (*run)(int64_t tasks, void (*task)(int64_t index, void* context), void* context);
};

// A buffer that belongs to the calling thread and is kept between calls (page faults on fresh temporaries cost more
// than the arithmetic of a normalisation). Contents are undefined. slot keeps buffers that live at once apart.
enum ScratchSlot {
  kScratchActivation,
  kScratchTile,
  kScratchPack,
  kScratchPartial,
  kScratchWinograd,
  kScratchFlags,
  kScratchSums,
  kScratchSlots
};
void* thread_scratch(ScratchSlot slot, size_t bytes);

// An output of at least so many bytes will have left the caches before it is read again: it is written past them, which spares
// reading its lines first. At first RESNET_FUSED_CPU_STREAM_MB, or a quarter of the last cache; negative: this again.
int64_t stream_bytes();
void set_stream_bytes(int64_t bytes);

// Activations are dense channels_last: [pixels, channels] with pixels = N*H*W. "acc" is float, or double for float64.
struct ChannelStatsParams {
  int64_t pixels, channels;
  const void* x;
  void* stats;  // acc [2, C]: mean, M2
  Parallel parallel;
};

struct BnActParams {
  int64_t pixels, channels;
  const void* x;
  const void* bn;     // acc [4, C]: mean, invstd, scale, shift
  double slope;
  const void* da;     // backward only
  const void* dz_in;  // backward only, may be null
  void* out;          // a or dz
  void* sums;         // backward only: acc [2, C]
  Parallel parallel;
};

// The mean over each image's pixels.
struct BnActPoolParams {
  int64_t images, image_pixels, channels;
  const void* x;
  const void* bn;  // acc [4, C]: mean, invstd, scale, shift
  double slope;
  const void* dmeans;        // backward and apply: [N, C]
  const void* coefficients;  // apply only: acc [4, C], as preact_apply has them
  void* out;                 // means [N, C]; backward: dz, may be null; apply: dx, may be x
  void* sums;                // backward only: acc [2, C]
  Parallel parallel;
};

struct PreactApplyParams {
  int64_t pixels, channels;
  const void* dz;
  const void* x;
  const void* coefficients;  // acc [4, C]: A, B, C, mean
  const void* dskip;         // may be null
  void* dx;
  Parallel parallel;
};

struct ResidualAddParams {
  int64_t images, pixels_per_image, channels;
  const void* x;
  const void* y;
  const void* affine;     // acc [2, C], may be null
  const void* gate;       // acc [N, gate_channels], may be null
  int64_t gate_channels;  // C or 1
  double alpha;
  bool activate;          // apply LeakyReLU(slope) to the sum
  double slope;
  void* out;
  void* stats;            // acc [2, C], may be null
  Parallel parallel;
};

struct MaxPoolParams {
  ConvGeometry g;        // of the windows: k == c, dilation 1, groups 1, r * s <= 256
  const void* x;         // forward only: [N, H, W, C]
  void* y;               // forward only: [N, P, Q, C]
  uint8_t* offsets;      // forward only: [N, P, Q, C], position r * g.s + s of the window's largest element
  const uint8_t* taken;  // backward only: the same, read
  const void* dy;        // backward only: [N, P, Q, C]
  void* dx;              // backward only: [N, H, W, C]
  Parallel parallel;
};

// Strides of a weight [k, c, r, s] in elements: weights come in any layout.
struct WeightLayout {
  int64_t stride_k, stride_c, stride_r, stride_s;
  bool is_acc;  // stored as acc (float32 masters with bfloat16 activations); otherwise in the activation dtype
};

struct PreactConvForwardParams {
  ConvGeometry g;  // groups == 1
  const void* x;
  const void* bn;  // acc [4, C]; null: plain convolution
  double slope;
  const void* weight;
  WeightLayout weight_layout;
  const void* bias;      // acc [K], may be null
  const void* residual;  // [N, P, Q, K], may be null
  void* y;
  void* stats;           // acc [2, K], may be null
  Parallel parallel;
};

struct PreactConvDgradParams {
  ConvGeometry g;
  const void* dy;
  const void* weight;
  WeightLayout weight_layout;
  const void* x;
  const void* bn;     // acc [4, C]
  double slope;
  const void* dz_in;  // may be null
  // acc [2, C], the sums of dz_in, which dz then holds; may be null. Strided 1x1 convolutions change the pixels that they read.
  const void* dz_in_sums;
  void* dz;
  void* sums;         // acc [2, C]
  Parallel parallel;
};

struct PreactConvWgradParams {
  ConvGeometry g;
  const void* dy;
  const void* x;
  const void* bn;  // acc [4, C]; null: plain convolution
  double slope;
  void* dweight;   // in weight_layout
  WeightLayout weight_layout;
  void* dbias;     // acc [K], may be null
  Parallel parallel;
  // Whose dx is dy, which it makes run by run before it is read: of preact_conv_backward_1x1 only; may be null.
  const PreactApplyParams* dy_from = nullptr;
};

// Indexed by DType.
struct CpuKernels {
  int level;
  const char* name;
  void (*channel_stats[kDTypes])(const ChannelStatsParams&);
  void (*bn_act_forward[kDTypes])(const BnActParams&);
  void (*bn_act_backward[kDTypes])(const BnActParams&);
  void (*bn_act_pool_forward[kDTypes])(const BnActPoolParams&);
  void (*bn_act_pool_backward[kDTypes])(const BnActPoolParams&);
  void (*bn_act_pool_apply[kDTypes])(const BnActPoolParams&);
  void (*preact_apply[kDTypes])(const PreactApplyParams&);
  void (*residual_add[kDTypes])(const ResidualAddParams&);
  void (*max_pool_forward[kDTypes])(const MaxPoolParams&);
  void (*max_pool_backward[kDTypes])(const MaxPoolParams&);
  void (*preact_conv_forward[kDTypes])(const PreactConvForwardParams&);
  void (*preact_conv_dgrad[kDTypes])(const PreactConvDgradParams&);
  void (*preact_conv_wgrad[kDTypes])(const PreactConvWgradParams&);
  // 1x1, stride 1, no padding; the parameters of the two must agree.
  void (*preact_conv_backward_1x1[kDTypes])(const PreactConvDgradParams&, const PreactConvWgradParams&);
};

constexpr int kLevels = 5;  // generic, avx2, avx512, avx512_bf16, avx512_amx

// The table in force (the best level that this CPU can run, unless a lower one was asked for).
const CpuKernels& cpu_kernels();
int simd_level();
int max_simd_level();            // of this CPU and this build
int set_simd_level(int level);   // -1 = automatic; returns the level now in force
const char* simd_level_name(int level);

}  // namespace resnet_fused
