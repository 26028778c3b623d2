// Both gradients of a 1x1 convolution: for each run of pixels first the input gradient, then the share of the weight
// gradient, while dy and x of the run are in the core's cache. Memory sees one read of each instead of two.
#include "dgrad_epilogue.h"
#include "pack_weights.h"
#include "primitives.h"
#include "wgrad_product.h"

namespace resnet_fused {
namespace RF_VARIANT {

template <typename T>
void preact_conv_backward_1x1(const PreactConvDgradParams& dgrad, const PreactConvWgradParams& wgrad) {
  if (product_fits<T>(wgrad)) {  // few pixels: both tensors stay in the caches between the two
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
  Unit* const packed = static_cast<Unit*>(thread_scratch(kScratchPack, size_t(pack_units<M>(pack)) * sizeof(Unit)));
  const int32_t tap = 0;
  parallel_for(dgrad.parallel, pack.out_blocks, [&](int64_t block) {
    pack_block<M, T>(packed + pack_block_offset<M>(pack, block), pack, block, dgrad.weight, dgrad.weight_layout,
                     dgrad.weight_layout.stride_k, dgrad.weight_layout.stride_c, &tap, &tap);
  });
  const bool streamed = should_stream(static_cast<const T*>(dgrad.dz), plan.pixels, g.c);
  A* const partial = static_cast<A*>(thread_scratch(kScratchSums, size_t(plan.parts) * 2 * g.c * sizeof(A)));
  memset(partial, 0, size_t(plan.parts) * 2 * g.c * sizeof(A));
  const Prologue<A> none = make_prologue<A>(nullptr, g.k, 0);
  const int64_t tap_offset = 0;

  direct_wgrad<T>(wgrad, plan, [&](int64_t part, int64_t unit) {
    const int64_t first = unit * plan.chunk, pixels = min64(plan.chunk, plan.pixels - first);
    const BandLayout layout = make_band<M>(g.k, 1, pixels, 1);
    Unit* const band =
        static_cast<Unit*>(thread_scratch(kScratchActivation, size_t(band_units<M>(layout)) * sizeof(Unit)));
    fill_band<M, T>(band, layout, static_cast<const T*>(dgrad.dy) + first * g.k, 1, pixels, 0, 0, none);
    const DgradEpilogue<T> epilogue = dgrad_epilogue<T>(dgrad, partial + part * 2 * g.c, kTilePixels, streamed,
                                                          kPairedOutputs<M>);
    const TileInput<M> input = {&tap_offset, 1, layout.slots * kBlock<M>, pack.in_units};
    const int64_t tiles = divide_up(pixels, int64_t(kTilePixels));
    for (int64_t block = 0; block < pack.out_blocks; ++block) {
      const Unit* const w = packed + pack_block_offset<M>(pack, block);
      const int vectors = pack_vectors<M>(pack, block);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t begin = split_begin(pixels, tiles, i);
        const int np = int(split_begin(pixels, tiles, i + 1) - begin);
        conv_tile_of<M, DgradEpilogue<T>>(np, vectors)(input, band + begin * kBlock<M>, w, epilogue,
                                                       block * kOutBlock<A>, first + begin, 0);
      }
    }
    if (streamed) stream_fence();
  });
  add_partial_sums(static_cast<A*>(dgrad.sums), partial, 2 * g.c, plan.parts, g.c, kPairedOutputs<M>);
}

template void preact_conv_backward_1x1<float>(const PreactConvDgradParams&, const PreactConvWgradParams&);
template void preact_conv_backward_1x1<double>(const PreactConvDgradParams&, const PreactConvWgradParams&);
template void preact_conv_backward_1x1<bf16>(const PreactConvDgradParams&, const PreactConvWgradParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
