// BatchNorm: the elementwise kernels (normalise, input gradient) and the launchers of all of them.
//
// Formulas: Ioffe and Szegedy, "Batch normalization" (2015). y = (x - mean) * invstd * weight + bias, and
// dx = weight * invstd * (dz - mean(dz) - xhat * mean(dz * xhat)) where mean and invstd come from the batch.
#pragma once

#include <numeric>

#include "batch_norm_sums.cuh"

namespace modeprobe {

constexpr int kElementwiseBlocks = 4;  // per multiprocessor, at most

// Of the input's gradient: with channels last eight channels stay in registers.
template <typename T, bool channels_last, bool plain>
constexpr int kGradientResident = channels_last ? kResident<T, plain> - (sizeof(T) < 8) : kResident<T, plain>;

// Neighbouring elements that a thread handles together. Float32 in packets: the copies into shared memory go
// past L1, and with two packets per thread each would fetch its 32-byte sectors for half of their bytes. With
// an epilogue a chunk, whose bits belong together.
template <typename T, bool plain>
constexpr int kTogether = plain && sizeof(T) == 4 ? kPacket<T> : kLanesPerChunk;

// Calls apply(first, channel) for each channel of the cursor's `count` elements: lanes from `first` on are
// that channel's until the next call. Almost always once, with first a constant 0.
template <int count, typename Apply>
__device__ __forceinline__ void for_channels(const Layout& layout, const Cursor& cursor, Apply&& apply) {
  apply(std::integral_constant<int, 0>{}, cursor.channel);
  uint32_t channel = cursor.channel;
  const uint32_t row = uint32_t(layout.s);
  for (uint32_t first = row - cursor.column; first < count; first += row) {
    channel = channel + 1 == uint32_t(layout.c) ? 0 : channel + 1;
    apply(int(first), channel);
  }
}

// The chunks of `count` elements of a thread. With channels last the stride is a multiple of the period after
// which the channels of a chunk come again, so that a thread's lanes keep theirs, whatever the channel count.
template <int count>
struct ChunkWalk {
  int64_t chunk, stride, chunks;

  __device__ __forceinline__ ChunkWalk(const Layout& layout, int64_t period) {
    const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x,
                  threads = int64_t(gridDim.x) * kThreads;
    chunks = (layout.elements() + count - 1) / count;
    stride = threads / period * period;
    chunk = thread < stride ? thread : chunks;
  }
};

template <typename T, bool channels_last, bool plain>
__global__ void __launch_bounds__(kThreads, kResident<T, plain>)
    batch_norm_normalize_kernel(const T* x, T* y, Layout layout, int64_t period,
                                ChannelParameters<T> parameters, acc_t<T>* statistics, Epilogue<T> epilogue) {
  using acc = acc_t<T>;
  constexpr int kLanes = kTogether<T, plain>;
  const EpilogueContext<T> context(plain ? Epilogue<T>{} : epilogue);
  const int64_t elements = layout.elements();
  const bool aligned = is_aligned(x) && is_aligned(y) && is_aligned(context.e.residual);
  if (statistics) {
    for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < layout.c;
         c += int64_t(gridDim.x) * kThreads) {
      statistics[c] = parameters.mean.load(c);
      statistics[layout.c + c] = parameters.invstd(c);
    }
  }
  ChunkWalk<kLanes> walk(layout, period);
  if (walk.chunk >= walk.chunks) return;
  Cursor cursor(layout, walk.chunk * kLanes, walk.stride * kLanes);
  acc mean[kLanes], scale[kLanes], shift[kLanes];
  if constexpr (channels_last) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t c = cursor.channel_of(layout, i);
      mean[i] = parameters.mean.load(c);
      scale[i] = parameters.scale(c);
      shift[i] = parameters.shift(c);
    }
  }
  Ahead<T, kLanes, ring_depth(kLanes * sizeof(T), kResident<T, plain>), 1> ahead(
      {x}, walk.chunk * kLanes, walk.stride * kLanes, elements, aligned);
  for (; walk.chunk < walk.chunks; walk.chunk += walk.stride) {
    const int64_t at = walk.chunk * kLanes;
    const bool whole = aligned && at + kLanes <= elements;
    acc value[kLanes], out[kLanes];
    ahead.wait();
    ahead.load(0, value);
    if constexpr (channels_last) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) out[i] = (value[i] - mean[i]) * scale[i] + shift[i];
    } else {
      for_channels<kLanes>(layout, cursor, [&](auto first, uint32_t c) {
        const acc m = parameters.mean.load(c), s = parameters.scale(c), b = parameters.shift(c);
#pragma unroll
        for (int i = 0; i < kLanes; ++i)
          if (i >= first) out[i] = (value[i] - m) * s + b;
      });
      cursor.advance(layout);
    }
    if constexpr (!plain) context.template forward<kLanes>(at, elements, whole, out);
    store_at<T, kLanes>(y, at, elements, whole, out);
    ahead.advance(at);
  }
}

