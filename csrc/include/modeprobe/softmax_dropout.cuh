// dropout(softmax(scores + mask)) over rows, a warp per row, and its backward.
//
// Maximum and sum in one reading: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
#pragma once

#include "channels.cuh"
#include "lanes.cuh"

namespace modeprobe {

constexpr int kMaxMaskDims = 8;
constexpr unsigned kFullWarp = 0xffffffffu;

// What is added to the scores, or a bool that says who takes part; steps are 0 where it is broadcast.
struct ScoreMask {
  const void* data;  // null: none
  bool is_bool;
  int dims;  // of the rows
  int64_t size[kMaxMaskDims], step[kMaxMaskDims], inner_step;

  __device__ __forceinline__ int64_t row_base(int64_t row) const {
    int64_t base = 0;
    for (int d = dims - 1; d >= 0; --d) {
      base += row % size[d] * step[d];
      row /= size[d];
    }
    return base;
  }
};

// One row of `length` elements in chunks of eight positions; lanes of a warp take turns.
struct RowChunks {
  int64_t start, length, chunk, last;

  __device__ __forceinline__ RowChunks(int64_t row, int64_t length)
      : start(row * length),
        length(length),
        chunk(start / kLanesPerChunk + threadIdx.x),
        last((start + length - 1) / kLanesPerChunk) {}
  __device__ __forceinline__ bool done() const { return chunk > last; }
  __device__ __forceinline__ void advance() { chunk += kWarp; }
  __device__ __forceinline__ int64_t at() const { return chunk * kLanesPerChunk; }
  __device__ __forceinline__ bool inside(int lane) const {
    return at() + lane >= start && at() + lane < start + length;
  }
};

// Chunks of a row that a thread waits for together: two, where they and their arithmetic fit into 128
// registers.
template <typename T>
constexpr int chunks_together(int tensors) {
  return tensors * kLanesPerChunk * int(sizeof(T)) <= 32 ? 2 : 1;
}

// Calls use(r, raw) for the chunks of a row; raw: the chunk's elements of each tensor.
template <typename T, typename Use, typename... Rest>
__device__ __forceinline__ void for_chunks(RowChunks r, int64_t n, bool aligned, Use&& use, const T* x,
                                           Rest... rest) {
  constexpr int kTensors = 1 + sizeof...(rest), kChunksTogether = chunks_together<T>(kTensors);
  const T* const from[kTensors] = {x, rest...};
  while (!r.done()) {
    Raw<T, kLanesPerChunk> raw[kChunksTogether][kTensors];
    RowChunks ahead = r;
#pragma unroll
    for (int k = 0; k < kChunksTogether; ++k, ahead.advance()) {
      if (ahead.done()) continue;
#pragma unroll
      for (int t = 0; t < kTensors; ++t)
        raw[k][t].load(from[t], ahead.at(), n, aligned && ahead.at() + kLanesPerChunk <= n);
    }
#pragma unroll
    for (int k = 0; k < kChunksTogether; ++k, r.advance())
      if (!r.done()) use(r, raw[k]);
  }
}

// Scores of one chunk with the mask applied; -inf outside the row.
template <typename T>
__device__ __forceinline__ void unpack_scores(const Raw<T, kLanesPerChunk>& raw, const ScoreMask& mask,
                                              int64_t mask_base, const RowChunks& r, acc_t<T>* value) {
  using acc = acc_t<T>;
  constexpr int kLanes = kLanesPerChunk;
  const acc nothing = -acc(INFINITY);
  raw.unpack_to(value);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    if (!r.inside(i)) {
      value[i] = nothing;
    } else if (mask.data) {
      const int64_t j = mask_base + (r.at() + i - r.start) * mask.inner_step;
      if (mask.is_bool)
        value[i] = static_cast<const uint8_t*>(mask.data)[j] ? value[i] : nothing;
      else
        value[i] += widen(static_cast<const T*>(mask.data)[j]);
    }
  }
}

// Elements inside the row are stored; the chunk at a row's border is shared with its neighbour.
template <typename T>
__device__ __forceinline__ void store_row(T* to, const RowChunks& r, bool aligned, const acc_t<T>* value) {
  const bool whole = aligned && r.inside(0) && r.inside(kLanesPerChunk - 1);
  if (whole) return store_elements<T, kLanesPerChunk>(to + r.at(), value);
#pragma unroll
  for (int i = 0; i < kLanesPerChunk; ++i)
    if (r.inside(i)) to[r.at() + i] = narrow<T>(value[i]);
}

