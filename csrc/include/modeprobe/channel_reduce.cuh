// A reduction per channel over a grid of (channels, slices), in two stages and in a fixed order.
//
// Every block reduces its slice and stores a partial; the last block of a channel to finish, known by a
// ticket, reduces the partials and goes on alone. No second launch, and the same bits on every run.
#pragma once

#include "channels.cuh"
#include "moments.cuh"

namespace modeprobe {

template <typename acc>
struct Sums {
  acc a, b;
};

template <typename acc>
MODEPROBE_HD Sums<acc> merge(Sums<acc> x, Sums<acc> y) {
  return {x.a + y.a, x.b + y.b};
}

// Workspace of one reduction: partials (slices, c), then tickets. Only the tickets must start as zero.
template <typename Value>
struct Partials {
  Value* values;
  unsigned* tickets;

  static size_t ticket_bytes(int64_t c) { return size_t(c + 1) * sizeof(unsigned); }
  static size_t bytes(int64_t c, int64_t slices) {
    return (ticket_bytes(c) + 15) / 16 * 16 + size_t(c * slices) * sizeof(Value);
  }
  static Partials at(void* workspace, int64_t c) {
    auto* start = static_cast<char*>(workspace);
    return {reinterpret_cast<Value*>(start + (ticket_bytes(c) + 15) / 16 * 16),
            reinterpret_cast<unsigned*>(start)};
  }
  // The ticket after the channels' own: how many channels are finished.
  __device__ unsigned* grid_ticket(int64_t c) const { return tickets + c; }
};

// Merges the values of threads with the same threadIdx.x; the result is in the threads of threadIdx.y = 0.
// blockDim.y is a power of two.
template <typename Value, int count>
__device__ __forceinline__ void merge_rows(Value* value) {
  MODEPROBE_SHARED(shared, Value[count][kThreads]);
  const int at = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int i = 0; i < count; ++i) shared[i][at] = value[i];
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int i = 0; i < count; ++i) shared[i][at] = merge(shared[i][at], shared[i][at + half * blockDim.x]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) value[i] = shared[i][threadIdx.x];
}

// Whether this block is the last of `blocks` to come here. What the others wrote before is then visible.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  MODEPROBE_SHARED(last, bool);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) last = atomicInc(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

template <typename Value>
__device__ __forceinline__ Value load_from_other_block(const Value* from) {
  Value value;
  static_assert(sizeof(Value) % 8 == 0);
#pragma unroll
  for (size_t i = 0; i < sizeof(Value) / 8; ++i) {
    const unsigned long long word = __ldcg(reinterpret_cast<const unsigned long long*>(from) + i);
    memcpy(reinterpret_cast<char*>(&value) + 8 * i, &word, 8);
  }
  return value;
}

// Reduces the blocks' values of `count` neighbouring channels from `channel` on. False in all blocks but the
// last of each channel group; there `value` is the total, in the threads of threadIdx.y = 0.
template <typename Value, int count>
__device__ __forceinline__ bool merge_grid(const Partials<Value>& partials, int64_t channels, int64_t channel,
                                           Value* value) {
  merge_rows<Value, count>(value);
  const unsigned slices = gridDim.y;
  if (slices == 1) return true;
  if (threadIdx.y == 0 && channel < channels) {
#pragma unroll
    for (int i = 0; i < count; ++i) partials.values[blockIdx.y * channels + channel + i] = value[i];
  }
  if (!is_last_block(partials.tickets + blockIdx.x, slices)) return false;
#pragma unroll
  for (int i = 0; i < count; ++i) value[i] = Value{};
  if (channel < channels) {
    for (unsigned slice = threadIdx.y; slice < slices; slice += blockDim.y) {
#pragma unroll
      for (int i = 0; i < count; ++i)
        value[i] = merge(value[i], load_from_other_block(partials.values + slice * channels + channel + i));
    }
  }
  merge_rows<Value, count>(value);
  return true;
}

// How a reduction is cut. columns: channels per thread (channels last), 0 for contiguous.
struct ReduceShape {
  dim3 grid, block;
};

constexpr int kReduceBlocks = 4;  // per multiprocessor, at most

inline unsigned power_of_two_at_least(int64_t wanted, unsigned most) {
  unsigned found = 1;
  while (found < wanted && found < most) found *= 2;
  return found;
}

// channels_per_thread: neighbouring channels that a thread reduces (channels last), or 0: a block per
// channel. blocks: that reside on a multiprocessor.
inline ReduceShape reduce_shape(const Layout& layout, int channels_per_thread, int blocks = kReduceBlocks) {
  const int64_t resident = int64_t(multiprocessors()) * blocks;
  unsigned x = 1;
  int64_t groups = layout.c, items;
  if (channels_per_thread) {
    const int64_t threads_wanted = (layout.c + channels_per_thread - 1) / channels_per_thread;
    x = power_of_two_at_least(threads_wanted, kWarp);
    groups = (threads_wanted + x - 1) / x;
    items = layout.n;
  } else {
    items = layout.n * ((layout.s + 2 * kLanesPerChunk - 2) / kLanesPerChunk);
  }
  const unsigned y = kThreads / x;
  // Each thread has four items at least, and the grid no more blocks than are resident at once.
  int64_t slices = (items + 4 * int64_t(y) - 1) / (4 * int64_t(y));
  const int64_t most = resident > groups ? resident / groups : 1;
  slices = slices < 1 ? 1 : slices < most ? slices : most;
  return {dim3(unsigned(groups), unsigned(slices)), dim3(x, y)};
}

}  // namespace modeprobe