// dx = scale * (dz - a - (x - mean) * b) with a = share * sums[0], b = share * sums[1] * invstd. Without sums
// (statistics that do not depend on x) dx = scale * dz, and x may be null where no activation needs it.
template <typename T, bool channels_last, bool plain>
__global__ void __launch_bounds__(kThreads, kGradientResident<T, channels_last, plain>)
    batch_norm_input_gradient_kernel(const T* dy, const T* x, T* dx, T* d_residual, Layout layout,
                                     int64_t period, ChannelParameters<T> parameters, const acc_t<T>* sums,
                                     acc_t<T> share, Epilogue<T> epilogue) {
  using acc = acc_t<T>;
  constexpr int kLanes = kTogether<T, plain>;
  const EpilogueContext<T> context(plain ? Epilogue<T>{} : epilogue);
  const int64_t elements = layout.elements();
  const bool aligned = is_aligned(x) && is_aligned(dy) && is_aligned(dx) && is_aligned(d_residual) &&
                       is_aligned(context.e.residual);
  ChunkWalk<kLanes> walk(layout, period);
  if (walk.chunk >= walk.chunks) return;
  Cursor cursor(layout, walk.chunk * kLanes, walk.stride * kLanes);
  const auto a_of = [&](uint32_t c) { return sums ? sums[c] * share : acc(0); };
  const auto b_of = [&](uint32_t c) {
    return sums ? sums[layout.c + c] * share * parameters.invstd(c) : acc(0);
  };
  acc mean[kLanes], scale[kLanes], shift[kLanes], a[kLanes], b[kLanes];
  if constexpr (channels_last) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t c = cursor.channel_of(layout, i);
      mean[i] = parameters.mean.load(c);
      scale[i] = parameters.scale(c);
      shift[i] = plain ? acc(0) : parameters.shift(c);
      a[i] = a_of(c);
      b[i] = b_of(c);
    }
  }
  Ahead<T, kLanes, ring_depth(2 * kLanes * sizeof(T), kGradientResident<T, channels_last, plain>), 2> ahead(
      {dy, x}, walk.chunk * kLanes, walk.stride * kLanes, elements, aligned);
  for (; walk.chunk < walk.chunks; walk.chunk += walk.stride) {
    const int64_t at = walk.chunk * kLanes;
    const bool whole = aligned && at + kLanes <= elements;
    acc g[kLanes], value[kLanes], z[kLanes], less[kLanes];
    ahead.wait();
    ahead.load(0, g);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[i] = acc(0);
    if (x) ahead.load(1, value);
    if constexpr (channels_last) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const acc v = value[i] - mean[i];
        z[i] = v * scale[i] + shift[i];
        less[i] = a[i] + v * b[i];
      }
    } else {
      for_channels<kLanes>(layout, cursor, [&](auto first, uint32_t c) {
        const acc m = parameters.mean.load(c), s = parameters.scale(c),
                  h = plain ? acc(0) : parameters.shift(c);
        const acc a_c = a_of(c), b_c = b_of(c);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          if (i < first) continue;
          const acc v = value[i] - m;
          z[i] = v * s + h;
          less[i] = a_c + v * b_c;
          scale[i] = s;
        }
      });
      cursor.advance(layout);
    }
    if constexpr (!plain) {
      context.template backward<kLanes>(at, elements, whole, z, g);
      if (d_residual) store_at<T, kLanes>(d_residual, at, elements, whole, g);
    }
    if (dx) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) g[i] = sums ? (g[i] - less[i]) * scale[i] : g[i] * scale[i];
      store_at<T, kLanes>(dx, at, elements, whole, g);
    }
    ahead.advance(at);
  }
}

