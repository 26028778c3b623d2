// The primitives as functions, for their own operators and for that of a whole unit, which prepares for all of its
// convolutions in one launch and takes the finalize steps along.
#pragma once

#include "../apply_into.h"
#include "tensor.h"

namespace resnet_fused {
namespace cuda {

// What is there already, and what is to be done besides. Nothing of it: a primitive alone.
struct Prepared {
  std::optional<Tensor> weight;     // packed
  uint32_t* counters = nullptr;     // zeros, as many as the kernel needs
  FinalizeForwardParams next{};     // of forward, where bn is not null
  FinalizeBackwardParams centre{};  // of the input gradient, where coefficients is not null; sums and bn are set here
  WeightMerge* later = nullptr;     // where to leave the merge of dweight, if that is left to the caller
  std::optional<Tensor>* later_partial = nullptr;  // and what keeps its memory
};

// The counters that a primitive alone needs: zeroed by one launch. Empty for 0.
Tensor zero_counters(int64_t count, DType dtype, const Tensor& like, const Target& target);
inline uint32_t* counters_of(const Tensor& tensor) { return static_cast<uint32_t*>(tensor.mutable_data_ptr()); }
// A weight as packed_weight would pack it; null where it is one that the kernels can read.
bool is_packed(const Tensor& weight, const ConvGeometry& g, DType dtype);
PackWeightParams pack_params(const Tensor& weight, const ConvGeometry& g, DType dtype, void* packed);

Tensor channel_stats_of(const Tensor& x);
// Without where the results go: bn is for the caller to set.
FinalizeForwardParams finalize_forward_params(const std::optional<Tensor>& stats, int64_t count,
                                              const std::optional<Tensor>& running_mean,
                                              const std::optional<Tensor>& running_var,
                                              const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double eps, int64_t channels);

void update_running_stats_of(const std::vector<Tensor>& running_means, const std::vector<Tensor>& running_vars,
                             const std::vector<Tensor>& stats, const std::vector<int64_t>& counts,
                             const std::vector<double>& momenta, const std::vector<Tensor>& batches_tracked);

std::tuple<Tensor, Tensor> preact_conv_forward_of(const Tensor& x, const std::optional<Tensor>& bn,
                                                  const Tensor& weight, const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& residual, double slope,
                                                  const ConvolutionOptions& options, bool want_stats,
                                                  const Prepared& prepared);
std::tuple<Tensor, Tensor> preact_conv_dgrad_of(const Tensor& dy, const Tensor& weight, const Tensor& x,
                                                const Tensor& bn, const std::optional<Tensor>& dz_in,
                                                double slope, const ConvolutionOptions& options,
                                                const Prepared& prepared);
std::tuple<Tensor, Tensor> preact_conv_wgrad_of(const Tensor& dy, const Tensor& x,
                                                const std::optional<Tensor>& bn, const Tensor& weight,
                                                double slope, const ConvolutionOptions& options, bool want_bias,
                                                const Prepared& prepared);
std::tuple<Tensor, Tensor, Tensor, Tensor> preact_conv_backward_1x1_of(
    const Tensor& dy, const Tensor& weight, const Tensor& x, const Tensor& bn,
    const std::optional<Tensor>& dz_in, double slope, bool want_bias, const Prepared& prepared);
// The result takes the memory that `into` says: every element is read and written by one thread.
Tensor preact_apply_of(const Tensor& dz, const Tensor& x, const Tensor& coefficients,
                       const std::optional<Tensor>& dskip, const std::vector<WeightMerge>& merges,
                       ApplyInto into);

}  // namespace cuda
}  // namespace resnet_fused
