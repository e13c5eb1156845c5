// BatchNorm of a small layer in one launch. A block owns whole channels and holds their data in shared
// memory: x (and dy) is read once, 2 and 3 passes over memory instead of 3 and 5, and no second kernel waits
// for the first. Blocks never wait for each other.
#pragma once

#include <algorithm>
#include <optional>

#include "batch_norm_sums.cuh"

namespace modeprobe {

// Per block: two share a multiprocessor of an H100 at 104 KiB where the layer is contiguous, at 103 KiB with
// channels last, which take more static memory.
constexpr size_t kOnChipBytes = 104 << 10;
constexpr size_t kOnChipBytesAlone = 32 << 10;  // per block, where fewer blocks than this leave it half idle:
constexpr int64_t kOnChipBlocks = 64;
// Rows that do not end at a chunk's border have elements that are moved one by one: on an H100 two launches
// take two thirds of the time at (256, 512, 7, 7) in bfloat16, one at (32, 512, 7, 7) three quarters.
constexpr int64_t kOnChipRaggedRows = 128;
constexpr int kBytesOfRow = 128;  // that threads side by side read, at most, with channels last
constexpr size_t kOnChipStaticBytes = 10 << 10;

// Blocks per multiprocessor that registers must not prevent.
template <bool channels_last, bool plain>
constexpr int kOnChipResident = channels_last && !plain ? 1 : 2;

struct OnChipShape {
  dim3 grid, block;
  size_t tensor_bytes;  // of shared memory for one tensor
  size_t shared_bytes;
};

// How a layer is cut into blocks that hold `tensors` tensors of `itemsize` bytes an element, or nothing where
// it is too large. Sizes alone decide, and what a block of this GPU can hold: alignment and values do not.
inline std::optional<OnChipShape> on_chip_shape(const Layout& layout, bool channels_last, int itemsize,
                                                int tensors) {
  if (channels_last && layout.c % kLanesPerChunk) return std::nullopt;
  if (!channels_last && layout.s % kLanesPerChunk && layout.n >= kOnChipRaggedRows) return std::nullopt;
  const size_t room = size_t(shared_bytes_per_block());
  const int64_t groups = channels_last ? layout.c / kLanesPerChunk : layout.c;
  const int64_t items =
      channels_last ? layout.n : layout.n * ((layout.s + 2 * kLanesPerChunk - 2) / kLanesPerChunk);
  // With channels last, threads side by side read 128 bytes of a row; fewer, down to a sector of 32 bytes,
  // where that gives too few blocks or too large ones.
  const int chunk_bytes = kLanesPerChunk * itemsize;
  const unsigned least = channels_last ? unsigned(std::max(1, 32 / chunk_bytes)) : 1;
  unsigned x = channels_last ? power_of_two_at_least(groups, unsigned(kBytesOfRow / chunk_bytes)) : 1;
  for (;; x /= 2) {
    const unsigned y = kThreads / x;
    const int64_t blocks = (groups + x - 1) / x, units = (items + y - 1) / y;
    const size_t tensor_bytes = size_t(units) * kThreads * chunk_bytes, bytes = tensor_bytes * tensors;
    const size_t most = blocks >= kOnChipBlocks ? kOnChipBytes : kOnChipBytesAlone;
    if (bytes <= most && bytes + kOnChipStaticBytes <= room && (blocks >= 2 * kOnChipBlocks || x <= least))
      return OnChipShape{dim3(unsigned(blocks)), dim3(x, y), tensor_bytes, bytes};
    if (x <= least) return std::nullopt;
  }
}

// A byte of sign bits must not hold two channels, which different blocks would write.
template <typename T>
std::optional<OnChipShape> on_chip_forward_shape(const Layout& layout, bool channels_last,
                                                 const Epilogue<T>& epilogue) {
  if (sizeof(T) == 8 || (!channels_last && epilogue.sign_bits && layout.s % kLanesPerChunk))
    return std::nullopt;
  return on_chip_shape(layout, channels_last, sizeof(T), 1);
}

template <typename T>
std::optional<OnChipShape> on_chip_backward_shape(const Layout& layout, bool channels_last) {
  if (sizeof(T) == 8) return std::nullopt;
  return on_chip_shape(layout, channels_last, sizeof(T), 2);
}

// The units of a thread: of one channel's rows (contiguous), or of eight channels (channels last).
template <bool channels_last>
struct OnChipWalk : RowWalk {
  using RowWalk::RowWalk;
};
template <>
struct OnChipWalk<true> {
  int64_t row, rows, at, step;

