// How large outputs meet the memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace modeprobe::cpu {

inline int64_t bytes_of(const torch::stable::Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

// The first write to fresh memory costs a page fault every 4 KB, more than the pass of arithmetic that does
// it; from 4 MB on the kernel is asked for pages of 2 MB, as NumPy asks. A wish: what it answers changes
// nothing.
inline void wish_large_pages(const torch::stable::Tensor& output) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t large = int64_t{1} << 22;
  constexpr uintptr_t page = 4096;
  if (bytes_of(output) < large) return;
  const auto begin = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t length = (begin + static_cast<uintptr_t>(bytes_of(output)) - first) / page * page;
  madvise(reinterpret_cast<void*>(first), length, MADV_HUGEPAGE);
#endif
}

// Like torch's empty_like().
inline torch::stable::Tensor empty_output(const torch::stable::Tensor& like) {
  torch::stable::Tensor output = torch::stable::empty_like(like);
  wish_large_pages(output);
  return output;
}

// Stores past the caches are seen by other threads after this.
inline void drain() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Whether an output is so large that it has left the caches before it is read again.
inline bool leaves_caches(const torch::stable::Tensor& output) {
  return bytes_of(output) >= int64_t{1} << 24;
}

}  // namespace modeprobe::cpu
