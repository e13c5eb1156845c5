// Where the channels of a tensor lie in memory, and how threads walk through it.
#pragma once

#include "mask.cuh"
#include "vector.cuh"

namespace modeprobe {

// Contiguous (N, C, S): element (n, c, s) at (n * C + c) * S + s. Channels last (and (N, C), where both are
// the same): S = 1 and N counts the pixels of all images.
struct Layout {
  int64_t n, c, s;

  // Positions of a contiguous row, at most: within a row they are counted in 31 bits.
  static constexpr int64_t kLongestRow = int64_t{1} << 30;

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

// `count` elements as they lie in memory: loads that are not yet unpacked can be in flight together.
template <typename T, int count>
struct Raw {
  static constexpr int kPackets = count / kPacket<T>;
  static_assert(count % kPacket<T> == 0);
  Packet packet[kPackets];

  __device__ __forceinline__ void load(const T* from, int64_t at, int64_t end, bool whole) {
#pragma unroll
    for (int k = 0; k < kPackets; ++k, at += kPacket<T>) {
      if (whole) {
        packet[k] = load_packet(from + at);
      } else {
        acc_t<T> value[kPacket<T>];
        load_at<T, kPacket<T>>(from, at, end, false, value);
        packet[k] = pack<T>(value);
      }
    }
  }
  __device__ __forceinline__ void unpack_to(acc_t<T>* out) const {
#pragma unroll
    for (int k = 0; k < kPackets; ++k) unpack<T>(packet[k], out + k * kPacket<T>);
  }
};
template <typename T>
struct Raw<T, 1> {
  T value;

  __device__ __forceinline__ void load(const T* from, int64_t at, int64_t, bool) { value = from[at]; }
  __device__ __forceinline__ void unpack_to(acc_t<T>* out) const { *out = widen(value); }
};

// What a multiprocessor must wait for at a time, to keep memory busy: bandwidth times latency. CUB's
// transform asks for 16 KiB on an A100, 32 on an H100 and 48 on an H200 (arch_to_min_bytes_in_flight).
constexpr int kBytesInFlight = 48 << 10;
// That many loads of `bytes` each by every thread, where `blocks` reside.
constexpr int in_flight(int bytes, int blocks) {
  const int once = bytes * kThreads * blocks;
  return (kBytesInFlight + once - 1) / once;
}

// The same through shared memory, of which a block's static part also holds other things.
constexpr int ring_depth(int bytes, int blocks) {
  const int wanted = in_flight(bytes, blocks), most = (32 << 10) / (bytes * kThreads);
  return wanted < most ? wanted : most;
}

// A thread's own slots in shared memory, of `count` elements each. No other thread looks at them, so that no
// barrier is needed.
template <typename T, int count>
struct Slots {
  static constexpr int kPackets = count / kPacket<T>;
  static_assert(count % kPacket<T> == 0);
  Packet* mine;  // packets lie kThreads apart: neighbouring threads touch neighbouring banks

  __device__ __forceinline__ explicit Slots(void* shared)
      : mine(static_cast<Packet*>(shared) + threadIdx.y * blockDim.x + threadIdx.x) {}
  __device__ __forceinline__ Packet* at(int slot, int k) const {
    return mine + (slot * kPackets + k) * kThreads;
  }

  // Begins to copy the elements from position `first` on; those from `end` on count as zero.
  __device__ __forceinline__ void fetch(int slot, const T* from, int64_t first, int64_t end,
                                        bool whole) const {
#pragma unroll
    for (int k = 0; k < kPackets; ++k, first += kPacket<T>) {
      if (whole) {
        copy_packet_async<(kPackets > 1)>(at(slot, k), from + first);
      } else {
        acc_t<T> value[kPacket<T>];
        load_at<T, kPacket<T>>(from, first, end, false, value);
        *at(slot, k) = pack<T>(value);
      }
    }
  }
  __device__ __forceinline__ void load(int slot, acc_t<T>* out) const {
#pragma unroll
    for (int k = 0; k < kPackets; ++k) unpack<T>(load_packet(at(slot, k)), out + k * kPacket<T>);
  }
};

// A walk over one or two tensors in strides, `depth` strides of which are always on their way into shared
// memory: in registers, a loop would have to be unrolled for them.
// multiple: `end` lies a multiple of `count` behind every position.
template <typename T, int count, int depth, int tensors, bool multiple = false>
struct Ahead {
  Slots<T, count> slots;
  const T* from[tensors];  // null: left out
  int64_t step, end;
  bool aligned;
  int turn = 0;

