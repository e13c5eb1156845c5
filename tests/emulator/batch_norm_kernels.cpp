#include <memory>

#include "dispatch.h"
#include "modeprobe/batch_norm.cuh"
#include "modeprobe/batch_norm_on_chip.cuh"

namespace emulated {
namespace {

using namespace modeprobe;

Layout layout_of(const BatchNorm& layer) { return {layer.n, layer.c, layer.s}; }

template <typename T>
Buffers<T> buffers_of(const BatchNorm& layer) {
  return {{layer.running_mean, layer.wide_buffers},
          {layer.running_var, layer.wide_buffers},
          layer.batches,
          layer.skipped,
          layer.has_momentum,
          acc_t<T>(layer.momentum)};
}

template <typename T>
Epilogue<T> epilogue_of(const BatchNorm& layer) {
  return {static_cast<const T*>(layer.residual),
          Activation(layer.activation),
          acc_t<T>(layer.slope),
          layer.key,
          rate_source<acc_t<T>>(layer.p, nullptr, true),
          layer.sign_bits};
}

// (2, c) statistics of a batch, or running buffers.
template <typename T>
ChannelParameters<T> parameters_of(const BatchNorm& layer, void* statistics) {
  auto* rows = static_cast<acc_t<T>*>(statistics);
  const Parameter<T> weight{layer.weight, layer.wide_parameters}, bias{layer.bias, layer.wide_parameters};
  if (rows) return {{rows, true}, {rows + layer.c, true}, false, acc_t<T>(layer.eps), weight, bias};
  return {{layer.running_mean, layer.wide_buffers},
          {layer.running_var, layer.wide_buffers},
          true,
          acc_t<T>(layer.eps),
          weight,
          bias};
}

std::unique_ptr<std::byte[]> poisoned(size_t bytes) {
  std::unique_ptr<std::byte[]> workspace(new std::byte[bytes]);
  memset(workspace.get(), 0xff, bytes);
  return workspace;
}

// Exactly as large as the launcher says.
template <typename T, typename Value>
std::unique_ptr<std::byte[]> workspace_of(const BatchNorm& layer, bool aligned) {
  return poisoned(reduce_workspace_bytes<T, Value>(layout_of(layer), layer.channels_last, aligned));
}

OnChipShape required(const std::optional<OnChipShape>& shape) {
  if (!shape) throw std::invalid_argument("the layer does not fit on the chip");
  return *shape;
}

template <typename T>
void moments(const BatchNorm& layer, const void* data, const MomentsOutput<T>& output) {
  const auto* x = static_cast<const T*>(data);
  const auto workspace = workspace_of<T, Spread<acc_t<T>>>(layer, columns_align<T>(layout_of(layer), x));
  check(launch_batch_norm_moments<T>(x, layout_of(layer), layer.channels_last, workspace.get(), output,
                                     nullptr));
}

}  // namespace

std::vector<int64_t> on_chip_shape(const BatchNorm& layer, int itemsize, int tensors) {
  const auto shape = modeprobe::on_chip_shape(layout_of(layer), layer.channels_last, itemsize, tensors);
  if (!shape) return {};
  return {int64_t(shape->grid.x), int64_t(shape->block.x), int64_t(shape->shared_bytes)};
}

void batch_norm_train(Dtype dtype, const BatchNorm& layer, const void* x, void* y, void* statistics) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const MomentsOutput<T> output{static_cast<acc_t<T>*>(statistics), nullptr, acc_t<T>(layer.eps),
                                  buffers_of<T>(layer)};
    if constexpr (sizeof(T) < 8) {
      if (layer.on_chip) {
        const Layout layout = layout_of(layer);
        const auto epilogue = epilogue_of<T>(layer);
        const auto workspace = poisoned(on_chip_workspace_bytes<T>(layout, output.buffers));
        const auto shape = required(on_chip_forward_shape<T>(layout, layer.channels_last, epilogue));
        const auto parameters = parameters_of<T>(layer, nullptr);
        return check(launch_batch_norm_on_chip_forward<T>(
            shape, static_cast<const T*>(x), static_cast<T*>(y), layout, layer.channels_last,
            parameters.weight, parameters.bias, workspace.get(), output, epilogue, nullptr));
      }
    }
    moments<T>(layer, x, output);
    check(launch_batch_norm_normalize<T>(static_cast<const T*>(x), static_cast<T*>(y), layout_of(layer),
                                         layer.channels_last, parameters_of<T>(layer, statistics), nullptr,
                                         epilogue_of<T>(layer), nullptr));
  });
}

