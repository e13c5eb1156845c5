// The forward reduction of BatchNorm: the moments of each channel, and what the last block to finish does
// with them: statistics, running buffers, the count of batches.
#pragma once

#include "channel_reduce.cuh"

namespace modeprobe {

// Resident blocks per multiprocessor. Float64 needs twice the registers; eight channels per thread do not fit
// into 80 registers on sm_100.
template <typename T, int columns>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMomentsResident = sizeof(T) == 8 || columns == 8 ? 2
                                 : columns                      ? 3
                                                                : 4;
#else
constexpr int kMomentsResident = sizeof(T) == 8 ? 2
                                 : columns      ? 3
                                                : 4;
#endif

// Neighbouring channels per thread with channels last; 1 where rows do not begin at 16-byte borders.
template <typename T>
constexpr int kColumns = kPacket<T>;

// Running statistics of one layer; any pointer may be null.
template <typename T>
struct Buffers {
  Parameter<T> mean, variance;
  int64_t* batches;
  int64_t* skipped;  // given: a batch that is not finite counts here and changes nothing else
  bool has_momentum;
  acc_t<T> momentum;

  // Channels can be folded in one by one, without knowing the others.
  MODEPROBE_HD bool independent() const { return has_momentum && !skipped; }
};

template <typename T>
__device__ __forceinline__ void fold_channel(const Buffers<T>& buffers, int64_t channel,
                                             const Moments<acc_t<T>>& m, acc_t<T> factor) {
  using acc = acc_t<T>;
  const bool assign = factor == acc(1);  // heals a buffer that holds NaN
  if (buffers.mean.data)
    buffers.mean.store(channel,
                       assign ? m.mean : (acc(1) - factor) * buffers.mean.load(channel) + factor * m.mean);
  if (buffers.variance.data) {
    const acc unbiased = m.m2 / acc(m.n - 1);
    buffers.variance.store(
        channel, assign ? unbiased : (acc(1) - factor) * buffers.variance.load(channel) + factor * unbiased);
  }
}

template <typename acc>
__device__ __forceinline__ bool is_finite(acc x) {
  return x - x == acc(0);
}

// One block folds all channels in; `moments` has one entry per channel.
template <typename T>
__device__ __forceinline__ void fold_all(const Buffers<T>& buffers, const Moments<acc_t<T>>* moments,
                                         int64_t channels) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  if (buffers.skipped) {
    bool bad = false;
    for (int64_t c = thread; c < channels; c += threads) {
      const auto m = load_from_other_block(moments + c);
      bad |= !is_finite(m.mean) || !is_finite(m.m2);
    }
    if (__syncthreads_or(bad)) {
      if (thread == 0) ++*buffers.skipped;
      return;
    }
  }
  const int64_t batches = buffers.batches ? *buffers.batches + 1 : 1;
  __syncthreads();
  if (thread == 0 && buffers.batches) *buffers.batches = batches;
  const acc_t<T> factor = buffers.has_momentum ? buffers.momentum : acc_t<T>(1) / acc_t<T>(batches);
  for (int64_t c = thread; c < channels; c += threads) {
    const auto m = load_from_other_block(moments + c);
    if (m.n > 1) fold_channel(buffers, c, m, factor);  // one value has no unbiased variance
  }
}

// Sums of x - shift and its square for one channel, shift being the thread's first value: what cancels is
// at most a factor of the thread's own count, however far the mean is from zero. Means are passed on relative
// to the channel's first element, the pivot: rounding a mean of 1e4 standard deviations would cost the
// variance its fourth digit at every merge.
template <typename acc>
struct ShiftedSums {
  acc shift, sum, squares;

  __device__ __forceinline__ void add(acc x) {
    const acc d = x - shift;
    sum += d;
    squares += d * d;
  }
  __device__ __forceinline__ Moments<acc> moments(int64_t n, acc pivot) const {
    if (n == 0) return {0, acc(0), acc(0)};
    const acc mean = sum / acc(n), m2 = squares - sum * mean;
    return {n, (shift - pivot) + mean, m2 < acc(0) ? acc(0) : m2};
  }
};

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

// Adds a unit of one channel to the thread's sums over `n` values; they have their shift already.
template <typename acc, typename Count>
__device__ __forceinline__ void add_unit(const Unit& unit, const acc* value, ShiftedSums<acc>& sums,
                                         Count& n) {
  ShiftedSums<acc> chunk{sums.shift, acc(0), acc(0)};
  for_positions(unit, [&](int i) {
    chunk.add(value[i]);
    ++n;
  });
  sums.sum += chunk.sum;
  sums.squares += chunk.squares;
}