  __device__ __forceinline__ Ahead(const T* const (&tensor)[tensors], int64_t at, int64_t step, int64_t end,
                                   bool aligned)
      : slots(room()), step(step), end(end), aligned(aligned) {
#pragma unroll
    for (int t = 0; t < tensors; ++t) from[t] = tensor[t];
#pragma unroll
    for (int k = 0; k < depth; ++k) fetch(k, at + k * step);
  }
  __device__ __forceinline__ void wait() const { wait_for_copies<depth - 1>(); }
  __device__ __forceinline__ void load(int tensor, acc_t<T>* out) const {
    slots.load(turn * tensors + tensor, out);
  }
  // When what was loaded at `at` has been used: its slot is free for the elements `depth` strides on.
  __device__ __forceinline__ void advance(int64_t at) {
    fetch(turn, at + depth * step);
    turn = turn + 1 == depth ? 0 : turn + 1;
  }

 private:
  // Packets in registers make no such demand: nvcc spends more of them then.
  struct alignas(kPacketBytes) Aligned {
    Packet packet;
  };

  static __device__ __forceinline__ void* room() {
    MODEPROBE_SHARED(ring, Aligned[depth * tensors * Slots<T, count>::kPackets * kThreads]);
    return &ring;
  }
  __device__ __forceinline__ void fetch(int k, int64_t at) const {
    if (at < end) {
#pragma unroll
      for (int t = 0; t < tensors; ++t)
        if (from[t])
          slots.fetch(k * tensors + t, from[t], at, end, aligned && (multiple || at + count <= end));
    }
    end_copy_group();
  }
};

template <typename T, int count>
__device__ __forceinline__ void store_at(T* to, int64_t at, int64_t end, bool whole, const acc_t<T>* in) {
  if constexpr (count % kPacket<T> == 0) {
    if (whole) return store_elements<T, count>(to + at, in);
  }
#pragma unroll
  for (int i = 0; i < count; ++i)
    if (at + i < end) to[at + i] = narrow<T>(in[i]);
}

// `count` elements, 16 bytes at a time where they lie so.
template <typename T, int count>
__device__ __forceinline__ void load_neighbours(const T* from, acc_t<T>* out) {
  load_at<T, count>(from, 0, count, is_aligned(from), out);
}

// Neighbouring channels from `first` on, after the last of which the first comes again.
struct ChannelRun {
  int64_t first, channels;
  bool wraps;  // known not to where false
};

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
  // `count` of them, those of a run.
  template <int count>
  __device__ __forceinline__ void load_run(const ChannelRun& run, acc_t<T>* out) const {
    if (run.wraps) {
      int64_t c = run.first;
#pragma unroll
      for (int k = 0; k < count; ++k, c = c + 1 == run.channels ? 0 : c + 1) out[k] = load(c);
    } else if (wide) {
      load_neighbours<acc_t<T>, count>(static_cast<const acc_t<T>*>(data) + run.first, out);
    } else {
      load_neighbours<T, count>(static_cast<const T*>(data) + run.first, out);
    }
  }
  __device__ __forceinline__ void store(int64_t i, acc_t<T> value) const {
    if (wide)
      static_cast<acc_t<T>*>(data)[i] = value;
    else
      static_cast<T*>(data)[i] = narrow<T>(value);
  }
};

}  // namespace modeprobe