// probabilities: before dropout, or null.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    softmax_dropout_kernel(const T* scores, ScoreMask mask, T* y, T* probabilities, int64_t rows,
                           int64_t length, const int64_t* key_pointer, uint64_t offset,
                           RateSource<acc_t<T>> source) {
  using acc = acc_t<T>;
  constexpr int kLanes = kLanesPerChunk;
  const Key key = load_key(key_pointer);
  const Rate<acc> rate = resolve(source);
  const int64_t n = rows * length;
  const bool aligned = is_aligned(scores), out_aligned = is_aligned(y) && is_aligned(probabilities);
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < rows;
       row += int64_t(gridDim.x) * blockDim.y) {
    const int64_t mask_base = mask.data ? mask.row_base(row) : 0;
    acc most = -acc(INFINITY), sum = 0;
    const RowChunks chunks(row, length);
    for_chunks(
        chunks, n, aligned,
        [&](const RowChunks& r, const auto& raw) {
          acc value[kLanes];
          unpack_scores(raw[0], mask, mask_base, r, value);
          acc here = most;
#pragma unroll
          for (int i = 0; i < kLanes; ++i) here = value[i] > here || value[i] != value[i] ? value[i] : here;
          if (here == -acc(INFINITY)) return;
          acc part = 0;
#pragma unroll
          for (int i = 0; i < kLanes; ++i) part += exp(value[i] - here);
          sum = (most == -acc(INFINITY) ? acc(0) : sum * exp(most - here)) + part;
          most = here;
        },
        scores);
    for (int half = kWarp / 2; half > 0; half /= 2) {
      const acc other_most = __shfl_xor_sync(kFullWarp, most, half),
                other = __shfl_xor_sync(kFullWarp, sum, half);
      const acc both = other_most > most || other_most != other_most ? other_most : most;
      if (both != -acc(INFINITY))
        sum = (most == -acc(INFINITY) ? acc(0) : sum * exp(most - both)) +
              (other_most == -acc(INFINITY) ? acc(0) : other * exp(other_most - both));
      most = both;
    }
    // Rounded products are added in another order on each lane: all take the first one's.
    most = __shfl_sync(kFullWarp, most, 0);
    sum = __shfl_sync(kFullWarp, sum, 0);
    const acc inverse = sum == acc(0) ? acc(0) : acc(1) / sum;
    for_chunks(
        chunks, n, aligned,
        [&](const RowChunks& r, const auto& raw) {
          acc value[kLanes];
          unpack_scores(raw[0], mask, mask_base, r, value);
#pragma unroll
          for (int i = 0; i < kLanes; ++i)
            value[i] = most == -acc(INFINITY) ? acc(0) : exp(value[i] - most) * inverse;
          if (probabilities) store_row(probabilities, r, out_aligned, value);
          const uint32_t keep = keep_bits_from(key, rate, offset + uint64_t(r.at()));
#pragma unroll
          for (int i = 0; i < kLanes; ++i) value[i] = keep >> i & 1 ? value[i] * rate.scale : acc(0);
          store_row(y, r, out_aligned, value);
        },
        scores);
  }
}

// ds = P * (d - sum(d * P)), d = dropout(dy).
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    softmax_dropout_backward_kernel(const T* dy, const T* probabilities, T* ds, int64_t rows, int64_t length,
                                    const int64_t* key_pointer, uint64_t offset,
                                    RateSource<acc_t<T>> source) {
  using acc = acc_t<T>;
  constexpr int kLanes = kLanesPerChunk;
  const Key key = load_key(key_pointer);
  const Rate<acc> rate = resolve(source);
  const int64_t n = rows * length;
  const bool aligned = is_aligned(dy) && is_aligned(probabilities), out_aligned = is_aligned(ds);
  const auto unpack = [&](const RowChunks& r, const auto& raw, acc* d, acc* p) {
    raw[0].unpack_to(d);
    raw[1].unpack_to(p);
    const uint32_t keep = keep_bits_from(key, rate, offset + uint64_t(r.at()));
#pragma unroll
    for (int i = 0; i < kLanes; ++i) d[i] = keep >> i & 1 ? d[i] * rate.scale : acc(0);
  };
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < rows;
       row += int64_t(gridDim.x) * blockDim.y) {
    acc sum = 0;
    const RowChunks chunks(row, length);
    for_chunks(
        chunks, n, aligned,
        [&](const RowChunks& r, const auto& raw) {
          acc d[kLanes], p[kLanes], part = 0;
          unpack(r, raw, d, p);
#pragma unroll
          for (int i = 0; i < kLanes; ++i)
            if (r.inside(i)) part += d[i] * p[i];
          sum += part;
        },
        dy, probabilities);
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kFullWarp, sum, half);
    for_chunks(
        chunks, n, aligned,
        [&](const RowChunks& r, const auto& raw) {
          acc d[kLanes], p[kLanes];
          unpack(r, raw, d, p);
#pragma unroll
          for (int i = 0; i < kLanes; ++i) d[i] = p[i] * (d[i] - sum);
          store_row(ds, r, out_aligned, d);
        },
        dy, probabilities);
  }
}

inline unsigned softmax_blocks(int64_t rows) {
  const int64_t wanted = (rows + kWarps - 1) / kWarps, most = int64_t(multiprocessors()) * 8;
  return unsigned(wanted < most ? wanted : most);
}

// Row-major scores, y and probabilities of rows * length elements.
template <typename T>
cudaError_t launch_softmax_dropout(const T* scores, const ScoreMask& mask, T* y, T* probabilities,
                                   int64_t rows, int64_t length, const int64_t* key, uint64_t offset,
                                   double p, const void* p_on_device, cudaStream_t stream) {
  if (rows == 0 || length == 0) return cudaSuccess;
  return launch(softmax_dropout_kernel<T>, dim3(softmax_blocks(rows)), dim3(kWarp, kWarps), stream, scores,
                mask, y, probabilities, rows, length, key, offset,
                rate_source<acc_t<T>>(p, p_on_device, true));
}

template <typename T>
cudaError_t launch_softmax_dropout_backward(const T* dy, const T* probabilities, T* ds, int64_t rows,
                                            int64_t length, const int64_t* key, uint64_t offset, double p,
                                            const void* p_on_device, cudaStream_t stream) {
  if (rows == 0 || length == 0) return cudaSuccess;
  return launch(softmax_dropout_backward_kernel<T>, dim3(softmax_blocks(rows)), dim3(kWarp, kWarps), stream,
                dy, probabilities, ds, rows, length, key, offset,
                rate_source<acc_t<T>>(p, p_on_device, true));
}

}  // namespace modeprobe
