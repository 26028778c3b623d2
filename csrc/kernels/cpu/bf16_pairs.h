// bfloat16 where the CPU multiplies pairs of it: 32 channels of a pixel are one vector of words. Shifted left these are the
// even channels in float32, masked the odd ones, so whatever is done to 32 channels takes two operations to read and one
// (and a permutation) to write, instead of two and two for each 16 channels in their order.
#pragma once

#include "simd.h"

namespace resnet_fused {
namespace RF_VARIANT {

// The prologue: null scale means none.
template <typename A> struct Prologue {
  const A* scale;
  const A* shift;
  A slope;
  bool relu;
};

#if RF_LEVEL >= 3
constexpr int kWordChannels = 2 * kLanes<float>;
constexpr __mmask16 kAllLanes = 0xffff;        // GCC 12 takes the unmasked names for reads of uninitialised vectors
constexpr __mmask32 kAllHalves = 0xffffffff;

RF_INLINE vuint32 load_words(const bf16* p) {
  vuint32 words;
  memcpy(&words, p, sizeof words);
  return words;
}
RF_INLINE __mmask32 first_halves(int64_t n) { return n >= kWordChannels ? kAllHalves : (__mmask32(1) << n) - 1; }
RF_INLINE vfloat even_channels(vuint32 words) { return (vfloat)(words << 16); }
RF_INLINE vfloat odd_channels(vuint32 words) { return (vfloat)(words & 0xffff0000u); }

// Orders of 16-bit halves, for permutations.
struct HalfOrder {
  alignas(64) uint16_t at[kWordChannels];
  RF_INLINE_METHOD __m512i vector() const { return _mm512_load_si512(at); }
};
template <typename F> constexpr HalfOrder half_order(const F& of) {
  HalfOrder order = {};
  for (int i = 0; i < kWordChannels; ++i) order.at[i] = static_cast<uint16_t>(of(i));
  return order;
}
// Half 0, half 16, half 1, half 17, ...: from [even | odd] to the order of the channels.
constexpr HalfOrder kInterleave = half_order([](int i) { return i / 2 + i % 2 * 16; });
RF_INLINE vuint32 permute(vuint32 words, __m512i order) {
  return (vuint32)_mm512_maskz_permutexvar_epi16(kAllHalves, order, (__m512i)words);
}
RF_INLINE vuint32 permute(vuint32 first, vuint32 second, __m512i order) {
  return (vuint32)_mm512_maskz_permutex2var_epi16(kAllHalves, (__m512i)first, order, (__m512i)second);
}
constexpr vint32 kEvenLanes = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};  // of two vectors
constexpr vint32 kInterleavedLanes = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
RF_INLINE vfloat permute(vfloat first, vfloat second, vint32 order) {
  return (vfloat)_mm512_maskz_permutex2var_ps(kAllLanes, (__m512)first, (__m512i)order, (__m512)second);
}
// [even | odd], rounded to nearest even by the CPU's own conversion: denormals become 0, as in the products.
RF_INLINE vuint32 pack_halves(vfloat even, vfloat odd) { return (vuint32)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even); }

// The lanes of both, rounded like them, as pairs: lane i of `low` below lane i of `high`.
RF_INLINE vuint32 pair_lanes(vfloat low, vfloat high) { return permute(pack_halves(low, high), kInterleave.vector()); }

// 32 per-channel numbers as those of the even and of the odd channels; the first n, the others 0. Those of 16 channels may
// stand for two pixels' (repeat).
struct EvenOdd {
  vfloat even, odd;
};
RF_INLINE EvenOdd load_even_odd(const float* p, int64_t n, bool repeat = false) {
  const vfloat low = n >= kLanes<float> ? load(p) : load_partial(p, int(n));
  vfloat high = {};
  if (repeat)
    high = low;
  else if (n >= kWordChannels)
    high = load(p + kLanes<float>);
  else if (n > kLanes<float>)
    high = load_partial(p + kLanes<float>, int(n) - kLanes<float>);
  return {permute(low, high, kEvenLanes), permute(low, high, kEvenLanes + 1)};
}

