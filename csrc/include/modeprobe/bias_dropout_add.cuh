// residual + dropout(x + bias) in one pass, and its backward with the bias gradient in the same pass.
#pragma once

#include "channel_reduce.cuh"
#include "divisor.cuh"
#include "elementwise.cuh"

namespace modeprobe {

// The bias of a packet, whose row is found without a division where 31 bits hold the position.
template <typename T>
struct BiasDropAdd {
  acc_t<T> scale;
  const T* bias;  // one per column, or null
  int64_t columns;
  Divisor divisor;
  bool small, aligned;  // aligned: a packet is in one row, at a 16-byte border of the bias

  template <int count>
  __device__ __forceinline__ void prepare(int64_t at, acc_t<T>* out) const {
    if (!bias) return;
    int64_t column = small ? int64_t(divisor.rest(uint32_t(at))) : at % columns;
    if constexpr (count % kPacket<T> == 0) {
      if (aligned) return load_elements<T, count>(bias + column, out);
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      out[i] = widen(bias[column]);
      column = column + 1 == columns ? 0 : column + 1;
    }
  }
  // One rounding, at the end.
  __device__ __forceinline__ acc_t<T> operator()(const acc_t<T> (&value)[2], acc_t<T> extra,
                                                 bool keep) const {
    const acc_t<T> x = bias ? value[0] + extra : value[0];
    return value[1] + (keep ? x * scale : acc_t<T>(0));
  }
};

// x, residual, y: n elements, row-major.
template <typename T, int share>
__global__ void __launch_bounds__(kThreads, kElementwiseBlocks<T, 2>)
    bias_dropout_add_kernel(Chunks chunks, const T* x, const T* residual, T* y, const int64_t* key,
                            RateSource<acc_t<T>> source, BiasDropAdd<T> use) {
  const Rate<acc_t<T>> rate = resolve(source);
  use.scale = rate.scale;
  for_elements<T, share>(chunks, {x, residual}, y, load_key(key), rate, use);
}

template <typename T>
cudaError_t launch_bias_dropout_add(const T* x, const T* bias, const T* residual, T* y, int64_t n,
                                    int64_t columns, const int64_t* key, uint64_t offset, double p,
                                    const void* p_on_device, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const Chunks chunks = chunks_of<T>(n, offset, x, residual, y);
  // A packet begins at a multiple of its length less the chunks' head.
  const bool aligned = columns % kPacket<T> == 0 && chunks.head % kPacket<T> == 0 &&
                       reinterpret_cast<uintptr_t>(bias) % kPacketBytes == 0;
  const bool small = n <= Divisor::kMost;
  const BiasDropAdd<T> use{acc_t<T>(0), bias,   columns, Divisor(small ? uint32_t(columns) : 1),
                           small,       aligned};
  constexpr int kOwn = kShare<T, 2>;
  return launch_elementwise<kOwn>(bias_dropout_add_kernel<T, kOwn>, bias_dropout_add_kernel<T, 1>, chunks,
                                  stream, x, residual, y, key, rate_source<acc_t<T>>(p, p_on_device, true),
                                  use);
}

// Neighbouring columns per thread: those of a chunk share its random numbers.
template <typename T>
constexpr int kBiasColumns = sizeof(T) == 8 ? kPacket<T> : kLanesPerChunk;

// dx = dropout(dy), and its column sums, before rounding, in a fixed order. `width` neighbouring columns per
// thread.
template <typename T, int width>
__global__ void __launch_bounds__(kThreads, 2)
    bias_dropout_add_backward_kernel(const T* dy, T* dx, Layout layout, const int64_t* key_pointer,
                                     uint64_t offset, RateSource<acc_t<T>> source,
                                     Partials<Sums<acc_t<T>>> partials, T* d_bias) {
  using acc = acc_t<T>;
  const Key key = load_key(key_pointer);
  const Rate<acc> rate = resolve(source);
  const int64_t base = int64_t(blockIdx.x) * blockDim.x * width, column = base + threadIdx.x * width;
  Sums<acc> sums[width] = {}, total{};
  if (column < layout.c) {
    const int64_t step = int64_t(gridDim.y) * blockDim.y * layout.c, elements = layout.elements();
    int64_t at = (int64_t(blockIdx.y) * blockDim.y + threadIdx.y) * layout.c + column;
    const auto drop = [&](acc* g) {
      const uint32_t keep = keep_bits_from(key, rate, offset + uint64_t(at));
#pragma unroll
      for (int i = 0; i < width; ++i) {
        g[i] = keep >> i & 1 ? g[i] * rate.scale : acc(0);
        sums[i].a += g[i];
      }
      store_at<T, width>(dx, at, elements, true, g);
    };
    acc g[width];
    if constexpr (width == 1) {
      for (; at < elements; at += step) {
        load_at<T, 1>(dy, at, elements, true, g);
        drop(g);
      }
    } else {
      Ahead<T, width, ring_depth(width * sizeof(T), 2), 1, true> ahead({dy}, at, step, elements, true);
      for (; at < elements; at += step) {
        ahead.wait();
        ahead.load(0, g);
        drop(g);
        ahead.advance(at);
      }
    }
  }
  if (!merge_grid<kWarp>(partials, layout.c, sums, total)) return;
  const unsigned thread = thread_of_block();
  if (thread < blockDim.x * width && base + thread < layout.c) d_bias[base + thread] = narrow<T>(total.a);
}

template <typename T>
bool bias_columns_align(int64_t columns, const T* dy, const T* dx) {
  return columns % kBiasColumns<T> == 0 && reinterpret_cast<uintptr_t>(dy) % kPacketBytes == 0 &&
         reinterpret_cast<uintptr_t>(dx) % kPacketBytes == 0;
}

template <typename T>
ReduceShape bias_shape(int64_t rows, int64_t columns, bool aligned) {
  const int count = aligned ? kBiasColumns<T> : 1;
  return column_shape(rows, columns, count, count * int(sizeof(T)));
}

template <typename T>
size_t bias_workspace_bytes(int64_t rows, int64_t columns, bool aligned) {
  const ReduceShape shape = bias_shape<T>(rows, columns, aligned);
  return Partials<Sums<acc_t<T>>>::bytes(columns, shape.grid.y);
}

template <typename T>
cudaError_t launch_bias_dropout_add_backward(const T* dy, T* dx, T* d_bias, int64_t rows, int64_t columns,
                                             const int64_t* key, uint64_t offset, double p,
                                             const void* p_on_device, void* workspace, cudaStream_t stream) {
  using Value = Sums<acc_t<T>>;
  const Layout layout{rows, columns, 1};
  const bool aligned = bias_columns_align(columns, dy, dx);
  const auto kernel =
      aligned ? bias_dropout_add_backward_kernel<T, kBiasColumns<T>> : bias_dropout_add_backward_kernel<T, 1>;
  const ReduceShape shape = bias_shape<T>(rows, columns, aligned);
  const cudaError_t status = cudaMemsetAsync(workspace, 0, Partials<Value>::ticket_bytes(columns), stream);
  if (status != cudaSuccess) return status;
  return launch(kernel, shape.grid, shape.block, stream, dy, dx, layout, key, offset,
                rate_source<acc_t<T>>(p, p_on_device, true), Partials<Value>::at(workspace, columns), d_bias);
}

}  // namespace modeprobe
