// modeprobe::dropout, dropout_, dropout_mask and fold_in on the CPU.
#include <torch/csrc/stable/library.h>
#include <array>

#include "dropout_common.h"

namespace modeprobe::cpu {

bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous() || tensor.numel() == 0) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::array<std::pair<int64_t, int64_t>, 64> order;  // torch's own limit of dimensions
  size_t dims = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) order[dims++] = {strides[d], sizes[d]};
  }
  std::sort(order.begin(), order.begin() + dims);
  int64_t expected = 1;
  for (size_t d = 0; d < dims; ++d) {
    if (order[d].first != expected) return false;
    expected *= order[d].second;
  }
  return true;
}

namespace {

void run(const Tensor& from, const Tensor& to, const Tensor& key, double p, int64_t offset, bool scaled,
         const std::optional<Tensor>& p_tensor, const char* who) {
  const Key k = read_key(key, who);
  p = read_p(p, p_tensor, who);
  const int64_t numel = from.numel(), size = int64_t(from.element_size());
  const auto apply = dropout_kernels().scale[dtype_of(from)];
  const Affine affine{scaled ? keep_scale<double>(p) : 1.0, 0.0, 0.0};
  const auto* x = static_cast<const char*>(from.const_data_ptr());
  auto* y = static_cast<char*>(to.mutable_data_ptr());
  for_each_tile(k, p, uint64_t(offset), numel,
                [&](int64_t begin, int64_t n, const uint64_t* bits) {
                  apply(x + begin * size, y + begin * size, n, bits, affine);
                },
                {{x, x == y ? nullptr : y}, 64 * size});
}

Tensor dropout(const Tensor& input, const Tensor& key, double p, int64_t offset, bool scaled,
               const std::optional<Tensor>& p_tensor) {
  check_data(input, "dropout", "input");
  const Tensor x = is_dense(input) ? input : torch::stable::contiguous(input);
  Tensor y = empty_output(x);
  run(x, y, key, p, offset, scaled, p_tensor, "dropout");
  return y;
}

void dropout_(const Tensor& input, const Tensor& key, double p, int64_t offset, bool scaled,
              const std::optional<Tensor>& p_tensor) {
  check_data(input, "dropout_", "input");
  if (is_dense(input)) {
    run(input, input, key, p, offset, scaled, p_tensor, "dropout_");
  } else {
    for (int64_t d = 0; d < input.dim(); ++d) {
      STD_TORCH_CHECK(
          input.size(d) == 1 || input.stride(d) != 0,
          "dropout_: more than one element of input refers to a single memory location; clone() it first");
    }
    const Tensor x = torch::stable::contiguous(input);
    run(x, x, key, p, offset, scaled, p_tensor, "dropout_");
    Tensor y = input;
    torch::stable::copy_(y, x);
  }
}

Tensor dropout_mask(const Tensor& key, int64_t numel, double p, int64_t offset,
                    const std::optional<Tensor>& p_tensor) {
  const Key k = read_key(key, "dropout_mask");
  p = read_p(p, p_tensor, "dropout_mask");
  STD_TORCH_CHECK(numel >= 0, "dropout_mask: numel must not be negative, got ", numel);
  Tensor mask = torch::stable::new_empty(key, {numel}, torch::headeronly::ScalarType::Bool);
  auto* out = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const auto expand = dropout_kernels().expand;
  for_each_tile(k, p, uint64_t(offset), numel,
                [&](int64_t begin, int64_t n, const uint64_t* bits) { expand(bits, n, out + begin); });
  return mask;
}

Tensor fold_in(const Tensor& key, int64_t n, const std::optional<Tensor>& n_tensor) {
  const Key k = read_key(key, "fold_in");
  if (n_tensor.has_value()) {
    STD_TORCH_CHECK(n_tensor->scalar_type() == torch::headeronly::ScalarType::Long &&
                        n_tensor->numel() == 1 && n_tensor->is_cpu(),
                    "fold_in: n_tensor must be an int64 tensor with one element on the CPU");
    n = *static_cast<const int64_t*>(n_tensor->const_data_ptr());
  }
  Tensor child = torch::stable::new_empty(key, {2});
  const Key folded = fold(k, static_cast<uint64_t>(n));
  auto* words = static_cast<int64_t*>(child.mutable_data_ptr());
  words[0] = static_cast<int64_t>(folded.seed);
  words[1] = static_cast<int64_t>(folded.stream);
  return child;
}

}  // namespace
}  // namespace modeprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CPU, m) {
  m.impl("dropout", TORCH_BOX(&modeprobe::cpu::dropout));
  m.impl("dropout_", TORCH_BOX(&modeprobe::cpu::dropout_));
  m.impl("dropout_mask", TORCH_BOX(&modeprobe::cpu::dropout_mask));
  m.impl("fold_in", TORCH_BOX(&modeprobe::cpu::fold_in));
}
