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
  __device__ __forceinline__ bool whole() const { return inside(0) && inside(kLanesPerChunk - 1); }
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

// e^x for x <= 0. Where 16 bits are stored, the hardware's 2^x is exact enough.
template <typename T>
__device__ __forceinline__ acc_t<T> exp_of(acc_t<T> x) {
  if constexpr (sizeof(T) == 2) {
    const float power = x * 1.4426950408889634f;
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
    return result;
#else
    return exp2f(power);
#endif
  } else {
    return exp(x);
  }
}

// The greater one, and NaN where there is one.
template <typename acc>
__device__ __forceinline__ acc greater(acc a, acc b) {
  return b > a || b != b ? b : a;
}

template <typename T>
__device__ __forceinline__ acc_t<T> masked_score(const ScoreMask& mask, int64_t at, acc_t<T> score) {
  if (mask.is_bool) return static_cast<const uint8_t*>(mask.data)[at] ? score : -acc_t<T>(INFINITY);
  return score + widen(static_cast<const T*>(mask.data)[at]);
}

// Scores of one chunk with the mask applied; -inf outside the row.
template <typename T>
__device__ __forceinline__ void unpack_scores(const Raw<T, kLanesPerChunk>& raw, const ScoreMask& mask,
                                              int64_t mask_base, const RowChunks& r, acc_t<T>* value) {
  using acc = acc_t<T>;
  constexpr int kLanes = kLanesPerChunk;
  const acc nothing = -acc(INFINITY);
  raw.unpack_to(value);
  if (!mask.data && r.whole()) return;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    if (!r.inside(i)) {
      value[i] = nothing;
    } else if (mask.data) {
      value[i] = masked_score<T>(mask, mask_base + (r.at() + i - r.start) * mask.inner_step, value[i]);
    }
  }
}

// Elements inside the row are stored; the chunk at a row's border is shared with its neighbour.
template <typename T>
__device__ __forceinline__ void store_row(T* to, const RowChunks& r, bool aligned, const acc_t<T>* value) {
  if (aligned && r.whole()) return store_elements<T, kLanesPerChunk>(to + r.at(), value);
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
          for (int i = 0; i < kLanes; ++i) here = greater(here, value[i]);
          if (here == -acc(INFINITY)) return;
          acc part = 0;
#pragma unroll
          for (int i = 0; i < kLanes; ++i) part += exp_of<T>(value[i] - here);
          sum = (most == -acc(INFINITY) ? acc(0) : sum * exp_of<T>(most - here)) + part;
          most = here;
        },
        scores);
    for (int half = kWarp / 2; half > 0; half /= 2) {
      const acc other_most = __shfl_xor_sync(kFullWarp, most, half),
                other = __shfl_xor_sync(kFullWarp, sum, half);
      const acc both = greater(most, other_most);
      if (both != -acc(INFINITY))
        sum = (most == -acc(INFINITY) ? acc(0) : sum * exp_of<T>(most - both)) +
              (other_most == -acc(INFINITY) ? acc(0) : other * exp_of<T>(other_most - both));
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
            value[i] = most == -acc(INFINITY) ? acc(0) : exp_of<T>(value[i] - most) * inverse;
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

// The same for rows of up to held * kWarp chunks, which stay in registers: read once, with one exponential
// and one decision each. A warp does one row and ends.

// A lane's chunks of its row; positions within the row fit into 32 bits.
struct HeldRow {
  int64_t start;  // of the row
  int length, first;

  __device__ __forceinline__ HeldRow(int64_t row, int64_t length)
      : start(row * length),
        length(int(length)),
        first(int(threadIdx.x) * kLanesPerChunk - int(start % kLanesPerChunk)) {}
  // Position of the k-th chunk; it may begin before the row.
  __device__ __forceinline__ int at(int k) const { return first + k * kWarp * kLanesPerChunk; }
  __device__ __forceinline__ bool done(int k) const { return at(k) >= length; }
  __device__ __forceinline__ bool whole(int k) const {
    return at(k) >= 0 && at(k) + kLanesPerChunk <= length;
  }
  __device__ __forceinline__ bool inside(int k, int lane) const {
    return at(k) + lane >= 0 && at(k) + lane < length;
  }

  template <typename T>
  __device__ __forceinline__ void load(const T* from, bool aligned, int k,
                                       Raw<T, kLanesPerChunk>& raw) const {
    raw.load(from + start, at(k), length, aligned && whole(k));
  }
  template <typename T>
  __device__ __forceinline__ void store(T* to, bool aligned, int k, const acc_t<T>* value) const {
    to += start + at(k);
    if (aligned && whole(k)) return store_elements<T, kLanesPerChunk>(to, value);
#pragma unroll
    for (int i = 0; i < kLanesPerChunk; ++i)
      if (inside(k, i)) to[i] = narrow<T>(value[i]);
  }
  template <typename acc>
  __device__ __forceinline__ uint32_t keep(Key key, const Rate<acc>& rate, uint64_t offset, int k) const {
    return keep_bits_from(key, rate, offset + uint64_t(start + at(k)));
  }
};

// Resident per multiprocessor, as far as no register is spilled; on sm_100 ptxas needs more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kHeldTwice = 2;
#else
constexpr int kHeldTwice = 3;
#endif
template <typename T, int held>
constexpr int kHeldBlocks = held == 1   ? 5
                            : held == 2 ? kHeldTwice
                            : held == 4 ? 2
                                        : 1;

template <typename T, int held>
__global__ void __launch_bounds__(kThreads, kHeldBlocks<T, held>)
    softmax_dropout_held_kernel(const T* scores, ScoreMask mask, T* y, T* probabilities, int64_t rows,
                                int64_t length, const int64_t* key_pointer, uint64_t offset,
                                RateSource<acc_t<T>> source) {
  using acc = acc_t<T>;
  constexpr int kLanes = kLanesPerChunk;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const HeldRow r(row, length);
  acc value[held][kLanes], most = -acc(INFINITY), sum = 0;
  {
    Raw<T, kLanes> raw[held];
    const bool aligned = is_aligned(scores);
#pragma unroll
    for (int k = 0; k < held; ++k)
      if (!r.done(k)) r.load(scores, aligned, k, raw[k]);
#pragma unroll
    for (int k = 0; k < held; ++k) {
      if (!r.done(k)) raw[k].unpack_to(value[k]);
      if (!r.whole(k)) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i)
          if (!r.inside(k, i)) value[k][i] = -acc(INFINITY);
      }
    }
  }
  if (mask.data) {
    const int64_t base = mask.row_base(row);
#pragma unroll
    for (int k = 0; k < held; ++k)
#pragma unroll
      for (int i = 0; i < kLanes; ++i)
        if (r.inside(k, i))
          value[k][i] = masked_score<T>(mask, base + (r.at(k) + i) * mask.inner_step, value[k][i]);
  }
