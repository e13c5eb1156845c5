// Division of 31-bit numbers by one that the host knows: a multiplication and a shift (Granlund and
// Montgomery, "Division by invariant integers using multiplication", PLDI 1994).
#pragma once

#include "mask.cuh"

namespace modeprobe {

struct Divisor {
  static constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // of dividends and divisors

  uint32_t value = 1, multiplier = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t value) : value(value) {
    if (value == 1) return;
    while ((uint64_t{1} << shift) < value) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    multiplier = uint32_t((power + value - 1) / value);
    --shift;
  }

  MODEPROBE_HD uint32_t quotient(uint32_t n) const {
    return value == 1 ? n : uint32_t(multiply_wide(n, multiplier) >> 32) >> shift;
  }
  MODEPROBE_HD uint32_t rest(uint32_t n) const { return n - quotient(n) * value; }
};

}  // namespace modeprobe