  __device__ __forceinline__ OnChipWalk(const Layout& layout, int64_t channel)
      : row(threadIdx.y),
        rows(channel < layout.c ? layout.n : 0),
        at(row * layout.c + channel),
        step(blockDim.y * layout.c) {}
  __device__ __forceinline__ bool done() const { return row >= rows; }
  __device__ __forceinline__ Unit next() {
    const Unit unit{at, Unit::kWhole};
    row += blockDim.y;
    at += step;
    return unit;
  }
};

// Only the unit's own positions: the others are another block's.
template <typename T>
__device__ __forceinline__ void store_unit(T* to, const Unit& unit, int64_t end, bool whole,
                                           const acc_t<T>* in) {
  if (unit.whole()) return store_at<T, kLanesPerChunk>(to, unit.at, end, whole, in);
#pragma unroll
  for (int i = 0; i < kLanesPerChunk; ++i)
    if (unit.has(i)) to[unit.at + i] = narrow<T>(in[i]);
}

// Which channels a block and its threads have: `kCount` neighbours each to reduce and to apply, one at most
// to finish.
template <typename T, bool channels_last>
struct OnChipChannels {
  static constexpr int kCount = channels_last ? kLanesPerChunk : 1;
  static constexpr int kSide = channels_last ? kBytesOfRow / int(kLanesPerChunk * sizeof(T)) : 1;  // threads
  int64_t first, own;
  bool ends;

  __device__ __forceinline__ explicit OnChipChannels(const Layout& layout) {
    const unsigned width = blockDim.x * kCount, thread = thread_of_block();
    const int64_t base = int64_t(blockIdx.x) * width;
    first = base + threadIdx.x * kCount;
    ends = thread < width && base + thread < layout.c;
    own = ends ? base + thread : 0;
  }
};

// Three numbers per channel of a block, made by the thread that finishes it and read by all.
template <typename T, bool channels_last>
struct OnChipNumbers {
  using Channels = OnChipChannels<T, channels_last>;
  struct alignas(kPacketBytes) Numbers {
    acc_t<T> a, b, c, unused;
  };
  Numbers* shared;

  __device__ __forceinline__ OnChipNumbers() : shared(room()) {}
  __device__ __forceinline__ void put(acc_t<T> a, acc_t<T> b, acc_t<T> c) const {
    const unsigned thread = thread_of_block();
    if (thread < blockDim.x * Channels::kCount) shared[thread] = {a, b, c, acc_t<T>(0)};
    __syncthreads();
  }
  __device__ __forceinline__ void get(acc_t<T>* a, acc_t<T>* b, acc_t<T>* c) const {
#pragma unroll
    for (int i = 0; i < Channels::kCount; ++i) {
      const Numbers numbers = shared[threadIdx.x * Channels::kCount + i];
      a[i] = numbers.a;
      b[i] = numbers.b;
      c[i] = numbers.c;
    }
  }

