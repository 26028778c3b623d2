// The input gradient of a run of pixels of a 1x1 convolution where the CPU multiplies pairs of bfloat16. Beside dz and
// BatchNorm's sums it leaves the activations, pairs of neighbouring pixels as the weight gradient reads them: x is read and
// normalised once for both.
#pragma once

#include "dgrad_epilogue.h"
#include "pack_weights.h"
#include "wgrad_direct.h"

namespace resnet_fused {
namespace RF_VARIANT {

#if RF_LEVEL >= 3
// In a register tile. Slower with 14, as elsewhere (fewer registers for the epilogue), and with 8.
constexpr int kPairedTilePixels = 12;
// Gradients are read where they lie: of more channels, those of a tile's pixels would push each other out of the L1 cache.
constexpr int64_t kPairedMostOutputs = 512;

RF_INLINE bool dgrad_fits_pixel_pairs(const ConvGeometry& g) {
  // Matrix tiles read gradients in whole rows.
  if (uses_matrix_tiles<ModeBf16Pair>(g.k / 2) && g.k > kWordChannels && g.k % kWordChannels != 0) return false;
  return (g.c == kLanes<float> || g.c % kWordChannels == 0) && g.k % 2 == 0 && g.k <= kPairedMostOutputs;
}

// mean, invstd, scale and shift as EvenOdd of 32 values that follow each other in x: of 32 channels, or of 16 for two pixels.
RF_INLINE int64_t paired_row(int64_t channels) { return max64(channels, kWordChannels); }
static inline void fill_paired_rows(float* rows, const float* bn, int64_t channels) {
  for (int64_t row = 0; row < 4; ++row, rows += paired_row(channels), bn += channels)
    for (int64_t c = 0; c < channels; c += kWordChannels) {
      const EvenOdd values = load_even_odd(bn + c, min64(kWordChannels, channels - c), channels < kWordChannels);
      store(rows + c, values.even);
      store(rows + c + kLanes<float>, values.odd);
    }
}

struct PairedRun {
  int64_t channels, outputs;
  const float* rows;  // as fill_paired_rows leaves them
  float slope;
  const bf16* dy;     // these four from the run's first pixel on
  const bf16* x;
  const bf16* dz_in;  // may be null
  bf16* dz;
  bool streamed;
  RunPairs activations;
  float* sum_dz;  // these two in slots
  float* sum_dz_xhat;
};

// The masks of both halves, over [even | odd].
RF_INLINE __mmask16 not_below_zero(vfloat z) { return _mm512_cmp_ps_mask((__m512)z, __m512{}, _CMP_NLE_UQ); }
RF_INLINE vuint32 pack_halves(__mmask32 mask, vfloat even, vfloat odd) {
  return (vuint32)_mm512_maskz_cvtne2ps_pbh(mask, (__m512)odd, (__m512)even);
}
RF_INLINE vfloat masked_sum(vfloat a, __mmask16 mask, vfloat b) {
  return (vfloat)_mm512_mask_add_ps((__m512)a, mask, (__m512)a, (__m512)b);
}

struct PairedSums {
  EvenOdd dz, dz_centred;
};

// 32 values from `at` on, or 16 where not kWhole (the others are 0 in x and da): dz and what it adds to the sums. Returns the
// activations as [even | odd] halves. The ReLU's mask is applied by the conversions, which take no longer for it.
template <Act kAct, bool kWhole>
RF_INLINE vuint32 finish_word(const PairedRun& run, int64_t at, int64_t channel, EvenOdd da, PairedSums& sums) {
  constexpr int L = kLanes<float>;
  const auto words_of = [&](const bf16* p) __attribute__((always_inline)) {
    if constexpr (kWhole) return load_words(p + at);
    return (vuint32)_mm512_maskz_loadu_epi16(first_halves(L), p + at);
  };
  const float* const mean = run.rows + channel;
  const float* const scale = mean + 2 * paired_row(run.channels);
  const float* const shift = mean + 3 * paired_row(run.channels);
  const vuint32 in = words_of(run.x);
  const EvenOdd x = {even_channels(in), odd_channels(in)};
  const EvenOdd z = {preact(x.even, load(scale), load(shift)), preact(x.odd, load(scale + L), load(shift + L))};
  EvenOdd before = {};
  if (run.dz_in) {
    const vuint32 beside = words_of(run.dz_in);
    before = {even_channels(beside), odd_channels(beside)};
  }
  vuint32 halves, activations;
  if constexpr (kAct == Act::kRelu) {
    const __mmask16 even = not_below_zero(z.even), odd = not_below_zero(z.odd);
    const __mmask32 both = _mm512_kunpackw(odd, even);
    activations = pack_halves(both, z.even, z.odd);
    halves = run.dz_in ? pack_halves(masked_sum(before.even, even, da.even), masked_sum(before.odd, odd, da.odd))
                       : pack_halves(both, da.even, da.odd);
  } else {
    const vfloat slope = splat<float>(run.slope);
    activations = pack_halves(activate<float>(z.even, slope, false), activate<float>(z.odd, slope, false));
    da = {activate_grad<float>(z.even, da.even, slope, false), activate_grad<float>(z.odd, da.odd, slope, false)};
    if (run.dz_in) da = {da.even + before.even, da.odd + before.odd};
    halves = pack_halves(da.even, da.odd);
  }
  const vuint32 words = permute(halves, kInterleave.vector());
  if constexpr (kWhole)
    store_words(run.dz + at, words, run.streamed);
  else
    _mm512_mask_storeu_epi16(run.dz + at, first_halves(L), (__m512i)words);
  const EvenOdd dz = {even_channels(words), odd_channels(words)};
  sums.dz.even += dz.even;
  sums.dz.odd += dz.odd;
  sums.dz_centred.even += dz.even * (x.even - load(mean));
  sums.dz_centred.odd += dz.odd * (x.odd - load(mean + L));
  return activations;
}

// Two neighbouring pixels, or the last one, of 32 channels, or of all 16.
template <Act kAct, int kVectors, int kPixels>
RF_INLINE void finish_pair(const PairedRun& run, const vfloat (*acc)[kVectors], int64_t channel, int64_t pixel,
                           PairedSums& sums) {
  constexpr int L = kLanes<float>;
  const int64_t at = pixel * run.channels + channel;
  uint32_t* const to = run.activations.at + channel / L * run.activations.block_stride + pixel / 2 * L;
  if constexpr (kVectors == 2) {
    const vuint32 first = finish_word<kAct, true>(run, at, channel, {acc[0][0], acc[0][1]}, sums);
    vuint32 second = {};
    if constexpr (kPixels == 2)
      second = finish_word<kAct, true>(run, at + run.channels, channel, {acc[1][0], acc[1][1]}, sums);
    const vuint32 low = permute(first, second, kPairLowPacked.vector());
    const vuint32 high = permute(first, second, kPairHighPacked.vector());
    memcpy(to, &low, sizeof low);
    memcpy(to + run.activations.block_stride, &high, sizeof high);
  } else {
    vfloat second = {};
    if constexpr (kPixels == 2) second = acc[1][0];
    const EvenOdd da = {permute(acc[0][0], second, kEvenLanes), permute(acc[0][0], second, kEvenLanes + 1)};
    vuint32 both = permute(finish_word<kAct, kPixels == 2>(run, at, channel, da, sums), kPairBothPacked.vector());
    if constexpr (kPixels == 1) both &= 0xffffu;  // an absent pixel is 0, not act(shift)
    memcpy(to, &both, sizeof both);
  }
}

RF_INLINE void add_sum(float* sum, vfloat value) { store(sum, load(sum) + value); }

// What a tile adds to the sums.
template <int kVectors> RF_INLINE void add_sums(const PairedRun& run, int64_t channel, const PairedSums& sums) {
  constexpr int L = kLanes<float>;
  const float* const invstd = run.rows + paired_row(run.channels) + channel;
  const EvenOdd xhat = {sums.dz_centred.even * load(invstd), sums.dz_centred.odd * load(invstd + L)};
  if constexpr (kVectors == 2) {
    add_sum(run.sum_dz + channel, sums.dz.even);
    add_sum(run.sum_dz + channel + L, sums.dz.odd);
    add_sum(run.sum_dz_xhat + channel, xhat.even);
    add_sum(run.sum_dz_xhat + channel + L, xhat.odd);
  } else {
    add_sum(run.sum_dz, pixels_sum(sums.dz));
    add_sum(run.sum_dz_xhat, pixels_sum(xhat));
  }
}

// NP pixels from `pixel` on, and kVectors vectors of input channels, whose weights are w.
template <Act kAct, int kVectors, int NP>
__attribute__((noinline)) void paired_dgrad_tile(const PairedRun& run, const uint32_t* w, int64_t channel, int64_t pixel) {
  constexpr int L = kLanes<float>, kRows = (NP + 2) / 3;
  // Three pixels to a pointer: at 0, 1 and 2 times a distance, which an address can hold.
  const bf16* row[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) row[i] = run.dy + (pixel + 3 * i) * run.outputs;
  vfloat acc[NP][kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < NP; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[p][v] = vfloat{};
  for (int64_t k = 0; k < run.outputs; k += 2, w += kVectors * L) {
    vuint32 weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = load_units<ModeBf16Pair>(w + v * L);
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) {
      uint32_t unit;
      memcpy(&unit, row[p / 3] + p % 3 * run.outputs, sizeof unit);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[p][v] = ModeBf16Pair::fma(acc[p][v], unit, weights[v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) row[i] += 2;
  }
  PairedSums sums = {};
#pragma GCC unroll 16
  for (int p = 0; p < NP; p += 2) finish_pair<kAct, kVectors, NP == 1 ? 1 : 2>(run, acc + p, channel, pixel + p, sums);
  add_sums<kVectors>(run, channel, sums);
}

#if RF_LEVEL >= 4
// The same for up to 32 pixels in matrix tiles: the sums of those whose gradients are at dy, and what becomes of them.
template <int kVectors>
__attribute__((noinline)) void paired_matrix_tile(const PairedRun& run, const bf16* dy, const uint32_t* w, float* sums) {
  constexpr int64_t L = kLanes<float>;
  const int64_t units = run.outputs / 2, step = units < kTileUnits ? units : kTileUnits;
  const int64_t left_step = run.outputs * int64_t(sizeof(bf16));
  const bf16* const second = dy + kTileRows * run.outputs;
  zero_tiles();
  bool copy = false;
  for (int64_t unit = 0; unit < units; unit += step, w += step * kVectors * L) {
    if (kVectors == 2 || !copy)
      multiply_tiles<kVectors, 0>(dy + 2 * unit, second + 2 * unit, left_step, w, w + L, kVectors * L * 4);
    else
      multiply_tiles<kVectors, 1>(dy + 2 * unit, second + 2 * unit, left_step, w, w + L, kVectors * L * 4);
    copy = !copy;
  }
  store_tiles<kVectors>(sums);
}
template <Act kAct, int kVectors>
__attribute__((noinline)) void finish_matrix_tile(const PairedRun& run, const float* sums, int64_t channel, int64_t pixel, int64_t count) {
  PairedSums paired = {};
  for (int64_t p = 0; p < count; p += 2) {
    vfloat acc[2][kVectors];
    for_each_sum(acc, [&](vfloat& sum, int i) __attribute__((always_inline)) {
      sum = load(sums + (p * kVectors + i) * kLanes<float>);
    });
    if (p + 1 < count)
      finish_pair<kAct, kVectors, 2>(run, acc, channel, pixel + p, paired);
    else
      finish_pair<kAct, kVectors, 1>(run, acc, channel, pixel + p, paired);
  }
  add_sums<kVectors>(run, channel, paired);
}

template <Act kAct, int kVectors>
static void paired_matrix_run(const PairedRun& run, const uint32_t* packed, const PackLayout& pack, int64_t pixels) {
  begin_convolution<ModeBf16Pair>(pack.in_units);
  // Of the last tile all rows are read, where there may be no memory behind the last pixel.
  const int64_t whole = pixels / kTileLefts * kTileLefts, rest = pixels - whole;
  bf16* const last =
      static_cast<bf16*>(thread_scratch(kScratchActivation, size_t(kTileLefts * run.outputs) * sizeof(bf16)));
  alignas(64) float sums[2][kTileLefts * kVectors * kLanes<float>];
  if (rest > 0) memcpy(last, run.dy + whole * run.outputs, size_t(rest * run.outputs) * sizeof(bf16));
  for (int64_t block = 0; block < pack.out_blocks; ++block) {
    const uint32_t* const w = packed + pack_block_offset<ModeBf16Pair>(pack, block);
    const int64_t channel = block * kOutBlock<float>;
    const auto multiply = [&](int64_t pixel) {
      const bf16* const dy = pixel < whole ? run.dy + pixel * run.outputs : last;
      if (pixel < pixels) paired_matrix_tile<kVectors>(run, dy, w, sums[pixel / kTileLefts % 2]);
    };
    multiply(0);
    for (int64_t pixel = 0; pixel < pixels; pixel += kTileLefts) {
      multiply(pixel + kTileLefts);  // while its products wait for each other, those before are finished
      finish_matrix_tile<kAct, kVectors>(run, sums[pixel / kTileLefts % 2], channel, pixel, min64(kTileLefts, pixels - pixel));
    }
  }
  end_convolution<ModeBf16Pair>(pack.in_units);
}
#endif

// The whole run: pixels in pairs, the odd one by itself.
template <Act kAct, int kVectors>
static void paired_dgrad_run(const PairedRun& run, const uint32_t* packed, const PackLayout& pack, int64_t pixels) {
#if RF_LEVEL >= 4
  if (uses_matrix_tiles<ModeBf16Pair>(pack.in_units)) return paired_matrix_run<kAct, kVectors>(run, packed, pack, pixels);
#endif
  const int64_t pairs = pixels / 2, tiles = divide_up(pairs, int64_t(kPairedTilePixels / 2));
  for (int64_t block = 0; block < pack.out_blocks; ++block) {
    const uint32_t* const w = packed + pack_block_offset<ModeBf16Pair>(pack, block);
    const int64_t channel = block * kOutBlock<float>;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = split_begin(pairs, tiles, i), pixel = 2 * begin;
      switch (split_begin(pairs, tiles, i + 1) - begin) {
        case 1: paired_dgrad_tile<kAct, kVectors, 2>(run, w, channel, pixel); break;
        case 2: paired_dgrad_tile<kAct, kVectors, 4>(run, w, channel, pixel); break;
        case 3: paired_dgrad_tile<kAct, kVectors, 6>(run, w, channel, pixel); break;
        case 4: paired_dgrad_tile<kAct, kVectors, 8>(run, w, channel, pixel); break;
        case 5: paired_dgrad_tile<kAct, kVectors, 10>(run, w, channel, pixel); break;
        default: paired_dgrad_tile<kAct, kVectors, kPairedTilePixels>(run, w, channel, pixel);
      }
    }
    if (pixels % 2) paired_dgrad_tile<kAct, kVectors, 1>(run, w, channel, pixels - 1);
  }
}
static void paired_dgrad_run(const PairedRun& run, const uint32_t* packed, const PackLayout& pack, int64_t pixels) {
  if (run.channels == kLanes<float>)
    (run.slope == 0 ? paired_dgrad_run<Act::kRelu, 1> : paired_dgrad_run<Act::kLeaky, 1>)(run, packed, pack, pixels);
  else
    (run.slope == 0 ? paired_dgrad_run<Act::kRelu, 2> : paired_dgrad_run<Act::kLeaky, 2>)(run, packed, pack, pixels);
}
#endif

}  // namespace RF_VARIANT
}  // namespace resnet_fused
