// Both gradients of a 1x1 convolution: for each run of pixels first the input gradient, then the share of the weight
// gradient, while dy and x of the run are in the core's cache. Memory sees one read of each instead of two.
#include "dgrad_pixel_pairs.h"
#include "pack_weights.h"
#include "primitives.h"
#include "wgrad_matrix.h"

namespace resnet_fused {
namespace RF_VARIANT {

// Whether dgrad_pixel_pairs.h has the input gradient.
template <typename T> static bool fits_pixel_pairs(const ConvGeometry& g) {
#if RF_LEVEL >= 3
  return sizeof(T) == 2 && dgrad_fits_pixel_pairs(g);
#else
  (void)g;
  return false;
#endif
}

template <typename T>
void preact_conv_backward_1x1(const PreactConvDgradParams& dgrad, const PreactConvWgradParams& wgrad) {
  if (product_fits<T>(wgrad)) {  // few pixels: both tensors stay in the caches between the two
    if (wgrad.dy_from) preact_apply<T>(*wgrad.dy_from);
    preact_conv_dgrad<T>(dgrad);
    preact_conv_wgrad<T>(wgrad);
    return;
  }
  typedef typename ModeOf<T>::type M;
  typedef typename M::Unit Unit;
  typedef Acc<T> A;
  const ConvGeometry& g = dgrad.g;
  const WgradPlan plan = plan_wgrad<T>(g, 0);
  const PackLayout pack = make_pack<M>(g.k, g.c, 1);
  const bool paired = fits_pixel_pairs<T>(g);
  const size_t row_bytes = paired ? size_t(4 * max64(g.c, kOutBlock<A>)) * sizeof(A) : 0;
  Unit* const packed =
      static_cast<Unit*>(thread_scratch(kScratchPack, size_t(pack_units<M>(pack)) * sizeof(Unit) + row_bytes));
  [[maybe_unused]] A* const rows = reinterpret_cast<A*>(packed + pack_units<M>(pack));
  const int32_t tap = 0;
  parallel_for(dgrad.parallel, pack.out_blocks, [&](int64_t block) {
    pack_block<M, T>(packed + pack_block_offset<M>(pack, block), pack, block, dgrad.weight, dgrad.weight_layout,
                     dgrad.weight_layout.stride_k, dgrad.weight_layout.stride_c, &tap, &tap);
  });
#if RF_LEVEL >= 3
  if constexpr (kPairedOutputs<M>)
    if (paired) fill_paired_rows(rows, static_cast<const A*>(dgrad.bn), g.c);
#endif
  const bool streamed = should_stream(static_cast<const T*>(dgrad.dz), plan.pixels, g.c);
  A* const partial = static_cast<A*>(thread_scratch(kScratchSums, size_t(plan.parts) * 2 * g.c * sizeof(A)));
  memset(partial, 0, size_t(plan.parts) * 2 * g.c * sizeof(A));
  const Prologue<A> none = make_prologue<A>(nullptr, g.k, 0);
  const int64_t tap_offset = 0;

  run_parts<T>(wgrad, plan, [&](int64_t part, int64_t unit, const RunPairs& activations) {
    const int64_t first = unit * plan.chunk, pixels = min64(plan.chunk, plan.pixels - first);
    A* const sums = partial + part * 2 * g.c;
    if (wgrad.dy_from) preact_apply_run<T>(*wgrad.dy_from, first, pixels);
#if RF_LEVEL >= 3
    if constexpr (kPairedOutputs<M>)
      if (paired) {
        const T* const dz_in = static_cast<const T*>(dgrad.dz_in);
        const PairedRun run = {g.c, g.k, rows, A(dgrad.slope), static_cast<const T*>(dgrad.dy) + first * g.k,
                               static_cast<const T*>(dgrad.x) + first * g.c, dz_in ? dz_in + first * g.c : nullptr,
                               static_cast<T*>(dgrad.dz) + first * g.c, streamed, activations, sums, sums + g.c};
        paired_dgrad_run(run, packed, pack, pixels);
        if (streamed) stream_fence();
        return true;
      }
#endif
    const BandLayout layout = make_band<M>(g.k, 1, pixels, 1);
    Unit* const band =
        static_cast<Unit*>(thread_scratch(kScratchActivation, size_t(band_scratch_units<M>(layout)) * sizeof(Unit)));
    fill_band<M, T>(band, layout, static_cast<const T*>(dgrad.dy) + first * g.k, 1, pixels, 0, 0, none);
    begin_convolution<M>(pack.in_units);
    const DgradEpilogue<T> epilogue = dgrad_epilogue<T>(dgrad, sums, kRunPixels, streamed, kPairedOutputs<M>);
    const TileInput<M> input = {&tap_offset, 1, layout.slots * kBlock<M>, pack.in_units};
    const PixelRows<M> rows = {band, 0, first, 0, 1, pixels};
    for (int64_t block = 0; block < pack.out_blocks; ++block)
      convolve_rows(input, rows, packed + pack_block_offset<M>(pack, block), epilogue, block * kOutBlock<A>,
                    pack_vectors<M>(pack, block), 0, [] {});
    end_convolution<M>(pack.in_units);
    if (streamed) stream_fence();
    return false;
  });
  add_partial_sums(static_cast<A*>(dgrad.sums), partial, 2 * g.c, plan.parts, g.c, kPairedOutputs<M>);
}

#if RF_LEVEL < 4
template void preact_conv_backward_1x1<float>(const PreactConvDgradParams&, const PreactConvWgradParams&);
template void preact_conv_backward_1x1<double>(const PreactConvDgradParams&, const PreactConvWgradParams&);
#endif
template void preact_conv_backward_1x1<bf16>(const PreactConvDgradParams&, const PreactConvWgradParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
