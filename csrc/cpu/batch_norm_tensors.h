// What the batch normalisation ops share on the CPU: views of tensors, outputs, per-channel operands.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm_schedule.h"
#include "memory.h"

namespace modeprobe::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), static_cast<int32_t>(type),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_vector(int64_t n, ScalarType type) { return empty_strided({n}, {1}, type); }

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Sizes, and the strides of the dense layout that every operand of the op is brought to.
struct Geometry {
  std::vector<int64_t> sizes, strides;
  View view;
};

Geometry geometry_of(const Tensor& input);

// `tensor` in that layout: itself, or a copy.
Tensor in_layout(const Tensor& tensor, const Geometry& g, const char* name);

inline Tensor empty_as(const Geometry& g, ScalarType type) {
  Tensor out = empty_strided(g.sizes, g.strides, type);
  wish_large_pages(out);
  return out;
}

void check_floating(const Tensor& tensor, const char* name);
void check_channels(const MaybeTensor& tensor, int64_t channels, const char* name);

// Per-channel values of any floating type, read as double; absent ones are `fallback`.
void read_channels(const MaybeTensor& tensor, double fallback, int64_t channels, double* out);
void write_channels(Tensor& tensor, int64_t channels, const double* values);

const Kernels& batch_norm_kernels();

// Calls f with the C++ type and kernel table of an element type.
template <class F>
void with_type(ScalarType type, const F& f) {
  const Kernels& k = batch_norm_kernels();
  switch (type) {
    case ScalarType::Float:
      return f(float{}, k.f32);
    case ScalarType::Double:
      return f(double{}, k.f64);
    case ScalarType::Half:
      return f(Half{}, k.f16);
    default:
      return f(BFloat{}, k.bf16);
  }
}

inline bool streams(const Tensor& t) {
  return leaves_caches(t) && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 64 == 0;
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
const T* data(const MaybeTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Activation, residual, dropout: the arguments of every op, and the tensors that keep them alive.
struct __attribute__((visibility("hidden"))) EpilogueTensors {
  int64_t activation;
  double slope, p;
  MaybeTensor residual, sign_bits, keep_bits;

  EpilogueTensors(const Geometry& g, ScalarType type, const MaybeTensor& residual_in, int64_t activation_in,
                  double slope_in, const MaybeTensor& key, double p_in);

  template <class T>
  Epilogue<T> get() const {
    using A = acc_t<T>;
    return {static_cast<int>(activation),
            static_cast<A>(slope),
            data<T>(residual),
            sign_bits.has_value() ? mutable_data<uint8_t>(*sign_bits) : nullptr,
            data<uint8_t>(keep_bits),
            static_cast<A>(p < 1 ? 1 / (1 - p) : 0)};
  }
};

}  // namespace modeprobe::cpu
