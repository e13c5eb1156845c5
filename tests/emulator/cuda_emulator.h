// CUDA's names for g++: what launch.cuh includes instead of the CUDA runtime. See scheduler.h for the
// machine.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::emulator::current()->thread)
#define blockIdx (::emulator::current()->block->index)
#define blockDim (::emulator::current()->block->grid->block_dim)
#define gridDim (::emulator::current()->block->grid->grid_dim)

// One object per block and place in the source; it starts as NaN.
#define MODEPROBE_SHARED(name, ...)                                  \
  auto& name = ::emulator::shared<__VA_ARGS__>([]() -> const void* { \
    static const char site = 0;                                      \
    return &site;                                                    \
  }())

#define MODEPROBE_DYNAMIC_SHARED(name, ...) \
  auto* name = static_cast<__VA_ARGS__*>(::emulator::dynamic_shared())

#define MODEPROBE_CHECK_ALIGNED(pointer, bytes) ::emulator::check_aligned(pointer, bytes)

using emulator::dim3;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
using cudaStream_t = void*;

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Few, so that small inputs already take several steps of a grid-stride loop.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::settings().multiprocessors : 227 << 10;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

namespace emulator {

template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 grid_dim, dim3 block_dim, size_t dynamic_bytes,
                   std::type_identity_t<Params>... args) {
  Grid grid{grid_dim, block_dim, [=] { kernel(args...); }, kernel_name(reinterpret_cast<void*>(kernel)),
            dynamic_bytes};
  run(grid, false);
  return cudaSuccess;
}

// With `dynamic_bytes` of extern shared memory, and all blocks resident at once.
template <typename... Params>
cudaError_t launch_cooperative(void (*kernel)(Params...), dim3 grid_dim, dim3 block_dim, size_t dynamic_bytes,
                               std::type_identity_t<Params>... args) {
  Grid grid{grid_dim, block_dim, [=] { kernel(args...); }, kernel_name(reinterpret_cast<void*>(kernel)),
            dynamic_bytes};
  run(grid, true);
  return cudaSuccess;
}

}  // namespace emulator

struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline void __stwb(uint4* to, uint4 value) {
  emulator::check_aligned(to, 16);
  memcpy(to, &value, sizeof(value));
}

// Asynchronous copies are made when their group is waited for, and not before.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulator::current()->copies.push_back({to, from, bytes, 0});
}
inline void __pipeline_commit() {
  for (auto& copy : emulator::current()->copies) ++copy.groups_since;
}
inline void __pipeline_wait_prior(size_t pending) {
  std::erase_if(emulator::current()->copies, [&](const emulator::Copy& copy) {
    if (copy.groups_since <= pending) return false;
    memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

template <typename T>
T __ldcg(const T* from) {
  emulator::check_aligned(from, sizeof(T));
  return *from;
}

// Narrow types: storage and conversions only, as kernels never calculate in them.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half x) { return float(std::bit_cast<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) { return {std::bit_cast<uint16_t>(_Float16(x))}; }
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

// Barriers.
inline void __syncthreads(emulator::Site site = emulator::Site::current()) {
  emulator::block_barrier(site, 0);
}
inline int __syncthreads_count(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::block_barrier(site, predicate != 0);
}
inline int __syncthreads_or(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::block_barrier(site, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::block_barrier(site, predicate == 0) == 0;
}
inline void __syncwarp(uint32_t mask = ~0u, emulator::Site site = emulator::Site::current()) {
  emulator::exchange(site, mask, 0);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Shuffles, votes and reductions over the lanes of `mask`.
namespace emulator {

template <typename T>
T shuffle(Site site, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const Exchange all = exchange(site, mask, bits);
  check_active(site, mask, source);
  memcpy(&value, &all.value[source], sizeof(T));
  return value;
}

inline int segment(int width) { return lane() & ~(width - 1); }

template <typename Combine>
uint32_t reduce(Site site, uint32_t mask, uint32_t value, Combine combine) {
  const Exchange all = exchange(site, mask, value);
  bool first = true;
  uint32_t result = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) continue;
    result = first ? uint32_t(all.value[i]) : combine(result, uint32_t(all.value[i]));
    first = false;
  }
  return result;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              emulator::Site site = emulator::Site::current()) {
  return emulator::shuffle(site, mask, value, emulator::segment(width) + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32,
                  emulator::Site site = emulator::Site::current()) {
  const int source = emulator::lane() ^ bits;
  const bool inside = source < emulator::segment(width) + width;
  return emulator::shuffle(site, mask, value, inside ? source : emulator::lane());
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32,
                   emulator::Site site = emulator::Site::current()) {
  const int source = emulator::lane() + delta;
  const bool inside = source < emulator::segment(width) + width;
  return emulator::shuffle(site, mask, value, inside ? source : emulator::lane());
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32,
                 emulator::Site site = emulator::Site::current()) {
  const int source = emulator::lane() - delta;
  return emulator::shuffle(site, mask, value, source >= emulator::segment(width) ? source : emulator::lane());
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::current()) {
  const auto all = emulator::exchange(site, mask, predicate != 0);
  uint32_t votes = 0;
  for (int i = 0; i < emulator::kWarpSize; ++i) votes |= uint32_t(mask >> i & all.value[i] & 1) << i;
  return votes;
}
inline int __any_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value,
                                  emulator::Site site = emulator::Site::current()) {
  return emulator::reduce(site, mask, value, [](uint32_t a, uint32_t b) { return a + b; });
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value,
                                  emulator::Site site = emulator::Site::current()) {
  return emulator::reduce(site, mask, value, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value,
                                 emulator::Site site = emulator::Site::current()) {
  return emulator::reduce(site, mask, value, [](uint32_t a, uint32_t b) { return a | b; });
}

// Atomics: fibers only change at barriers and shuffles, so plain operations are atomic.
template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
  const unsigned old = *at;
  *at = old >= limit ? 0 : old + 1;
  return old;
}
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  const T old = *at;
  if (old == expected) *at = value;
  return old;
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at |= value;
  return old;
}
