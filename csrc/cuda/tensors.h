// What the CUDA implementations share: argument checks, dense layouts, outputs, dtype dispatch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "modeprobe/vector.cuh"
#include "runtime.h"

namespace modeprobe::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_data(const Tensor& tensor, const char* who, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  who, ": ", name, " must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(tensor.is_cuda(), who, ": ", name, " must be on a CUDA device");
}

inline void check_beside(const Tensor& tensor, const Tensor& data, const char* who, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == data.get_device_index(), who, ": ", name,
                  " must be on the device of the data");
}

// A key's two words, side by side on the device.
inline Tensor checked_key(const Tensor& key, const Tensor& data, const char* who) {
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == 2, who,
                  ": key must be an int64 tensor of shape (2,)");
  check_beside(key, data, who, "key");
  return torch::stable::contiguous(key);
}

// The address of p on the device, which the host never reads; null where p comes as a number.
inline const void* checked_p(double p, const MaybeTensor& p_tensor, const Tensor& data, const char* who) {
  if (!p_tensor.has_value()) {
    STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, who, ": p must be in [0, 1], got ", p);
    return nullptr;
  }
  STD_TORCH_CHECK(p_tensor->scalar_type() == ScalarType::Double && p_tensor->numel() == 1, who,
                  ": p_tensor must be a float64 tensor with one element");
  check_beside(*p_tensor, data, who, "p_tensor");
  return p_tensor->const_data_ptr();
}

inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, ScalarType type,
                            const Tensor& beside) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(type),
                                                  aoti_torch_device_type_cuda(), beside.get_device_index(),
                                                  &handle));
  return Tensor(handle);
}

inline Tensor empty_vector(int64_t n, ScalarType type, const Tensor& beside) {
  const int64_t stride = 1;
  return empty_strided(1, &n, &stride, type, beside);
}

inline Tensor empty_rows(int64_t rows, int64_t columns, ScalarType type, const Tensor& beside) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return empty_strided(2, sizes, strides, type, beside);
}

// Whether dimensions, innermost first, follow each other in memory without gaps.
inline bool is_dense_in(const Tensor& tensor, const std::vector<int64_t>& order) {
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

// Whether the elements fill one block of memory, each place once, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous() || tensor.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1) by_stride.emplace_back(tensor.stride(d), d);
  std::sort(by_stride.begin(), by_stride.end());
  std::vector<int64_t> order;
  for (const auto& one : by_stride) order.push_back(one.second);
  return is_dense_in(tensor, order);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* data(const MaybeTensor& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <typename T>
T* mutable_data(const MaybeTensor& tensor) {
  return tensor.has_value() ? mutable_data<T>(*tensor) : nullptr;
}

// Calls f with a value of the C++ type of `type`.
template <typename F>
void with_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(__half{});
    default:
      return f(__nv_bfloat16{});
  }
}

}  // namespace modeprobe::cuda
