// The launchers of csrc/include, by dtype number, on host memory.
#pragma once

#include <cstdint>
#include <vector>

namespace emulated {

enum class Dtype : int { kFloat32, kFloat16, kBfloat16, kFloat64 };

struct Rate {
  double p = 0;
  const void* on_device = nullptr;
  bool scaled = true;
};

void dropout(Dtype dtype, const void* x, void* y, int64_t n, const int64_t* key, uint64_t offset, Rate rate);
void dropout_mask(uint8_t* mask, int64_t n, const int64_t* key, uint64_t offset, Rate rate);
void fold_in(int64_t* out, const int64_t* key, uint64_t n);

// dims, size, step: the walk through the mask; 0: every element has its own decision.
void structured_dropout(Dtype dtype, const void* x, void* y, int64_t n, int dims, const int64_t* size,
                        const int64_t* step, const int64_t* key, uint64_t offset, Rate rate, bool alpha,
                        bool linear);
void bias_dropout_add(Dtype dtype, const void* x, const void* bias, const void* residual, void* y, int64_t n,
                      int64_t columns, const int64_t* key, uint64_t offset, Rate rate);
void bias_dropout_add_backward(Dtype dtype, const void* dy, void* dx, void* d_bias, int64_t rows,
                               int64_t columns, const int64_t* key, uint64_t offset, Rate rate);
// dims, size, step: of the mask's rows.
void softmax_dropout(Dtype dtype, const void* scores, const void* mask, bool is_bool, int dims,
                     const int64_t* size, const int64_t* step, int64_t inner_step, void* y,
                     void* probabilities, int64_t rows, int64_t length, const int64_t* key, uint64_t offset,
                     Rate rate);
void softmax_dropout_backward(Dtype dtype, const void* dy, const void* probabilities, void* ds, int64_t rows,
                              int64_t length, const int64_t* key, uint64_t offset, Rate rate);

// Of one BatchNorm call. Null pointers mean absent; `wide`: parameters and buffers in the accumulate type.
struct BatchNorm {
  int64_t n, c, s;
  bool channels_last;
  bool wide_parameters = true, wide_buffers = true;
  double eps = 1e-5;
  void *weight = nullptr, *bias = nullptr;
  void *running_mean = nullptr, *running_var = nullptr;
  int64_t *batches = nullptr, *skipped = nullptr;
  bool has_momentum = true;
  double momentum = 0.1;
  const void* residual = nullptr;
  int activation = 0;
  double slope = 0.01;
  const int64_t* key = nullptr;
  double p = 0;
  uint8_t* sign_bits = nullptr;
  bool on_chip = false;  // the kernels of one launch, which must then fit
};

// {blocks, threads side by side, bytes of shared memory} of the kernels of one launch; empty where it is too
// large.
std::vector<int64_t> on_chip_shape(const BatchNorm& layer, int itemsize, int tensors);
void batch_norm_train(Dtype dtype, const BatchNorm& layer, const void* x, void* y, void* statistics);
void batch_norm_eval(Dtype dtype, const BatchNorm& layer, const void* x, void* y, void* statistics);
// d_weight, d_bias: of the parameters' dtype. sums: (2, c) of acc.
void batch_norm_backward(Dtype dtype, const BatchNorm& layer, bool batch_statistics, const void* dy,
                         const void* x, void* statistics, void* sums, void* dx, void* d_residual,
                         void* d_weight, void* d_bias);
void batch_norm_moments(Dtype dtype, const BatchNorm& layer, const void* x, void* packed);
void batch_norm_merge(Dtype dtype, const BatchNorm& layer, const void* parts, int64_t part_count, void* mean,
                      void* variance, void* count);

}  // namespace emulated
