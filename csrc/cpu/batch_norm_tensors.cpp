#include "batch_norm_tensors.h"

#include <algorithm>
#include <cstring>

#include "capability.h"
#include "dropout_common.h"

namespace modeprobe::cpu {

const Kernels& batch_norm_kernels() {
#if defined(__x86_64__)
  static const Kernels& chosen = capability() == Capability::kAvx512 ? batch_norm_kernels_avx512()
                                 : capability() == Capability::kAvx2 ? batch_norm_kernels_avx2()
                                                                     : batch_norm_kernels_portable();
  return chosen;
#else
  return batch_norm_kernels_portable();
#endif
}

void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "batch_norm: ", name, " must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(tensor.is_cpu(), "batch_norm: ", name, " must be on the CPU, as input is");
}

void check_channels(const MaybeTensor& tensor, int64_t channels, const char* name) {
  if (!tensor.has_value()) return;
  check_floating(*tensor, name);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == channels, "batch_norm: ", name,
                  " must have shape (", channels, ",), one value per channel of input");
}

Geometry geometry_of(const Tensor& input) {
  check_floating(input, "input");
  Geometry g;
  const int64_t dims = input.dim();
  STD_TORCH_CHECK(dims >= 2, "batch_norm: input must have shape (N, C, *), got ", dims, " dimension(s)");
  int64_t *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(input.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(input.get(), &strides));
  STD_TORCH_CHECK(sizes[1] > 0, "batch_norm: input must have channels, got size 0 in dimension 1");
  g.sizes.assign(sizes, sizes + dims);
  g.view = {sizes[0], sizes[1], 1, false};
  for (int64_t d = 2; d < dims; ++d) g.view.inner *= sizes[d];

  const auto dense = [&](const int64_t* order) {  // innermost dimension first
    int64_t expected = 1;
    for (int64_t i = 0; i < dims; ++i) {
      if (sizes[order[i]] != 1 && strides[order[i]] != expected) return false;
      expected *= sizes[order[i]];
    }
    return true;
  };
  std::vector<int64_t> order(dims);
  for (int64_t d = 0; d < dims; ++d) order[d] = dims - 1 - d;
  const bool contiguous = g.view.numel() == 0 || dense(order.data());
  g.view.rows = g.view.inner == 1;
  if (contiguous) {
    g.strides.assign(strides, strides + dims);
  } else {
    order[0] = 1;
    for (int64_t i = 1; i + 1 < dims; ++i) order[i] = dims - i;
    order[dims - 1] = 0;
    if (dense(order.data())) {
      g.view.rows = true;
      g.strides.assign(strides, strides + dims);
    } else {
      g.strides.assign(dims, 1);
      for (int64_t d = dims - 1; d-- > 0;)
        g.strides[d] = g.strides[d + 1] * std::max<int64_t>(1, sizes[d + 1]);
    }
  }
  return g;
}

Tensor in_layout(const Tensor& tensor, const Geometry& g, const char* name) {
  const int64_t dims = static_cast<int64_t>(g.sizes.size());
  STD_TORCH_CHECK(tensor.dim() == dims, "batch_norm: ", name, " must have the shape of input");
  int64_t *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  bool same = true;
  for (int64_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(sizes[d] == g.sizes[d], "batch_norm: ", name, " must have the shape of input");
    same &= sizes[d] == 1 || strides[d] == g.strides[d];
  }
  if (same || g.view.numel() == 0) return tensor;
  Tensor out = empty_as(g, tensor.scalar_type());
  torch::stable::copy_(out, tensor);
  return out;
}

void read_channels(const MaybeTensor& tensor, double fallback, int64_t channels, double* out) {
  if (!tensor.has_value()) {
    std::fill(out, out + channels, fallback);
    return;
  }
  const int64_t stride = channels > 1 ? tensor->stride(0) : 1;
  const auto read = [&](auto* p) {
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<double>(p[c * stride]);
  };
  switch (tensor->scalar_type()) {
    case ScalarType::Float:
      return read(data<float>(*tensor));
    case ScalarType::Double:
      return read(data<double>(*tensor));
    case ScalarType::Half:
      return read(data<c10::Half>(*tensor));
    default:
      return read(data<c10::BFloat16>(*tensor));
  }
}

void write_channels(Tensor& tensor, int64_t channels, const double* values) {
  const int64_t stride = channels > 1 ? tensor.stride(0) : 1;
  const auto write = [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    for (int64_t c = 0; c < channels; ++c) {
      if constexpr (std::is_same_v<T, double>) {
        p[c * stride] = values[c];
      } else {
        p[c * stride] = static_cast<T>(static_cast<float>(values[c]));
      }
    }
  };
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return write(mutable_data<float>(tensor));
    case ScalarType::Double:
      return write(mutable_data<double>(tensor));
    case ScalarType::Half:
      return write(mutable_data<c10::Half>(tensor));
    default:
      return write(mutable_data<c10::BFloat16>(tensor));
  }
}

EpilogueTensors::EpilogueTensors(const Geometry& g, ScalarType type, const MaybeTensor& residual_in,
                                 int64_t activation_in, double slope_in, const MaybeTensor& key, double p_in)
    : activation(activation_in), slope(slope_in), p(p_in) {
  STD_TORCH_CHECK(activation >= kNone && activation <= kGeluTanh, "batch_norm: unknown activation ",
                  activation);
  if (residual_in.has_value()) {
    STD_TORCH_CHECK(residual_in->scalar_type() == type, "batch_norm: residual must have the dtype of input");
    residual = in_layout(*residual_in, g, "residual");
  }
  if (!key.has_value() || keep_threshold(p).hi > 0xffffu) return;
  const Key words = read_key(*key, "batch_norm");
  p = read_p(p, std::nullopt, "batch_norm");
  const int64_t n = g.view.numel();
  keep_bits = empty_vector(ceil_div(n, 8) + 8, ScalarType::Byte);
  auto* bits = mutable_data<uint8_t>(*keep_bits);
  if (p == 1) {
    std::memset(bits, 0, static_cast<size_t>(ceil_div(n, 8)));
    return;
  }
  for_each_tile(words, p, 0, n, [&](int64_t begin, int64_t count, const uint64_t* from) {
    std::memcpy(bits + begin / 8, from, static_cast<size_t>(ceil_div(count, 8)));
  });
}

}  // namespace modeprobe::cpu
