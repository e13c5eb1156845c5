// The elementwise halves of BatchNorm, normalise and input gradient, in blocks that do not stay: every thread
// does a fixed number of units and ends. On an H100 a grid that strides instead reaches 0.87 to 0.95 of a
// copy's bandwidth where these reach 0.99 and more.
//
// Formulas: Ioffe and Szegedy, "Batch normalization" (2015). y = (x - mean) * invstd * weight + bias, and
// dx = weight * invstd * (dz - mean(dz) - xhat * mean(dz * xhat)) where mean and invstd come from the batch.
#pragma once

#include "batch_norm_sums.cuh"
#include "channel_units.cuh"

namespace modeprobe {

// Neighbouring elements that a thread handles together: a packet, or with an epilogue a chunk, whose bits
// belong together.
template <typename T, bool plain>
constexpr int kTogether = plain ? kPacket<T> : kLanesPerChunk;

// Resident blocks per multiprocessor. With channels last the parameters of eight channels are in registers,
// and on sm_100 nvcc needs more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kNormalizeWithEpilogue = 2;
#else
constexpr int kNormalizeWithEpilogue = 3;
#endif
template <typename T, bool channels_last, bool plain>
constexpr int kNormalizeResident = sizeof(T) == 8  ? 2 - (channels_last && !plain)
                                   : !plain        ? kNormalizeWithEpilogue
                                   : channels_last ? 4
                                                   : 5;
template <typename T, bool channels_last, bool plain>
constexpr int kGradientResident = sizeof(T) == 8  ? 2 - channels_last
                                  : !plain        ? 3 - channels_last
                                  : channels_last ? 3
                                                  : 4;

// Units of a thread: enough that 32 KiB and more are on their way from the resident blocks. With channels
// last they share their parameters.
template <typename T, bool channels_last, bool plain>
constexpr int kNormalizeUnits = sizeof(T) == 8           ? plain ? 4 : 1
                                : channels_last && plain ? 4
                                : plain                  ? 2
                                                         : 4 - int(sizeof(T)) / 2;
template <typename T, bool channels_last, bool plain>
constexpr int kGradientUnits = sizeof(T) == 8            ? plain ? 2 : 1
                               : plain || sizeof(T) == 2 ? 2
                                                         : 1 + channels_last;

template <typename T, bool channels_last, bool plain>
__global__ void __launch_bounds__(kThreads, kNormalizeResident<T, channels_last, plain>)
    batch_norm_normalize_kernel(const T* x, T* y, Layout layout, UnitCut cut, ChannelParameters<T> parameters,
                                acc_t<T>* statistics, Epilogue<T> epilogue) {
  using acc = acc_t<T>;
  constexpr int kLanes = kTogether<T, plain>, kUnits = kNormalizeUnits<T, channels_last, plain>;
  if (statistics) {
    for (int64_t c = int64_t(blockIdx.x) * kThreads + thread_of_block(); c < layout.c;
         c += int64_t(gridDim.x) * kThreads) {
      statistics[c] = parameters.mean.load(c);
      statistics[layout.c + c] = parameters.invstd(c);
    }
  }
  const Units<kLanes, kUnits, channels_last> unit(cut);
  if (unit.none()) return;
  Raw<T, kLanes> raw[kUnits], raw_residual[kUnits];
  unit.load(x, raw);
  const EpilogueContext<T> context(plain ? Epilogue<T>{} : epilogue);
  if constexpr (!plain) unit.load(context.e.residual, raw_residual);
  const auto finish = [&](int k, acc* z) {
    const int64_t at = unit.position(k);
    if constexpr (!plain) {
      acc residual[kLanes];
      if (context.e.residual) raw_residual[k].unpack_to(residual);
      context.template forward<kLanes>(at, cut.elements, residual, z);
    }
    store_at<T, kLanes>(y, at, cut.elements, unit.is_whole(k), z);
  };
  if constexpr (channels_last) {
    const ChannelRun run = channels_of<kLanes>(cut, layout, unit.column);
    acc mean[kLanes], scale[kLanes], weight[kLanes], shift[kLanes];
    parameters.mean.template load_run<kLanes>(run, mean);
    parameters.template load_invstd<kLanes>(run, scale);
    parameters.template load_weight<kLanes>(run, weight);
    parameters.template load_shift<kLanes>(run, shift);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) scale[i] *= weight[i];
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!unit.has(k)) return;
      acc value[kLanes];
      raw[k].unpack_to(value);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) value[i] = (value[i] - mean[i]) * scale[i] + shift[i];
      finish(k, value);
    }
  } else {
    const UnitChannels channels(cut, unit.position(0) - threadIdx.x * kLanes);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!unit.has(k)) return;
      acc value[kLanes], out[kLanes];
      raw[k].unpack_to(value);
      channels.template each<kLanes>(unit.position(k), [&](auto first, uint32_t c) {
        const acc m = parameters.mean.load(c), s = parameters.scale(c), b = parameters.shift(c);
#pragma unroll
        for (int i = 0; i < kLanes; ++i)
          if (i >= first) out[i] = (value[i] - m) * s + b;
      });
      finish(k, out);
    }
  }
}

