// What forward and backward of batch normalisation share on CUDA: layouts, per-channel operands, epilogues.
#pragma once

#include "modeprobe/batch_norm.cuh"
#include "tensors.h"

namespace modeprobe::cuda {

constexpr const char* kWho = "batch_norm";

// Sizes, and the strides of the dense layout that every operand of the op is brought to.
struct Geometry {
  std::vector<int64_t> sizes, strides;
  Layout layout;
  bool channels_last;

  explicit Geometry(const Tensor& input) {
    check_data(input, kWho, "input");
    const int64_t dims = input.dim();
    STD_TORCH_CHECK(dims >= 2, "batch_norm: input must have shape (N, C, *), got ", dims, " dimension(s)");
    std::vector<int64_t> contiguous, innermost_channels;
    contiguous.reserve(dims);
    innermost_channels.reserve(dims);
    innermost_channels.push_back(1);
    for (int64_t d = dims; d-- > 0;) {
      contiguous.push_back(d);
      if (d != 1) innermost_channels.push_back(d);
    }
    layout = {input.size(0), input.size(1), 1};
    for (int64_t d = 2; d < dims; ++d) layout.s *= input.size(d);
    const bool is_contiguous = layout.elements() == 0 || is_dense_in(input, contiguous);
    channels_last = layout.s == 1 || (!is_contiguous && is_dense_in(input, innermost_channels));
    sizes.resize(dims);
    strides.resize(dims);
    int64_t expected = 1;
    for (const int64_t d : channels_last && !is_contiguous ? innermost_channels : contiguous) {
      sizes[d] = input.size(d);
      strides[d] = expected;
      expected *= std::max<int64_t>(1, sizes[d]);
    }
    if (is_contiguous || (channels_last && is_dense_in(input, innermost_channels)))
      for (int64_t d = 0; d < dims; ++d) strides[d] = input.stride(d);
    STD_TORCH_CHECK(channels_last || layout.s <= Layout::kLongestRow, "batch_norm: input may have at most ",
                    Layout::kLongestRow, " positions per sample and channel on CUDA, got ", layout.s);
    if (channels_last) layout = {layout.n * layout.s, layout.c, 1};
  }

  Tensor empty(ScalarType type, const Tensor& beside) const {
    return empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), type, beside);
  }

  // `tensor` in this layout: itself, or a copy.
  Tensor bring(const Tensor& tensor, const char* name) const {
    bool same = tensor.dim() == int64_t(sizes.size()), dense = true;
    for (int64_t d = 0; same && d < tensor.dim(); ++d) {
      same = tensor.size(d) == sizes[d];
      dense &= sizes[d] == 1 || tensor.stride(d) == strides[d];
    }
    STD_TORCH_CHECK(same, "batch_norm: ", name, " must have the shape of input");
    if (dense || layout.elements() == 0) return tensor;
    Tensor copy = empty(tensor.scalar_type(), tensor);
    torch::stable::copy_(copy, tensor);
    return copy;
  }
};

// One value per channel, in the accumulate type or in input's own.
inline void check_channels(const MaybeTensor& tensor, const Tensor& input, const char* name) {
  if (!tensor.has_value()) return;
  const ScalarType type = tensor->scalar_type();
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == input.size(1), "batch_norm: ", name,
                  " must have shape (", input.size(1), ",), one value per channel of input");
  STD_TORCH_CHECK(type == input.scalar_type() || type == accumulate_type(input.scalar_type()),
                  "batch_norm: ", name, " must have the dtype of input, or float32 for narrower input");
  STD_TORCH_CHECK(tensor->size(0) <= 1 || tensor->stride(0) == 1, "batch_norm: ", name,
                  " must be contiguous");
  check_beside(*tensor, input, kWho, name);
}

template <typename T>
Parameter<T> parameter(const MaybeTensor& tensor, ScalarType type) {
  if (!tensor.has_value()) return {nullptr, true};
  return {tensor->mutable_data_ptr(), tensor->scalar_type() == accumulate_type(type)};
}

// Activation, residual, dropout: the arguments of every op, and the tensors that keep them alive.
struct __attribute__((visibility("hidden"))) EpilogueTensors {
  int64_t activation;
  double slope, p;
  MaybeTensor residual, key, sign_bits;

  EpilogueTensors(const Geometry& g, const Tensor& input, const MaybeTensor& residual_in,
                  int64_t activation_in, double slope_in, const MaybeTensor& key_in, double p_in)
      : activation(activation_in), slope(slope_in), p(p_in) {
    STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::kGeluTanh),
                    "batch_norm: unknown activation ", activation);
    if (residual_in.has_value()) {
      STD_TORCH_CHECK(residual_in->scalar_type() == input.scalar_type(),
                      "batch_norm: residual must have the dtype of input");
      check_beside(*residual_in, input, kWho, "residual");
      residual = g.bring(*residual_in, "residual");
    }
    if (key_in.has_value()) {
      checked_p(p, std::nullopt, input, kWho);
      key = checked_key(*key_in, input, kWho);
    }
  }

  template <typename T>
  Epilogue<T> get() const {
    return {data<T>(residual),
            Activation(activation),
            acc_t<T>(slope),
            data<int64_t>(key),
            rate_source<acc_t<T>>(p, nullptr, true),
            mutable_data<uint8_t>(sign_bits)};
  }
};

// (2, C) statistics of a batch, or a mean and a variance.
template <typename T>
ChannelParameters<T> from_statistics(const Tensor& statistics, const MaybeTensor& weight,
                                     const MaybeTensor& bias, ScalarType type) {
  auto* rows = mutable_data<acc_t<T>>(statistics);
  return {{rows, true}, {rows + statistics.size(1), true}, false,
          acc_t<T>(0),  parameter<T>(weight, type),        parameter<T>(bias, type)};
}

}  // namespace modeprobe::cuda