// Adds one value of each of `columns` channels.
template <int columns, typename acc>
__device__ __forceinline__ void add_row(const acc* value, ShiftedSums<acc>* sums, int64_t& n) {
#pragma unroll
  for (int i = 0; i < columns; ++i) {
    if (n == 0) sums[i].shift = value[i];
    sums[i].add(value[i]);
  }
  ++n;
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

template <typename T>
__device__ __forceinline__ Moments<acc_t<T>> collect_rows(const T* x, const Layout& layout, int64_t channel,
                                                          acc_t<T> pivot) {
  using acc = acc_t<T>;
  RowWalk walk(layout, channel);
  ShiftedSums<acc> sums{walk.first(x, pivot), acc(0), acc(0)};
  uint32_t n = 0;
  walk_rows<in_flight(kLanesPerChunk * sizeof(T), kMomentsResident<T, 0>)>(
      walk, layout.elements(), is_aligned(x),
      [&](const auto& raw, const Unit& unit, bool) {
        acc value[kLanesPerChunk];
        raw[0].unpack_to(value);
        add_unit(unit, value, sums, n);
      },
      x);
  return sums.moments(n, pivot);
}

template <typename T, int columns>
__device__ __forceinline__ void collect_columns(const T* x, const Layout& layout, int64_t channel,
                                                const acc_t<T>* pivot, Moments<acc_t<T>>* moments) {
  using acc = acc_t<T>;
  ShiftedSums<acc> sums[columns] = {};
  int64_t n = 0;
  if (channel < layout.c) {
    constexpr int kRows = columns > 1 ? in_flight(kPacketBytes, kMomentsResident<T, columns>) : 4;
    const int64_t stride = int64_t(gridDim.y) * blockDim.y;
    for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < layout.n;
         row += kRows * stride) {
      Raw<T, columns> raw[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u)
        if (row + u * stride < layout.n)
          raw[u].load(x, (row + u * stride) * layout.c + channel, layout.elements(), true);
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (row + u * stride >= layout.n) break;
        acc value[columns];
        raw[u].unpack_to(value);
        add_row<columns>(value, sums, n);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < columns; ++i) moments[i] = sums[i].moments(n, pivot[i]);
}

// Where the moments of the batch go; any pointer may be null.
template <typename T>
struct MomentsOutput {
  acc_t<T>* statistics;  // (2, c): mean and 1 / sqrt(biased variance + eps)
  acc_t<T>* packed;      // (2 * c + 2): mean, M2, and the count in two digits
  acc_t<T> eps;
  Buffers<T> buffers;
};

// The first element of each of `count` channels: see ShiftedSums.
template <typename T, int count>
__device__ __forceinline__ void load_pivots(const T* x, const Layout& layout, int64_t channel,
                                            acc_t<T>* pivot) {
#pragma unroll
  for (int i = 0; i < count; ++i)
    pivot[i] = channel + i < layout.c && layout.n > 0 ? widen(x[(channel + i) * layout.s]) : acc_t<T>(0);
}

// The total of `count` channels -> statistics, packed, and the buffers or, where these depend on all
// channels, the workspace.
template <typename T, int count>
__device__ __forceinline__ void finish_channels(const Layout& layout, int64_t channel, const acc_t<T>* pivot,
                                                const Moments<acc_t<T>>* moments,
                                                const Partials<Moments<acc_t<T>>>& partials,
                                                const MomentsOutput<T>& output) {
  using acc = acc_t<T>;
  if (threadIdx.y != 0 || channel >= layout.c) return;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int64_t c = channel + i;
    const Moments<acc> m{moments[i].n, pivot[i] + moments[i].mean, moments[i].m2};
    if (output.statistics) {
      output.statistics[c] = m.mean;
      output.statistics[layout.c + c] = acc(1) / sqrt(m.m2 / acc(m.n) + output.eps);
    }
    if (output.packed) {
      output.packed[c] = m.mean;
      output.packed[layout.c + c] = m.m2;
      if (c == 0) split_count(m.n, output.packed + 2 * layout.c, output.packed + 2 * layout.c + 1);
    }
    if (output.buffers.independent()) {
      fold_channel(output.buffers, c, m, output.buffers.momentum);
      if (c == 0 && output.buffers.batches) ++*output.buffers.batches;
    } else {
      partials.values[c] = m;
    }
  }
}

// Then, by the last block to come here, the buffers that depend on all channels.
template <typename T>
__device__ __forceinline__ void finish_batch(const Layout& layout,
                                             const Partials<Moments<acc_t<T>>>& partials,
                                             const Buffers<T>& buffers) {
  if (buffers.independent()) return;
  if (gridDim.x > 1 && !is_last_block(partials.grid_ticket(layout.c), gridDim.x)) return;
  __syncthreads();
  fold_all(buffers, partials.values, layout.c);
}

// columns = 0: contiguous, a block per channel and slice; else channels last, `columns` of them per thread.
template <typename T, int columns>
__global__ void __launch_bounds__(kThreads, kMomentsResident<T, columns>)
    batch_norm_moments_kernel(const T* x, Layout layout, Partials<Moments<acc_t<T>>> partials,
                              MomentsOutput<T> output) {
  using acc = acc_t<T>;
  constexpr int kCount = columns ? columns : 1;
  const int64_t channel =
      columns ? (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kCount : int64_t(blockIdx.x);
  acc pivot[kCount];
  load_pivots<T, kCount>(x, layout, channel, pivot);
  Moments<acc> moments[kCount];
  if constexpr (columns == 0)
    moments[0] = collect_rows(x, layout, channel, pivot[0]);
  else
    collect_columns<T, columns>(x, layout, channel, pivot, moments);
  if (!merge_grid<Moments<acc>, kCount>(partials, layout.c, channel, moments)) return;

  finish_channels<T, kCount>(layout, channel, pivot, moments, partials, output);
  finish_batch(layout, partials, output.buffers);
}

// Moments of `parts` processes, (parts, 2 * c + 2), merged in order by one block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_merge_kernel(const acc_t<T>* parts, int64_t part_count, int64_t channels,
                            Moments<acc_t<T>>* merged, acc_t<T>* mean, acc_t<T>* variance, acc_t<T>* count,
                            Buffers<T> buffers) {
  using acc = acc_t<T>;
  const int64_t stride = 2 * channels + 2;
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    Moments<acc> total{};
    for (int64_t k = 0; k < part_count; ++k) {
      const acc* part = parts + k * stride;
      total =
          merge(total, {join_count(part[2 * channels], part[2 * channels + 1]), part[c], part[channels + c]});
    }
    merged[c] = total;
    mean[c] = total.mean;
    variance[c] = total.n > 0 ? total.m2 / acc(total.n) : acc(0);
    if (c == 0) *count = acc(total.n);
  }
  __syncthreads();
  fold_all(buffers, merged, channels);
}

}  // namespace modeprobe
