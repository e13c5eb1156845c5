// One pass over a tensor of channels in units of neighbouring elements, by blocks that do not stay: where the
// units of a thread lie, and which channels theirs are.
#pragma once

#include <algorithm>
#include <numeric>

#include "channels.cuh"
#include "divisor.cuh"

namespace modeprobe {

// Contiguous tensors up to here are divided in 31 bits, larger ones block by block in 64.
#if defined(MODEPROBE_EMULATOR)
constexpr int64_t kSmallElements = 4096;  // so that tests take both ways
#else
constexpr int64_t kSmallElements = Divisor::kMost;
#endif

// How a tensor is cut into units, from `count` neighbouring elements each.
struct UnitCut {
  int64_t elements;
  bool aligned;  // every unit begins at a 16-byte border of all tensors
  // Contiguous: a position's row of s elements, and that row's channel.
  bool small;
  Divisor s, c;
  // Channels last: the tensor as rows of `columns` units, after which the channels of a unit come again.
  int64_t columns;
  Divisor groups;  // blocks side by side
  bool even;       // a row of units is one of the tensor
};

// The units of a thread: `at` of the first, `step` from one to the next.
template <int count, int units, bool channels_last>
struct Units {
  int64_t at, step, end;
  bool whole, aligned;  // whole: all units of the block exist, and are aligned
  int64_t column;       // channels last

  __device__ __forceinline__ explicit Units(const UnitCut& cut)
      : end(cut.elements), aligned(cut.aligned), column(0) {
    int64_t end_of_block;
    // From the end: what the reduction before has read last is still in the L2 cache. On an H100 1% of the
    // time of a forward pass over 411 MB, 5% over 51 MB.
    const uint32_t block = gridDim.x - 1 - blockIdx.x;
    if constexpr (channels_last) {
      const uint32_t tile = cut.groups.quotient(block), group = block - tile * cut.groups.value;
      const int64_t row = int64_t(tile) * units * blockDim.y, line = cut.columns * count;
      column = int64_t(group) * blockDim.x + threadIdx.x;
      at = (row + threadIdx.y) * line + column * count;
      step = blockDim.y * line;
      end_of_block = (row + int64_t(units) * blockDim.y) * line;
      if (column >= cut.columns) at = end;
    } else {
      const int64_t begin = int64_t(block) * (kThreads * units * count);
      at = begin + threadIdx.x * count;
      step = kThreads * count;
      end_of_block = begin + kThreads * units * count;
    }
    whole = aligned && end_of_block <= end;
  }
  __device__ __forceinline__ bool none() const { return at >= end; }
  __device__ __forceinline__ int64_t position(int k) const { return at + k * step; }
  // Whether the k-th unit exists, and can be accessed 16 bytes at a time.
  __device__ __forceinline__ bool has(int k) const { return whole || position(k) < end; }
  __device__ __forceinline__ bool is_whole(int k) const {
    return whole || (aligned && position(k) + count <= end);
  }

  template <typename T>
  __device__ __forceinline__ void load(const T* from, Raw<T, count> (&raw)[units]) const {
    if (!from) return;
    if (whole) {
#pragma unroll
      for (int k = 0; k < units; ++k) raw[k].load(from, position(k), end, true);
    } else {
#pragma unroll
      for (int k = 0; k < units; ++k)
        if (has(k)) raw[k].load(from, position(k), end, is_whole(k));
    }
  }
};

// Where a contiguous unit's channels lie.
struct UnitChannels {
  const UnitCut& cut;
  uint32_t column, channel;  // of the block's first element, where positions need 64 bits
  int64_t origin;

  __device__ __forceinline__ UnitChannels(const UnitCut& cut, int64_t begin)
      : cut(cut), column(0), channel(0), origin(0) {
    if (cut.small) return;
    origin = begin;
    column = uint32_t(begin % cut.s.value);
    channel = uint32_t(begin / cut.s.value % cut.c.value);
  }

  // Calls apply(first, channel) for each channel of the `count` elements from `at` on: lanes from `first` on
  // are that channel's until the next call. Almost always once, with first a constant 0.
  template <int count, typename Apply>
  __device__ __forceinline__ void each(int64_t at, Apply&& apply) const {
    const uint32_t from = column + uint32_t(at - origin), row = cut.s.quotient(from);
    uint32_t c = cut.c.rest(channel + row);
    apply(std::integral_constant<int, 0>{}, c);
    for (uint32_t first = cut.s.value - (from - row * cut.s.value); first < count; first += cut.s.value) {
      c = c + 1 == cut.c.value ? 0 : c + 1;
      apply(int(first), c);
    }
  }
};

// Those of a column of units with channels last.
template <int count>
__device__ __forceinline__ ChannelRun channels_of(const UnitCut& cut, const Layout& layout, int64_t column) {
  const int64_t first = column * count;
  return {cut.even ? first : first % layout.c, layout.c, !cut.even};
}

struct UnitLaunch {
  dim3 grid, block;
  UnitCut cut;
};

// count: elements of a unit; units: of a thread.
template <typename T, typename... Pointers>
UnitLaunch unit_launch(const Layout& layout, bool channels_last, int count, int units, Pointers... tensors) {
  UnitCut cut{};
  cut.elements = layout.elements();
  cut.aligned = ((reinterpret_cast<uintptr_t>(tensors) % kPacketBytes == 0) && ...);
  // At least one block: an empty tensor has statistics to write.
  const auto blocks = [](int64_t items, int64_t per_block) {
    return std::max<int64_t>(1, (items + per_block - 1) / per_block);
  };
  if (!channels_last) {
    cut.small = cut.elements <= kSmallElements;
    cut.s = Divisor(uint32_t(std::max<int64_t>(1, layout.s)));
    cut.c = Divisor(uint32_t(std::max<int64_t>(1, layout.c)));
    return {dim3(unsigned(blocks(cut.elements, int64_t{kThreads} * units * count))), dim3(kThreads), cut};
  }
  cut.columns = std::max<int64_t>(1, layout.c / std::gcd(layout.c, int64_t(count)));
  cut.even = layout.c % count == 0;
  const unsigned x = power_of_two_at_least(cut.columns, kWarp), y = kThreads / x;
  const int64_t line = cut.columns * count, groups = blocks(cut.columns, x),
                tiles = blocks(blocks(cut.elements, line), int64_t{y} * units);
  cut.groups = Divisor(uint32_t(groups));
  return {dim3(unsigned(groups * tiles)), dim3(x, y), cut};
}

}  // namespace modeprobe
