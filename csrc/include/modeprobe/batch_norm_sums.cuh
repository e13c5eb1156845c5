// The backward reduction of BatchNorm: sums of dz and dz * (x - mean) over each channel, which are the
// gradients of bias and weight, and what the input's gradient is made with.
#pragma once

#include "batch_norm_moments.cuh"
#include "epilogue.cuh"

namespace modeprobe {

// Resident blocks per multiprocessor. Float64 needs twice the registers.
template <typename T, bool plain>
constexpr int kResident = sizeof(T) == 8 ? 1
                          : plain        ? 3
                                         : 2;

// Of the sums: on sm_100 eight channels per thread with an activation do not fit into 128 registers.
template <typename T, int columns, bool plain>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSumsResident = columns == 8 && !plain ? 1 : kResident<T, plain>;
#else
constexpr int kSumsResident = kResident<T, plain>;
#endif

// The normalisation as kernels apply it: x -> (x - mean) * scale + shift.
template <typename T>
struct ChannelParameters {
  Parameter<T> mean, spread;  // spread: 1 / standard deviation, or the variance
  bool spread_is_variance;
  acc_t<T> eps;
  Parameter<T> weight, bias;

  __device__ __forceinline__ acc_t<T> invstd(int64_t c) const {
    const acc_t<T> value = spread.load(c);
    return spread_is_variance ? acc_t<T>(1) / sqrt(value + eps) : value;
  }
  __device__ __forceinline__ acc_t<T> scale(int64_t c) const {
    return weight.load_or(c, acc_t<T>(1)) * invstd(c);
  }
  __device__ __forceinline__ acc_t<T> shift(int64_t c) const { return bias.load_or(c, acc_t<T>(0)); }
};

template <typename T>
struct GradientOutput {
  acc_t<T>* sums;  // (2, c): of dz, of dz * (x - mean) * invstd; may be null
  Parameter<T> weight, bias;
};

// What differentiation needs of `count` channels; without an activation only the mean.
template <typename T, int count, bool plain>
struct LoadedChannels {
  acc_t<T> mean[count], scale[count], shift[count];

  __device__ __forceinline__ LoadedChannels(const ChannelParameters<T>& parameters, const Layout& layout,
                                            int64_t channel) {
    using acc = acc_t<T>;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const bool inside = channel + i < layout.c;
      mean[i] = inside ? parameters.mean.load(channel + i) : acc(0);
      scale[i] = inside && !plain ? parameters.scale(channel + i) : acc(0);
      shift[i] = inside && !plain ? parameters.shift(channel + i) : acc(0);
    }
  }

  // dy and x of one unit -> dz and x - mean, in place. count: of `width` channels, or one.
  template <int width>
  __device__ __forceinline__ void differentiate(const EpilogueContext<T>& context, int64_t at,
                                                int64_t elements, bool whole, acc_t<T>* g,
                                                acc_t<T>* v) const {
    static_assert(count == 1 || count == width);
#pragma unroll
    for (int i = 0; i < width; ++i) v[i] -= mean[count > 1 ? i : 0];
    if constexpr (!plain) {
      acc_t<T> z[width];
#pragma unroll
      for (int i = 0; i < width; ++i) z[i] = v[i] * scale[count > 1 ? i : 0] + shift[count > 1 ? i : 0];
      context.template backward<width>(at, elements, whole, z, g);
    }
  }
};

// Adds dz and dz * (x - mean) of one channel's unit, or of one row of `columns` channels.
template <typename acc>
__device__ __forceinline__ void add_unit(const Unit& unit, const acc* g, const acc* v, Sums<acc>& sums) {
  Sums<acc> chunk{};
  for_positions(unit, [&](int i) { chunk = merge(chunk, {g[i], g[i] * v[i]}); });
  sums = merge(sums, chunk);
}
template <int columns, typename acc>
__device__ __forceinline__ void add_row(const acc* g, const acc* v, Sums<acc>* sums) {
#pragma unroll
  for (int i = 0; i < columns; ++i) sums[i] = merge(sums[i], {g[i], g[i] * v[i]});
}

// The totals of `count` channels -> the gradients of weight and bias, and their sums where wanted.
template <typename T, int count>
__device__ __forceinline__ void finish_gradients(const Layout& layout, int64_t channel,
                                                 const ChannelParameters<T>& parameters,
                                                 const Sums<acc_t<T>>* sums,
                                                 const GradientOutput<T>& output) {
  if (threadIdx.y != 0 || channel >= layout.c) return;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int64_t c = channel + i;
    const acc_t<T> projected = sums[i].b * parameters.invstd(c);
    if (output.sums) {
      output.sums[c] = sums[i].a;
      output.sums[layout.c + c] = projected;
    }
    if (output.weight.data) output.weight.store(c, projected);
    if (output.bias.data) output.bias.store(c, sums[i].a);
  }
}

template <typename T, int columns, bool plain>
__global__ void __launch_bounds__(kThreads, kSumsResident<T, columns, plain>)
    batch_norm_backward_reduce_kernel(const T* dy, const T* x, Layout layout, ChannelParameters<T> parameters,
                                      Epilogue<T> epilogue, Partials<Sums<acc_t<T>>> partials,
                                      GradientOutput<T> output) {
  using acc = acc_t<T>;
  constexpr int kCount = columns ? columns : 1, kWidth = columns ? columns : kLanesPerChunk;
  const int64_t channel =
      columns ? (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kCount : int64_t(blockIdx.x);
  const int64_t elements = layout.elements();
  const EpilogueContext<T> context(plain ? Epilogue<T>{} : epilogue);
  const LoadedChannels<T, kCount, plain> channels(parameters, layout, channel);
  Sums<acc> sums[kCount] = {};

  if constexpr (columns == 0) {
    RowWalk walk(layout, channel);
    walk_rows<in_flight(2 * kLanesPerChunk * sizeof(T), kResident<T, plain>)>(
        walk, elements, is_aligned(x) && is_aligned(dy) && is_aligned(context.e.residual),
        [&](const auto& raw, const Unit& unit, bool whole) {
          if (unit.empty()) return;
          acc g[kWidth], v[kWidth];
          raw[0].unpack_to(g);
          raw[1].unpack_to(v);
          channels.template differentiate<kWidth>(context, unit.at, elements, whole, g, v);
          add_unit(unit, g, v, sums[0]);
        },
        dy, x);
  } else if (channel < layout.c) {
    const int64_t step = int64_t(gridDim.y) * blockDim.y * layout.c;
    int64_t at = (int64_t(blockIdx.y) * blockDim.y + threadIdx.y) * layout.c + channel;
    acc g[kWidth], v[kWidth];
    if constexpr (columns == 1) {
      for (; at < elements; at += step) {
        load_at<T, 1>(dy, at, elements, false, g);
        load_at<T, 1>(x, at, elements, false, v);
        channels.template differentiate<1>(context, at, elements, false, g, v);
        add_row<1>(g, v, sums);
      }
    } else {
      Ahead<T, kWidth, ring_depth(2 * kPacketBytes, kResident<T, plain>), 2, true> ahead({dy, x}, at, step,
                                                                                         elements, true);
      for (; at < elements; at += step) {
        ahead.wait();
        ahead.load(0, g);
        ahead.load(1, v);
        channels.template differentiate<kWidth>(context, at, elements, true, g, v);
        add_row<kWidth>(g, v, sums);
        ahead.advance(at);
      }
    }
  }
  if (!merge_grid<Sums<acc>, kCount>(partials, layout.c, channel, sums)) return;
  finish_gradients<T, kCount>(layout, channel, parameters, sums, output);
}

}  // namespace modeprobe
