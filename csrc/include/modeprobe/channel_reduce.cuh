// A reduction per channel over a grid of (channels, slices), in two stages and in a fixed order.
//
// Every block reduces its slice and stores a partial; the last block of a channel to finish, known by a
// ticket, reduces the partials and goes on alone. No second launch, and the same bits on every run.
//
// What stands between the last load and the result is a chain of latencies, the same for every size: on an
// H100 shared memory and a barrier per halving, and partials loaded one after the other, took 30 to 35 us.
#pragma once

#include "channels.cuh"

namespace modeprobe {

template <typename acc>
struct Sums {
  acc a, b;
};

// Moments over n values. n is a weight here: the exact count follows from the shape.
template <typename acc>
struct alignas(2 * sizeof(acc)) Spread {
  acc n, mean, m2, unused;
};

// Values seen one after the other, and what they come to.
template <typename Value>
struct Fold;

template <typename acc>
struct Fold<Sums<acc>> {
  Sums<acc> total{};

  __device__ __forceinline__ void add(const Sums<acc>& value) {
    total.a += value.a;
    total.b += value.b;
  }
  __device__ __forceinline__ Sums<acc> get() const { return total; }
};

// Weighted sums relative to the first mean, without a division per value: what cancels is at most a factor of
// the number of values.
template <typename acc>
struct Fold<Spread<acc>> {
  acc shift = 0, n = 0, sum = 0, squares = 0;

  __device__ __forceinline__ void add(const Spread<acc>& value) {
    if (value.n == acc(0)) return;
    if (n == acc(0)) shift = value.mean;
    const acc d = value.mean - shift, weighted = value.n * d;
    n += value.n;
    sum += weighted;
    squares += value.m2 + weighted * d;
  }
  __device__ __forceinline__ Spread<acc> get() const {
    if (n == acc(0)) return {};
    const acc mean = sum / n, m2 = squares - sum * mean;
    return {n, shift + mean, m2 < acc(0) ? acc(0) : m2, acc(0)};
  }
};

// Every lane's values, merged with those of the lane `offset` away.
template <typename acc, int count>
__device__ __forceinline__ void merge_lanes(Sums<acc> (&value)[count], unsigned offset) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    value[i].a += __shfl_xor_sync(~0u, value[i].a, offset);
    value[i].b += __shfl_xor_sync(~0u, value[i].b, offset);
  }
}
// Chan, Golub and LeVeque as in moments.cuh. A thread has the same n of all its channels: one division.
template <typename acc, int count>
__device__ __forceinline__ void merge_lanes(Spread<acc> (&value)[count], unsigned offset) {
  const acc n = value[0].n, other = __shfl_xor_sync(~0u, n, offset), all = n + other,
            share = all > acc(0) ? other / all : acc(0), both = n * share;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const acc mean = __shfl_xor_sync(~0u, value[i].mean, offset),
              m2 = __shfl_xor_sync(~0u, value[i].m2, offset), d = mean - value[i].mean;
    value[i] = {all, value[i].mean + d * share, value[i].m2 + m2 + d * d * both, acc(0)};
  }
}

__device__ __forceinline__ unsigned thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }

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

// Merges the values of the threads with the same threadIdx.x, of which each has `count` neighbouring
// channels. Returns the total of the block's channel thread_of_block(), where it has so many. blockDim.x is a
// power of two, at most `most`.
template <int most, typename Value, int count>
__device__ __forceinline__ Value merge_block(Value (&value)[count]) {
  MODEPROBE_SHARED(shared, Value[kWarps][most * count]);
  const unsigned thread = thread_of_block(), lane = thread % kWarp;
  for (unsigned offset = kWarp / 2; offset >= blockDim.x; offset /= 2) merge_lanes(value, offset);
  if (lane < blockDim.x) {
#pragma unroll
    for (int i = 0; i < count; ++i) shared[thread / kWarp][lane * count + i] = value[i];
  }
  __syncthreads();
  Fold<Value> fold;
  if (thread < blockDim.x * count) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) fold.add(shared[warp][thread]);
  }
  return fold.get();
}

// The same for one value per thread, those of threads `width` apart: the total is in the threads below
// `width`, a power of two.
template <typename Value>
__device__ __forceinline__ Value merge_apart(Value value, unsigned width) {
  MODEPROBE_SHARED(shared, Value[kThreads]);
  Value one[1] = {value};
  for (unsigned offset = kWarp / 2; offset >= width; offset /= 2) merge_lanes(one, offset);
  if (width == kThreads) return one[0];
  const unsigned thread = thread_of_block(), step = width < kWarp ? kWarp : width;
  shared[thread] = one[0];
  __syncthreads();
  Fold<Value> fold;
  if (thread < width)
    for (unsigned at = thread; at < kThreads; at += step) fold.add(shared[at]);
  return fold.get();
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
  using Word = std::conditional_t<sizeof(Value) % sizeof(uint4) == 0, uint4, unsigned long long>;
  static_assert(sizeof(Value) % sizeof(Word) == 0);
  Value value;
#pragma unroll
  for (size_t i = 0; i < sizeof(Value) / sizeof(Word); ++i) {
    const Word word = __ldcg(reinterpret_cast<const Word*>(from) + i);
    memcpy(reinterpret_cast<char*>(&value) + sizeof(Word) * i, &word, sizeof(Word));
  }
  return value;
}

