// Runs CUDA kernels on the CPU, one block at a time, every thread of it a fiber: the kernels' own source,
// with its barriers, asynchronous copies, ldmatrix and mma.sync. What it checks beyond the results:
//   * shared memory starts as NaN and ends at a page that cannot be touched;
//   * all threads of a block reach the same barriers, all lanes of a warp the same warp-wide instructions;
//   * results do not depend on the order in which warps and lanes run between barriers, nor on whether an
//   asynchronous
//     copy happens at once or as late as its wait allows (set_schedule): what a missing barrier or wait would
//     break.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace resnet_fused {
namespace emulator {

extern dim3 thread_index, block_index, block_size, grid_size;

// order 0: forwards, 1: backwards, else a random one. late: copies happen when they are waited for.
void set_schedule(int order, bool late);
// Raises where a launch asks for more shared memory than its kernel may have.
void allow_shared(size_t most, size_t asked);
void run(dim3 grid, int threads, size_t shared, const std::function<void()>& kernel);
int64_t launches();        // so far
int64_t largest_shared();  // bytes that a launch has asked for since the last call

char* shared_memory();
void barrier();
// Every lane of the warp gives `bytes` bytes and gets all 32 lanes' after each other.
const char* exchange(const void* mine, size_t bytes);

void copy_async(void* to, const void* from, bool wanted);
void copy_commit();
void copy_wait_for(int groups);
template <int N> void copy_wait() { copy_wait_for(N); }

void ldmatrix(uint32_t* r, const void* at);
void ldmatrix_transposed(uint32_t* r, const void* at);
void mma_16bit(float* d, const uint32_t* a, const uint32_t* b, bool is_bfloat16);
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b);
uint32_t round_tf32(uint32_t bits);

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
uint16_t float_to_bfloat16(float value);

}  // namespace emulator
}  // namespace resnet_fused

#define threadIdx ::resnet_fused::emulator::thread_index
#define blockIdx ::resnet_fused::emulator::block_index
#define blockDim ::resnet_fused::emulator::block_size
#define gridDim ::resnet_fused::emulator::grid_size
inline void __syncthreads() { resnet_fused::emulator::barrier(); }
// Blocks run one after another and see all that was written before.
inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at += value;
  return before;
}
