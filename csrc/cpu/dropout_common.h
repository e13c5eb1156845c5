// What the CPU implementations of the dropout family share: argument checks, layouts, the loop over tiles.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "dropout_kernels.h"
#include "memory.h"

namespace modeprobe::cpu {

using torch::stable::Tensor;

inline void check_data(const Tensor& tensor, const char* who, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  who, ": ", name, " must be float16, bfloat16, float32 or float64");
  STD_TORCH_CHECK(tensor.is_cpu(), who, ": ", name, " must be on the CPU");
}

inline Dtype dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Double:
      return kDouble;
    case ScalarType::Half:
      return kHalf;
    default:
      return kBFloat16;
  }
}

inline Key read_key(const Tensor& key, const char* who) {
  STD_TORCH_CHECK(
      key.scalar_type() == torch::headeronly::ScalarType::Long && key.dim() == 1 && key.size(0) == 2, who,
      ": key must be an int64 tensor of shape (2,)");
  STD_TORCH_CHECK(key.is_cpu(), who, ": key must be on the CPU, as the data is");
  const auto* words = static_cast<const int64_t*>(key.const_data_ptr());
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[key.stride(0)])};
}

inline double read_p(double p, const std::optional<Tensor>& p_tensor, const char* who) {
  if (p_tensor.has_value()) {
    STD_TORCH_CHECK(p_tensor->scalar_type() == torch::headeronly::ScalarType::Double &&
                        p_tensor->numel() == 1 && p_tensor->is_cpu(),
                    who, ": p_tensor must be a float64 tensor with one element on the CPU");
    p = *static_cast<const double*>(p_tensor->const_data_ptr());
  }
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, who, ": p must be in [0, 1], got ", p);
  return p;
}

// Whether the elements fill one block of memory, each place once, in whatever order of dimensions.
bool is_dense(const Tensor& tensor);

// Calls body(begin, n, bits) for tiles that cover [0, numel), in parallel; bits decide elements first + begin
// + j. `ahead`: where the elements are.
template <class Body>
void for_each_tile(Key key, double p, uint64_t first, int64_t numel, const Body& body,
                   const Ahead& ahead = {}) {
  const Threshold t = keep_threshold(p);
  const DropoutKernels& kernels = dropout_kernels();
  const int64_t tiles = (numel + kTile - 1) / kTile;
  const auto run = [&](int64_t from, int64_t to) {
    uint64_t bits[kTileWords + 1];
    for (int64_t tile = from; tile < to; ++tile) {
      const int64_t begin = tile * kTile, n = std::min<int64_t>(kTile, numel - begin);
      draw_tile(kernels, key, t, first + uint64_t(begin), n, bits, ahead.from(begin / 64));
      body(begin, n, static_cast<const uint64_t*>(bits));
    }
  };
  constexpr int64_t tiles_per_thread = 4;  // below, a second thread costs more than it brings
  if (tiles <= tiles_per_thread) {
    run(0, tiles);
  } else {
    torch::stable::parallel_for(0, tiles, tiles_per_thread, run);
  }
}

}  // namespace modeprobe::cpu
