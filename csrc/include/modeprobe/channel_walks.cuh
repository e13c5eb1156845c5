// How the threads of a reduction walk through one channel of a contiguous tensor, or through several with
// channels last.
#pragma once

#include "channels.cuh"

namespace modeprobe {

// Eight positions, those of one channel among them as bits.
struct Unit {
  static constexpr uint32_t kWhole = (1u << kLanesPerChunk) - 1;
  int64_t at;
  uint32_t bits;

  __device__ __forceinline__ bool empty() const { return bits == 0; }
  __device__ __forceinline__ bool whole() const { return bits == kWhole; }
  __device__ __forceinline__ bool has(int i) const { return bits >> i & 1; }
  // Whether all eight positions lie before `end`.
  __device__ __forceinline__ bool inside(int64_t end) const { return whole() || at + kLanesPerChunk <= end; }
};

// Calls add(i) for the unit's positions. Nearly all units are whole: one branch then, not one per position.
template <typename Add>
__device__ __forceinline__ void for_positions(const Unit& unit, Add&& add) {
  if (unit.whole()) {
#pragma unroll
    for (int i = 0; i < kLanesPerChunk; ++i) add(i);
  } else {
#pragma unroll
    for (int i = 0; i < kLanesPerChunk; ++i)
      if (unit.has(i)) add(i);
  }
}

// Walks the rows of one channel of a contiguous tensor, chunk by chunk, without a division or a product of 64
// bits per step, and within a row without a look at its ends: a reduction of 16-bit data has few instructions
// per element before they, not the memory, set its pace.
struct RowWalk {
  int64_t start, row, row_step;  // the row's first element; from one row to the next; of one stride
  uint32_t chunk, chunk_step, chunks, inner, length;
  uint32_t left;  // units

  // Chunks that can overlap a row of s elements, wherever it begins.
  __device__ __forceinline__ RowWalk(const Layout& layout, int64_t channel)
      : row(layout.c * layout.s),
        chunks(uint32_t((layout.s + 2 * kLanesPerChunk - 2) / kLanesPerChunk)),
        inner(chunks > 3 ? chunks - 3 : 0),
        length(uint32_t(layout.s)) {
    const uint32_t item = blockIdx.y * kThreads + threadIdx.y, stride = gridDim.y * kThreads;
    start = item / chunks * row + channel * layout.s;
    chunk = item % chunks;
    row_step = stride / chunks * row;
    chunk_step = stride % chunks;
    const int64_t units = layout.n * chunks - item;
    left = units > 0 ? uint32_t((units + stride - 1) / stride) : 0;
  }
  __device__ __forceinline__ bool done() const { return left == 0; }
  __device__ __forceinline__ uint32_t head() const { return uint32_t(start) % kLanesPerChunk; }
  // The first element on the way, or `otherwise`.
  template <typename T>
  __device__ __forceinline__ acc_t<T> first(const T* x, acc_t<T> otherwise) const {
    const uint32_t begin = chunk * kLanesPerChunk, skipped = begin > head() ? begin - head() : 0;
    return !done() && skipped < length ? widen(x[start + skipped]) : otherwise;
  }
  __device__ __forceinline__ Unit next() {
    --left;
    const uint32_t head = this->head();
    Unit unit{int64_t(start - head + uint64_t{chunk} * kLanesPerChunk), Unit::kWhole};
    if (chunk - 1 >= inner) {  // the first of a row, or one of its last two
      const uint32_t first = chunk == 0 ? head : 0;
      const int to_end = int(head + length - chunk * kLanesPerChunk);
      const uint32_t last = to_end < 0 ? 0 : to_end < kLanesPerChunk ? uint32_t(to_end) : kLanesPerChunk;
      unit.bits = last > first ? (1u << last) - (1u << first) : 0;
    }
    chunk += chunk_step;
    start += row_step;
    if (chunk >= chunks) {
      chunk -= chunks;
      start += row;
    }
    return unit;
  }
};

// Calls add(raw, unit, whole) for the units of a walk over tensors of one layout, `units` of which are on
// their way together. raw: the unit's elements of each tensor; whole: they may be accessed 16 bytes at a
// time.
template <int units, typename T, typename Add, typename... Rest>
__device__ __forceinline__ void walk_rows(RowWalk& walk, int64_t elements, bool aligned, Add&& add,
                                          const T* x, Rest... rest) {
  constexpr int kTensors = 1 + sizeof...(rest);
  using Elements = Raw<T, kLanesPerChunk>;
  const T* const from[kTensors] = {x, rest...};
  if (aligned) {
    while (walk.left >= units) {
      Unit unit[units];
      Elements raw[units][kTensors];
      bool whole[units];
#pragma unroll
      for (int u = 0; u < units; ++u) {
        unit[u] = walk.next();
        whole[u] = unit[u].inside(elements);
#pragma unroll
        for (int t = 0; t < kTensors; ++t) raw[u][t].load(from[t], unit[u].at, elements, whole[u]);
      }
#pragma unroll
      for (int u = 0; u < units; ++u) add(raw[u], unit[u], whole[u]);
    }
  }
  while (!walk.done()) {
    const Unit unit = walk.next();
    const bool whole = aligned && unit.inside(elements);
    Elements raw[kTensors];
#pragma unroll
    for (int t = 0; t < kTensors; ++t) raw[t].load(from[t], unit.at, elements, whole);
    add(raw, unit, whole);
  }
}

// Rows of a thread with channels last: those of the grid's threads alternate.
struct ColumnWalk {
  int64_t at, step;
  uint32_t left;

  __device__ __forceinline__ ColumnWalk(const Layout& layout, int64_t channel) {
    const int64_t stride = int64_t(gridDim.y) * blockDim.y,
                  first = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
    at = first * layout.c + channel;
    step = stride * layout.c;
    const int64_t rows = channel < layout.c && first < layout.n ? layout.n - first + stride - 1 : 0;
    left = uint32_t(rows >> 32 ? rows / stride : uint32_t(rows) / uint32_t(stride));
  }
};

// Calls add(raw, at) for every row of the thread's `columns` channels, `rows` of which are on their way
// together. raw: the row's elements of each tensor.
template <int columns, int rows, typename T, typename Add, typename... Rest>
__device__ __forceinline__ void walk_columns(ColumnWalk& walk, Add&& add, const T* x, Rest... rest) {
  constexpr int kTensors = 1 + sizeof...(rest);
  const T* const from[kTensors] = {x, rest...};
  for (; walk.left >= rows; walk.left -= rows) {
    Raw<T, columns> raw[rows][kTensors];
    int64_t at = walk.at;
#pragma unroll
    for (int u = 0; u < rows; ++u, at += walk.step)
#pragma unroll
      for (int t = 0; t < kTensors; ++t) raw[u][t].load(from[t], at, 0, true);
#pragma unroll
    for (int u = 0; u < rows; ++u, walk.at += walk.step) add(raw[u], walk.at);
  }
  for (; walk.left > 0; --walk.left, walk.at += walk.step) {
    Raw<T, columns> raw[kTensors];
#pragma unroll
    for (int t = 0; t < kTensors; ++t) raw[t].load(from[t], walk.at, 0, true);
    add(raw, walk.at);
  }
}

}  // namespace modeprobe
