// Dropout with one decision for many elements (Dropout1d to 3d, stochastic depth), and alpha dropout:
// y = keep ? scale * x + shift : fill. Alpha dropout: Klambauer et al., "Self-normalizing networks" (2017).
#pragma once

#include "channels.cuh"
#include "divisor.cuh"
#include "elementwise.cuh"

namespace modeprobe {

constexpr int kMaxWalk = 12;

// The dimensions of dense data in memory order, outermost first, with the step that each takes in the mask.
// Neighbours that step through the mask as one dimension would are merged.
struct MaskWalk {
  int dims;
  int64_t size[kMaxWalk], step[kMaxWalk];
  Divisor divisor[kMaxWalk];  // by size; for tensors of up to Divisor::kMost elements
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

template <typename acc>
__device__ __forceinline__ Affine<acc> resolve(const AffineSource<acc>& source, const Rate<acc>& rate,
                                               const RateSource<acc>& rate_from) {
  if (!source.alpha) return {rate.scale, acc(0), acc(0)};
  if (!rate_from.device_bits) return source.affine;
  return alpha_affine<acc>(keep_probability(*rate_from.device_bits), source.linear);
}

// How many elements from a position on are neighbours in the mask's walk, and the first one's index there.
struct Run {
  uint64_t index;
  int64_t length;
};

template <bool small>
__device__ __forceinline__ Run run_at(const MaskWalk& walk, uint64_t offset, int64_t at) {
  const auto split = [&](int d, int64_t value, int64_t* above) {
    if constexpr (small) {
      const uint32_t quotient = walk.divisor[d].quotient(uint32_t(value));
      *above = quotient;
      return int64_t(uint32_t(value) - quotient * walk.divisor[d].value);
    } else {
      *above = value / walk.size[d];
      return value - *above * walk.size[d];
    }
  };
  const int inner = walk.dims - 1;
  int64_t rest;
  const int64_t within = split(inner, at, &rest);
  uint64_t index = offset + uint64_t(within) * uint64_t(walk.step[inner]);
  for (int d = inner - 1; d > 0; --d) {
    int64_t above;
    const int64_t here = split(d, rest, &above);
    index += uint64_t(here) * uint64_t(walk.step[d]);
    rest = above;
  }
  if (inner > 0) index += uint64_t(rest) * uint64_t(walk.step[0]);
  return {index, walk.size[inner] - within};
}

// One bit per element from position `at` on, up to `span` of them.
template <int span, bool small, typename acc>
__device__ __forceinline__ uint32_t walk_bits(const MaskWalk& walk, Key key, const Rate<acc>& rate,
                                              uint64_t offset, int64_t at, int64_t end) {
  const uint64_t step = uint64_t(walk.step[walk.dims - 1]);
  const int most = end - at < span ? int(end - at) : span;
  uint32_t result = 0;
  Run run{0, 0};
  int lane = 0;
#pragma unroll 1
  while (lane < most) {
    if (run.length == 0) run = run_at<small>(walk, offset, at + lane);
    int count = run.length < most - lane ? int(run.length) : most - lane;
    const int within = int(run.index % kLanesPerChunk);
    uint32_t bits = keep_byte(key, rate, run.index / kLanesPerChunk) >> within;
    if (step == 0) {
      bits = bits & 1u ? ~0u : 0;
    } else {
      // As many as the chunk of the mask has; none of its neighbours where the walk leaps.
      const int room = step == 1 ? kLanesPerChunk - within : 1;
      if (count > room) count = room;
      run.index += uint64_t(count) * step;
    }
    run.length -= count;
    result |= (bits & ((1u << count) - 1)) << lane;
    lane += count;
  }
  return result;
}

// Elements of a thread: 32 bytes, and no less than a chunk.
template <typename T>
constexpr int kSpan = sizeof(T) == 8 ? kLanesPerChunk : 32 / int(sizeof(T));

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kStructuredBlocks = 3;  // ptxas needs more registers there
#else
constexpr int kStructuredBlocks = 4;
#endif

// x and y: dense, n elements in memory order, in blocks that do not stay (see elementwise.cuh). A packet in
// which everything is dropped is not read.
template <typename T, bool small>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : kStructuredBlocks)
    structured_dropout_kernel(const T* x, T* y, int64_t n, MaskWalk walk, const int64_t* key, uint64_t offset,
                              RateSource<acc_t<T>> rate_from, AffineSource<acc_t<T>> affine_from) {
  using acc = acc_t<T>;
  constexpr int kElements = kSpan<T>, kWide = kPacket<T>;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kElements;
  if (at >= n) return;
  const Rate<acc> rate = resolve(rate_from);
  const Affine<acc> affine = resolve(affine_from, rate, rate_from);
  const bool whole = is_aligned(x) && is_aligned(y) && at + kElements <= n;
  const uint32_t keep = walk_bits<kElements, small>(walk, load_key(key), rate, offset, at, n);
  Raw<T, kWide> raw[kElements / kWide];
#pragma unroll
  for (int k = 0; k < kElements / kWide; ++k)
    if (keep >> (k * kWide) & ((1u << kWide) - 1)) raw[k].load(x, at + k * kWide, n, whole);
#pragma unroll
  for (int k = 0; k < kElements / kWide; ++k) {
    acc value[kWide];
    raw[k].unpack_to(value);
    if (affine_from.alpha) {
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        value[i] = keep >> (k * kWide + i) & 1 ? value[i] * affine.scale + affine.shift : affine.fill;
    } else {
#pragma unroll
      for (int i = 0; i < kWide; ++i)
        value[i] = keep >> (k * kWide + i) & 1 ? value[i] * affine.scale : acc(0);
    }
    store_at<T, kWide>(y, at + k * kWide, n, whole, value);
  }
}

// Resident per multiprocessor, as far as no register is spilled.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T>
constexpr int kAlphaBlocks = sizeof(T) == 8 ? 2 : 3;
#else
template <typename T>
constexpr int kAlphaBlocks = kElementwiseBlocks<T>;
#endif

template <typename T>
struct AlphaDrop {
  Affine<acc_t<T>> affine;