// Partials that a thread of the last block waits for at a time. Of a single channel few threads have two.
template <int most, typename Value>
constexpr unsigned kPartialsAhead = most == 1                      ? 1
                                    : sizeof(Value) > kPacketBytes ? 4
                                                                   : 16;

// Reduces the blocks' values. False in all blocks but the last of each channel group; there, and in every
// block on the way, `total` is of the channel thread_of_block() of the block's blockDim.x * count.
template <int most, typename Value, int count>
__device__ __forceinline__ bool merge_grid(const Partials<Value>& partials, int64_t channels,
                                           Value (&value)[count], Value& total) {
  total = merge_block<most>(value);
  const unsigned thread = thread_of_block(), width = blockDim.x * count, slices = gridDim.y;
  const int64_t base = int64_t(blockIdx.x) * width;
  const bool mine = thread < width && base + thread < channels;
  if (slices == 1) return true;
  if (mine) partials.values[blockIdx.y * channels + base + thread] = total;
  if (!is_last_block(partials.tickets + blockIdx.x, slices)) return false;
  constexpr unsigned kAhead = kPartialsAhead<most, Value>;
  const int64_t channel = base + thread % width;
  const unsigned parts = kThreads / width;
  Fold<Value> fold;
  if (channel < channels) {
    const Value* from = partials.values + channel;
    for (unsigned slice = thread / width; slice < slices; slice += kAhead * parts) {
      Value found[kAhead];
#pragma unroll
      for (unsigned k = 0; k < kAhead; ++k)
        if (slice + k * parts < slices)
          found[k] = load_from_other_block(from + (slice + k * parts) * channels);
#pragma unroll
      for (unsigned k = 0; k < kAhead; ++k)
        if (slice + k * parts < slices) fold.add(found[k]);
    }
  }
  total = merge_apart(fold.get(), width);
  return true;
}

// How a reduction is cut.
struct ReduceShape {
  dim3 grid, block;
};

inline unsigned power_of_two_at_least(int64_t wanted, unsigned most) {
  unsigned found = 1;
  while (found < wanted && found < most) found *= 2;
  return found;
}

constexpr int kReduceBlocks = 4;  // per multiprocessor, at most

// Contiguous: a block per channel and slice. `blocks` reside on a multiprocessor.
inline ReduceShape reduce_shape(const Layout& layout, int blocks = kReduceBlocks) {
  const int64_t resident = int64_t(multiprocessors()) * blocks;
  const int64_t items = layout.n * ((layout.s + 2 * kLanesPerChunk - 2) / kLanesPerChunk);
  // Each thread has four items at least, and the grid no more blocks than are resident at once.
  const int64_t wanted = (items + 4 * kThreads - 1) / (4 * kThreads),
                most = resident > layout.c ? resident / layout.c : 1,
                slices = wanted < 1      ? 1
                         : wanted < most ? wanted
                                         : most;
  return {dim3(unsigned(layout.c), unsigned(slices)), dim3(1, kThreads)};
}

constexpr int kColumnBlocks = 2;  // per multiprocessor: more of them would be more partials, and no faster
constexpr int kRowsPerThread = 16;
constexpr int kPartialsPerThread = 24;  // of the last block

// Channels last: threads with `count` neighbouring channels each, `bytes` together.
inline ReduceShape column_shape(int64_t rows, int64_t channels, int count, int bytes) {
  const int64_t threads = (channels + count - 1) / count, most = int64_t(multiprocessors()) * kColumnBlocks;
  // Where the last block would have many partials to read, a block takes fewer channels, down to 128 bytes of
  // a row: as many blocks are fewer slices then.
  for (unsigned x = power_of_two_at_least(threads, kWarp);; x /= 2) {
    const int64_t y = kThreads / x, groups = (threads + x - 1) / x,
                  wanted = (rows + kRowsPerThread * y - 1) / (kRowsPerThread * y),
                  room = most > groups ? most / groups : 1,
                  slices = wanted < 1      ? 1
                           : wanted < room ? wanted
                                           : room;
    if (x * bytes <= 128 || slices * x * count <= int64_t{kPartialsPerThread} * kThreads)
      return {dim3(unsigned(groups), unsigned(slices)), dim3(x, unsigned(y))};
  }
}

}  // namespace modeprobe