// 16 bytes of neighbouring channels per thread, where every row begins at a 16-byte border.
template <typename T, typename... Pointers>
bool columns_align(const Layout& layout, Pointers... pointers) {
  return layout.c % kColumns<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % kPacketBytes == 0) && ...);
}

// Bytes of workspace, at most, for a reduction with these inputs; only the first Partials::ticket_bytes(c)
// must be zero.
template <typename T, typename Value>
size_t reduce_workspace_bytes(const Layout& layout, bool channels_last, bool columns_aligned) {
  const int columns = !channels_last ? 0 : columns_aligned ? kColumns<T> : 1;
  return Partials<Value>::bytes(layout.c, reduce_shape(layout, columns).grid.y);
}

// Whether a launch with this workspace must find its tickets zero; a single block per channel takes none.
inline bool needs_tickets(const ReduceShape& shape, bool independent) {
  return shape.grid.y > 1 || (!independent && shape.grid.x > 1);
}

template <typename T>
cudaError_t launch_batch_norm_moments(const T* x, const Layout& layout, bool channels_last, void* workspace,
                                      const MomentsOutput<T>& output, cudaStream_t stream) {
  using Value = Moments<acc_t<T>>;
  const bool aligned = columns_align<T>(layout, x);
  const auto kernel = !channels_last ? batch_norm_moments_kernel<T, 0>
                      : aligned      ? batch_norm_moments_kernel<T, kColumns<T>>
                                     : batch_norm_moments_kernel<T, 1>;
  const ReduceShape shape = reduce_shape(layout,
                                         !channels_last ? 0
                                         : aligned      ? kColumns<T>
                                                        : 1,
                                         resident_blocks(kernel, kReduceBlocks));
  if (needs_tickets(shape, output.buffers.independent())) {
    const cudaError_t status = cudaMemsetAsync(workspace, 0, Partials<Value>::ticket_bytes(layout.c), stream);
    if (status != cudaSuccess) return status;
  }
  const auto partials = Partials<Value>::at(workspace, layout.c);
  return launch(kernel, shape.grid, shape.block, stream, x, layout, partials, output);
}

template <typename T>
cudaError_t launch_batch_norm_merge(const acc_t<T>* parts, int64_t part_count, int64_t channels,
                                    Moments<acc_t<T>>* merged, acc_t<T>* mean, acc_t<T>* variance,
                                    acc_t<T>* count, const Buffers<T>& buffers, cudaStream_t stream) {
  return launch(batch_norm_merge_kernel<T>, dim3(1), dim3(kThreads), stream, parts, part_count, channels,
                merged, mean, variance, count, buffers);
}

// An empty batch is a batch: it counts, and changes nothing else.
static __global__ void count_batch_kernel(int64_t* batches) { ++*batches; }

inline cudaError_t launch_count_batch(int64_t* batches, cudaStream_t stream) {
  return batches ? launch(count_batch_kernel, dim3(1), dim3(1), stream, batches) : cudaSuccess;
}

struct ElementwiseShape {
  dim3 grid;
  int64_t period;
};

