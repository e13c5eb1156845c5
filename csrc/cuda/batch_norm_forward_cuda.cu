// Batch normalisation forward on CUDA: training, evaluation, and the statistics alone.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch_norm_on_chip.h"
#include "batch_norm_tensors.h"

namespace modeprobe::cuda {
namespace {

using Output = std::tuple<Tensor, Tensor, Tensor>;

// The running buffers, and the rule by which a batch is folded in.
struct Running {
  const MaybeTensor &mean, &variance, &batches, &skipped;
  std::optional<double> momentum;

  void check(const Tensor& data) const {
    for (const auto& [tensor, name] :
         {std::pair{&batches, "num_batches_tracked"}, {&skipped, "skipped_batches"}}) {
      if (!tensor->has_value()) continue;
      STD_TORCH_CHECK((*tensor)->scalar_type() == ScalarType::Long && (*tensor)->numel() == 1,
                      "batch_norm: ", name, " must be one int64");
      check_beside(**tensor, data, kWho, name);
    }
    STD_TORCH_CHECK(momentum.has_value() || batches.has_value() || !mean.has_value(),
                    "batch_norm: momentum=None needs num_batches_tracked, which counts the batches");
    STD_TORCH_CHECK(
        !mean.has_value() || !variance.has_value() || mean->scalar_type() == variance->scalar_type(),
        "batch_norm: running_mean and running_var must have the same dtype");
  }