#pragma unroll
  for (int k = 0; k < held; ++k)
#pragma unroll
    for (int i = 0; i < kLanes; ++i) most = greater(most, value[k][i]);
  for (int half = kWarp / 2; half > 0; half /= 2)
    most = greater(most, __shfl_xor_sync(kFullWarp, most, half));
  // A row of which nothing takes part has no probabilities.
  const acc from = most == -acc(INFINITY) ? acc(0) : most;
#pragma unroll
  for (int k = 0; k < held; ++k)
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      value[k][i] = exp_of<T>(value[k][i] - from);
      sum += value[k][i];
    }
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kFullWarp, sum, half);
  const acc inverse = sum == acc(0) ? acc(0) : acc(1) / sum;
  const Key key = load_key(key_pointer);
  const Rate<acc> rate = resolve(source);
  const bool aligned = is_aligned(y) && is_aligned(probabilities);
#pragma unroll
  for (int k = 0; k < held; ++k) {
    if (r.done(k)) continue;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[k][i] *= inverse;
    if (probabilities) r.store(probabilities, aligned, k, value[k]);
    const uint32_t keep = r.keep(key, rate, offset, k);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[k][i] = keep >> i & 1 ? value[k][i] * rate.scale : acc(0);
    r.store(y, aligned, k, value[k]);
  }
}

template <typename T, int held>
constexpr int kHeldBackwardBlocks = held == 1   ? 3
                                    : held == 2 ? (sizeof(T) == 2 ? 3 : 2)
                                    : held == 4 ? 2
                                                : 1;

