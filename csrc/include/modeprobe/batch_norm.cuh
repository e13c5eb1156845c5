// The launchers of BatchNorm in two passes and more: the reductions here, the elementwise halves in
// batch_norm_elementwise.cuh.
#pragma once

#include "batch_norm_elementwise.cuh"

namespace modeprobe {

// 16 bytes of neighbouring channels per thread, where every row begins at a 16-byte border.
template <typename T, typename... Pointers>
bool columns_align(const Layout& layout, Pointers... pointers) {
  return layout.c % kColumns<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % kPacketBytes == 0) && ...);
}

// blocks: of a contiguous reduction, that reside on a multiprocessor.
template <typename T>
ReduceShape shape_of(const Layout& layout, bool channels_last, bool columns_aligned,
                     int blocks = kReduceBlocks) {
  if (!channels_last) return reduce_shape(layout, blocks);
  const int count = columns_aligned ? kColumns<T> : 1;
  return column_shape(layout.n, layout.c, count, count * int(sizeof(T)));
}

// Bytes of workspace, at most, for a reduction with these inputs; only the first Partials::ticket_bytes(c)
// must be zero.
template <typename T, typename Value>
size_t reduce_workspace_bytes(const Layout& layout, bool channels_last, bool columns_aligned) {
  return Partials<Value>::bytes(layout.c, shape_of<T>(layout, channels_last, columns_aligned).grid.y);
}

// Whether a launch with this workspace must find its tickets zero; a single block per channel takes none.
inline bool needs_tickets(const ReduceShape& shape, bool independent) {
  return shape.grid.y > 1 || (!independent && shape.grid.x > 1);
}

template <typename T>
cudaError_t launch_batch_norm_moments(const T* x, const Layout& layout, bool channels_last, void* workspace,
                                      const MomentsOutput<T>& output, cudaStream_t stream) {
  using Value = Spread<acc_t<T>>;
  const bool aligned = columns_align<T>(layout, x);
  const auto kernel = !channels_last ? batch_norm_moments_kernel<T, 0>
                      : aligned      ? batch_norm_moments_kernel<T, kColumns<T>>
                                     : batch_norm_moments_kernel<T, 1>;
  const ReduceShape shape =
      shape_of<T>(layout, channels_last, aligned, resident_blocks(kernel, kReduceBlocks));
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
  const ReduceShape shape =
      shape_of<T>(layout, channels_last, aligned, resident_blocks(kernel, kReduceBlocks));
  if (needs_tickets(shape, true)) {
    const cudaError_t status = cudaMemsetAsync(workspace, 0, Partials<Value>::ticket_bytes(layout.c), stream);
    if (status != cudaSuccess) return status;
  }
  const auto partials = Partials<Value>::at(workspace, layout.c);
  return launch(kernel, shape.grid, shape.block, stream, dy, x, layout, parameters, epilogue, partials,
                output);
}

}  // namespace modeprobe