  template <typename T>
  Buffers<T> get(ScalarType type) const {
    return {parameter<T>(mean, type),       parameter<T>(variance, type), mutable_data<int64_t>(batches),
            mutable_data<int64_t>(skipped), momentum.has_value(),         acc_t<T>(momentum.value_or(0))};
  }
};

template <typename T>
void collect(const Tensor& input, const Geometry& g, const MomentsOutput<T>& output, cudaStream_t stream) {
  using Value = Spread<acc_t<T>>;
  const T* x = data<T>(input);
  const size_t bytes =
      reduce_workspace_bytes<T, Value>(g.layout, g.channels_last, columns_align<T>(g.layout, x));
  const Tensor workspace = empty_vector(int64_t(bytes), ScalarType::Byte, input);
  check(launch_batch_norm_moments<T>(x, g.layout, g.channels_last, workspace.mutable_data_ptr(), output,
                                     stream),
        kWho);
}

// In one launch, where the layer is small enough.
template <typename T>
bool train_on_chip(const Tensor& input, const Tensor& output, const Geometry& g, const MaybeTensor& weight,
                   const MaybeTensor& bias, const MomentsOutput<T>& moments, const Epilogue<T>& epilogue,
                   cudaStream_t stream) {
  if constexpr (sizeof(T) < 8) {
    const auto shape = on_chip_forward_shape<T>(g.layout, g.channels_last, epilogue);
    if (!shape) return false;
    const size_t bytes = on_chip_workspace_bytes<T>(g.layout, moments.buffers);
    MaybeTensor workspace;
    if (bytes > 0) workspace = empty_vector(int64_t(bytes), ScalarType::Byte, input);
    const ScalarType type = input.scalar_type();
    check(launch_batch_norm_on_chip_forward<T>(*shape, data<T>(input), mutable_data<T>(output), g.layout,
                                               g.channels_last, parameter<T>(weight, type),
                                               parameter<T>(bias, type), mutable_data<char>(workspace),
                                               moments, epilogue, stream),
          kWho);
    return true;
  }
  return false;
}

Tensor new_sign_bits(bool wanted, const Geometry& g, const Tensor& input) {
  return empty_vector(wanted ? (g.layout.elements() + 7) / 8 : 0, ScalarType::Byte, input);
}

Output batch_norm_train(const Tensor& input_in, const MaybeTensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& running_mean, const MaybeTensor& running_var,
                        const MaybeTensor& num_batches_tracked, const MaybeTensor& skipped_batches,
                        std::optional<double> momentum, double eps, const MaybeTensor& residual,
                        int64_t activation, double slope, const MaybeTensor& key, double p,
                        bool save_sign_bits) {
  const Geometry g(input_in);
  const ScalarType type = input_in.scalar_type(), wide = accumulate_type(type);
  check_channels(weight, input_in, "weight");
  check_channels(bias, input_in, "bias");
  check_channels(running_mean, input_in, "running_mean");
  check_channels(running_var, input_in, "running_var");
  const Running running{running_mean, running_var, num_batches_tracked, skipped_batches, momentum};
  running.check(input_in);
  const torch::stable::accelerator::DeviceGuard guard(input_in.get_device_index());
  const cudaStream_t stream = current_stream(input_in);
  const Tensor input = g.bring(input_in, "input");
  EpilogueTensors epilogue(g, input, residual, activation, slope, key, p);

  const int64_t channels = g.layout.c;
  Tensor output = g.empty(type, input), statistics = empty_rows(2, channels, wide, input),
         sign_bits = new_sign_bits(save_sign_bits, g, input);
  if (g.layout.elements() == 0) {
    torch::stable::zero_(statistics);
    check(launch_count_batch(mutable_data<int64_t>(num_batches_tracked), stream), kWho);
    return {output, statistics, sign_bits};
  }
  if (save_sign_bits) epilogue.sign_bits = sign_bits;
  with_type(type, [&]<typename T>(T) {
    const MomentsOutput<T> moments{mutable_data<acc_t<T>>(statistics), nullptr, acc_t<T>(eps),
                                   running.get<T>(type)};
    if (train_on_chip<T>(input, output, g, weight, bias, moments, epilogue.get<T>(), stream)) return;
    collect<T>(input, g, moments, stream);
    check(launch_batch_norm_normalize<T>(data<T>(input), mutable_data<T>(output), g.layout, g.channels_last,
                                         from_statistics<T>(statistics, weight, bias, type), nullptr,
                                         epilogue.get<T>(), stream),
          kWho);
  });
  return {output, statistics, sign_bits};
}

Output batch_norm_eval(const Tensor& input_in, const Tensor& mean, const Tensor& variance,
                       const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                       const MaybeTensor& residual, int64_t activation, double slope, const MaybeTensor& key,
                       double p, bool save, bool save_sign_bits) {
  const Geometry g(input_in);
  const ScalarType type = input_in.scalar_type(), wide = accumulate_type(type);
  check_channels(mean, input_in, "mean");
  check_channels(variance, input_in, "variance");
  check_channels(weight, input_in, "weight");
  check_channels(bias, input_in, "bias");
  const torch::stable::accelerator::DeviceGuard guard(input_in.get_device_index());
  const cudaStream_t stream = current_stream(input_in);
  const Tensor input = g.bring(input_in, "input");
  EpilogueTensors epilogue(g, input, residual, activation, slope, key, p);

  const int64_t channels = g.layout.c;
  Tensor output = g.empty(type, input),
         statistics = save ? empty_rows(2, channels, wide, input) : empty_vector(0, wide, input),
         sign_bits = new_sign_bits(save_sign_bits, g, input);
  if (save_sign_bits) epilogue.sign_bits = sign_bits;
  with_type(type, [&]<typename T>(T) {
    const ChannelParameters<T> parameters{
        parameter<T>(mean, type),   parameter<T>(variance, type), true, acc_t<T>(eps),
        parameter<T>(weight, type), parameter<T>(bias, type)};
    check(launch_batch_norm_normalize<T>(data<T>(input), mutable_data<T>(output), g.layout, g.channels_last,
                                         parameters, save ? mutable_data<acc_t<T>>(statistics) : nullptr,
                                         epilogue.get<T>(), stream),
          kWho);
  });
  return {output, statistics, sign_bits};
}

Tensor batch_norm_moments(const Tensor& input_in) {
  const Geometry g(input_in);
  const torch::stable::accelerator::DeviceGuard guard(input_in.get_device_index());
  const Tensor input = g.bring(input_in, "input");
  Tensor packed = empty_vector(2 * g.layout.c + 2, accumulate_type(input.scalar_type()), input);
  if (g.layout.elements() == 0) return torch::stable::zero_(packed);
  with_type(input.scalar_type(), [&]<typename T>(T) {
    Buffers<T> none{};
    none.has_momentum = true;
    collect<T>(input, g, {nullptr, mutable_data<acc_t<T>>(packed), acc_t<T>(0), none}, current_stream(input));
  });
  return packed;
}

Output batch_norm_merge(const Tensor& moments, const MaybeTensor& running_mean,
                        const MaybeTensor& running_var, const MaybeTensor& num_batches_tracked,
                        const MaybeTensor& skipped_batches, std::optional<double> momentum) {
  const ScalarType type = moments.scalar_type();
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(1) >= 2 && moments.size(1) % 2 == 0 &&
                      (type == ScalarType::Float || type == ScalarType::Double) && moments.is_cuda() &&
                      moments.is_contiguous(),
                  "batch_norm: moments must be a contiguous (K, 2 * C + 2) float32 or float64 tensor");
  const int64_t channels = (moments.size(1) - 2) / 2;
  for (const auto& [tensor, name] :
       {std::pair{&running_mean, "running_mean"}, {&running_var, "running_var"}}) {
    if (!tensor->has_value()) continue;
    STD_TORCH_CHECK((*tensor)->dim() == 1 && (*tensor)->size(0) == channels && (*tensor)->is_contiguous(),
                    "batch_norm: ", name, " must be contiguous, of shape (", channels, ",)");
    check_beside(**tensor, moments, kWho, name);
  }
  const Running running{running_mean, running_var, num_batches_tracked, skipped_batches, momentum};
  running.check(moments);
  const torch::stable::accelerator::DeviceGuard guard(moments.get_device_index());
  Tensor mean = empty_vector(channels, type, moments), variance = empty_vector(channels, type, moments),
         count = empty_vector(1, type, moments);
  const auto merge = [&]<typename T>(T) {
    using Value = Moments<acc_t<T>>;
    const Tensor merged = empty_vector(channels * int64_t(sizeof(Value)), ScalarType::Byte, moments);
    check(launch_batch_norm_merge<T>(data<acc_t<T>>(moments), moments.size(0), channels,
                                     mutable_data<Value>(merged), mutable_data<acc_t<T>>(mean),
                                     mutable_data<acc_t<T>>(variance), mutable_data<acc_t<T>>(count),
                                     running.get<T>(type), current_stream(moments)),
          kWho);
  };
  // Buffers narrower than the moments say which type the data has.
  with_type(running_mean.has_value() ? running_mean->scalar_type() : type, merge);
  return {mean, variance, count};
}

}  // namespace
}  // namespace modeprobe::cuda

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CUDA, m) {
  m.impl("batch_norm_train", TORCH_BOX(&modeprobe::cuda::batch_norm_train));
  m.impl("batch_norm_eval", TORCH_BOX(&modeprobe::cuda::batch_norm_eval));
  m.impl("batch_norm_moments", TORCH_BOX(&modeprobe::cuda::batch_norm_moments));
  m.impl("batch_norm_merge", TORCH_BOX(&modeprobe::cuda::batch_norm_merge));
}
