// Where the channels of a tensor lie in memory, and how threads walk through it.
#pragma once

#include "mask.cuh"
#include "vector.cuh"

namespace modeprobe {

// Contiguous (N, C, S): element (n, c, s) at (n * C + c) * S + s. Channels last (and (N, C), where both are
// the same): S = 1 and N counts the pixels of all images.
struct Layout {
  int64_t n, c, s;

  MODEPROBE_HD int64_t elements() const { return n * c * s; }
  MODEPROBE_HD int64_t per_channel() const { return n * s; }
};

// `count` elements from position `at` on, those from `end` on as zero; 16 bytes at a time where `whole`.
template <typename T, int count>
__device__ __forceinline__ void load_at(const T* from, int64_t at, int64_t end, bool whole, acc_t<T>* out) {
  if constexpr (count % kPacket<T> == 0) {
    if (whole) return load_elements<T, count>(from + at, out);
  }
#pragma unroll
  for (int i = 0; i < count; ++i) out[i] = at + i < end ? widen(from[at + i]) : acc_t<T>(0);
}

template <typename T, int count>
__device__ __forceinline__ void store_at(T* to, int64_t at, int64_t end, bool whole, const acc_t<T>* in) {
  if constexpr (count % kPacket<T> == 0) {
    if (whole) return store_elements<T, count>(to + at, in);
  }
#pragma unroll
  for (int i = 0; i < count; ++i)
    if (at + i < end) to[at + i] = narrow<T>(in[i]);
}

// A parameter or buffer, held in the accumulate type or in the data's own; null where absent.
template <typename T>
struct Parameter {
  void* data;
  bool wide;

  __device__ __forceinline__ acc_t<T> load(int64_t i) const {
    return wide ? static_cast<const acc_t<T>*>(data)[i] : widen(static_cast<const T*>(data)[i]);
  }
  __device__ __forceinline__ acc_t<T> load_or(int64_t i, acc_t<T> absent) const {
    return data ? load(i) : absent;
  }
  __device__ __forceinline__ void store(int64_t i, acc_t<T> value) const {
    if (wide)
      static_cast<acc_t<T>*>(data)[i] = value;
    else
      static_cast<T*>(data)[i] = narrow<T>(value);
  }
};

// The channel of a position that moves by a fixed stride: additions with carry instead of divisions.
struct Cursor {
  uint32_t column, channel;            // column: position within the row of s elements
  uint32_t column_step, channel_step;  // of one stride

  __device__ __forceinline__ Cursor(const Layout& layout, int64_t at, int64_t stride)
      : column(uint32_t(at % layout.s)),
        channel(uint32_t(at / layout.s % layout.c)),
        column_step(uint32_t(stride % layout.s)),
        channel_step(uint32_t(stride / layout.s % layout.c)) {}

  __device__ __forceinline__ void advance(const Layout& layout) {
    column += column_step;
    channel += channel_step;
    if (column >= layout.s) {
      column -= uint32_t(layout.s);
      ++channel;
    }
    if (channel >= layout.c) channel -= uint32_t(layout.c);
  }

  // The channel of the element `lane` further on.
  __device__ __forceinline__ uint32_t channel_of(const Layout& layout, int lane) const {
    uint32_t at = column + lane, found = channel;
    while (at >= layout.s) {
      at -= uint32_t(layout.s);
      found = found + 1 == layout.c ? 0 : found + 1;
    }
    return found;
  }
};

}  // namespace modeprobe