// together: kTogether of the kernel.
template <typename... Params>
ElementwiseShape elementwise_shape(void (*kernel)(Params...), int64_t together, const Layout& layout,
                                   bool channels_last) {
  const int64_t period = channels_last ? layout.c / std::gcd(layout.c, together) : 1;
  const unsigned blocks = grid_stride_blocks(kernel, layout.elements() / together + 1, kElementwiseBlocks);
  const unsigned least = unsigned((period + kThreads - 1) / kThreads);
  return {dim3(blocks > least ? blocks : least), period};
}

// statistics: (2, c) of acc, written where not null.
template <typename T>
cudaError_t launch_batch_norm_normalize(const T* x, T* y, const Layout& layout, bool channels_last,
                                        const ChannelParameters<T>& parameters, acc_t<T>* statistics,
                                        const Epilogue<T>& epilogue, cudaStream_t stream) {
  const bool plain = is_plain(epilogue);
  const auto kernel = channels_last ? plain ? batch_norm_normalize_kernel<T, true, true>
                                            : batch_norm_normalize_kernel<T, true, false>
                      : plain       ? batch_norm_normalize_kernel<T, false, true>
                                    : batch_norm_normalize_kernel<T, false, false>;
  const auto [grid, period] =
      elementwise_shape(kernel, plain ? kTogether<T, true> : kTogether<T, false>, layout, channels_last);
  return launch(kernel, grid, dim3(kThreads), stream, x, y, layout, period, parameters, statistics, epilogue);
}

template <typename T>
cudaError_t launch_batch_norm_backward_reduce(const T* dy, const T* x, const Layout& layout,
                                              bool channels_last, const ChannelParameters<T>& parameters,
                                              const Epilogue<T>& epilogue, void* workspace,
                                              const GradientOutput<T>& output, cudaStream_t stream) {
  using Value = Sums<acc_t<T>>;
  const bool aligned = columns_align<T>(layout, x, dy, epilogue.residual);
  const auto choose = [&](auto plain) {
    return !channels_last ? batch_norm_backward_reduce_kernel<T, 0, plain.value>
           : aligned      ? batch_norm_backward_reduce_kernel<T, kColumns<T>, plain.value>
                          : batch_norm_backward_reduce_kernel<T, 1, plain.value>;
  };
  const auto kernel = is_plain(epilogue) ? choose(std::true_type{}) : choose(std::false_type{});
  const ReduceShape shape = reduce_shape(layout,
                                         !channels_last ? 0
                                         : aligned      ? kColumns<T>
                                                        : 1,
                                         resident_blocks(kernel, kReduceBlocks));
  if (needs_tickets(shape, true)) {
    const cudaError_t status = cudaMemsetAsync(workspace, 0, Partials<Value>::ticket_bytes(layout.c), stream);
    if (status != cudaSuccess) return status;
  }
  const auto partials = Partials<Value>::at(workspace, layout.c);
  return launch(kernel, shape.grid, shape.block, stream, dy, x, layout, parameters, epilogue, partials,
                output);
}

// dx, d_residual: either may be null. sums: (2, c) or null; share: 1 / count where sums are not yet divided.
template <typename T>
cudaError_t launch_batch_norm_input_gradient(const T* dy, const T* x, T* dx, T* d_residual,
                                             const Layout& layout, bool channels_last,
                                             const ChannelParameters<T>& parameters, const acc_t<T>* sums,
                                             acc_t<T> share, const Epilogue<T>& epilogue,
                                             cudaStream_t stream) {
  const bool plain = is_plain(epilogue) && d_residual == nullptr;
  const auto kernel = channels_last ? plain ? batch_norm_input_gradient_kernel<T, true, true>
                                            : batch_norm_input_gradient_kernel<T, true, false>
                      : plain       ? batch_norm_input_gradient_kernel<T, false, true>
                                    : batch_norm_input_gradient_kernel<T, false, false>;
  const auto [grid, period] =
      elementwise_shape(kernel, plain ? kTogether<T, true> : kTogether<T, false>, layout, channels_last);
  return launch(kernel, grid, dim3(kThreads), stream, dy, x, dx, d_residual, layout, period, parameters, sums,
                share, epilogue);
}

}  // namespace modeprobe
