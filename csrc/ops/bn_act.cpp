// The elementwise part of the unfused path: a = act(x*scale + shift), and its backward with BN's two
// reductions; the same with the mean of a over each image's pixels (global average pooling).
#include "primitives.h"

namespace resnet_fused {
namespace {

// Of which images a mean can be taken.
void check_pooled(const Activation& input) {
  RF_CHECK(input.h > 0 && input.w > 0, "expected x with non-zero spatial size for its mean, but got ", input.h, "x",
           input.w);
}

Tensor forward(const Tensor& x, const Tensor& bn, double slope, bool pool) {
  const Activation input = check_activation(x, "input");
  const Tensor bn_rows = check_acc(bn, "bn", 4, input.c, input.dtype);
  if (pool) check_pooled(input);
  const Tensor out = empty_activation(input.n, input.c, pool ? 1 : input.h, pool ? 1 : input.w, input.dtype);
  if (input.numel() == 0) return out;
  BnActParams params{};
  params.pixels = input.pixels();
  params.channels = input.c;
  params.pool_pixels = pool ? input.h * input.w : 0;
  params.x = input.data;
  params.bn = bn_rows.const_data_ptr();
  params.slope = slope;
  params.out = out.mutable_data_ptr();
  params.parallel = torch_parallel();
  cpu_kernels().bn_act_forward[index_of(input.dtype)](params);
  return out;
}

Tensor bn_act_forward(const Tensor& x, const Tensor& bn, double slope) { return forward(x, bn, slope, false); }

Tensor bn_act_pool_forward(const Tensor& x, const Tensor& bn, double slope) { return forward(x, bn, slope, true); }

// pool: da is of the means. into_da: dz may take da's memory.
std::tuple<Tensor, Tensor> backward(const Tensor& da, const Tensor& x, const Tensor& bn,
                                    const std::optional<Tensor>& dz_in, double slope, bool pool, bool into_da) {
  const Activation input = check_activation(x, "input");
  Activation expected = input;
  if (pool) {
    check_pooled(input);
    expected.h = expected.w = 1;
  }
  const Activation gradient = check_activation_like(da, "da", expected, pool ? "means of the input" : "input");
  if (dz_in) check_activation_like(*dz_in, "dz_in", input, "input");
  const Tensor bn_rows = check_acc(bn, "bn", 4, input.c, input.dtype);
  const DType acc = acc_dtype(input.dtype);
  const Tensor dz = into_da && !pool && may_overwrite(input)
                        ? da
                        : empty_activation(input.n, input.c, input.h, input.w, input.dtype);
  if (input.numel() == 0) return {dz, zeros_matrix(2, input.c, acc)};
  const Tensor sums = empty_matrix(2, input.c, acc);
  BnActParams params{};
  params.pixels = input.pixels();
  params.channels = input.c;
  params.pool_pixels = pool ? input.h * input.w : 0;
  params.x = input.data;
  params.bn = bn_rows.const_data_ptr();
  params.slope = slope;
  params.da = gradient.data;
  params.dz_in = optional_data(dz_in);
  params.out = dz.mutable_data_ptr();
  params.sums = sums.mutable_data_ptr();
  params.parallel = torch_parallel();
  cpu_kernels().bn_act_backward[index_of(input.dtype)](params);
  return {dz, sums};
}

std::tuple<Tensor, Tensor> bn_act_pool_backward(const Tensor& dy, const Tensor& x, const Tensor& bn, double slope) {
  return backward(dy, x, bn, std::nullopt, slope, true, false);
}

// BatchNorm -> activation (-> mean), all of its backward: (dx, sums). into_dout: dx may take dout's memory.
std::tuple<Tensor, Tensor> preact_backward(const Tensor& dout, const Tensor& x, const Tensor& bn, bool training,
                                           double slope, bool pool, bool into_dout) {
  auto [dz, sums] = backward(dout, x, bn, std::nullopt, slope, pool, into_dout);
  const int64_t count = x.size(0) * x.size(2) * x.size(3);
  return {preact_apply(dz, x, finalize_backward(sums, bn, count, training), std::nullopt, ApplyInto::dz), sums};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_act_backward(const Tensor& da, const Tensor& x, const Tensor& bn,
                                           const std::optional<Tensor>& dz_in, double slope) {
  return backward(da, x, bn, dz_in, slope, false, false);
}

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("bn_act_forward(Tensor x, Tensor bn, float slope) -> Tensor");
  m.def("bn_act_pool_forward(Tensor x, Tensor bn, float slope) -> Tensor");
  m.def("bn_act_pool_backward(Tensor dy, Tensor x, Tensor bn, float slope) -> (Tensor, Tensor)");
  m.def("bn_act_backward(Tensor da, Tensor x, Tensor bn, Tensor? dz_in, float slope) -> (Tensor, Tensor)");
  m.def(
      "preact_backward(Tensor(a!) dout, Tensor x, Tensor bn, bool training, float slope, bool pool, "
      "bool into_dout) "
      "-> (Tensor(a!), Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("bn_act_forward", TORCH_BOX(&bn_act_forward));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
  m.impl("bn_act_pool_forward", TORCH_BOX(&bn_act_pool_forward));
  m.impl("bn_act_pool_backward", TORCH_BOX(&bn_act_pool_backward));
  m.impl("preact_backward", TORCH_BOX(&preact_backward));
}

}  // namespace resnet_fused
