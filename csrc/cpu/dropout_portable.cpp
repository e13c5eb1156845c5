// Dropout in plain C++: any processor, and what the other instruction sets are compared with.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <cmath>
#include <cstring>
#include <limits>

#include "capability.h"
#include "dropout_kernels.h"

namespace modeprobe::cpu {
namespace {

constexpr int lanes(float) { return 1; }
constexpr int lanes(double) { return 1; }
inline float broadcast(float value) { return value; }
inline double broadcast(double value) { return value; }
inline double load(const double* p) { return *p; }
template <class T>
inline float load(const T* p) {
  return static_cast<float>(*p);
}
template <class T, class Acc>
inline void store(T* p, Acc value) {
  *p = static_cast<T>(value);
}
template <class T, class Acc>
inline void store_past(T* p, Acc value) {
  store(p, value);
}
template <class Acc>
inline Acc select(uint64_t kept, int j, Acc value, Acc fill) {
  return kept >> j & 1 ? value : fill;
}

template <class Acc>
inline Acc maximum(Acc a, Acc b) {
  return a > b ? a : b;
}
template <class Acc>
inline Acc exponential(Acc x) {
  return exponential_of(x);
}

void draw(Key key, Threshold t, uint64_t chunk, int64_t words, uint64_t* bits, const Ahead&) {
  for (int64_t w = 0; w < words; ++w) {
    uint64_t kept = 0, ties = 0;
    for (int c = 0; c < 8; ++c) {
      const Words draws = chunk_words(key, (chunk + 8 * w + c) & kChunkMask, 0);
      for (int lane = 0; lane < kLanesPerChunk; ++lane) {
        const uint32_t u = lane_draw(draws, lane);
        kept |= uint64_t{u < t.hi} << (8 * c + lane);
        ties |= uint64_t{u == t.hi} << (8 * c + lane);
      }
    }
    if (ties != 0 && t.lo != 0) kept |= break_ties(key, t, chunk + 8 * w, ties);
    bits[w] = kept;
  }
}

}  // namespace

#include "dropout_loops.h"

extern const DropoutKernels kDropoutPortable = MODEPROBE_DROPOUT_TABLE;

float exponential_of(float x) { return std::exp(x); }
double exponential_of(double x) { return std::exp(x); }

const DropoutKernels& dropout_kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) return kDropoutAvx512;
  if (capability() == Capability::kAvx2) return kDropoutAvx2;
#endif
  return kDropoutPortable;
}

uint64_t break_ties(Key key, Threshold t, uint64_t chunk, uint64_t ties) {
  uint64_t kept = 0;
  for (; ties != 0; ties &= ties - 1) {
    const int j = __builtin_ctzll(ties);
    const Words draws = chunk_words(key, (chunk + j / 8) & kChunkMask, 1);
    kept |= uint64_t{lane_draw(draws, j & 7) < t.lo} << j;
  }
  return kept;
}

void draw_tile(const DropoutKernels& kernels, Key key, Threshold t, uint64_t first, int64_t n, uint64_t* bits,
               const Ahead& ahead) {
  const int64_t words = (n + 63) / 64;
  if (t.hi > 0xffff || (t.hi | t.lo) == 0) {
    for (int64_t w = 0; w < words; ++w) bits[w] = t.hi ? ~uint64_t{0} : 0;
    return;
  }
  const int lead = int(first & 7);
  if (lead == 0) return kernels.draw(key, t, first >> 3, words, bits, ahead);
  kernels.draw(key, t, first >> 3, (lead + n + 63) / 64, bits, ahead);
  for (int64_t w = 0; w < words; ++w) bits[w] = bits[w] >> lead | bits[w + 1] << (64 - lead);
}

}  // namespace modeprobe::cpu