 private:
  static __device__ __forceinline__ Numbers* room() {
    MODEPROBE_SHARED(numbers, Numbers[Channels::kSide * Channels::kCount]);
    return numbers;
  }
};

template <typename T, bool channels_last, bool plain>
__global__ void __launch_bounds__(kThreads, kOnChipResident<channels_last, plain>)
    batch_norm_on_chip_forward_kernel(const T* x, T* y, Layout layout, Parameter<T> weight, Parameter<T> bias,
                                      Partials<Spread<acc_t<T>>> partials, MomentsOutput<T> output,
                                      Epilogue<T> epilogue) {
  using acc = acc_t<T>;
  using Walk = OnChipWalk<channels_last>;
  using Channels = OnChipChannels<T, channels_last>;
  constexpr int kLanes = kLanesPerChunk, kCount = Channels::kCount;
  MODEPROBE_DYNAMIC_SHARED(shared, Packet);
  const Slots<T, kLanes> held(shared);
  const EpilogueContext<T> context(plain ? Epilogue<T>{} : epilogue);
  const Channels channels(layout);
  const int64_t elements = layout.elements();
  const bool aligned = is_aligned(x) && is_aligned(y) && is_aligned(context.e.residual);
  const auto is_whole = [&](const Unit& unit) { return aligned && unit.inside(elements); };

  const Walk start(layout, channels.first);
  int number = 0;
  for (Walk walk = start; !walk.done(); ++number) {
    const Unit unit = walk.next();
    if (!unit.empty()) held.fetch(number, x, unit.at, elements, is_whole(unit));
  }
  // All that is needed later comes while x is on its way.
  acc pivot[kCount];
  load_pivots<T, kCount>(x, layout, channels.first, pivot);
  const ChannelEnd<T> end(x, layout, output, channels.own, channels.ends);
  const acc weight_of_own = weight.load_or(channels.own, acc(1)),
            bias_of_own = bias.load_or(channels.own, acc(0));
  end_copy_group();
  wait_for_copies<0>();

  ShiftedSums<acc> sums[kCount] = {};
  int64_t n = 0;
  if constexpr (channels_last) {
    acc shift[kLanes] = {};
    if (!start.done()) held.load(0, shift);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) sums[i].shift = shift[i];
  } else {
    sums[0].shift = start.first(x, pivot[0]);
  }
  number = 0;
  for (Walk walk = start; !walk.done(); ++number) {
    const Unit unit = walk.next();
    if (unit.empty()) continue;
    acc value[kLanes];
    held.load(number, value);
    if constexpr (channels_last) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) sums[i].add(value[i]);
      ++n;
    } else {
      add_unit(unit, value, sums[0], n);
    }
  }
  Spread<acc> moments[kCount];
  to_moments(sums, n, pivot, moments);
  const Spread<acc> total = merge_block<Channels::kSide>(moments);
  const acc invstd = acc(1) / sqrt(total.m2 / acc(layout.per_channel()) + output.eps);
  const OnChipNumbers<T, channels_last> numbers;
  numbers.put(end.pivot + total.mean, weight_of_own * invstd, bias_of_own);
  end.finish(layout, total, partials.values, output);

  acc mean[kCount], scale[kCount], shift[kCount];
  numbers.get(mean, scale, shift);
  number = 0;
  for (Walk walk = start; !walk.done(); ++number) {
    const Unit unit = walk.next();
    if (unit.empty()) continue;
    const bool whole = is_whole(unit);
    acc value[kLanes];
    held.load(number, value);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int c = channels_last ? i : 0;
      value[i] = (value[i] - mean[c]) * scale[c] + shift[c];
    }
    if constexpr (!plain) context.template forward<kLanes>(unit.at, elements, whole, value);
    store_unit(y, unit, elements, whole, value);
  }
  finish_batch(layout, partials, output.buffers);
}

// batch_statistics: of the batch, so that they depend on x.
template <typename T, bool channels_last, bool plain>
__global__ void __launch_bounds__(kThreads, kOnChipResident<channels_last, plain>)
    batch_norm_on_chip_backward_kernel(const T* dy, const T* x, T* dx, T* d_residual, Layout layout,
                                       size_t tensor_bytes, ChannelParameters<T> parameters,
                                       bool batch_statistics, Epilogue<T> epilogue,
                                       GradientOutput<T> output) {
  using acc = acc_t<T>;
  using Walk = OnChipWalk<channels_last>;
  using Channels = OnChipChannels<T, channels_last>;
  constexpr int kLanes = kLanesPerChunk, kCount = Channels::kCount;
  MODEPROBE_DYNAMIC_SHARED(shared, char);
  const Slots<T, kLanes> held_x(shared), held_dy(shared + tensor_bytes);
  const EpilogueContext<T> context(plain ? Epilogue<T>{} : epilogue);
  const Channels channels(layout);
  const int64_t elements = layout.elements();
  const bool aligned = is_aligned(x) && is_aligned(dy) && is_aligned(dx) && is_aligned(d_residual) &&
                       is_aligned(context.e.residual);
  const auto is_whole = [&](const Unit& unit) { return aligned && unit.inside(elements); };

  const Walk start(layout, channels.first);
  int number = 0;
  for (Walk walk = start; !walk.done(); ++number) {
    const Unit unit = walk.next();
    if (unit.empty()) continue;
    held_x.fetch(number, x, unit.at, elements, is_whole(unit));
    held_dy.fetch(number, dy, unit.at, elements, is_whole(unit));
  }
  const LoadedChannels<T, kCount, plain> loaded(parameters, layout, channels.first);
  const acc invstd = parameters.invstd(channels.own),
            weight = parameters.weight.load_or(channels.own, acc(1));
  end_copy_group();
  wait_for_copies<0>();

  Sums<acc> sums[kCount] = {};
  number = 0;
  for (Walk walk = start; !walk.done(); ++number) {
    const Unit unit = walk.next();
    if (unit.empty()) continue;
    acc g[kLanes], v[kLanes];
    held_dy.load(number, g);
    held_x.load(number, v);
    loaded.template differentiate<kLanes>(context, unit.at, elements, is_whole(unit), g, v);
    if constexpr (channels_last)
      add_row<kLanes>(g, v, sums);
    else
      add_unit(unit, g, v, sums[0]);
  }
  const Sums<acc> total = merge_block<Channels::kSide>(sums);
  const acc share = acc(1) / acc(layout.per_channel()), scale_of_own = weight * invstd;
  const OnChipNumbers<T, channels_last> numbers;
  numbers.put(scale_of_own, total.a * share * scale_of_own, total.b * invstd * share * invstd * scale_of_own);
  if (channels.ends) finish_gradients(layout, channels.own, invstd, total, output);

  acc scale[kCount], a[kCount], b[kCount];
  numbers.get(scale, a, b);
  number = 0;
  for (Walk walk = start; !walk.done(); ++number) {
    const Unit unit = walk.next();
    if (unit.empty()) continue;
    const bool whole = is_whole(unit);
    acc g[kLanes], v[kLanes];
    held_dy.load(number, g);
    held_x.load(number, v);
    loaded.template differentiate<kLanes>(context, unit.at, elements, whole, g, v);
    if (d_residual) store_unit(d_residual, unit, elements, whole, g);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int c = channels_last ? i : 0;
      g[i] = batch_statistics ? g[i] * scale[c] - (v[i] * b[c] + a[c]) : g[i] * scale[c];
    }
    store_unit(dx, unit, elements, whole, g);
  }
}

