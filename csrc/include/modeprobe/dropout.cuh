// Dropout: y[j] = keep(offset + j) ? scale * x[j] : +0. The same kernel is its own backward.
#pragma once

#include "elementwise.cuh"

namespace modeprobe {

template <typename T>
struct Drop {
  acc_t<T> scale;

  template <int count>
  __device__ __forceinline__ void prepare(int64_t, acc_t<T>*) const {}
  __device__ __forceinline__ acc_t<T> operator()(const acc_t<T> (&x)[1], acc_t<T>, bool keep) const {
    return keep ? x[0] * scale : acc_t<T>(0);
  }
};

template <typename T, int share>
__global__ void __launch_bounds__(kThreads, kElementwiseBlocks<T>)
    dropout_forward_kernel(Chunks chunks, const T* x, T* y, const int64_t* key, RateSource<acc_t<T>> source) {
  const Rate<acc_t<T>> rate = resolve(source);
  for_elements<T, share>(chunks, {x}, y, load_key(key), rate, Drop<T>{rate.scale});
}

// Args:
//   x, y: n elements each, may be the same; key: 2 elements on the device.
//   p_on_device: one float64 on the device that replaces p, or null.
template <typename T>
cudaError_t launch_dropout_forward(const T* x, T* y, int64_t n, const int64_t* key, uint64_t offset, double p,
                                   const void* p_on_device, bool scaled, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const Chunks chunks = chunks_of<T>(n, offset, x, y);
  return launch_elementwise<kShare<T>>(dropout_forward_kernel<T, kShare<T>>, dropout_forward_kernel<T, 1>,
                                       chunks, stream, x, y, key,
                                       rate_source<acc_t<T>>(p, p_on_device, scaled));
}

// keep(offset + j) for j < n, as bytes 0 and 1; a chunk per thread.
static __global__ void __launch_bounds__(kThreads, 4)
    dropout_mask_kernel(uint8_t* mask, int64_t n, const int64_t* key, uint64_t offset,
                        RateSource<float> source) {
  const Rate<float> rate = resolve(source);
  const int64_t chunk = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t at = chunk * kLanesPerChunk - int64_t(offset % kLanesPerChunk);
  if (at >= n) return;
  const auto lanes = decide<1>(load_key(key), rate, offset / kLanesPerChunk + chunk);
  if (at >= 0 && at + kLanesPerChunk <= n && reinterpret_cast<uintptr_t>(mask + at) % 8 == 0) {
    uint64_t bytes = 0;
#pragma unroll
    for (int lane = 0; lane < kLanesPerChunk; ++lane) bytes |= uint64_t(lanes.kept(lane, rate)) << (8 * lane);
    *reinterpret_cast<uint64_t*>(mask + at) = bytes;
    return;
  }
#pragma unroll
  for (int lane = 0; lane < kLanesPerChunk; ++lane)
    if (at + lane >= 0 && at + lane < n) mask[at + lane] = lanes.kept(lane, rate);
}

inline cudaError_t launch_dropout_mask(uint8_t* mask, int64_t n, const int64_t* key, uint64_t offset,
                                       double p, const void* p_on_device, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return launch(dropout_mask_kernel, dim3(blocks_for(n / kLanesPerChunk + 2)), dim3(kThreads), stream, mask,
                n, key, offset, rate_source<float>(p, p_on_device, false));
}

static __global__ void fold_in_kernel(int64_t* out, const int64_t* key, uint64_t n,
                                      const int64_t* n_on_device) {
  const Key child = fold(load_key(key), n_on_device ? uint64_t(*n_on_device) : n);
  out[0] = int64_t(child.seed);
  out[1] = int64_t(child.stream);
}

inline cudaError_t launch_fold_in(int64_t* out, const int64_t* key, uint64_t n, const int64_t* n_on_device,
                                  cudaStream_t stream) {
  return launch(fold_in_kernel, dim3(1), dim3(1), stream, out, key, n, n_on_device);
}

}  // namespace modeprobe
