#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"
#include "modeprobe/vector.cuh"

namespace emulated {

// Calls f with a null pointer of the dtype's C++ type. EMULATOR_ONE_DTYPE keeps quick builds to float32.
template <typename F>
void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(static_cast<float*>(nullptr));
#if !defined(EMULATOR_ONE_DTYPE)
    case Dtype::kFloat16:
      return f(static_cast<__half*>(nullptr));
    case Dtype::kBfloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::kFloat64:
      return f(static_cast<double*>(nullptr));
#endif
    default:
      throw std::invalid_argument("dtype");
  }
}

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error("launch failed: " + std::to_string(int(status)));
}

}  // namespace emulated
