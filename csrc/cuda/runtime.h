// What every CUDA implementation needs from torch and the CUDA runtime: the current stream and error checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

// Lives in libtorch_cuda: weak, so that the same library loads on a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace modeprobe::cuda {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "modeprobe: a CUDA kernel was called, but this torch is a CPU build");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Not STD_CUDA_CHECK: it pulls in symbols of libtorch_cuda.
inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "modeprobe: ", what, ": ", cudaGetErrorString(status));
}

}  // namespace modeprobe::cuda