// Per-channel numbers of whole groups of 32 channels as [even, odd] vectors of each group ("slots"), in place, and back. What
// is left of the channels stays in its order.
RF_INLINE int64_t paired_channels(int64_t channels) { return channels / kWordChannels * kWordChannels; }
static inline void channels_to_slots(float* row, int64_t channels) {
  for (int64_t c = 0; c < paired_channels(channels); c += kWordChannels) {
    const EvenOdd group = load_even_odd(row + c, kWordChannels);
    store(row + c, group.even);
    store(row + c + kLanes<float>, group.odd);
  }
}
static inline void slots_to_channels(float* row, int64_t channels) {
  for (int64_t c = 0; c < paired_channels(channels); c += kWordChannels) {
    const vfloat even = load(row + c), odd = load(row + c + kLanes<float>);
    store(row + c, permute(even, odd, kInterleavedLanes));
    store(row + c + kLanes<float>, permute(even, odd, kInterleavedLanes + 8));
  }
}
// 16 channels of two pixels, [even | even] and [odd | odd]: the pixels' sum, in the channels' order.
RF_INLINE vfloat pixels_sum(const EvenOdd& pixels) {
  return permute(pixels.even, pixels.odd, kInterleavedLanes) + permute(pixels.even, pixels.odd, kInterleavedLanes + 8);
}
// `streamed`: past the caches, p then being aligned to a vector.
RF_INLINE void store_words(bf16* p, vuint32 words, bool streamed) {
  if (streamed)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)words);
  else
    memcpy(p, &words, sizeof words);
}

// What stands before the products, for 32 channels: words of x to [even | odd] halves of act(x*scale + shift).
enum class Act { kRelu, kLeaky };
template <Act kAct> struct WordPrologue {
  EvenOdd scale, shift;
  vfloat slope;

  WordPrologue(const Prologue<float>& p, int64_t channel, int64_t n, bool repeat)
      : scale(load_even_odd(p.scale + channel, n, repeat)),
        shift(load_even_odd(p.shift + channel, n, repeat)),
        slope(splat<float>(p.slope)) {}

  // The activation's sign of zero is lost in the products, so the maximum will do: of zero and a NaN it is the second.
  RF_INLINE_METHOD vfloat act(vfloat z) const {
    if constexpr (kAct == Act::kRelu) return (vfloat)_mm512_maskz_max_ps(kAllLanes, __m512{}, (__m512)z);
    return activate<float>(z, slope, false);
  }
  RF_INLINE_METHOD vuint32 halves(vuint32 words) const {
    return pack_halves(act(preact(even_channels(words), scale.even, shift.even)),
                       act(preact(odd_channels(words), scale.odd, shift.odd)));
  }
};

// Calls f with the WordPrologue of channels [channel, channel + n), n <= 32.
template <typename F>
RF_INLINE void with_word_prologue(const Prologue<float>& p, int64_t channel, int64_t n, bool repeat, const F& f) {
  if (p.relu)
    f(WordPrologue<Act::kRelu>(p, channel, n, repeat));
  else
    f(WordPrologue<Act::kLeaky>(p, channel, n, repeat));
}

// 32 channels, or the `valid` that there are, of `pixels` pixels, `step` apart, normalised and activated, a vector each: zeros
// follow them, but where a pixel has 16 channels, what follows in a vector is not written.
static inline void fill_words(uint32_t* out, const bf16* x, int64_t step, int64_t pixels, int64_t channel, int64_t valid,
                       const Prologue<float>& prologue) {
  constexpr int64_t L = kLanes<float>;
  const __mmask32 mask = first_halves(valid);
  if (!prologue.scale) {
    if (valid >= kWordChannels)
      for (int64_t p = 0; p < pixels; ++p) memcpy(out + p * L, x + p * step, kWordChannels * sizeof(bf16));
    else if (valid == L && channel == 0)
      for (int64_t p = 0; p < pixels; ++p) memcpy(out + p * L, x + p * step, L * sizeof(bf16));
    else
      for (int64_t p = 0; p < pixels; ++p)
        _mm512_storeu_si512(out + p * L, _mm512_maskz_loadu_epi16(mask, x + p * step));
    return;
  }
  const __m512i order = kInterleave.vector();
  const int64_t pairs = valid == L && step == L ? pixels / 2 : 0;  // of pixels that are one vector
  if (pairs > 0)
    with_word_prologue(prologue, channel, valid, true, [&](const auto& words) __attribute__((always_inline)) {
      for (int64_t p = 0; p < pairs; ++p) {
        const vuint32 both = permute(words.halves(load_words(x + 2 * p * L)), order);
        memcpy(out + 2 * p * L, &both, sizeof both / 2);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (2 * p + 1) * L),
                            _mm512_maskz_extracti64x4_epi64(0xf, (__m512i)both, 1));
      }
    });
  with_word_prologue(prologue, channel, valid, false, [&](const auto& words) __attribute__((always_inline)) {
    for (int64_t p = 2 * pairs; p < pixels; ++p) {
      const vuint32 one = permute(words.halves((vuint32)_mm512_maskz_loadu_epi16(mask, x + p * step)), order);
      memcpy(out + p * L, &one, sizeof one);
    }
  });
}
#endif

}  // namespace RF_VARIANT
}  // namespace resnet_fused