  template <int count>
  __device__ __forceinline__ void prepare(int64_t, acc_t<T>*) const {}
  __device__ __forceinline__ acc_t<T> operator()(const acc_t<T> (&x)[1], acc_t<T>, bool keep) const {
    return keep ? x[0] * affine.scale + affine.shift : affine.fill;
  }
};

template <typename T, int share>
__global__ void __launch_bounds__(kThreads, kAlphaBlocks<T>)
    alpha_dropout_kernel(Chunks chunks, const T* x, T* y, const int64_t* key, RateSource<acc_t<T>> rate_from,
                         AffineSource<acc_t<T>> affine_from) {
  const Rate<acc_t<T>> rate = resolve(rate_from);
  for_elements<T, share>(chunks, {x}, y, load_key(key), rate,
                         AlphaDrop<T>{resolve(affine_from, rate, rate_from)});
}

// walk.dims = 0: every element has its own decision, with alpha dropout. alpha: with that p (and
// p_on_device).
template <typename T>
cudaError_t launch_structured_dropout(const T* x, T* y, int64_t n, MaskWalk walk, const int64_t* key,
                                      uint64_t offset, double p, const void* p_on_device, bool scaled,
                                      bool alpha, bool linear, cudaStream_t stream) {
  using acc = acc_t<T>;
  if (n == 0) return cudaSuccess;
  const auto rate = rate_source<acc>(p, p_on_device, scaled);
  const auto affine = alpha ? alpha_source<acc>(p, linear) : AffineSource<acc>{};
  if (walk.dims == 0) {
    const Chunks chunks = chunks_of<T>(n, offset, x, y);
    return launch_elementwise<kShare<T>>(alpha_dropout_kernel<T, kShare<T>>, alpha_dropout_kernel<T, 1>,
                                         chunks, stream, x, y, key, rate, affine);
  }
  const bool small = n <= Divisor::kMost;
  for (int d = 0; small && d < walk.dims; ++d) walk.divisor[d] = Divisor(uint32_t(walk.size[d]));
  const auto kernel = small ? structured_dropout_kernel<T, true> : structured_dropout_kernel<T, false>;
  return launch(kernel, dim3(blocks_for(n / kSpan<T> + 1)), dim3(kThreads), stream, x, y, n, walk, key,
                offset, rate, affine);
}

}  // namespace modeprobe