// Bytes of workspace; only the first Partials::ticket_bytes(c) must be zero, and none where it is empty.
template <typename T>
size_t on_chip_workspace_bytes(const Layout& layout, const Buffers<T>& buffers) {
  return buffers.independent() ? 0 : Partials<Spread<acc_t<T>>>::bytes(layout.c, 1);
}

template <typename T>
cudaError_t launch_batch_norm_on_chip_forward(const OnChipShape& shape, const T* x, T* y,
                                              const Layout& layout, bool channels_last,
                                              const Parameter<T>& weight, const Parameter<T>& bias,
                                              void* workspace, const MomentsOutput<T>& output,
                                              const Epilogue<T>& epilogue, cudaStream_t stream) {
  using P = Partials<Spread<acc_t<T>>>;
  if (!output.buffers.independent() && shape.grid.x > 1) {
    const cudaError_t status = cudaMemsetAsync(workspace, 0, P::ticket_bytes(layout.c), stream);
    if (status != cudaSuccess) return status;
  }
  const bool plain = is_plain(epilogue);
  const auto kernel = channels_last ? plain ? batch_norm_on_chip_forward_kernel<T, true, true>
                                            : batch_norm_on_chip_forward_kernel<T, true, false>
                      : plain       ? batch_norm_on_chip_forward_kernel<T, false, true>
                                    : batch_norm_on_chip_forward_kernel<T, false, false>;
  return launch_with_shared(kernel, shape.grid, shape.block, shape.shared_bytes, kOnChipStaticBytes, stream,
                            x, y, layout, weight, bias, P::at(workspace, layout.c), output, epilogue);
}

// d_residual may be null; dx is always made.
template <typename T>
cudaError_t launch_batch_norm_on_chip_backward(const OnChipShape& shape, const T* dy, const T* x, T* dx,
                                               T* d_residual, const Layout& layout, bool channels_last,
                                               const ChannelParameters<T>& parameters, bool batch_statistics,
                                               const Epilogue<T>& epilogue, const GradientOutput<T>& output,
                                               cudaStream_t stream) {
  const bool plain = is_plain(epilogue) && d_residual == nullptr;
  const auto kernel = channels_last ? plain ? batch_norm_on_chip_backward_kernel<T, true, true>
                                            : batch_norm_on_chip_backward_kernel<T, true, false>
                      : plain       ? batch_norm_on_chip_backward_kernel<T, false, true>
                                    : batch_norm_on_chip_backward_kernel<T, false, false>;
  return launch_with_shared(kernel, shape.grid, shape.block, shape.shared_bytes, kOnChipStaticBytes, stream,
                            dy, x, dx, d_residual, layout, shape.tensor_bytes, parameters, batch_statistics,
                            epilogue, output);
}

}  // namespace modeprobe
