// The one way a kernel is launched, and the seam between a GPU and the emulator of tests/emulator.
//
// Kernels use CUDA's own names. Two things have none that g++ can compile: shared memory is declared with
// MODEPROBE_SHARED(name, type) or, where its size comes with the launch, MODEPROBE_DYNAMIC_SHARED(name,
// type), and vector accesses announce their alignment.
#pragma once

#include <cstdint>

#if defined(MODEPROBE_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

namespace modeprobe {
template <typename T>
using type_of = T;
}

#define MODEPROBE_SHARED(name, ...) __shared__::modeprobe::type_of<__VA_ARGS__> name
#define MODEPROBE_DYNAMIC_SHARED(name, ...)    \
  extern __shared__ uint4 modeprobe_dynamic[]; \
  auto* name = reinterpret_cast<__VA_ARGS__*>(modeprobe_dynamic)
#define MODEPROBE_CHECK_ALIGNED(pointer, bytes)
#endif

namespace modeprobe {

constexpr int kThreads = 256;  // per block, for every kernel
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

constexpr size_t kSharedWithoutAsking = 48 << 10;  // static and dynamic together

// What does not change while a process lives, asked once for each device: of a kernel (null: of the device)
// the answer to `question`. A small layer takes the GPU less time than the runtime takes for three of them.
// Only answers > 0 are kept.
template <typename Ask>
int remembered(const void* kernel, int question, const Ask& ask) {
#if defined(MODEPROBE_EMULATOR)
  return ask(0);
#else
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int>, int> answers;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const std::tuple<const void*, int, int> about{kernel, question, device};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = answers.find(about);
  if (found != answers.end()) return found->second;
  const int answer = ask(device);
  if (answer > 0) answers.emplace(about, answer);
  return answer;
#endif
}

// What the current device says, or `otherwise` where it cannot be asked.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  const int found = remembered(nullptr, int(attribute), [=](int device) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
  });
  return found > 0 ? found : otherwise;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, 1); }
inline int shared_bytes_per_block() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, int(kSharedWithoutAsking));
}

// With `shared_bytes` of dynamic shared memory, beside less than `static_bytes` of static. Errors are those
// of the launch itself; those of the kernel come with the next synchronisation, as everywhere in CUDA.
template <typename... Params, typename... Args>
cudaError_t launch_with_shared(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                               size_t static_bytes, cudaStream_t stream, Args... args) {
  if (block.x * block.y * block.z > kThreads) return cudaErrorInvalidConfiguration;
#if defined(MODEPROBE_EMULATOR)
  return emulator::launch(kernel, grid, block, shared_bytes, Params(args)...);
#else
  if (shared_bytes + static_bytes > kSharedWithoutAsking) {
    // As much as there can be, always: another thread may be about to launch the kernel with more than this.
    const int most = shared_bytes_per_block() - int(static_bytes);
    cudaError_t status = cudaSuccess;
    remembered(reinterpret_cast<const void*>(kernel), most, [&](int) {
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
      return status == cudaSuccess;
    });
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
#endif
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
  return launch_with_shared(kernel, grid, block, 0, 0, stream, args...);
}

// For a kernel that does one item per thread.
inline unsigned blocks_for(int64_t items) { return unsigned((items + kThreads - 1) / kThreads); }

// Blocks of a kernel that reside on a multiprocessor together, no more than `most`. A grid of a few more than
// the GPU holds would end in a wave that leaves most of it idle.
template <typename... Params>
int resident_blocks(void (*kernel)(Params...), int most) {
#if !defined(MODEPROBE_EMULATOR)
  const int found = remembered(reinterpret_cast<const void*>(kernel), kThreads, [=](int) {
    int blocks = 0;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0) == cudaSuccess ? blocks
                                                                                                      : 0;
  });
  if (found > 0) return found < most ? found : most;
#endif
  return most;
}

}  // namespace modeprobe