// dx = scale * (dz - a - (x - mean) * b) with a = share * sums[0], b = share * sums[1] * invstd. Without sums
// (statistics that do not depend on x) dx = scale * dz, and x may be null where no activation needs it.
template <typename T, bool channels_last, bool plain>
__global__ void __launch_bounds__(kThreads, kGradientResident<T, channels_last, plain>)
    batch_norm_input_gradient_kernel(const T* dy, const T* x, T* dx, T* d_residual, Layout layout,
                                     UnitCut cut, ChannelParameters<T> parameters, const acc_t<T>* sums,
                                     acc_t<T> share, Epilogue<T> epilogue) {
  using acc = acc_t<T>;
  constexpr int kLanes = kTogether<T, plain>, kUnits = kGradientUnits<T, channels_last, plain>;
  const Units<kLanes, kUnits, channels_last> unit(cut);
  if (unit.none()) return;
  Raw<T, kLanes> raw_dy[kUnits], raw_x[kUnits];
  unit.load(dy, raw_dy);
  unit.load(x, raw_x);
  const EpilogueContext<T> context(plain ? Epilogue<T>{} : epilogue);
  // v: x - mean, z: what was activated.
  const auto finish = [&](int k, acc* z, const acc* scale, const acc* less) {
    const int64_t at = unit.position(k);
    const bool whole = unit.is_whole(k);
    acc g[kLanes];
    raw_dy[k].unpack_to(g);
    if constexpr (!plain) {
      context.template backward<kLanes>(at, cut.elements, whole, z, g);
      if (d_residual) store_at<T, kLanes>(d_residual, at, cut.elements, whole, g);
    }
    if (dx) {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) g[i] = sums ? g[i] * scale[i] - less[i] : g[i] * scale[i];
      store_at<T, kLanes>(dx, at, cut.elements, whole, g);
    }
  };
  const auto load = [&](int k, acc* value) {
    if (x) return raw_x[k].unpack_to(value);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) value[i] = acc(0);
  };
  if constexpr (channels_last) {
    const ChannelRun run = channels_of<kLanes>(cut, layout, unit.column);
    acc mean[kLanes], scale[kLanes], shift[kLanes], a[kLanes] = {}, b[kLanes] = {}, invstd[kLanes];
    parameters.mean.template load_run<kLanes>(run, mean);
    parameters.template load_invstd<kLanes>(run, invstd);
    parameters.template load_weight<kLanes>(run, scale);
    if constexpr (!plain) parameters.template load_shift<kLanes>(run, shift);
    if (sums) {
      acc* rows = const_cast<acc*>(sums);
      Parameter<T>{rows, true}.template load_run<kLanes>(run, a);
      Parameter<T>{rows + layout.c, true}.template load_run<kLanes>(run, b);
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      scale[i] *= invstd[i];
      a[i] *= share * scale[i];
      b[i] *= share * invstd[i] * scale[i];
    }
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!unit.has(k)) return;
      acc value[kLanes], z[kLanes], less[kLanes];
      load(k, value);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const acc v = value[i] - mean[i];
        if constexpr (!plain) z[i] = v * scale[i] + shift[i];
        less[i] = v * b[i] + a[i];
      }
      finish(k, z, scale, less);
    }
  } else {
    const UnitChannels channels(cut, unit.position(0) - threadIdx.x * kLanes);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      if (!unit.has(k)) return;
      acc value[kLanes], z[kLanes], scale[kLanes], less[kLanes];
      load(k, value);
      channels.template each<kLanes>(unit.position(k), [&](auto first, uint32_t c) {
        const acc m = parameters.mean.load(c), invstd = parameters.invstd(c),
                  s = parameters.weight.load_or(c, acc(1)) * invstd, h = plain ? acc(0) : parameters.shift(c);
        const acc a = sums ? sums[c] * share * s : acc(0),
                  b = sums ? sums[layout.c + c] * share * invstd * s : acc(0);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          if (i < first) continue;
          const acc v = value[i] - m;
          if constexpr (!plain) z[i] = v * s + h;
          less[i] = v * b + a;
          scale[i] = s;
        }
      });
      finish(k, z, scale, less);
    }
  }
}

// statistics: (2, c) of acc, written where not null.
template <typename T>
cudaError_t launch_batch_norm_normalize(const T* x, T* y, const Layout& layout, bool channels_last,
                                        const ChannelParameters<T>& parameters, acc_t<T>* statistics,
                                        const Epilogue<T>& epilogue, cudaStream_t stream) {
  const auto run = [&](auto last, auto plain) {
    const auto [grid, block, cut] =
        unit_launch<T>(layout, last.value, kTogether<T, plain.value>,
                       kNormalizeUnits<T, last.value, plain.value>, x, y, epilogue.residual);
    return launch(batch_norm_normalize_kernel<T, last.value, plain.value>, grid, block, stream, x, y, layout,
                  cut, parameters, statistics, epilogue);
  };
  const auto with = [&](auto last) {
    return is_plain(epilogue) ? run(last, std::true_type{}) : run(last, std::false_type{});
  };
  return channels_last ? with(std::true_type{}) : with(std::false_type{});
}

// dx, d_residual: either may be null. sums: (2, c) or null; share: 1 / count where sums are not yet divided.
template <typename T>
cudaError_t launch_batch_norm_input_gradient(const T* dy, const T* x, T* dx, T* d_residual,
                                             const Layout& layout, bool channels_last,
                                             const ChannelParameters<T>& parameters, const acc_t<T>* sums,
                                             acc_t<T> share, const Epilogue<T>& epilogue,
                                             cudaStream_t stream) {
  const auto run = [&](auto last, auto plain) {
    const auto [grid, block, cut] =
        unit_launch<T>(layout, last.value, kTogether<T, plain.value>,
                       kGradientUnits<T, last.value, plain.value>, dy, x, dx, d_residual, epilogue.residual);
    return launch(batch_norm_input_gradient_kernel<T, last.value, plain.value>, grid, block, stream, dy, x,
                  dx, d_residual, layout, cut, parameters, sums, share, epilogue);
  };
  const auto with = [&](auto last) {
    return is_plain(epilogue) && d_residual == nullptr ? run(last, std::true_type{})
                                                       : run(last, std::false_type{});
  };
  return channels_last ? with(std::true_type{}) : with(std::false_type{});
}

}  // namespace modeprobe
