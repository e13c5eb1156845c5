// Dropout with one decision for many elements (Dropout1d to 3d, stochastic depth), and alpha dropout:
// y = keep ? scale * x + shift : fill. Alpha dropout: Klambauer et al., "Self-normalizing networks" (2017).
#pragma once

#include "channels.cuh"
#include "lanes.cuh"

namespace modeprobe {

constexpr int kMaxWalk = 12;

// The dimensions of dense data in memory order, outermost first, with the step that each takes in the mask.
// Neighbours that step through the mask as one dimension would are merged.
struct MaskWalk {
  int dims;
  int64_t size[kMaxWalk], step[kMaxWalk];
};

template <typename acc>
struct Affine {
  acc scale, shift, fill;
};

// What alpha dropout does at a keep probability of q * 2^-53; nothing is left at 0.
template <typename acc>
MODEPROBE_HD Affine<acc> alpha_affine(uint64_t q, bool linear) {
  if (q == 0) return {acc(0), acc(0), acc(0)};
  const acc saturation = acc(-1.7580993408473766), keep = acc(q) * acc(1.0 / 9007199254740992.0);
  const acc drop = acc((uint64_t{1} << 53) - q) * acc(1.0 / 9007199254740992.0);
  const acc a = acc(1) / acc(sqrt(keep * (acc(1) + drop * saturation * saturation)));
  if (linear) return {a, acc(0), acc(0)};
  return {a, -a * saturation * drop, a * saturation + -a * saturation * drop};
}

// How kept elements change: a scale alone, or alpha dropout's affine map, whose p may be on the device.
template <typename acc>
struct AffineSource {
  Affine<acc> affine;
  bool alpha, linear;
};

template <typename acc>
AffineSource<acc> alpha_source(double p, bool linear) {
  const double saturation = -1.7580993408473766;
  if (!(p < 1.0)) return {{acc(0), acc(0), acc(0)}, true, linear};
  const double a = 1 / std::sqrt((1 - p) * (1 + p * saturation * saturation)), b = -a * saturation * p;
  if (linear) return {{acc(a), acc(0), acc(0)}, true, linear};
  return {{acc(a), acc(b), acc(a * saturation + b)}, true, linear};
}

// One bit per element from position `at` on, eight of them.
template <typename Int, typename acc>
__device__ __forceinline__ uint32_t walk_bits(const MaskWalk& walk, Key key, const Rate<acc>& rate,
                                              uint64_t offset, Int at, Int end) {
  const int inner = walk.dims - 1;
  const Int length = Int(walk.size[inner]);
  uint32_t result = 0, bits = 0;
  uint64_t cached = ~uint64_t{0};
  Int within = 0, left = 0;
  uint64_t base = 0;
  for (int lane = 0; lane < kLanesPerChunk && at + lane < end; ++lane) {
    if (left == 0) {
      Int rest = (at + lane) / length;
      within = (at + lane) - rest * length;
      left = length - within;
      base = offset;
      for (int d = inner - 1; d >= 0; --d) {
        const Int size = Int(walk.size[d]), above = rest / size;
        base += uint64_t(rest - above * size) * uint64_t(walk.step[d]);
        rest = above;
      }
    }
    const uint64_t index = base + uint64_t(within) * uint64_t(walk.step[inner]);
    if (index / kLanesPerChunk != cached) {
      cached = index / kLanesPerChunk;
      bits = keep_byte(key, rate, cached);
    }
    result |= (bits >> (index % kLanesPerChunk) & 1u) << lane;
    ++within;
    --left;
  }
  return result;
}

// x and y: dense, n elements in memory order. A chunk in which everything is dropped is not read.
template <typename T, bool walked>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2
                                            : walked       ? 3
                                                           : 4)
    structured_dropout_kernel(const T* x, T* y, int64_t n, MaskWalk walk, const int64_t* key_pointer,
                              uint64_t offset, RateSource<acc_t<T>> rate_from,
                              AffineSource<acc_t<T>> affine_from) {
  using acc = acc_t<T>;
  constexpr int kLanes = kLanesPerChunk;
  const Key key = load_key(key_pointer);
  const Rate<acc> rate = resolve(rate_from);
  Affine<acc> affine = affine_from.affine;
  if (!affine_from.alpha) {
    affine = {rate.scale, acc(0), acc(0)};
  } else if (rate_from.device_bits) {
    affine = alpha_affine<acc>(keep_probability(*rate_from.device_bits), affine_from.linear);
  }
  const bool aligned = is_aligned(x) && is_aligned(y), small = n < int64_t(UINT32_MAX) - kLanes;
  const int64_t chunks = (n + kLanes - 1) / kLanes;
  for (int64_t chunk = int64_t(blockIdx.x) * kThreads + threadIdx.x; chunk < chunks;
       chunk += int64_t(gridDim.x) * kThreads) {
    const int64_t at = chunk * kLanes;
    const bool whole = aligned && at + kLanes <= n;
    uint32_t keep;
    if constexpr (walked)
      keep = small ? walk_bits<uint32_t>(walk, key, rate, offset, uint32_t(at), uint32_t(n))
                   : walk_bits<uint64_t>(walk, key, rate, offset, uint64_t(at), uint64_t(n));
    else
      keep = keep_bits_from(key, rate, offset + uint64_t(at));
    acc value[kLanes];
    if (keep != 0) {
      load_at<T, kLanes>(x, at, n, whole, value);
      if (affine_from.alpha) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i)
          value[i] = keep >> i & 1 ? value[i] * affine.scale + affine.shift : affine.fill;
      } else {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) value[i] = keep >> i & 1 ? value[i] * affine.scale : acc(0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLanes; ++i) value[i] = affine.fill;
    }
    store_at<T, kLanes>(y, at, n, whole, value);
  }
}

// walk.dims = 0: every element has its own decision. alpha_p: alpha dropout with that p (and p_on_device).
template <typename T>
cudaError_t launch_structured_dropout(const T* x, T* y, int64_t n, const MaskWalk& walk, const int64_t* key,
                                      uint64_t offset, double p, const void* p_on_device, bool scaled,
                                      bool alpha, bool linear, cudaStream_t stream) {
  using acc = acc_t<T>;
  if (n == 0) return cudaSuccess;
  const auto kernel = walk.dims ? structured_dropout_kernel<T, true> : structured_dropout_kernel<T, false>;
  const auto affine = alpha ? alpha_source<acc>(p, linear) : AffineSource<acc>{};
  return launch(kernel, dim3(grid_stride_blocks(kernel, n / kLanesPerChunk + 1, 4)), dim3(kThreads), stream,
                x, y, n, walk, key, offset, rate_source<acc>(p, p_on_device, scaled), affine);
}

}  // namespace modeprobe