void batch_norm_eval(Dtype dtype, const BatchNorm& layer, const void* x, void* y, void* statistics) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check(launch_batch_norm_normalize<T>(static_cast<const T*>(x), static_cast<T*>(y), layout_of(layer),
                                         layer.channels_last, parameters_of<T>(layer, nullptr),
                                         static_cast<acc_t<T>*>(statistics), epilogue_of<T>(layer), nullptr));
  });
}

void batch_norm_backward(Dtype dtype, const BatchNorm& layer, bool batch_statistics, const void* dy,
                         const void* x, void* statistics, void* sums, void* dx, void* d_residual,
                         void* d_weight, void* d_bias) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* gradient = static_cast<const T*>(dy);
    const auto* input = static_cast<const T*>(x);
    const Layout layout = layout_of(layer);
    const auto parameters = parameters_of<T>(layer, statistics);
    const auto epilogue = epilogue_of<T>(layer);
    if constexpr (sizeof(T) < 8) {
      if (layer.on_chip) {
        const auto shape = required(on_chip_backward_shape<T>(layout, layer.channels_last));
        const GradientOutput<T> output{
            nullptr, {d_weight, layer.wide_parameters}, {d_bias, layer.wide_parameters}};
        return check(launch_batch_norm_on_chip_backward<T>(
            shape, gradient, input, static_cast<T*>(dx), static_cast<T*>(d_residual), layout,
            layer.channels_last, parameters, batch_statistics, epilogue, output, nullptr));
      }
    }
    if (sums) {
      const auto workspace = workspace_of<T, Sums<acc_t<T>>>(
          layer, columns_align<T>(layout, input, gradient, epilogue.residual));
      const GradientOutput<T> output{
          static_cast<acc_t<T>*>(sums), {d_weight, layer.wide_parameters}, {d_bias, layer.wide_parameters}};
      check(launch_batch_norm_backward_reduce<T>(gradient, input, layout, layer.channels_last, parameters,
                                                 epilogue, workspace.get(), output, nullptr));
    }
    check(launch_batch_norm_input_gradient<T>(
        gradient, input, static_cast<T*>(dx), static_cast<T*>(d_residual), layout, layer.channels_last,
        parameters, batch_statistics ? static_cast<acc_t<T>*>(sums) : nullptr,
        acc_t<T>(1) / acc_t<T>(layout.per_channel()), epilogue, nullptr));
  });
}

void batch_norm_moments(Dtype dtype, const BatchNorm& layer, const void* x, void* packed) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Buffers<T> none{};
    none.has_momentum = true;
    moments<T>(layer, x, {nullptr, static_cast<acc_t<T>*>(packed), acc_t<T>(0), none});
  });
}

void batch_norm_merge(Dtype dtype, const BatchNorm& layer, const void* parts, int64_t part_count, void* mean,
                      void* variance, void* count) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using acc = acc_t<T>;
    const auto merged = std::make_unique<Moments<acc>[]>(layer.c);
    check(launch_batch_norm_merge<T>(static_cast<const acc*>(parts), part_count, layer.c, merged.get(),
                                     static_cast<acc*>(mean), static_cast<acc*>(variance),
                                     static_cast<acc*>(count), buffers_of<T>(layer), nullptr));
  });
}

}  // namespace emulated
