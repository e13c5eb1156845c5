#include "dispatch.h"
#include "modeprobe/bias_dropout_add.cuh"
#include "modeprobe/softmax_dropout.cuh"
#include "modeprobe/structured_dropout.cuh"

namespace emulated {

using namespace modeprobe;

void structured_dropout(Dtype dtype, const void* x, void* y, int64_t n, int dims, const int64_t* size,
                        const int64_t* step, const int64_t* key, uint64_t offset, Rate rate, bool alpha,
                        bool linear) {
  MaskWalk walk{dims, {}, {}};
  for (int d = 0; d < dims; ++d) walk.size[d] = size[d], walk.step[d] = step[d];
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check(launch_structured_dropout<T>(static_cast<const T*>(x), static_cast<T*>(y), n, walk, key, offset,
                                       rate.p, rate.on_device, rate.scaled, alpha, linear, nullptr));
  });
}

void bias_dropout_add(Dtype dtype, const void* x, const void* bias, const void* residual, void* y, int64_t n,
                      int64_t columns, const int64_t* key, uint64_t offset, Rate rate) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check(launch_bias_dropout_add<T>(static_cast<const T*>(x), static_cast<const T*>(bias),
                                     static_cast<const T*>(residual), static_cast<T*>(y), n, columns, key,
                                     offset, rate.p, rate.on_device, nullptr));
  });
}

void bias_dropout_add_backward(Dtype dtype, const void* dy, void* dx, void* d_bias, int64_t rows,
                               int64_t columns, const int64_t* key, uint64_t offset, Rate rate) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto *from = static_cast<const T*>(dy), *to = static_cast<const T*>(dx);
    const size_t bytes = bias_workspace_bytes<T>(rows, columns, bias_columns_align(columns, from, to));
    const std::unique_ptr<std::byte[]> workspace(new std::byte[bytes]);
    memset(workspace.get(), 0xff, bytes);
    check(launch_bias_dropout_add_backward<T>(from, static_cast<T*>(dx), static_cast<T*>(d_bias), rows,
                                              columns, key, offset, rate.p, rate.on_device, workspace.get(),
                                              nullptr));
  });
}

void softmax_dropout(Dtype dtype, const void* scores, const void* mask, bool is_bool, int dims,
                     const int64_t* size, const int64_t* step, int64_t inner_step, void* y,
                     void* probabilities, int64_t rows, int64_t length, const int64_t* key, uint64_t offset,
                     Rate rate) {
  ScoreMask score_mask{};
  score_mask.data = mask;
  score_mask.is_bool = is_bool;
  score_mask.dims = dims;
  score_mask.inner_step = inner_step;
  for (int d = 0; d < dims; ++d) score_mask.size[d] = size[d], score_mask.step[d] = step[d];
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check(launch_softmax_dropout<T>(static_cast<const T*>(scores), score_mask, static_cast<T*>(y),
                                    static_cast<T*>(probabilities), rows, length, key, offset, rate.p,
                                    rate.on_device, nullptr));
  });
}

void softmax_dropout_backward(Dtype dtype, const void* dy, const void* probabilities, void* ds, int64_t rows,
                              int64_t length, const int64_t* key, uint64_t offset, Rate rate) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check(launch_softmax_dropout_backward<T>(static_cast<const T*>(dy), static_cast<const T*>(probabilities),
                                             static_cast<T*>(ds), rows, length, key, offset, rate.p,
                                             rate.on_device, nullptr));
  });
}

}  // namespace emulated
