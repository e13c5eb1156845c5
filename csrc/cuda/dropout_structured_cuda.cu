// modeprobe::structured_dropout and alpha_dropout on CUDA.
#include <torch/csrc/stable/library.h>

#include "modeprobe/structured_dropout.cuh"
#include "tensors.h"

namespace modeprobe::cuda {
namespace {

MaskWalk plan(const Tensor& x, const std::vector<int64_t>& shared_dims, const char* who) {
  const int64_t dims = x.dim();
  std::vector<int64_t> step(size_t(dims), 1), order;
  int64_t previous = -1;
  for (const int64_t d : shared_dims) {
    STD_TORCH_CHECK(d > previous && d < dims, who, ": shared_dims must be ascending and in [0, input.dim())");
    step[size_t(d)] = 0;
    previous = d;
  }
  int64_t mask_numel = 1;
  for (int64_t d = dims; d-- > 0;) {
    if (step[size_t(d)] == 0) continue;
    step[size_t(d)] = mask_numel;
    mask_numel *= x.size(d);
  }
  for (int64_t d = 0; d < dims; ++d)
    if (x.size(d) != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  std::vector<std::pair<int64_t, int64_t>> merged;  // size, step
  for (const int64_t d : order) {
    if (!merged.empty() && merged.back().second == step[size_t(d)] * x.size(d)) {
      merged.back() = {merged.back().first * x.size(d), step[size_t(d)]};
    } else {
      merged.emplace_back(x.size(d), step[size_t(d)]);
    }
  }
  if (merged.empty()) merged.emplace_back(1, 0);
  STD_TORCH_CHECK(merged.size() <= size_t(kMaxWalk), who, ": input has more than ", kMaxWalk,
                  " dimensions that cannot be merged");
  MaskWalk walk{int(merged.size()), {}, {}};
  for (size_t d = 0; d < merged.size(); ++d) {
    walk.size[d] = merged[d].first;
    walk.step[d] = merged[d].second;
  }
  return walk;
}

Tensor run(const Tensor& input, const Tensor& key_in, double p, const MaybeTensor& p_tensor, int64_t offset,
           const std::vector<int64_t>& shared_dims, bool walked, bool scaled, bool alpha, bool linear,
           const char* who) {
  check_data(input, who, "input");
  const Tensor key = checked_key(key_in, input, who);
  const void* p_on_device = checked_p(p, p_tensor, input, who);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor x = is_dense(input) ? input : torch::stable::contiguous(input);
  Tensor y = torch::stable::empty_like(x);
  const MaskWalk walk = walked ? plan(x, shared_dims, who) : MaskWalk{};
  with_type(x.scalar_type(), [&]<typename T>(T) {
    check(launch_structured_dropout<T>(data<T>(x), mutable_data<T>(y), x.numel(), walk, data<int64_t>(key),
                                       uint64_t(offset), p, p_on_device, scaled, alpha, linear,
                                       current_stream(x)),
          who);
  });
  return y;
}

Tensor structured_dropout(const Tensor& input, const Tensor& key, double p, std::vector<int64_t> shared_dims,
                          int64_t offset, bool scaled, const MaybeTensor& p_tensor) {
  return run(input, key, p, p_tensor, offset, shared_dims, true, scaled, false, false, "structured_dropout");
}

Tensor alpha_dropout(const Tensor& input, const Tensor& key, double p, std::vector<int64_t> shared_dims,
                     bool linear, int64_t offset, const MaybeTensor& p_tensor) {
  return run(input, key, p, p_tensor, offset, shared_dims, !shared_dims.empty(), true, true, linear,
             "alpha_dropout");
}

}  // namespace
}  // namespace modeprobe::cuda

STABLE_TORCH_LIBRARY_IMPL(modeprobe, CUDA, m) {
  m.impl("structured_dropout", TORCH_BOX(&modeprobe::cuda::structured_dropout));
  m.impl("alpha_dropout", TORCH_BOX(&modeprobe::cuda::alpha_dropout));
}
