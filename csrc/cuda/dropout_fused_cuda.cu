// modeprobe::bias_dropout_add, softmax_dropout and their backward passes on CUDA.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "modeprobe/bias_dropout_add.cuh"
#include "modeprobe/softmax_dropout.cuh"
#include "tensors.h"

namespace modeprobe::cuda {
namespace {

using Guard = torch::stable::accelerator::DeviceGuard;

void check_same(const Tensor& a, const Tensor& b, const char* who, const char* names) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  STD_TORCH_CHECK(same, who, ": ", names, " must have the same shape");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), who, ": ", names, " must have the same dtype");
  check_beside(b, a, who, names);
}

Tensor bias_dropout_add(const Tensor& input, const MaybeTensor& bias, const Tensor& residual,
                        const Tensor& key_in, double p, int64_t offset, const MaybeTensor& p_tensor) {
  const char* who = "bias_dropout_add";
  check_data(input, who, "input");
  check_same(input, residual, who, "input and residual");
  const Tensor key = checked_key(key_in, input, who);
  const void* p_on_device = checked_p(p, p_tensor, input, who);
  if (bias.has_value()) {
    STD_TORCH_CHECK(input.dim() >= 1 && bias->dim() == 1 && bias->size(0) == input.size(-1) &&
                        bias->scalar_type() == input.scalar_type(),
                    who, ": bias must have shape (input.size(-1),) and input's dtype");
    check_beside(*bias, input, who, "bias");
  }
  const Guard guard(input.get_device_index());
  const Tensor x = torch::stable::contiguous(input), r = torch::stable::contiguous(residual);
  const MaybeTensor b = bias.has_value() ? MaybeTensor(torch::stable::contiguous(*bias)) : std::nullopt;
  Tensor y = torch::stable::empty_like(x);
  with_type(x.scalar_type(), [&]<typename T>(T) {
    check(launch_bias_dropout_add<T>(data<T>(x), data<T>(b), data<T>(r), mutable_data<T>(y), x.numel(),
                                     x.dim() ? std::max<int64_t>(1, x.size(-1)) : 1, data<int64_t>(key),
                                     uint64_t(offset), p, p_on_device, current_stream(x)),
          who);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_dropout_add_backward(const Tensor& grad_output, const Tensor& key_in,
                                                     double p, int64_t offset, const MaybeTensor& p_tensor) {
  const char* who = "bias_dropout_add_backward";
  check_data(grad_output, who, "grad_output");
  STD_TORCH_CHECK(grad_output.dim() >= 1, who, ": grad_output must have at least one dimension");
  const Tensor key = checked_key(key_in, grad_output, who);
  const void* p_on_device = checked_p(p, p_tensor, grad_output, who);
  const Guard guard(grad_output.get_device_index());
  const Tensor dy = torch::stable::contiguous(grad_output);
  const int64_t columns = dy.size(-1);
  Tensor dx = torch::stable::empty_like(dy), d_bias = empty_vector(columns, dy.scalar_type(), dy);
  if (dy.numel() == 0) return {dx, torch::stable::zero_(d_bias)};
  with_type(dy.scalar_type(), [&]<typename T>(T) {
    const int64_t rows = dy.numel() / columns;
    const bool aligned = bias_columns_align(columns, data<T>(dy), data<T>(dx));
    const Tensor workspace =
        empty_vector(int64_t(bias_workspace_bytes<T>(rows, columns, aligned)), ScalarType::Byte, dy);
    check(launch_bias_dropout_add_backward<T>(data<T>(dy), mutable_data<T>(dx), mutable_data<T>(d_bias), rows,
                                              columns, data<int64_t>(key), uint64_t(offset), p, p_on_device,
                                              workspace.mutable_data_ptr(), current_stream(dy)),
          who);
  });
  return {dx, d_bias};
}

ScoreMask score_mask(const Tensor& scores, const MaybeTensor& mask) {
  ScoreMask found{};
  if (!mask.has_value()) return found;
  const char* who = "softmax_dropout";
  found.is_bool = mask->scalar_type() == ScalarType::Bool;
  STD_TORCH_CHECK(found.is_bool || mask->scalar_type() == scores.scalar_type(), who,
                  ": mask must be bool or of scores' dtype");
  check_beside(*mask, scores, who, "mask");
  STD_TORCH_CHECK(mask->dim() == scores.dim(), who, ": mask must have as many dimensions as scores");
  STD_TORCH_CHECK(scores.dim() <= kMaxMaskDims + 1, who, ": scores with a mask may have at most ",
                  kMaxMaskDims + 1, " dimensions");
  found.data = mask->const_data_ptr();
  found.dims = int(scores.dim()) - 1;
  for (int d = 0; d <= found.dims; ++d) {
    STD_TORCH_CHECK(mask->size(d) == scores.size(d) || mask->size(d) == 1, who,
                    ": mask cannot be expanded to the shape of scores");
    const int64_t step = mask->size(d) == 1 ? 0 : mask->stride(d);
    if (d == found.dims) {
      found.inner_step = step;
    } else {
      found.size[d] = scores.size(d);
      found.step[d] = step;
    }
  }
  return found;
}

std::tuple<Tensor, Tensor> softmax_dropout(const Tensor& scores, const MaybeTensor& mask,
                                           const Tensor& key_in, double p, bool save, int64_t offset,
                                           const MaybeTensor& p_tensor) {
  const char* who = "softmax_dropout";
  check_data(scores, who, "scores");
  STD_TORCH_CHECK(scores.dim() >= 1, who, ": scores must have at least one dimension");
  const Tensor key = checked_key(key_in, scores, who);
  const void* p_on_device = checked_p(p, p_tensor, scores, who);
  const ScoreMask rows_mask = score_mask(scores, mask);
  const Guard guard(scores.get_device_index());
  const Tensor x = torch::stable::contiguous(scores);
  Tensor y = torch::stable::empty_like(x);
  Tensor probabilities = save ? torch::stable::empty_like(x) : empty_vector(0, x.scalar_type(), x);
  if (x.numel() == 0) return {y, probabilities};
  with_type(x.scalar_type(), [&]<typename T>(T) {
    check(launch_softmax_dropout<T>(data<T>(x), rows_mask, mutable_data<T>(y),
                                    save ? mutable_data<T>(probabilities) : nullptr, x.numel() / x.size(-1),
                                    x.size(-1), data<int64_t>(key), uint64_t(offset), p, p_on_device,
                                    current_stream(x)),
          who);
  });
  return {y, probabilities};
}

Tensor softmax_dropout_backward(const Tensor& grad_output, const Tensor& probabilities, const Tensor& key_in,
                                double p, int64_t offset, const MaybeTensor& p_tensor) {
  const char* who = "softmax_dropout_backward";
  check_data(grad_output, who, "grad_output");
  check_same(grad_output, probabilities, who, "grad_output and probabilities");
  const Tensor key = checked_key(key_in, grad_output, who);
  const void* p_on_device = checked_p(p, p_tensor, grad_output, who);
  const Guard guard(grad_output.get_device_index());
  const Tensor dy = torch::stable::contiguous(grad_output), saved = torch::stable::contiguous(probabilities);
  Tensor ds = torch::stable::empty_like(dy);
  if (dy.numel() == 0) return ds;
  with_type(dy.scalar_type(), [&]<typename T>(T) {
    check(launch_softmax_dropout_backward<T>(data<T>(dy), data<T>(saved), mutable_data<T>(ds),
                                             dy.numel() / dy.size(-1), dy.size(-1), data<int64_t>(key),
                                             uint64_t(offset), p, p_on_device, current_stream(dy)),
          who);
  });
  return ds;
}

}  // namespace
}  // namespace modeprobe::cuda

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CUDA, m) {
  m.impl("bias_dropout_add", TORCH_BOX(&modeprobe::cuda::bias_dropout_add));
  m.impl("bias_dropout_add_backward", TORCH_BOX(&modeprobe::cuda::bias_dropout_add_backward));
  m.impl("softmax_dropout", TORCH_BOX(&modeprobe::cuda::softmax_dropout));
  m.impl("softmax_dropout_backward", TORCH_BOX(&modeprobe::cuda::softmax_dropout_backward));
}
