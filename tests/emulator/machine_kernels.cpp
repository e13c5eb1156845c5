// Small kernels that use, rightly and wrongly, everything the emulator offers: the emulator's own test.
#include <map>
#include <string>

#include "machine_kernels.h"
#include "modeprobe/vector.cuh"

namespace emulated {
namespace machine {  // named, so that a fault can tell the kernel's name

using namespace modeprobe;

// Sum over the block by shuffles and shared memory; with the barrier left out some schedule reads NaN.
template <bool barrier>
__global__ void block_sum_kernel(const float* x, float* out) {
  MODEPROBE_SHARED(partial, float[kWarps]);
  float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int half = kWarp / 2; half > 0; half /= 2) value += __shfl_xor_sync(~0u, value, half);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  if (barrier) __syncthreads();
  float total = 0;
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) total += partial[i];
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

__global__ void divergent_barrier_kernel(const float*, float* out) {
  if (threadIdx.x != 7) __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void two_barriers_kernel(const float*, float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void inactive_lane_kernel(const float*, float* out) {
  float value = 1;
  if (threadIdx.x % kWarp != 3) value = __shfl_xor_sync(~0u, value, 1);
  out[threadIdx.x] = value;
}
__global__ void outside_mask_kernel(const float*, float* out) {
  out[threadIdx.x] = threadIdx.x % kWarp < 16 ? __shfl_sync(0xffffu, 1.0f, 20) : 0.0f;
}
__global__ void not_in_mask_kernel(const float*, float* out) {
  out[threadIdx.x] = __shfl_sync(0xffu, 1.0f, 0);
}
__global__ void never_completes_kernel(const float*, float* out) {
  if (threadIdx.x == 0)
    emulator::grid_barrier();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void misaligned_kernel(const float* x, float*) { (void)load_packet(x + 1); }
__global__ void misaligned_shared_kernel(const float*, float*) {
  MODEPROBE_SHARED(words, uint32_t[4 * kThreads]);
  (void)load_packet(words + 4 * threadIdx.x);
}

// Every block reads what the others wrote before the barrier.
__global__ void grid_barrier_kernel(const float* x, float* out) {
  auto* seen = static_cast<float*>(emulator::dynamic_shared());
  if (threadIdx.x == 0) out[blockIdx.x] = x[blockIdx.x];
  emulator::grid_barrier();
  if (threadIdx.x < gridDim.x) seen[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += seen[i];
    out[gridDim.x + blockIdx.x] = sum;
  }
}

// Votes, counts, reductions and atomics over the warp's even lanes.
__global__ void votes_kernel(const float*, float* out) {
  MODEPROBE_SHARED(counter, unsigned);
  if (threadIdx.x == 0) counter = 0;
  __syncthreads();
  const unsigned even = 0x55555555u, lane = threadIdx.x % kWarp;
  if (lane % 2 == 0) {
    const bool right = __ballot_sync(even, lane < 8) == 0x55u && __any_sync(even, lane == 30) &&
                       !__all_sync(even, lane < 30) && __reduce_add_sync(even, lane) == 240 &&
                       __reduce_max_sync(even, lane) == 30 && __reduce_or_sync(even, lane) == 30;
    if (right) atomicAdd(&counter, 1u);
  }
  const int count = __syncthreads_count(lane == 0);
  const int all = __syncthreads_and(counter == blockDim.x / 2), any = __syncthreads_or(lane == 33);
  if (threadIdx.x == 0) out[blockIdx.x] = float(count) * float(all) + float(any);
}

using Kernel = void (*)(const float*, float*);
const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> all = {
      {"block_sum", block_sum_kernel<true>},
      {"block_sum_without_barrier", block_sum_kernel<false>},
      {"divergent_barrier", divergent_barrier_kernel},
      {"two_barriers", two_barriers_kernel},
      {"inactive_lane", inactive_lane_kernel},
      {"outside_mask", outside_mask_kernel},
      {"not_in_mask", not_in_mask_kernel},
      {"never_completes", never_completes_kernel},
      {"misaligned", misaligned_kernel},
      {"misaligned_shared", misaligned_shared_kernel},
      {"grid_barrier", grid_barrier_kernel},
      {"votes", votes_kernel},
  };
  return all;
}

}  // namespace machine

void run_machine_kernel(const std::string& name, const float* x, float* out, unsigned blocks,
                        unsigned threads, bool cooperative) {
  const machine::Kernel kernel = machine::kernels().at(name);
  if (cooperative)
    emulator::launch_cooperative(kernel, blocks, threads, blocks * sizeof(float), x, out);
  else
    emulator::launch(kernel, blocks, threads, 0, x, out);
}

}  // namespace emulated
