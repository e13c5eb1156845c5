// Moments of a set of values, (n, mean, M2) with M2 = sum((x - mean)^2), and their merge.
//
// Merge: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances" (1979), eq. 2.1. It never forms E[x^2] - E[x]^2, so nothing cancels when |mean| >> std.
#pragma once

#include <cstdint>

#include "host_device.cuh"

namespace modeprobe {

// The count is an integer: float32 cannot count past 2^24.
template <typename T>
struct Moments {
  int64_t n;
  T mean, m2;
};

// The moments of both sets together. Empty sets are neutral; NaN and Inf propagate.
template <typename T>
MODEPROBE_HD Moments<T> merge(Moments<T> a, Moments<T> b) {
  if (a.n == 0) return b;
  if (b.n == 0) return a;
  const int64_t n = a.n + b.n;
  const T delta = b.mean - a.mean, share = T(b.n) / T(n);
  return {n, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (T(a.n) * share)};
}

// A count as two exact float32 digits of base 2^24, so that it travels in the same message as the moments.
constexpr int64_t kCountBase = int64_t{1} << 24;

template <typename T>
MODEPROBE_HD void split_count(int64_t n, T* low, T* high) {
  *low = T(n % kCountBase);
  *high = T(n / kCountBase);
}

template <typename T>
MODEPROBE_HD int64_t join_count(T low, T high) {
  return int64_t(high) * kCountBase + int64_t(low);
}

}  // namespace modeprobe
