// Max pooling that keeps one byte per output: which position of its window was the largest. Backward gathers: an input
// pixel adds, in the order of (p, q), the gradients of those windows over it whose byte names it.
#include "channel_blocks.h"
#include "primitives.h"

namespace resnet_fused {
namespace RF_VARIANT {
namespace {

// A task's rows are at most so much of the larger tensor; they belong to it alone.
constexpr int64_t kTaskBytes = 64 << 10;

// Which window position a lane took. As wide as what it is compared beside, so that masks need no conversion.
template <typename A> using Offsets = typename VecOf<A>::mask;

template <typename A> RF_INLINE Offsets<A> splat_offset(int64_t offset) {
  return Offsets<A>{} + static_cast<decltype(Offsets<A>{}[0] + 0)>(offset);
}

// The bytes of one vector's lanes.
template <typename A> struct LaneBytes {
  typedef uint8_t type __attribute__((vector_size(RF_VECTOR_BYTES / sizeof(A))));
};
// By name where there is an instruction: GCC 12 narrows and widens lane by lane. (The plain forms of the intrinsics read
// an uninitialised register there, and warn.)
template <typename A> RF_INLINE void store_bytes(uint8_t* p, Offsets<A> offsets) {
#if RF_LEVEL >= 2
  if constexpr (sizeof(A) == 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)offsets));
  } else {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi64_epi8(0xff, (__m512i)offsets));
  }
#else
  const auto bytes = __builtin_convertvector(offsets, typename LaneBytes<A>::type);
  memcpy(p, &bytes, sizeof bytes);
#endif
}
template <typename A> RF_INLINE Offsets<A> load_bytes(const uint8_t* p) {
#if RF_LEVEL >= 2
  if constexpr (sizeof(A) == 4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Offsets<A>)_mm512_maskz_cvtepu8_epi32(0xffff, bytes);
  } else {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (Offsets<A>)_mm512_maskz_cvtepu8_epi64(0xff, bytes);
  }
#elif RF_LEVEL == 1
  if constexpr (sizeof(A) == 4) {
    return (Offsets<A>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  } else {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return (Offsets<A>)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(word));
  }
#else
  typename LaneBytes<A>::type bytes;
  memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Offsets<A>);
#endif
}

// A block's bytes beside its values (Block::load and store): pairs of bf16 vectors hold the even channels apart
// from the odd.
template <typename T, int N, bool kPartial>
RF_INLINE void store_offsets(const Block<T, N, kPartial>& block, uint8_t* p, const Offsets<Acc<T>>* offsets) {
  typedef Acc<T> A;
  constexpr int L = kLanes<A>;
  if constexpr (kPartial) {
    uint8_t bytes[L];
    store_bytes<A>(bytes, offsets[0]);
    for (int i = 0; i < block.lanes; ++i) p[i] = bytes[i];
  } else if constexpr (Block<T, N, kPartial>::kPairs) {
    for (int v = 0; v < N; v += 2) {
#if RF_LEVEL >= 2
      const __m256i words = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(offsets[v] | offsets[v + 1] << 8));
#else
      const vuint16_half words = __builtin_convertvector(offsets[v] | offsets[v + 1] << 8, vuint16_half);
#endif
      memcpy(p + v * L, &words, sizeof words);
    }
  } else {
    for (int v = 0; v < N; ++v) store_bytes<A>(p + v * L, offsets[v]);
  }
}
template <typename T, int N, bool kPartial>
RF_INLINE void load_offsets(const Block<T, N, kPartial>& block, const uint8_t* p, Offsets<Acc<T>>* offsets) {
  typedef Acc<T> A;
  constexpr int L = kLanes<A>;
  if constexpr (kPartial) {
    uint8_t bytes[L] = {};
    for (int i = 0; i < block.lanes; ++i) bytes[i] = p[i];
    offsets[0] = load_bytes<A>(bytes);
  } else if constexpr (Block<T, N, kPartial>::kPairs) {
    for (int v = 0; v < N; v += 2) {
      vuint16_half words;
      memcpy(&words, p + v * L, sizeof words);
#if RF_LEVEL >= 2
      const Offsets<A> both = (Offsets<A>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)words);
#elif RF_LEVEL == 1
      const Offsets<A> both = (Offsets<A>)_mm256_cvtepu16_epi32((__m128i)words);
#else
      const Offsets<A> both = __builtin_convertvector(words, Offsets<A>);
#endif
      offsets[v] = both & 0xff;
      offsets[v + 1] = both >> 8;
    }
  } else {
    for (int v = 0; v < N; ++v) offsets[v] = load_bytes<A>(p + v * L);
  }
}

// Positions [begin, end) along one dimension.
struct Range {
  int64_t begin, end;
};
// Of the window of output `o`, the positions inside of the input.
RF_INLINE Range positions(int64_t o, int64_t stride, int64_t pad, int64_t kernel, int64_t size) {
  const int64_t first = o * stride - pad;
  return {first < 0 ? -first : 0, size - first < kernel ? size - first : kernel};
}
// The outputs whose windows hold input `i`.
RF_INLINE Range windows(int64_t i, int64_t stride, int64_t pad, int64_t kernel, int64_t outputs) {
  const int64_t last = (i + pad) / stride;
  const int64_t before = i + pad - kernel;  // the last one that ends before i begins here at most
  return {before < 0 ? 0 : before / stride + 1, last < outputs ? last + 1 : outputs};
}

