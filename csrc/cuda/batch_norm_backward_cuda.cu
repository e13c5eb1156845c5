// Batch normalisation backward on CUDA: in one call, and its two halves.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch_norm_on_chip.h"
#include "batch_norm_tensors.h"

namespace modeprobe::cuda {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_statistics(const Tensor& statistics, const Tensor& input, const char* name) {
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 2 && statistics.size(1) == input.size(1) &&
                      statistics.scalar_type() == accumulate_type(input.scalar_type()) &&
                      statistics.is_contiguous(),
                  "batch_norm: ", name, " must be a (2, C) tensor as the forward pass makes it");
  check_beside(statistics, input, kWho, name);
}

// Everything a backward op reads, in one layout.
struct Inputs {
  Geometry g;
  ScalarType type;
  Tensor grad_output;
  MaybeTensor input;
  EpilogueTensors epilogue;
  const torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  Inputs(const Tensor& grad_output_in, const MaybeTensor& input_in, const Tensor& statistics,
         const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, int64_t activation,
         double slope, const MaybeTensor& key, double p, const MaybeTensor& sign_bits)
      : g(input_in.has_value() ? *input_in : grad_output_in),
        type(grad_output_in.scalar_type()),
        grad_output(g.bring(grad_output_in, "grad_output")),
        epilogue(g, grad_output_in, residual, activation, slope, key, p),
        guard(grad_output_in.get_device_index()),
        stream(current_stream(grad_output_in)) {
    check_data(grad_output_in, kWho, "grad_output");
    if (input_in.has_value()) {
      STD_TORCH_CHECK(input_in->scalar_type() == type,
                      "batch_norm: grad_output must have the dtype of input");
      check_beside(*input_in, grad_output_in, kWho, "input");
      input = g.bring(*input_in, "input");
    }
    check_statistics(statistics, grad_output_in, "statistics");
    check_channels(weight, grad_output_in, "weight");
    check_channels(bias, grad_output_in, "bias");
    if (sign_bits.has_value() && sign_bits->numel() > 0) {
      STD_TORCH_CHECK(
          sign_bits->numel() == (g.layout.elements() + 7) / 8 && sign_bits->scalar_type() == ScalarType::Byte,
          "batch_norm: sign_bits must be those of the forward pass");
      check_beside(*sign_bits, grad_output_in, kWho, "sign_bits");
      epilogue.sign_bits = sign_bits;
    }
    // The derivative of an addition does not look at what was added.
    if (activation == int64_t(Activation::kNone) || epilogue.sign_bits.has_value()) epilogue.residual.reset();
    if (activation == int64_t(Activation::kNone)) epilogue.sign_bits.reset();
  }

  bool recomputes() const {
    return epilogue.activation != int64_t(Activation::kNone) && !epilogue.sign_bits.has_value();
  }
  Tensor new_sums() const { return empty_rows(2, g.layout.c, accumulate_type(type), grad_output); }

  template <typename T>
  void reduce(const Tensor& statistics, const MaybeTensor& weight, const MaybeTensor& bias,
              const Tensor& sums, const MaybeTensor& grad_weight, const MaybeTensor& grad_bias) const {
    using Value = Sums<acc_t<T>>;
    const T *x = data<T>(input), *dy = data<T>(grad_output);
    const Epilogue<T> e = epilogue.get<T>();
    const size_t bytes = reduce_workspace_bytes<T, Value>(g.layout, g.channels_last,
                                                          columns_align<T>(g.layout, x, dy, e.residual));
    const Tensor workspace = empty_vector(int64_t(bytes), ScalarType::Byte, grad_output);
    const GradientOutput<T> output{mutable_data<acc_t<T>>(sums), parameter<T>(grad_weight, type),
                                   parameter<T>(grad_bias, type)};
    check(launch_batch_norm_backward_reduce<T>(dy, x, g.layout, g.channels_last,
                                               from_statistics<T>(statistics, weight, bias, type), e,
                                               workspace.mutable_data_ptr(), output, stream),
          kWho);
  }

  // Everything in one launch, where the layer is small enough.
  template <typename T>
  bool on_chip(const Tensor& statistics, const MaybeTensor& weight, const MaybeTensor& bias,
               bool batch_statistics, const Tensor& grad_input, const MaybeTensor& grad_residual,
               const MaybeTensor& grad_weight, const MaybeTensor& grad_bias) const {
    if constexpr (sizeof(T) < 8) {
      const auto shape = on_chip_backward_shape<T>(g.layout, g.channels_last);
      if (!shape) return false;
      const GradientOutput<T> output{nullptr, parameter<T>(grad_weight, type), parameter<T>(grad_bias, type)};
      check(launch_batch_norm_on_chip_backward<T>(*shape, data<T>(grad_output), data<T>(input),
                                                  mutable_data<T>(grad_input), mutable_data<T>(grad_residual),
                                                  g.layout, g.channels_last,
                                                  from_statistics<T>(statistics, weight, bias, type),
                                                  batch_statistics, epilogue.get<T>(), output, stream),
            kWho);
      return true;
    }
    return false;
  }

