// The inner loops of batch normalisation, one table of them per instruction set and element type.
//
// Two layouts. Planes: `images` x `channels` runs of `length` elements, each run of one channel (a
// contiguous (N, C, *) tensor). Rows: `rows` runs of `width` elements, element j of each run of channel
// j mod C (channels innermost). Offsets are elements from the start of the tensor, in memory order, so
// that one offset finds an element in every operand. Per-channel operands are indexed from the tile's
// first channel (planes), or by j (rows).
#pragma once

#include <cstdint>

namespace modeprobe::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using Type = float;
};
template <>
struct Accumulate<double> {
  using Type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::Type;

enum Activation { kNone, kRelu, kLeakyRelu, kSilu, kGelu, kGeluTanh };

constexpr int kMaxGroup = 64;  // channels of a plane tile

struct Planes {
  int64_t begin, images, image_stride, channels, channel_stride, length;
};

struct Rows {
  int64_t begin, rows, width;
};

// y = dropout(activation(z + residual)). Null pointers: no residual, no bits, no dropout.
template <class T>
struct Epilogue {
  int activation;
  acc_t<T> slope;
  const T* residual;
  uint8_t* sign_bits;        // forward: written, from zeros; backward: read instead of recomputing z
  const uint8_t* keep_bits;  // the dropout mask
  acc_t<T> keep_scale;
};

// z = (x - mean) * scale + bias
template <class T>
struct Normalize {
  const T* input;
  T* output;
  const acc_t<T>*mean, *scale, *bias;
  bool stream;  // output is larger than what caches keep
  Epilogue<T> epilogue;
};

// grad_input = (dz - dz_mean - (x - mean) * slope) * scale, the subtrahends only with batch statistics.
template <class T>
struct Backward {
  const T *input, *grad_output;
  T *grad_input, *grad_residual;  // grad_residual = dz
  const acc_t<T>*mean, *scale, *bias, *dz_mean, *x_slope;
  bool batch_statistics;
  bool stream;  // grad_input is larger than what caches keep
  Epilogue<T> epilogue;
};

template <class T>
struct KernelTable {
  // Per channel of the tile: mean and M2 of its values.
  void (*plane_moments)(const T* input, Planes tile, double* mean, double* m2);
  void (*row_moments)(const T* input, Rows tile, double* mean, double* m2, acc_t<T>* scratch);
  void (*plane_normalize)(const Normalize<T>&, Planes tile);
  void (*row_normalize)(const Normalize<T>&, Rows tile);
  // Per channel: sum(dz) and sum(dz * (x - mean)), added to what is there. Writes grad_residual if given.
  void (*plane_backward_reduce)(const Backward<T>&, Planes tile, double* sum, double* dot);
  void (*row_backward_reduce)(const Backward<T>&, Rows tile, double* sum, double* dot);
  void (*plane_backward_input)(const Backward<T>&, Planes tile);
  void (*row_backward_input)(const Backward<T>&, Rows tile);
};

struct Kernels {
  KernelTable<float> f32;
  KernelTable<double> f64;
  KernelTable<Half> f16;
  KernelTable<BFloat> bf16;
};

const Kernels& batch_norm_kernels_portable();
const Kernels& batch_norm_kernels_avx2();
const Kernels& batch_norm_kernels_avx512();

}  // namespace modeprobe::cpu
