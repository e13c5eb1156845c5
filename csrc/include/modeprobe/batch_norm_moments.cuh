// The forward reduction of BatchNorm: the moments of each channel, and what the last block to finish does
// with them: statistics, running buffers, the count of batches.
#pragma once

#include "channel_reduce.cuh"
#include "channel_walks.cuh"
#include "moments.cuh"

namespace modeprobe {

// Resident blocks per multiprocessor. Contiguous float64 needs twice the registers.
template <typename T, int columns>
constexpr int kMomentsResident = columns || sizeof(T) == 8 ? kColumnBlocks : kReduceBlocks;

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

// The running statistics of a channel as they are, so that a kernel can load them ahead.
template <typename T>
struct OldBuffers {
  acc_t<T> mean, variance;

  __device__ __forceinline__ OldBuffers(const Buffers<T>& buffers, int64_t channel)
      : mean(buffers.mean.load_or(channel, acc_t<T>(0))),
        variance(buffers.variance.load_or(channel, acc_t<T>(0))) {}
};

template <typename T>
__device__ __forceinline__ void fold_channel(const Buffers<T>& buffers, const OldBuffers<T>& old,
                                             int64_t channel, int64_t n, acc_t<T> mean, acc_t<T> m2,
                                             acc_t<T> factor) {
  using acc = acc_t<T>;
  const bool assign = factor == acc(1);  // heals a buffer that holds NaN
  const acc unbiased = m2 / acc(n - 1);
  if (buffers.mean.data)
    buffers.mean.store(channel, assign ? mean : (acc(1) - factor) * old.mean + factor * mean);
  if (buffers.variance.data)
    buffers.variance.store(channel, assign ? unbiased : (acc(1) - factor) * old.variance + factor * unbiased);
}

template <typename acc>
__device__ __forceinline__ bool is_finite(acc x) {
  return x - x == acc(0);
}

// One block folds all channels in; `moments` has one entry per channel, all over n values.
template <typename T, typename Value>
__device__ __forceinline__ void fold_all(const Buffers<T>& buffers, const Value* moments, int64_t n,
                                         int64_t channels) {
  const unsigned thread = thread_of_block(), threads = blockDim.x * blockDim.y;
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
  if (n <= 1) return;  // one value has no unbiased variance
  const acc_t<T> factor = buffers.has_momentum ? buffers.momentum : acc_t<T>(1) / acc_t<T>(batches);
  for (int64_t c = thread; c < channels; c += threads) {
    const auto m = load_from_other_block(moments + c);
    fold_channel(buffers, OldBuffers<T>(buffers, c), c, n, m.mean, m.m2, factor);
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
  // inverse: 1 / n.
  __device__ __forceinline__ Spread<acc> moments(acc n, acc inverse, acc pivot) const {
    const acc mean = sum * inverse, m2 = squares - sum * mean;
    return {n, (shift - pivot) + mean, m2 < acc(0) ? acc(0) : m2, acc(0)};
  }
};

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

// The sums of each of `count` channels over n values -> their moments. Without a value they are empty.
template <int count, typename acc>
__device__ __forceinline__ void to_moments(const ShiftedSums<acc> (&sums)[count], int64_t n, const acc* pivot,
                                           Spread<acc> (&moments)[count]) {
  const acc inverse = acc(1) / acc(n);
#pragma unroll
  for (int i = 0; i < count; ++i)
    moments[i] = n > 0 ? sums[i].moments(acc(n), inverse, pivot[i]) : Spread<acc>{};
}

template <typename T>
__device__ __forceinline__ void collect_rows(const T* x, const Layout& layout, int64_t channel,
                                             const acc_t<T> (&pivot)[1], Spread<acc_t<T>> (&moments)[1]) {
  using acc = acc_t<T>;
  RowWalk walk(layout, channel);
  ShiftedSums<acc> sums[1] = {{walk.first(x, pivot[0]), acc(0), acc(0)}};
  uint32_t n = 0;
  walk_rows<in_flight(kLanesPerChunk * sizeof(T), kMomentsResident<T, 0>)>(
      walk, layout.elements(), is_aligned(x),
      [&](const auto& raw, const Unit& unit, bool) {
        acc value[kLanesPerChunk];
        raw[0].unpack_to(value);
        add_unit(unit, value, sums[0], n);
      },
      x);
  to_moments(sums, n, pivot, moments);
}

template <typename T, int columns>
__device__ __forceinline__ void collect_columns(const T* x, const Layout& layout, int64_t channel,
                                                const acc_t<T> (&pivot)[columns],
                                                Spread<acc_t<T>> (&moments)[columns]) {
  using acc = acc_t<T>;
  ShiftedSums<acc> sums[columns] = {};
  ColumnWalk walk(layout, channel);
  const uint32_t n = walk.left;
  if (n > 0) {
    // The shifts are loaded apart from the loop: a question whether they are there would be one per element.
    acc shift[columns];
    Raw<T, columns> raw;
    raw.load(x, walk.at, 0, true);
    raw.unpack_to(shift);
#pragma unroll
    for (int i = 0; i < columns; ++i) sums[i].shift = shift[i];
  }
  walk_columns<columns, (columns > 1 ? 8 : 4)>(
      walk,
      [&](const auto& raw, int64_t) {
        acc value[columns];
        raw[0].unpack_to(value);
#pragma unroll
        for (int i = 0; i < columns; ++i) sums[i].add(value[i]);
      },
      x);
  to_moments(sums, n, pivot, moments);
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

// What the last block does with the total of a channel: statistics, packed, and the buffers or, where these
// depend on all channels, the workspace. What it needs is loaded before the reduction ends: on an H100 each
// load after it takes 0.7 us that nothing else fills.
template <typename T>
struct ChannelEnd {
  using acc = acc_t<T>;
  int64_t channel;
  bool mine;
  acc pivot;
  OldBuffers<T> old;

  // mine: whether this thread has a channel to finish.
  __device__ __forceinline__ ChannelEnd(const T* x, const Layout& layout, const MomentsOutput<T>& output,
                                        int64_t channel, bool mine)
      : channel(mine ? channel : 0), mine(mine), old(output.buffers, this->channel) {
    load_pivots<T, 1>(x, layout, this->channel, &pivot);
  }

  __device__ __forceinline__ void finish(const Layout& layout, const Spread<acc>& total, Spread<acc>* all,
                                         const MomentsOutput<T>& output) const {
    if (!mine) return;
    const int64_t n = layout.per_channel();
    const acc mean = pivot + total.mean;
    if (output.statistics) {
      output.statistics[channel] = mean;
      output.statistics[layout.c + channel] = acc(1) / sqrt(total.m2 / acc(n) + output.eps);
    }
    if (output.packed) {
      output.packed[channel] = mean;
      output.packed[layout.c + channel] = total.m2;
      if (channel == 0) split_count(n, output.packed + 2 * layout.c, output.packed + 2 * layout.c + 1);
    }
    if (output.buffers.independent()) {
      fold_channel(output.buffers, old, channel, n, mean, total.m2, output.buffers.momentum);
      if (channel == 0 && output.buffers.batches) ++*output.buffers.batches;
    } else {
      all[channel] = {total.n, mean, total.m2, acc(0)};
    }
  }
};

// Then, by the last block to come here, the buffers that depend on all channels.
template <typename T>
__device__ __forceinline__ void finish_batch(const Layout& layout, const Partials<Spread<acc_t<T>>>& partials,
                                             const Buffers<T>& buffers) {
  if (buffers.independent()) return;
  if (gridDim.x > 1 && !is_last_block(partials.grid_ticket(layout.c), gridDim.x)) return;
  __syncthreads();
  fold_all(buffers, partials.values, layout.per_channel(), layout.c);
}

// columns = 0: contiguous, a block per channel and slice; else channels last, `columns` of them per thread.
template <typename T, int columns>
__global__ void __launch_bounds__(kThreads, kMomentsResident<T, columns>)
    batch_norm_moments_kernel(const T* x, Layout layout, Partials<Spread<acc_t<T>>> partials,
                              MomentsOutput<T> output) {
  using acc = acc_t<T>;
  constexpr int kCount = columns ? columns : 1;
  const unsigned width = blockDim.x * kCount, thread = thread_of_block();
  const int64_t base = int64_t(blockIdx.x) * width, channel = base + threadIdx.x * kCount;
  acc pivot[kCount];
  load_pivots<T, kCount>(x, layout, channel, pivot);
  const ChannelEnd<T> end(x, layout, output, base + thread, thread < width && base + thread < layout.c);
  Spread<acc> moments[kCount], total;
  if constexpr (columns == 0)
    collect_rows(x, layout, channel, pivot, moments);
  else
    collect_columns<T, columns>(x, layout, channel, pivot, moments);
  if (!merge_grid<columns ? kWarp : 1>(partials, layout.c, moments, total)) return;
  end.finish(layout, total, partials.values, output);
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
  const auto count_of = [&](int64_t k) {
    const acc* part = parts + k * stride + 2 * channels;
    return join_count(part[0], part[1]);
  };
  int64_t n = 0;
  for (int64_t k = 0; k < part_count; ++k) n += count_of(k);
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    Moments<acc> total{};
    for (int64_t k = 0; k < part_count; ++k) {
      const acc* part = parts + k * stride;
      total = merge(total, {count_of(k), part[c], part[channels + c]});
    }
    merged[c] = total;
    mean[c] = total.mean;
    variance[c] = total.n > 0 ? total.m2 / acc(total.n) : acc(0);
    if (c == 0) *count = acc(total.n);
  }
  __syncthreads();
  fold_all(buffers, merged, n, channels);
}

}  // namespace modeprobe