  template <typename T>
  void apply(const Tensor& statistics, const MaybeTensor& weight, const MaybeTensor& bias,
             const MaybeTensor& sums, double share, const MaybeTensor& grad_input,
             const MaybeTensor& grad_residual) const {
    check(launch_batch_norm_input_gradient<T>(
              data<T>(grad_output), sums.has_value() || recomputes() ? data<T>(input) : nullptr,
              mutable_data<T>(grad_input), mutable_data<T>(grad_residual), g.layout, g.channels_last,
              from_statistics<T>(statistics, weight, bias, type), data<acc_t<T>>(sums), acc_t<T>(share),
              epilogue.get<T>(), stream),
          kWho);
  }
};

MaybeTensor wanted(bool yes, const Tensor& tensor) { return yes ? MaybeTensor(tensor) : std::nullopt; }

Gradients batch_norm_backward(const Tensor& grad_output_in, const MaybeTensor& input_in,
                              const Tensor& statistics, const MaybeTensor& weight, const MaybeTensor& bias,
                              bool batch_statistics, bool need_input, bool need_affine, bool need_residual,
                              const MaybeTensor& residual, int64_t activation, double slope,
                              const MaybeTensor& key, double p, const MaybeTensor& sign_bits) {
  const Inputs in(grad_output_in, input_in, statistics, weight, bias, residual, activation, slope, key, p,
                  sign_bits);
  const Tensor& dy = in.grad_output;
  const ScalarType wide = accumulate_type(in.type);
  const bool reduce = need_affine || (batch_statistics && need_input);
  STD_TORCH_CHECK(in.input.has_value() || (!reduce && !in.recomputes()),
                  "batch_norm: this backward pass needs input");
  const int64_t channels = in.g.layout.c;
  const bool weighted = need_affine && weight.has_value(), biased = need_affine && bias.has_value();
  Tensor grad_input = need_input ? in.g.empty(in.type, dy) : empty_vector(0, in.type, dy);
  Tensor grad_residual = need_residual ? in.g.empty(in.type, dy) : empty_vector(0, in.type, dy);
  Tensor grad_weight =
      weighted ? empty_vector(channels, weight->scalar_type(), dy) : empty_vector(0, wide, dy);
  Tensor grad_bias = biased ? empty_vector(channels, bias->scalar_type(), dy) : empty_vector(0, wide, dy);
  if (in.g.layout.elements() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_input, grad_weight, grad_bias, grad_residual};
  }
  with_type(in.type, [&]<typename T>(T) {
    const MaybeTensor to_residual = wanted(need_residual, grad_residual);
    const MaybeTensor to_weight = wanted(weighted, grad_weight), to_bias = wanted(biased, grad_bias);
    if (reduce && need_input &&
        in.on_chip<T>(statistics, weight, bias, batch_statistics, grad_input, to_residual, to_weight,
                      to_bias))
      return;
    MaybeTensor sums;
    if (reduce) {
      sums = in.new_sums();
      in.reduce<T>(statistics, weight, bias, *sums, to_weight, to_bias);
    }
    if (need_input || need_residual)
      in.apply<T>(statistics, weight, bias, batch_statistics && need_input ? sums : std::nullopt,
                  1.0 / double(in.g.layout.per_channel()), wanted(need_input, grad_input), to_residual);
  });
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

Tensor batch_norm_backward_reduce(const Tensor& grad_output_in, const Tensor& input, const Tensor& statistics,
                                  const MaybeTensor& weight, const MaybeTensor& bias,
                                  const MaybeTensor& residual, int64_t activation, double slope,
                                  const MaybeTensor& key, double p, const MaybeTensor& sign_bits) {
  const Inputs in(grad_output_in, input, statistics, weight, bias, residual, activation, slope, key, p,
                  sign_bits);
  Tensor sums = in.new_sums();
  if (in.g.layout.elements() == 0) return torch::stable::zero_(sums);
  with_type(in.type,
            [&]<typename T>(T) { in.reduce<T>(statistics, weight, bias, sums, std::nullopt, std::nullopt); });
  return sums;
}

std::tuple<Tensor, Tensor> batch_norm_backward_input(const Tensor& grad_output_in, const Tensor& input,
                                                     const Tensor& statistics, const Tensor& means,
                                                     const MaybeTensor& weight, const MaybeTensor& bias,
                                                     bool need_residual, const MaybeTensor& residual,
                                                     int64_t activation, double slope, const MaybeTensor& key,
                                                     double p, const MaybeTensor& sign_bits) {
  const Inputs in(grad_output_in, input, statistics, weight, bias, residual, activation, slope, key, p,
                  sign_bits);
  check_statistics(means, grad_output_in, "means");
  Tensor grad_input = in.g.empty(in.type, in.grad_output),
         grad_residual =
             need_residual ? in.g.empty(in.type, in.grad_output) : empty_vector(0, in.type, in.grad_output);
  if (in.g.layout.elements() == 0) return {grad_input, grad_residual};
  with_type(in.type, [&]<typename T>(T) {
    in.apply<T>(statistics, weight, bias, means, 1.0, grad_input, wanted(need_residual, grad_residual));
  });
  return {grad_input, grad_residual};
}

}  // namespace
}  // namespace modeprobe::cuda

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CUDA, m) {
  m.impl("batch_norm_backward", TORCH_BOX(&modeprobe::cuda::batch_norm_backward));
  m.impl("batch_norm_backward_reduce", TORCH_BOX(&modeprobe::cuda::batch_norm_backward_reduce));
  m.impl("batch_norm_backward_input", TORCH_BOX(&modeprobe::cuda::batch_norm_backward_input));
}
