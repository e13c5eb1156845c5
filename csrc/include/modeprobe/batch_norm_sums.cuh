// The backward reduction of BatchNorm: sums of dz and dz * (x - mean) over each channel, which are the
// gradients of bias and weight, and what the input's gradient is made with.
#pragma once

#include "batch_norm_moments.cuh"
#include "epilogue.cuh"

namespace modeprobe {

// Resident blocks per multiprocessor. Float64 needs twice the registers; eight channels per thread with an
// activation do not fit into 128, on sm_100 and in float16, which has its own conversions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T>
constexpr int kEightWithEpilogue = 1;
#else
template <typename T>
constexpr int kEightWithEpilogue = std::is_same_v<T, __half> ? 1 : 2;
#endif
template <typename T, int columns, bool plain>
constexpr int kSumsResident = sizeof(T) == 8           ? 1
                              : columns == 8 && !plain ? kEightWithEpilogue<T>
                              : columns || !plain      ? 2
                                                       : 3;

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

  // The same of `count` channels.
  template <int count>
  __device__ __forceinline__ void load_invstd(const ChannelRun& run, acc_t<T>* out) const {
    spread.template load_run<count>(run, out);
    if (!spread_is_variance) return;
#pragma unroll
    for (int i = 0; i < count; ++i) out[i] = acc_t<T>(1) / sqrt(out[i] + eps);
  }
  template <int count>
  __device__ __forceinline__ void load_weight(const ChannelRun& run, acc_t<T>* out) const {
#pragma unroll
    for (int i = 0; i < count; ++i) out[i] = acc_t<T>(1);
    if (weight.data) weight.template load_run<count>(run, out);
  }
  template <int count>
  __device__ __forceinline__ void load_shift(const ChannelRun& run, acc_t<T>* out) const {
#pragma unroll
    for (int i = 0; i < count; ++i) out[i] = acc_t<T>(0);
    if (bias.data) bias.template load_run<count>(run, out);
  }
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
                                            int64_t channel)
      : mean{}, scale{}, shift{} {
    if (channel + count > layout.c) return;
    const ChannelRun run{channel, layout.c, false};
    parameters.mean.template load_run<count>(run, mean);
    if constexpr (!plain) {
      acc_t<T> weight[count];
      parameters.template load_invstd<count>(run, scale);
      parameters.template load_weight<count>(run, weight);
      parameters.template load_shift<count>(run, shift);
#pragma unroll
      for (int i = 0; i < count; ++i) scale[i] *= weight[i];
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
  Fold<Sums<acc>> all{sums}, chunk;
  for_positions(unit, [&](int i) { chunk.add({g[i], g[i] * v[i]}); });
  all.add(chunk.get());
  sums = all.get();
}
template <int columns, typename acc>
__device__ __forceinline__ void add_row(const acc* g, const acc* v, Sums<acc>* sums) {
#pragma unroll
  for (int i = 0; i < columns; ++i) {
    sums[i].a += g[i];
    sums[i].b += g[i] * v[i];
  }
}

// The total of a channel -> the gradients of weight and bias, and their sums where wanted.
template <typename T>
__device__ __forceinline__ void finish_gradients(const Layout& layout, int64_t channel, acc_t<T> invstd,
                                                 const Sums<acc_t<T>>& total,
                                                 const GradientOutput<T>& output) {
  const acc_t<T> projected = total.b * invstd;
  if (output.sums) {
    output.sums[channel] = total.a;
    output.sums[layout.c + channel] = projected;
  }
  if (output.weight.data) output.weight.store(channel, projected);
  if (output.bias.data) output.bias.store(channel, total.a);
}

template <typename T, int columns, bool plain>
__global__ void __launch_bounds__(kThreads, kSumsResident<T, columns, plain>)
    batch_norm_backward_reduce_kernel(const T* dy, const T* x, Layout layout, ChannelParameters<T> parameters,
                                      Epilogue<T> epilogue, Partials<Sums<acc_t<T>>> partials,
                                      GradientOutput<T> output) {
  using acc = acc_t<T>;
  constexpr int kCount = columns ? columns : 1, kWidth = columns ? columns : kLanesPerChunk;
  const unsigned width = blockDim.x * kCount, thread = thread_of_block();
  const int64_t base = int64_t(blockIdx.x) * width, channel = base + threadIdx.x * kCount;
  const bool ends = thread < width && base + thread < layout.c;
  const int64_t elements = layout.elements();
  const EpilogueContext<T> context(plain ? Epilogue<T>{} : epilogue);
  const LoadedChannels<T, kCount, plain> channels(parameters, layout, channel);
  // Loaded ahead, as ChannelEnd of the moments does.
  const acc invstd = parameters.invstd(ends ? base + thread : 0);
  Sums<acc> sums[kCount] = {}, total{};

  if constexpr (columns == 0) {
    RowWalk walk(layout, channel);
    walk_rows<in_flight(2 * kLanesPerChunk * sizeof(T), kSumsResident<T, columns, plain>)>(
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
  } else {
    constexpr int kRows = columns == 8 && !plain   ? 4 / kSumsResident<T, columns, plain>
                          : columns == 1 || !plain ? 2
                                                   : 4;
    ColumnWalk walk(layout, channel);
    walk_columns<columns, kRows>(
        walk,
        [&](const auto& raw, int64_t at) {
          acc g[kWidth], v[kWidth];
          raw[0].unpack_to(g);
          raw[1].unpack_to(v);
          channels.template differentiate<kWidth>(context, at, elements, columns > 1, g, v);
          add_row<kWidth>(g, v, sums);
        },
        dy, x);
  }
  if (!merge_grid<columns ? kWarp : 1>(partials, layout.c, sums, total)) return;
  if (ends) finish_gradients(layout, base + thread, invstd, total, output);
}

}  // namespace modeprobe
