// What follows the normalisation in the same pass: y = dropout(activation(z + residual)), and its derivative.
#pragma once

#include "channels.cuh"
#include "lanes.cuh"

namespace modeprobe {

enum class Activation : int { kNone, kRelu, kLeakyRelu, kSilu, kGeluErf, kGeluTanh };

template <typename acc>
__device__ __forceinline__ acc sigmoid(acc z) {
  return acc(1) / (acc(1) + exp(-z));
}

template <typename acc>
__device__ __forceinline__ acc activate(Activation activation, acc slope, acc z) {
  switch (activation) {
    case Activation::kRelu:
      return z < acc(0) ? acc(0) : z;  // NaN stays
    case Activation::kLeakyRelu:
      return z > acc(0) ? z : z * slope;
    case Activation::kSilu:
      return z * sigmoid(z);
    case Activation::kGeluErf:
      return acc(0.5) * z * (acc(1) + erf(z * acc(0.70710678118654752440)));
    case Activation::kGeluTanh: {
      const acc inner = acc(0.79788456080286535588) * (z + acc(0.044715) * z * z * z);
      return acc(0.5) * z * (acc(1) + tanh(inner));
    }
    default:
      return z;
  }
}

template <typename acc>
__device__ __forceinline__ acc activation_derivative(Activation activation, acc slope, acc z) {
  switch (activation) {
    case Activation::kRelu:
      return z <= acc(0) ? acc(0) : acc(1);
    case Activation::kLeakyRelu:
      return z > acc(0) ? acc(1) : slope;
    case Activation::kSilu: {
      const acc s = sigmoid(z);
      return s * (acc(1) + z * (acc(1) - s));
    }
    case Activation::kGeluErf:
      return acc(0.5) * (acc(1) + erf(z * acc(0.70710678118654752440))) +
             z * acc(0.39894228040143267794) * exp(acc(-0.5) * z * z);
    case Activation::kGeluTanh: {
      const acc inner = acc(0.79788456080286535588) * (z + acc(0.044715) * z * z * z);
      const acc t = tanh(inner);
      return acc(0.5) * (acc(1) + t) + acc(0.5) * z * (acc(1) - t * t) * acc(0.79788456080286535588) *
                                           (acc(1) + acc(3 * 0.044715) * z * z);
    }
    default:
      return acc(1);
  }
}

// sign_bits: bit i & 7 of byte i >> 3 says z + residual > 0 at position i; written forward, read backward.
template <typename T>
struct Epilogue {
  const T* residual;
  Activation activation;
  acc_t<T> slope;
  const int64_t* key;  // null: no dropout
  RateSource<acc_t<T>> rate;
  uint8_t* sign_bits;
};

template <typename T>
MODEPROBE_HD bool is_plain(const Epilogue<T>& e) {
  return !e.residual && e.activation == Activation::kNone && !e.key && !e.sign_bits;
}

// The decisions for the chunk of position `at`, bit 0 for that position itself.
template <typename acc>
__device__ __forceinline__ uint32_t keep_bits(Key key, const Rate<acc>& rate, int64_t at) {
  return keep_byte(key, rate, uint64_t(at) / kLanesPerChunk) >> (at % kLanesPerChunk);
}

// An epilogue inside a kernel: key and rate are loaded once per thread.
template <typename T>
struct EpilogueContext {
  using acc = acc_t<T>;
  Epilogue<T> e;
  Key key;
  Rate<acc> rate;

  __device__ __forceinline__ explicit EpilogueContext(const Epilogue<T>& epilogue)
      : e(epilogue), key{}, rate{} {
    if (e.key) {
      key = load_key(e.key);
      rate = resolve(e.rate);
    }
  }

  // z (normalised, without residual) becomes y, for `count` positions from `at` on within one chunk.
  template <int count>
  __device__ __forceinline__ void forward(int64_t at, int64_t end, bool whole, acc* z) const {
    acc residual[count];
    if (e.residual) load_at<T, count>(e.residual, at, end, whole, residual);
    forward<count>(at, end, residual, z);
  }
  // The same with the residual's elements, loaded ahead where there is one.
  template <int count>
  __device__ __forceinline__ void forward(int64_t at, int64_t end, const acc* residual, acc* z) const {
    if (e.residual) {
#pragma unroll
      for (int i = 0; i < count; ++i) z[i] += residual[i];
    }
    if (e.sign_bits) {
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < count; ++i) bits |= uint32_t(z[i] > acc(0) && at + i < end) << i;
      e.sign_bits[at / kLanesPerChunk] = uint8_t(bits);
    }
    if (e.activation != Activation::kNone) {
#pragma unroll
      for (int i = 0; i < count; ++i) z[i] = activate(e.activation, e.slope, z[i]);
    }
    if (e.key) {
      const uint32_t keep = keep_bits(key, rate, at);
#pragma unroll
      for (int i = 0; i < count; ++i) z[i] = keep >> i & 1 ? z[i] * rate.scale : acc(0);
    }
  }

  // dy becomes dz; z is only looked at where an activation needs it and no sign bits stand in for it.
  template <int count>
  __device__ __forceinline__ void backward(int64_t at, int64_t end, bool whole, acc* z, acc* dy) const {
    if (e.key) {
      const uint32_t keep = keep_bits(key, rate, at);
#pragma unroll
      for (int i = 0; i < count; ++i) dy[i] = keep >> i & 1 ? dy[i] * rate.scale : acc(0);
    }
    if (e.activation == Activation::kNone) return;
    if (e.sign_bits) {
      const acc below = e.activation == Activation::kRelu ? acc(0) : e.slope;
      const uint32_t bits =
          at < end ? uint32_t(e.sign_bits[at / kLanesPerChunk]) >> (at % kLanesPerChunk) : 0;
#pragma unroll
      for (int i = 0; i < count; ++i) dy[i] = bits >> i & 1 ? dy[i] : dy[i] * below;
      return;
    }
    if (e.residual) {
      acc residual[count];
      load_at<T, count>(e.residual, at, end, whole, residual);
#pragma unroll
      for (int i = 0; i < count; ++i) z[i] += residual[i];
    }
#pragma unroll
    for (int i = 0; i < count; ++i) dy[i] *= activation_derivative(e.activation, e.slope, z[i]);
  }
};

}  // namespace modeprobe
