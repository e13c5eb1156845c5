// The one way a kernel is launched, and the seam between a GPU and the emulator of tests/emulator.
//
// Kernels use CUDA's own names. Two things have none that g++ can compile: static shared memory is declared
// with MODEPROBE_SHARED(name, type), and vector accesses announce their alignment.
#pragma once

#include <cstdint>

#if defined(MODEPROBE_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace modeprobe {
template <typename T>
using type_of = T;
}

#define MODEPROBE_SHARED(name, ...) __shared__::modeprobe::type_of<__VA_ARGS__> name
#define MODEPROBE_CHECK_ALIGNED(pointer, bytes)
#endif

namespace modeprobe {

constexpr int kThreads = 256;  // per block, for every kernel
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Errors of the launch itself; those of the kernel come with the next synchronisation, as everywhere in CUDA.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
  if (block.x * block.y * block.z > kThreads) return cudaErrorInvalidConfiguration;
#if defined(MODEPROBE_EMULATOR)
  return emulator::launch(kernel, grid, block, Params(args)...);
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
#endif
}

// Multiprocessors of the current device; 1 where it cannot be asked.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 1;
  return count > 0 ? count : 1;
}

// Blocks for a grid-stride loop over `items`, one per thread and step: no more than stay resident.
inline unsigned grid_stride_blocks(int64_t items, int resident_per_multiprocessor) {
  const int64_t wanted = (items + kThreads - 1) / kThreads;
  const int64_t most = int64_t(multiprocessors()) * resident_per_multiprocessor;
  return unsigned(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace modeprobe
