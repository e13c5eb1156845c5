// The mask contract: a dropout mask as a pure function of (seed, stream, element index, p).
//
// Philox4x32-10 is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.cuh"

namespace modeprobe {

constexpr int kLanesPerChunk = 8;
constexpr uint64_t kChunkMask = (uint64_t{1} << 61) - 1;  // of a chunk, = i >> 3; i wraps at 2^64
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Words {
  uint32_t w[4];
};

struct Key {
  uint64_t seed, stream;
};

MODEPROBE_HD uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // Spelled out: from the 64-bit product nvcc 13 makes an addition of zero to every high word.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

MODEPROBE_HD Words philox(uint32_t k0, uint32_t k1, Words c) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = multiply_wide(kPhiloxM0, c.w[0]), b = multiply_wide(kPhiloxM1, c.w[2]);
    c = {{uint32_t(b >> 32) ^ c.w[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c.w[3] ^ k1, uint32_t(a)}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// The four words that decide elements [8 * chunk, 8 * chunk + 8); tie = 1 gives the words that break ties.
MODEPROBE_HD Words chunk_words(Key key, uint64_t chunk, uint32_t tie) {
  return philox(uint32_t(key.seed), uint32_t(key.seed >> 32),
                {{uint32_t(key.stream), uint32_t(key.stream >> 32), uint32_t(chunk),
                  uint32_t(chunk >> 32) | tie << 31}});
}

MODEPROBE_HD uint32_t lane_draw(const Words& words, int lane) {
  return words.w[lane >> 1] >> (16 * (lane & 1)) & 0xffffu;
}

// The n-th child of a key. No mask draws from a counter with this bit set: a chunk has 61 bits.
MODEPROBE_HD Key fold(Key key, uint64_t n) {
  const Words words = philox(uint32_t(key.seed), uint32_t(key.seed >> 32),
                             {{uint32_t(key.stream), uint32_t(key.stream >> 32), uint32_t(n),
                               (uint32_t(n >> 32) & 0x3fffffffu) | 1u << 30}});
  return {words.w[0] | uint64_t{words.w[1]} << 32, words.w[2] | uint64_t{words.w[3]} << 32};
}

// Keep probability as a 32-bit threshold, split for the 16-bit draw and its tie-break. `hi` may be 65536.
struct Threshold {
  uint32_t hi, lo;
};

inline Threshold keep_threshold(double p) {
  const auto t = static_cast<uint64_t>(std::nearbyint((1.0 - p) * 4294967296.0));
  return {uint32_t(t >> 16), uint32_t(t & 0xffffu)};
}

// Acc is double for float64 data: a float32 scale would cost it half of its digits.
template <class Acc = float>
inline Acc keep_scale(double p) {
  return p < 1.0 ? static_cast<Acc>(1.0 / (1.0 - p)) : Acc(0);
}

// The readable form of the contract; kernels decide eight lanes at a time and must agree with it bit for bit.
MODEPROBE_HD bool keep(Key key, Threshold t, uint64_t i) {
  const int lane = int(i & 7);
  const uint32_t u = lane_draw(chunk_words(key, i >> 3, 0), lane);
  if (u != t.hi) return u < t.hi;
  return lane_draw(chunk_words(key, i >> 3, 1), lane) < t.lo;
}

}  // namespace modeprobe
