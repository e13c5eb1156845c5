// Dropout: y[j] = keep(offset + j) ? scale * x[j] : +0. The same kernel is its own backward.
#pragma once

#include "lanes.cuh"

namespace modeprobe {

// Resident per multiprocessor: 32 KiB of loads in flight; less on sm_100, where ptxas needs more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T>
constexpr int kDropoutBlocks = sizeof(T) == 4 ? 3 : 2;
#else
template <typename T>
constexpr int kDropoutBlocks = 4;
#endif

// Chunks that a thread handles together. Eight float64 elements are four 16-byte loads already.
template <typename T>
constexpr int kChunksPerStep = sizeof(T) == 8 ? 1 : 2;

// Which chunks of [offset, offset + n) are whole and can be read and written 16 bytes at a time: `head`
// elements of chunk 0 lie before the data. No chunk is, where the chunks' borders are not 16-byte borders.
struct ChunkRange {
  int head;
  int64_t chunks, whole_begin, whole_end;
};

template <typename T>
__device__ __forceinline__ ChunkRange chunk_range(const T* x, const T* y, int64_t n, uint64_t offset) {
  const int head = int(offset % kLanesPerChunk);
  const int64_t chunks = (head + n + kLanesPerChunk - 1) / kLanesPerChunk;
  if (!is_aligned(x - head) || !is_aligned(y - head)) return {head, chunks, 0, 0};
  const int64_t begin = head > 0, end = (head + n) / kLanesPerChunk;
  return {head, chunks, begin, end > begin ? end : begin};
}

// The whole chunks from `begin` on; returns where it stopped.
template <typename T>
__device__ __forceinline__ int64_t drop_chunks(const T* x, T* y, int64_t begin, int64_t end, Key key,
                                               const Rate<acc_t<T>>& rate, uint64_t first_chunk) {
  using acc = acc_t<T>;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x,
                threads = int64_t(gridDim.x) * kThreads;
  constexpr int kChunks = kChunksPerStep<T>;
  for (int64_t chunk = begin + thread; chunk < end; chunk += kChunks * threads) {
    acc value[kChunks * kLanesPerChunk];
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
      if (k == 0 || chunk + k * threads < end)
        load_elements<T, kLanesPerChunk>(x + (chunk + k * threads) * kLanesPerChunk,
                                         value + k * kLanesPerChunk);
    const auto lanes = decide<kChunks>(key, rate, first_chunk + chunk, threads);
#pragma unroll
    for (int lane = 0; lane < kChunks * kLanesPerChunk; ++lane)
      value[lane] = lanes.kept(lane, rate) ? value[lane] * rate.scale : acc(0);
#pragma unroll
    for (int k = 0; k < kChunks; ++k)
      if (k == 0 || chunk + k * threads < end)
        store_elements<T, kLanesPerChunk>(y + (chunk + k * threads) * kLanesPerChunk,
                                          value + k * kLanesPerChunk);
  }
  return end;
}

// The same where a packet is half a chunk: whole warps on kPairedChunks at a time, and what is left for
// none. Neighbouring warps of a block are apart, so that a small tensor meets every multiprocessor.
template <typename T>
__device__ __forceinline__ int64_t drop_paired_chunks(const T* x, T* y, int64_t begin, int64_t end, Key key,
                                                      const Rate<acc_t<T>>& rate, uint64_t first_chunk) {
  using acc = acc_t<T>;
  constexpr int kRow = kWarp * kPacket<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t tiles = (end - begin) / kPairedChunks, step = int64_t(gridDim.x) * kWarps;
  const int64_t first = int64_t(threadIdx.x / kWarp) * gridDim.x + blockIdx.x;
  int64_t at = (begin + first * kPairedChunks) * kLanesPerChunk + lane * kPacket<T>;
  uint64_t chunk = first_chunk + begin + first * kPairedChunks + paired_chunk(lane);
  for (int64_t tile = first; tile < tiles; tile += step) {
    acc value[kLanesPerChunk];
    load_elements<T, kPacket<T>>(x + at, value);
    load_elements<T, kPacket<T>>(x + at + kRow, value + kPacket<T>);
    const auto lanes = decide_paired(key, rate, chunk, lane);
#pragma unroll
    for (int i = 0; i < kLanesPerChunk; ++i) value[i] = lanes.kept(i, rate) ? value[i] * rate.scale : acc(0);
    store_elements<T, kPacket<T>>(y + at, value);
    store_elements<T, kPacket<T>>(y + at + kRow, value + kPacket<T>);
    at += step * kPairedChunks * kLanesPerChunk;
    chunk += step * kPairedChunks;
  }
  return begin + tiles * kPairedChunks;
}

// x and y may be the same. No __restrict__ for that reason.
template <typename T>
__global__ void __launch_bounds__(kThreads, kDropoutBlocks<T>)
    dropout_forward_kernel(const T* x, T* y, int64_t n, const int64_t* key_pointer, uint64_t offset,
                           RateSource<acc_t<T>> source) {
  using acc = acc_t<T>;
  const Key key = load_key(key_pointer);
  const Rate<acc> rate = resolve(source);
  const ChunkRange range = chunk_range(x, y, n, offset);
  const uint64_t first_chunk = offset / kLanesPerChunk;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x,
                threads = int64_t(gridDim.x) * kThreads;
  // Where chunk 0 would begin.
  x -= range.head;
  y -= range.head;
  int64_t whole_end;
  if constexpr (2 * kPacket<T> == kLanesPerChunk)
    whole_end = drop_paired_chunks(x, y, range.whole_begin, range.whole_end, key, rate, first_chunk);
  else
    whole_end = drop_chunks(x, y, range.whole_begin, range.whole_end, key, rate, first_chunk);

  // What is left: the first chunk and the last ones, or all of them where the pointers are not aligned.
  const int64_t ragged = range.whole_begin + range.chunks - whole_end;
  for (int64_t item = thread; item < ragged; item += threads) {
    const int64_t chunk = item < range.whole_begin ? item : item - range.whole_begin + whole_end;
    const auto lanes = decide<1>(key, rate, first_chunk + chunk);
#pragma unroll
    for (int lane = 0; lane < kLanesPerChunk; ++lane) {
      const int64_t j = chunk * kLanesPerChunk + lane;
      if (j >= range.head && j < range.head + n)
        y[j] = narrow<T>(lanes.kept(lane, rate) ? widen(x[j]) * rate.scale : acc(0));
    }
  }
}

// Args:
//   x, y: n elements each, may be the same; key: 2 elements on the device.
//   p_on_device: one float64 on the device that replaces p, or null.
template <typename T>
cudaError_t launch_dropout_forward(const T* x, T* y, int64_t n, const int64_t* key, uint64_t offset, double p,
                                   const void* p_on_device, bool scaled, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t chunks = n / kLanesPerChunk + 2;
  const auto kernel = dropout_forward_kernel<T>;
  return launch(kernel, dim3(grid_stride_blocks(kernel, chunks, kDropoutBlocks<T>)), dim3(kThreads), stream,
                x, y, n, key, offset, rate_source<acc_t<T>>(p, p_on_device, scaled));
}

// keep(offset + j) for j < n, as bytes 0 and 1.
static __global__ void __launch_bounds__(kThreads, kDropoutBlocks<uint8_t>)
    dropout_mask_kernel(uint8_t* mask, int64_t n, const int64_t* key_pointer, uint64_t offset,
                        RateSource<float> source) {
  const Key key = load_key(key_pointer);
  const Rate<float> rate = resolve(source);
  const int head = int(offset % kLanesPerChunk);
  const int64_t chunks = (head + n + kLanesPerChunk - 1) / kLanesPerChunk;
  for (int64_t chunk = int64_t(blockIdx.x) * kThreads + threadIdx.x; chunk < chunks;
       chunk += int64_t(gridDim.x) * kThreads) {
    const auto lanes = decide<1>(key, rate, offset / kLanesPerChunk + chunk);
#pragma unroll
    for (int lane = 0; lane < kLanesPerChunk; ++lane) {
      const int64_t j = chunk * kLanesPerChunk - head + lane;
      if (j >= 0 && j < n) mask[j] = lanes.kept(lane, rate);
    }
  }
}

inline cudaError_t launch_dropout_mask(uint8_t* mask, int64_t n, const int64_t* key, uint64_t offset,
                                       double p, const void* p_on_device, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t chunks = n / kLanesPerChunk + 2;
  return launch(dropout_mask_kernel,
                dim3(grid_stride_blocks(dropout_mask_kernel, chunks, kDropoutBlocks<uint8_t>)),
                dim3(kThreads), stream, mask, n, key, offset, rate_source<float>(p, p_on_device, false));
}

static __global__ void fold_in_kernel(int64_t* out, const int64_t* key, uint64_t n,
                                      const int64_t* n_on_device) {
  const Key child = fold(load_key(key), n_on_device ? uint64_t(*n_on_device) : n);
  out[0] = int64_t(child.seed);
  out[1] = int64_t(child.stream);
}

inline cudaError_t launch_fold_in(int64_t* out, const int64_t* key, uint64_t n, const int64_t* n_on_device,
                                  cudaStream_t stream) {
  return launch(fold_in_kernel, dim3(1), dim3(1), stream, out, key, n, n_on_device);
}

}  // namespace modeprobe
