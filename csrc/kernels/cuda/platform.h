// What a kernel file is compiled with: the CUDA runtime under nvcc; under RF_EMULATE, with a plain C++
// compiler, the emulator of the tests (tests/cuda_emulator), which runs the same source one block at a time
// on the CPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef RF_EMULATE
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif

#if defined(__CUDACC__) || defined(RF_EMULATE)
#define RF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RF_HOST_DEVICE inline
#endif
