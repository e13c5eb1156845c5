// One pass over a tensor with a decision per element, in blocks that do not stay: each warp does a fixed
// share and ends. On an H100 a grid that strides instead reaches 0.90 to 0.93 of a copy's bandwidth where
// this one reaches 0.99, whatever is kept in flight: blocks that begin in the order of memory keep close
// together.
#pragma once

#include "lanes.cuh"

namespace modeprobe {

// A tile is what a warp does at once: 32 chunks.
constexpr int kTileChunks = kWarp, kTileElements = kTileChunks * kLanesPerChunk;

// Tiles of a warp's share. Each has 512 bytes to 2 KiB: three blocks have 48 KiB and more in flight.
template <typename T, int inputs = 1>
constexpr int kShare = sizeof(T) == 8 ? 1 : 4 / inputs;

// Resident per multiprocessor. With one block less there are registers for the keys of all rounds, at the
// price of 4% of the bandwidth in 16 bits, none in float32.
template <typename T, int inputs = 1>
constexpr int kElementwiseBlocks = sizeof(T) == 8 ? 2 : 3 + (sizeof(T) == 2 && inputs == 1);

// The elements [0, n) as chunks of the mask: `head` elements of chunk 0 lie before them.
struct Chunks {
  int64_t n;
  uint64_t first;  // chunk of the mask
  int head;
  bool aligned;        // the chunks' borders are 16-byte borders of all tensors
  uint64_t whole = 0;  // a warp's share that begins at [0, whole) is in the middle, and aligned

  MODEPROBE_HD int64_t tiles() const { return (head + n + kTileElements - 1) / kTileElements; }
};

template <typename T, typename... Pointers>
Chunks chunks_of(int64_t n, uint64_t offset, Pointers... tensors) {
  const int head = int(offset % kLanesPerChunk);
  const auto ok = [&](const T* p) { return reinterpret_cast<uintptr_t>(p - head) % kPacketBytes == 0; };
  return {n, offset / kLanesPerChunk, head, (ok(tensors) && ...)};
}

// Where a lane's packets of a tile lie. Where a packet is half a chunk, lanes exchange halves, so that each
// access of a lane continues its neighbour's.
template <typename T>
struct Place {
  static constexpr int kPackets = kLanesPerChunk / kPacket<T>;
  static constexpr bool kPaired = kPackets == 2;
  int64_t first;  // element

  __device__ __forceinline__ Place(const Chunks& chunks, int64_t tile, int lane)
      : first(tile * kTileElements - chunks.head + lane * (kPaired ? kPacket<T> : kLanesPerChunk)) {}
  __device__ __forceinline__ int64_t at(int packet) const {
    return first + packet * (kPaired ? kWarp * kPacket<T> : kPacket<T>);
  }
};

// The decisions of a lane's packets of a tile.
template <typename T>
__device__ __forceinline__ Lanes<1> decide_tile(Key key, const Rate<acc_t<T>>& rate, const Chunks& chunks,
                                                int64_t tile, int lane) {
  const uint64_t chunk = chunks.first + uint64_t(tile) * kTileChunks;
  if constexpr (Place<T>::kPaired)
    return decide_paired(key, rate, chunk + paired_chunk(lane), lane);
  else
    return decide<1>(key, rate, chunk + lane);
}

// y = use(inputs, extra, keep) for all elements, `inputs` and `extra` being an element's. What else it takes
// `use.prepare(position, extra)` loads, a packet at once. Tensors may be the same: no __restrict__ for that
// reason.
template <typename T, int share, int inputs, typename Use>
__device__ __forceinline__ void for_elements(const Chunks& chunks, const T* const (&from)[inputs], T* y,
                                             Key key, const Rate<acc_t<T>>& rate, const Use& use) {
  using acc = acc_t<T>;
  constexpr int kPackets = Place<T>::kPackets, kWide = kPacket<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t tile = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) * share;
  const int64_t begin = tile * kTileElements - chunks.head;
  if (uint64_t(begin) < chunks.whole) {
    Packet packet[inputs][share][kPackets];
#pragma unroll
    for (int k = 0; k < share; ++k)
#pragma unroll
      for (int i = 0; i < kPackets; ++i)
#pragma unroll
        for (int t = 0; t < inputs; ++t)
          packet[t][k][i] = load_packet(from[t] + Place<T>(chunks, tile + k, lane).at(i));
#pragma unroll
    for (int k = 0; k < share; ++k) {
      const auto lanes = decide_tile<T>(key, rate, chunks, tile + k, lane);
#pragma unroll
      for (int i = 0; i < kPackets; ++i) {
        const int64_t at = Place<T>(chunks, tile + k, lane).at(i);
        acc value[inputs][kWide], extra[kWide];
#pragma unroll
        for (int t = 0; t < inputs; ++t) unpack<T>(packet[t][k][i], value[t]);
        use.template prepare<kWide>(at, extra);
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          acc one[inputs];
#pragma unroll
          for (int t = 0; t < inputs; ++t) one[t] = value[t][j];
          value[0][j] = use(one, extra[j], lanes.kept(i * kWide + j, rate));
        }
        store_packet(y + at, pack<T>(value[0]));
      }
    }
    return;
  }
  // A border, or pointers that are not aligned: element by element, neighbours by neighbouring lanes.
  constexpr int kAtOnce = kLanesPerChunk / inputs;
#pragma unroll 1
  for (int k = 0; k < share; ++k) {
    const int64_t start = begin + k * kTileElements + lane;
    if (start - lane >= chunks.n) return;
    const uint32_t own = keep_byte(key, rate, chunks.first + uint64_t(tile + k) * kTileChunks + lane);
#pragma unroll 1
    for (int first = 0; first < kLanesPerChunk; first += kAtOnce) {
      acc value[kAtOnce][inputs], extra[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t at = start + (first + i) * kWarp;
        if (at < 0 || at >= chunks.n) continue;
#pragma unroll
        for (int t = 0; t < inputs; ++t) value[i][t] = widen(from[t][at]);
        use.template prepare<1>(at, &extra[i]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t at = start + (first + i) * kWarp;
        const uint32_t bits = __shfl_sync(~0u, own, ((first + i) * kWarp + lane) / kLanesPerChunk);
        if (at >= 0 && at < chunks.n)
          y[at] = narrow<T>(use(value[i], extra[i], bits >> (lane % kLanesPerChunk) & 1u));
      }
    }
  }
}

// Runs `wide`, whose warps do `share` tiles, or where these would leave multiprocessors idle or nothing is
// aligned, `narrow`, whose warps do one.
template <int share, typename... Params, typename... Args>
cudaError_t launch_elementwise(void (*wide)(Chunks, Params...), void (*narrow)(Chunks, Params...),
                               Chunks chunks, cudaStream_t stream, Args... args) {
  const int64_t tiles = chunks.tiles();
  const bool few = !chunks.aligned || tiles < int64_t(multiprocessors()) * kWarps * share * 2;
  const int64_t own = few ? 1 : share, per_block = kWarps * own, last = chunks.n - own * kTileElements;
  chunks.whole = chunks.aligned && last >= 0 ? uint64_t(last) + 1 : 0;
  return launch(few ? narrow : wide, dim3(unsigned((tiles + per_block - 1) / per_block)), dim3(kThreads),
                stream, chunks, args...);
}

}  // namespace modeprobe
