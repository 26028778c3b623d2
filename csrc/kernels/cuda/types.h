// Element types of activations, and their conversions: PTX on the device, bit arithmetic in the emulator.
#pragma once

#include "platform.h"

namespace resnet_fused {
namespace cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <typename T> constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

struct alignas(16) Chunk {
  uint32_t word[4];
};

#ifdef RF_EMULATE
inline float bits_to_float(uint32_t bits) { return emulator::bits_to_float(bits); }
inline uint32_t float_to_bits(float value) { return emulator::float_to_bits(value); }
#elif defined(__CUDACC__)
__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }
#endif

#if defined(__CUDACC__) || defined(RF_EMULATE)

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bfloat16 value) {
  return bits_to_float(uint32_t{value.bits} << 16);
}
__device__ __forceinline__ float to_float(float16 value) {
#ifdef RF_EMULATE
  return emulator::half_to_float(value.bits);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#endif
}

// To the nearest, ties to even.
template <typename T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float value) {
#ifdef RF_EMULATE
  return {emulator::float_to_bfloat16(value)};
#else
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#endif
}
template <> __device__ __forceinline__ float16 from_float<float16>(float value) {
#ifdef RF_EMULATE
  return {emulator::float_to_half(value)};
#else
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#endif
}

// Two elements of a 32-bit word; the first in the low half.
template <typename T> __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  return uint32_t{from_float<T>(low).bits} | uint32_t{from_float<T>(high).bits} << 16;
}
#ifndef RF_EMULATE
template <> __device__ __forceinline__ uint32_t pack_pair<bfloat16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <> __device__ __forceinline__ uint32_t pack_pair<float16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
#endif

template <typename T> __device__ __forceinline__ void unpack(const Chunk& chunk, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = bits_to_float(chunk.word[i]);
    } else {
      out[2 * i] = to_float(T{static_cast<uint16_t>(chunk.word[i])});
      out[2 * i + 1] = to_float(T{static_cast<uint16_t>(chunk.word[i] >> 16)});
    }
  }
}

template <typename T> __device__ __forceinline__ Chunk pack(const float* in) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      chunk.word[i] = float_to_bits(in[i]);
    else
      chunk.word[i] = pack_pair<T>(in[2 * i], in[2 * i + 1]);
  }
  return chunk;
}

// V elements, loaded at once where they fill 16 bytes (at an aligned place), else one by one; kept as they
// are in memory until they are read: half the registers.
template <typename T, int V> struct Packed {
  T element[V];
  __device__ __forceinline__ void load(const T* at) {
#pragma unroll
    for (int i = 0; i < V; ++i) element[i] = at[i];
  }
  __device__ __forceinline__ float operator[](int i) const { return to_float(element[i]); }
};
template <typename T>
  requires(sizeof(T) == 2)
struct Packed<T, 8> {
  Chunk chunk;
  __device__ __forceinline__ void load(const T* at) { chunk = *reinterpret_cast<const Chunk*>(at); }
  __device__ __forceinline__ float operator[](int i) const {
    return to_float(T{static_cast<uint16_t>(chunk.word[i / 2] >> (i % 2 * 16))});
  }
};
template <> struct Packed<float, 4> {
  Chunk chunk;
  __device__ __forceinline__ void load(const float* at) { chunk = *reinterpret_cast<const Chunk*>(at); }
  __device__ __forceinline__ float operator[](int i) const { return bits_to_float(chunk.word[i]); }
};

template <typename T, int V> __device__ __forceinline__ void load(const T* at, float* out) {
  Packed<T, V> packed;
  packed.load(at);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = packed[i];
}

template <typename T, int V> __device__ __forceinline__ void store(T* at, const float* in) {
  if constexpr (V == kChunk<T>) {
    *reinterpret_cast<Chunk*>(at) = pack<T>(in);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) at[i] = from_float<T>(in[i]);
  }
}

// Eight elements at a place that is a multiple of 16 bytes.
template <typename T> __device__ __forceinline__ void load8(const T* at, float* out) {
#pragma unroll
  for (int j = 0; j < 8; j += kChunk<T>) load<T, kChunk<T>>(at + j, out + j);
}
template <typename T> __device__ __forceinline__ void store8(T* at, const float* in) {
#pragma unroll
  for (int j = 0; j < 8; j += kChunk<T>) store<T, kChunk<T>>(at + j, in + j);
}

// As the next reader will see it.
template <typename T> __device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

// act(z) = z > 0 ? z : slope*z. NaN stays NaN; with slope 0, -inf gives 0 and not NaN.
__device__ __forceinline__ float activate(float z, float slope) {
  return z <= 0.0f ? (slope == 0.0f ? 0.0f : slope * z) : z;
}
// d * act'(z); with slope 0 it is 0 whatever d is.
__device__ __forceinline__ float activate_backward(float d, float z, float slope) {
  return z > 0.0f ? d : (slope == 0.0f ? 0.0f : slope * d);
}

#endif

}  // namespace cuda
}  // namespace resnet_fused
