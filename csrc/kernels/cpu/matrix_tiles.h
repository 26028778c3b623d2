// The CPU's matrix tiles (Intel AMX): 16 rows of 64 bytes, in which one instruction adds to 16 x 16 float32 sums the products
// of 16 x 32 by 32 x 16 values of bfloat16. A row of the left operand are 32 channels of one pixel, or pixels of one channel; of
// the right one, pairs of them for 16 outputs: the layouts of bf16_pairs.h, so tiles are loaded from where pairs are multiplied.
// Products are added up in float32, 16 of each parity first, then these to the sum; as with vdpbf16ps denormals are 0.
#pragma once

#include "simd.h"

namespace resnet_fused {
namespace RF_VARIANT {

#if RF_LEVEL >= 4
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileLefts = 2 * kTileRows;  // rows of both left operands
constexpr int64_t kTileUnits = 16;  // pairs in a row of the left operand, rows of the right one: at most

// Sums are tiles 0 to 3; 4 and 5 the left operands, 6 and 7 the right ones.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// Before tiles are loaded: what was stored is in memory. GCC's names for the loads (12's at least) do not tell it that they read
// any, and of a configuration only 8 bytes.
RF_INLINE void memory_to_tiles(const void* p = nullptr) { __asm__ volatile("" ::"r"(p) : "memory"); }

// Sets the calling thread's tiles for products of `units` pairs at a time, until _tile_release(). The library that PyTorch
// convolves with sets them anew, as this does.
RF_INLINE void use_tiles(int64_t units) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? units * 4 : 64);
    config.rows[i] = uint8_t(i < 6 ? kTileRows : units);
  }
  memory_to_tiles(&config);
  _tile_loadconfig(&config);
}

// A number as a type, for a lambda's template argument.
template <int kValue> struct Number {
  static constexpr int value = kValue;
};

// sums[2][NV] += left[a] * right[v], one step of the reduction: what is given are addresses, and the bytes between rows. With one
// right operand the sums are kept twice (kCopy): alone they would wait for the products before.
template <int NV, int kCopy>
RF_INLINE void multiply_tiles(const void* left0, const void* left1, int64_t left_step, const void* right0, const void* right1,
                              int64_t right_step) {
  _tile_loadd(4, left0, left_step);
  _tile_loadd(6, right0, right_step);
  _tile_loadd(5, left1, left_step);
  if constexpr (NV == 2) {
    _tile_loadd(7, right1, right_step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  } else if constexpr (kCopy == 0) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
  } else {
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(3, 5, 6);
  }
}

// What a sum begins with, or load_tiles.
RF_INLINE void zero_tiles() {
  memory_to_tiles();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// The sums into `to`, 32 rows of NV vectors.
template <int NV> RF_INLINE void store_tiles(float* to) {
  constexpr int64_t L = kLanes<float>, kStep = NV * L * int64_t(sizeof(float)), kHalf = kTileRows * NV * L;
  _tile_stored(0, to, kStep);
  _tile_stored(2, to + kHalf, kStep);
  if constexpr (NV == 2) {
    _tile_stored(1, to + L, kStep);
    _tile_stored(3, to + kHalf + L, kStep);
  } else {
    alignas(64) float copy[2 * kTileRows * L];
    _tile_stored(1, copy, kStep);
    _tile_stored(3, copy + kHalf, kStep);
    for (int64_t i = 0; i < 2 * kTileRows * L; i += L) store(to + i, load(to + i) + load(copy + i));
  }
}
#endif

}  // namespace RF_VARIANT
}  // namespace resnet_fused
