// residual + dropout(x + bias) in one pass, and its backward with the bias gradient in the same pass.
#pragma once

#include "channel_reduce.cuh"
#include "lanes.cuh"

namespace modeprobe {

// x, residual, y: n elements, row-major; bias: one per column, or null. One rounding, at the end.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    bias_dropout_add_kernel(const T* x, const T* bias, const T* residual, T* y, int64_t n, int64_t columns,
                            const int64_t* key_pointer, uint64_t offset, RateSource<acc_t<T>> source) {
  using acc = acc_t<T>;
  constexpr int kLanes = kLanesPerChunk;
  const Key key = load_key(key_pointer);
  const Rate<acc> rate = resolve(source);
  const bool aligned = is_aligned(x) && is_aligned(residual) && is_aligned(y);
  const bool bias_aligned = is_aligned(bias) && columns % kLanes == 0;
  const int64_t chunks = (n + kLanes - 1) / kLanes;
  const int64_t stride = int64_t(gridDim.x) * kThreads, column_step = stride * kLanes % columns;
  int64_t chunk = int64_t(blockIdx.x) * kThreads + threadIdx.x, column = chunk * kLanes % columns;
  for (; chunk < chunks; chunk += stride) {
    const int64_t at = chunk * kLanes;
    const bool whole = aligned && at + kLanes <= n;
    acc value[kLanes], rest[kLanes];
    Raw<T, kLanes> raw_x, raw_rest;
    raw_x.load(x, at, n, whole);
    raw_rest.load(residual, at, n, whole);
    raw_x.unpack_to(value);
    raw_rest.unpack_to(rest);
    if (bias) {
      acc b[kLanes];
      if (bias_aligned) {
        load_elements<T, kLanes>(bias + column, b);
      } else {
        int64_t c = column;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          b[i] = widen(bias[c]);
          c = c + 1 == columns ? 0 : c + 1;
        }
      }
#pragma unroll
      for (int i = 0; i < kLanes; ++i) value[i] += b[i];
    }
    const uint32_t keep = keep_bits_from(key, rate, offset + uint64_t(at));
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[i] = rest[i] + (keep >> i & 1 ? value[i] * rate.scale : acc(0));
    store_at<T, kLanes>(y, at, n, whole, value);
    column += column_step;
    if (column >= columns) column -= columns;
  }
}

template <typename T>
cudaError_t launch_bias_dropout_add(const T* x, const T* bias, const T* residual, T* y, int64_t n,
                                    int64_t columns, const int64_t* key, uint64_t offset, double p,
                                    const void* p_on_device, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const auto kernel = bias_dropout_add_kernel<T>;
  return launch(kernel, dim3(grid_stride_blocks(kernel, n / kLanesPerChunk + 1, 4)), dim3(kThreads), stream,
                x, bias, residual, y, n, columns, key, offset, rate_source<acc_t<T>>(p, p_on_device, true));
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
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * width;
  Sums<acc> sums[width] = {};
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
  if (!merge_grid<Sums<acc>, width>(partials, layout.c, column, sums)) return;
  if (threadIdx.y == 0 && column < layout.c) {
#pragma unroll
    for (int i = 0; i < width; ++i) d_bias[column + i] = narrow<T>(sums[i].a);
  }
}

template <typename T>
bool bias_columns_align(int64_t columns, const T* dy, const T* dx) {
  return columns % kBiasColumns<T> == 0 && reinterpret_cast<uintptr_t>(dy) % kPacketBytes == 0 &&
         reinterpret_cast<uintptr_t>(dx) % kPacketBytes == 0;
}

template <typename T>
size_t bias_workspace_bytes(int64_t rows, int64_t columns, bool aligned) {
  const ReduceShape shape = reduce_shape({rows, columns, 1}, aligned ? kBiasColumns<T> : 1);
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
  const ReduceShape shape =
      reduce_shape(layout, aligned ? kBiasColumns<T> : 1, resident_blocks(kernel, kReduceBlocks));
  const cudaError_t status = cudaMemsetAsync(workspace, 0, Partials<Value>::ticket_bytes(columns), stream);
  if (status != cudaSuccess) return status;
  return launch(kernel, shape.grid, shape.block, stream, dy, dx, layout, key, offset,
                rate_source<acc_t<T>>(p, p_on_device, true), Partials<Value>::at(workspace, columns), d_bias);
}

}  // namespace modeprobe