template <typename T, int held>
__global__ void __launch_bounds__(kThreads, kHeldBackwardBlocks<T, held>)
    softmax_dropout_backward_held_kernel(const T* dy, const T* probabilities, T* ds, int64_t rows,
                                         int64_t length, const int64_t* key_pointer, uint64_t offset,
                                         RateSource<acc_t<T>> source) {
  using acc = acc_t<T>;
  constexpr int kLanes = kLanesPerChunk;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const Key key = load_key(key_pointer);
  const Rate<acc> rate = resolve(source);
  const bool aligned = is_aligned(dy) && is_aligned(probabilities);
  const HeldRow r(row, length);
  Raw<T, kLanes> raw_d[held], raw_p[held];
  uint32_t keep[held];
  acc sum = 0;
#pragma unroll
  for (int k = 0; k < held; ++k) {
    if (r.done(k)) continue;
    r.load(dy, aligned, k, raw_d[k]);
    r.load(probabilities, aligned, k, raw_p[k]);
  }
  const auto unpack = [&](int k, acc* d, acc* p) {
    raw_d[k].unpack_to(d);
    raw_p[k].unpack_to(p);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) d[i] = keep[k] >> i & 1 ? d[i] * rate.scale : acc(0);
  };
#pragma unroll
  for (int k = 0; k < held; ++k) {
    if (r.done(k)) continue;
    keep[k] = r.keep(key, rate, offset, k);
    acc d[kLanes], p[kLanes];
    unpack(k, d, p);
    const bool whole = r.whole(k);
#pragma unroll
    for (int i = 0; i < kLanes; ++i)
      if (whole || r.inside(k, i)) sum += d[i] * p[i];
  }
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kFullWarp, sum, half);
  const bool out_aligned = is_aligned(ds);
#pragma unroll
  for (int k = 0; k < held; ++k) {
    if (r.done(k)) continue;
    acc d[kLanes], p[kLanes];
    unpack(k, d, p);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) d[i] = p[i] * (d[i] - sum);
    r.store(ds, out_aligned, k, d);
  }
}

inline unsigned row_blocks(int64_t rows) { return unsigned((rows + kWarps - 1) / kWarps); }

// For warps that go from row to row.
inline unsigned softmax_blocks(int64_t rows) {
  const int64_t wanted = row_blocks(rows), most = int64_t(multiprocessors()) * 8;
  return unsigned(wanted < most ? wanted : most);
}

// Calls run(held) with the chunks per lane that a row's registers must hold, as a constant; 0: too many.
template <typename T, typename Run>
cudaError_t with_held(int64_t length, const Run& run) {
  if constexpr (sizeof(T) < 8) {
    // Rows that do not begin at a chunk's border reach into one more.
    const int64_t chunks = (length + kLanesPerChunk - 1) / kLanesPerChunk + (length % kLanesPerChunk != 0);
    if (chunks <= kWarp) return run(std::integral_constant<int, 1>());
    if (chunks <= 2 * kWarp) return run(std::integral_constant<int, 2>());
    if (chunks <= 4 * kWarp) return run(std::integral_constant<int, 4>());
    if constexpr (sizeof(T) == 2)
      if (chunks <= 8 * kWarp) return run(std::integral_constant<int, 8>());
  }
  return run(std::integral_constant<int, 0>());
}

// Row-major scores, y and probabilities of rows * length elements.
template <typename T>
cudaError_t launch_softmax_dropout(const T* scores, const ScoreMask& mask, T* y, T* probabilities,
                                   int64_t rows, int64_t length, const int64_t* key, uint64_t offset,
                                   double p, const void* p_on_device, cudaStream_t stream) {
  if (rows == 0 || length == 0) return cudaSuccess;
  return with_held<T>(length, [&](auto held) {
    auto kernel = softmax_dropout_kernel<T>;
    if constexpr (held > 0) kernel = softmax_dropout_held_kernel<T, held>;
    return launch(kernel, dim3(held ? row_blocks(rows) : softmax_blocks(rows)), dim3(kWarp, kWarps), stream,
                  scores, mask, y, probabilities, rows, length, key, offset,
                  rate_source<acc_t<T>>(p, p_on_device, true));
  });
}

template <typename T>
cudaError_t launch_softmax_dropout_backward(const T* dy, const T* probabilities, T* ds, int64_t rows,
                                            int64_t length, const int64_t* key, uint64_t offset, double p,
                                            const void* p_on_device, cudaStream_t stream) {
  if (rows == 0 || length == 0) return cudaSuccess;
  return with_held<T>(length, [&](auto held) {
    auto kernel = softmax_dropout_backward_kernel<T>;
    if constexpr (held > 0) kernel = softmax_dropout_backward_held_kernel<T, held>;
    return launch(kernel, dim3(held ? row_blocks(rows) : softmax_blocks(rows)), dim3(kWarp, kWarps), stream,
                  dy, probabilities, ds, rows, length, key, offset,
                  rate_source<acc_t<T>>(p, p_on_device, true));
  });
}

}  // namespace modeprobe
