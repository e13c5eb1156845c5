// modeprobe::dropout, dropout_, dropout_mask and fold_in on CUDA.
#include <torch/csrc/stable/library.h>

#include "modeprobe/dropout.cuh"
#include "tensors.h"

namespace modeprobe::cuda {
namespace {

void run(const Tensor& from, const Tensor& to, const Tensor& key_in, double p, int64_t offset, bool scaled,
         const MaybeTensor& p_tensor, const char* who) {
  const Tensor key = checked_key(key_in, from, who);
  const void* p_on_device = checked_p(p, p_tensor, from, who);
  const torch::stable::accelerator::DeviceGuard guard(from.get_device_index());
  const cudaStream_t stream = current_stream(from);
  with_type(from.scalar_type(), [&]<typename T>(T) {
    check(launch_dropout_forward<T>(data<T>(from), mutable_data<T>(to), from.numel(), data<int64_t>(key),
                                    uint64_t(offset), p, p_on_device, scaled, stream),
          who);
  });
}

Tensor dropout(const Tensor& input, const Tensor& key, double p, int64_t offset, bool scaled,
               const MaybeTensor& p_tensor) {
  check_data(input, "dropout", "input");
  const Tensor x = is_dense(input) ? input : torch::stable::contiguous(input);
  Tensor y = torch::stable::empty_like(x);
  run(x, y, key, p, offset, scaled, p_tensor, "dropout");
  return y;
}

void dropout_(const Tensor& input, const Tensor& key, double p, int64_t offset, bool scaled,
              const MaybeTensor& p_tensor) {
  check_data(input, "dropout_", "input");
  if (is_dense(input)) return run(input, input, key, p, offset, scaled, p_tensor, "dropout_");
  const Tensor x = torch::stable::contiguous(input);
  run(x, x, key, p, offset, scaled, p_tensor, "dropout_");
  Tensor y = input;
  torch::stable::copy_(y, x);
}

Tensor dropout_mask(const Tensor& key_in, int64_t numel, double p, int64_t offset,
                    const MaybeTensor& p_tensor) {
  STD_TORCH_CHECK(numel >= 0, "dropout_mask: numel must not be negative, got ", numel);
  const Tensor key = checked_key(key_in, key_in, "dropout_mask");
  const void* p_on_device = checked_p(p, p_tensor, key, "dropout_mask");
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  Tensor mask = empty_vector(numel, ScalarType::Bool, key);
  check(launch_dropout_mask(mutable_data<uint8_t>(mask), numel, data<int64_t>(key), uint64_t(offset), p,
                            p_on_device, current_stream(key)),
        "dropout_mask");
  return mask;
}

Tensor fold_in(const Tensor& key_in, int64_t n, const MaybeTensor& n_tensor) {
  const Tensor key = checked_key(key_in, key_in, "fold_in");
  if (n_tensor.has_value()) {
    STD_TORCH_CHECK(n_tensor->scalar_type() == ScalarType::Long && n_tensor->numel() == 1,
                    "fold_in: n_tensor must be an int64 tensor with one element");
    check_beside(*n_tensor, key, "fold_in", "n_tensor");
  }
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  Tensor child = empty_vector(2, ScalarType::Long, key);
  check(launch_fold_in(mutable_data<int64_t>(child), data<int64_t>(key), uint64_t(n), data<int64_t>(n_tensor),
                       current_stream(key)),
        "fold_in");
  return child;
}

}  // namespace
}  // namespace modeprobe::cuda

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CUDA, m) {
  m.impl("dropout", TORCH_BOX(&modeprobe::cuda::dropout));
  m.impl("dropout_", TORCH_BOX(&modeprobe::cuda::dropout_));
  m.impl("dropout_mask", TORCH_BOX(&modeprobe::cuda::dropout_mask));
  m.impl("fold_in", TORCH_BOX(&modeprobe::cuda::fold_in));
}