template <typename T> struct MaxPool {
  typedef Acc<T> A;
  typedef Vec<A> V;
  const MaxPoolParams& params;
  int64_t task_rows;

  // PyTorch's rule: from the first position inside, in the order of rows, then columns, takes what is larger or
  // NaN.
  template <typename B>
  void forward_pixel(int64_t first, int64_t output, Range rows, Range columns, int64_t channel, B block) const {
    constexpr int N = B::kCount;
    const ConvGeometry& g = params.g;
    const T* x = static_cast<const T*>(params.x) + channel;
    V best[N];
    Offsets<A> taken[N];
    block.load(x + (first + rows.begin * g.w + columns.begin) * g.c, best);
    for (int v = 0; v < N; ++v) taken[v] = splat_offset<A>(rows.begin * g.s + columns.begin);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t s = columns.begin; s < columns.end; ++s) {
        V value[N];
        block.load(x + (first + r * g.w + s) * g.c, value);
        const Offsets<A> offset = splat_offset<A>(r * g.s + s);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
          const auto larger = (value[v] > best[v]) | (value[v] != value[v]);
          best[v] = larger ? value[v] : best[v];
          taken[v] = larger ? offset : taken[v];
        }
      }
    }
    block.store(static_cast<T*>(params.y) + output * g.c + channel, best);
    store_offsets(block, params.offsets + output * g.c + channel, taken);
  }

  // Rows of the output.
  static void forward(int64_t index, void* context) {
    const MaxPool& job = *static_cast<const MaxPool*>(context);
    const ConvGeometry& g = job.params.g;
    const int64_t begin = index * job.task_rows, rows = g.n * g.p;
    const int64_t end = begin + job.task_rows < rows ? begin + job.task_rows : rows;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / g.p, p = row % g.p;
      const Range r = positions(p, g.stride_h, g.pad_h, g.r, g.h);
      for (int64_t q = 0; q < g.q; ++q) {
        const Range s = positions(q, g.stride_w, g.pad_w, g.s, g.w);
        // The pixel of position (0, 0) of the window; may lie outside.
        const int64_t first = (image * g.h + p * g.stride_h - g.pad_h) * g.w + q * g.stride_w - g.pad_w;
        for_each_block<T>(g.c, [&](auto block, int64_t channel, int64_t) __attribute__((always_inline)) {
          job.forward_pixel(first, row * g.q + q, r, s, channel, block);
        });
      }
    }
  }

  template <typename B>
  void backward_pixel(int64_t image, int64_t h, int64_t w, Range rows, Range columns, int64_t channel, B block) const {
    constexpr int N = B::kCount;
    const ConvGeometry& g = params.g;
    V sum[N] = {};
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const int64_t r = h + g.pad_h - p * g.stride_h;
      for (int64_t q = columns.begin; q < columns.end; ++q) {
        const int64_t at = ((image * g.p + p) * g.q + q) * g.c + channel;
        const Offsets<A> here = splat_offset<A>(r * g.s + w + g.pad_w - q * g.stride_w);
        V gradient[N];
        Offsets<A> taken[N];
        block.load(static_cast<const T*>(params.dy) + at, gradient);
        load_offsets(block, params.taken + at, taken);
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) sum[v] += taken[v] == here ? gradient[v] : V{};
      }
    }
    block.store(static_cast<T*>(params.dx) + ((image * g.h + h) * g.w + w) * g.c + channel, sum);
  }

  // Rows of the input.
  static void backward(int64_t index, void* context) {
    const MaxPool& job = *static_cast<const MaxPool*>(context);
    const ConvGeometry& g = job.params.g;
    const int64_t begin = index * job.task_rows, rows = g.n * g.h;
    const int64_t end = begin + job.task_rows < rows ? begin + job.task_rows : rows;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / g.h, h = row % g.h;
      const Range p = windows(h, g.stride_h, g.pad_h, g.r, g.p);
      for (int64_t w = 0; w < g.w; ++w) {
        const Range q = windows(w, g.stride_w, g.pad_w, g.s, g.q);
        for_each_block<T>(g.c, [&](auto block, int64_t channel, int64_t) __attribute__((always_inline)) {
          job.backward_pixel(image, h, w, p, q, channel, block);
        });
      }
    }
  }

  static void run(const MaxPoolParams& params, int64_t rows, int64_t columns, void (*task)(int64_t, void*)) {
    const int64_t row_bytes = columns * params.g.c * static_cast<int64_t>(sizeof(T));
    MaxPool job = {params, row_bytes < kTaskBytes ? kTaskBytes / row_bytes : 1};
    params.parallel.run(divide_up(rows, job.task_rows), task, &job);
  }
};

}  // namespace

template <typename T> void max_pool_forward(const MaxPoolParams& params) {
  const ConvGeometry& g = params.g;
  // Of the input, which the rows of an output row's windows come from.
  MaxPool<T>::run(params, g.n * g.p, g.stride_h * g.w, &MaxPool<T>::forward);
}

template <typename T> void max_pool_backward(const MaxPoolParams& params) {
  MaxPool<T>::run(params, params.g.n * params.g.h, params.g.w, &MaxPool<T>::backward);
}

template void max_pool_forward<float>(const MaxPoolParams&);
template void max_pool_forward<double>(const MaxPoolParams&);
template void max_pool_forward<bf16>(const MaxPoolParams&);
template void max_pool_backward<float>(const MaxPoolParams&);
template void max_pool_backward<double>(const MaxPoolParams&);
template void max_pool_backward<bf16>(const MaxPoolParams&);

}  // namespace RF_VARIANT
}  // namespace resnet_fused
