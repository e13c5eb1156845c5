// Dropout with AVX2, FMA and F16C. Run only where capability() found them.
#if defined(__x86_64__)

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <limits>

#include "dropout_kernels.h"
#include "target.h"

MODEPROBE_TARGET_AVX2

namespace modeprobe::cpu {
namespace {

constexpr int lanes(float) { return 8; }
constexpr int lanes(double) { return 4; }
inline __m256 broadcast(float value) { return _mm256_set1_ps(value); }
inline __m256d broadcast(double value) { return _mm256_set1_pd(value); }

inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
inline __m256d load(const double* p) { return _mm256_loadu_pd(p); }
inline __m256 load(const c10::Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 load(const c10::BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline void store(float* p, __m256 value) { _mm256_storeu_ps(p, value); }
inline void store(double* p, __m256d value) { _mm256_storeu_pd(p, value); }
inline void store(void* p, __m128i value) {
  auto* to = static_cast<__m128i*>(p);
  _mm_storeu_si128(to, value);
}
inline void store(c10::Half* p, __m256 value) {
  store(static_cast<void*>(p), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
// To nearest even. A NaN that stems from bfloat16 data has zeros where the carry would start, so it stays
// one.
inline void store(c10::BFloat16* p, __m256 value) {
  const __m256i word = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd), 16);
  store(static_cast<void*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}

inline __m256 select(uint64_t kept, __m256 value, __m256 fill) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i word = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(kept)), lane);
  return _mm256_blendv_ps(fill, value, _mm256_castsi256_ps(_mm256_cmpeq_epi32(word, lane)));
}
inline __m256d select(uint64_t kept, __m256d value, __m256d fill) {
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i word = _mm256_and_si256(_mm256_set1_epi64x(static_cast<int64_t>(kept)), lane);
  return _mm256_blendv_pd(fill, value, _mm256_castsi256_pd(_mm256_cmpeq_epi64(word, lane)));
}

inline __m256 maximum(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
inline __m256d maximum(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }

// See dropout_avx512.cpp. 2^n in two factors: it may be below the normal range.
inline __m256 exponential(__m256 x) {
  x = _mm256_max_ps(broadcast(-104.0f), x);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, broadcast(kInverseLn2)), 8);
  __m256 r = _mm256_fnmadd_ps(n, broadcast(kLn2High), x);
  r = _mm256_fnmadd_ps(n, broadcast(kLn2Low), r);
  __m256 sum = broadcast(kExpTaylor[0]);
  for (int k = 1; k < 8; ++k) sum = _mm256_fmadd_ps(sum, r, broadcast(kExpTaylor[k]));
  const __m256i exponent = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(exponent, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(exponent, half), bias), 23);
  return sum * _mm256_castsi256_ps(a) * _mm256_castsi256_ps(b);
}
inline __m256d exponential(__m256d x) {
  double lane[4];
  _mm256_storeu_pd(lane, x);
  for (double& value : lane) value = exponential_of(value);
  return _mm256_loadu_pd(lane);
}

// Four chunks, one per 64-bit lane; see dropout_avx512.cpp.
struct State {
  __m256i c0, c1, c2, c3;
};

inline void round(State& s, __m256i k0, __m256i k1) {
  const __m256i a = _mm256_mul_epu32(s.c0, _mm256_set1_epi64x(kPhiloxM0));
  const __m256i b = _mm256_mul_epu32(s.c2, _mm256_set1_epi64x(kPhiloxM1));
  s.c0 = _mm256_xor_si256(_mm256_srli_epi64(b, 32), _mm256_xor_si256(s.c1, k0));
  s.c2 = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_xor_si256(s.c3, k1));
  s.c1 = b;
  s.c3 = a;
}

inline __m256i pair(__m256i low, __m256i high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa);
}

// 32 draws in memory order: the sign bits of `kept` and `ties`, one per draw.
struct Decision {
  uint32_t kept, ties;
};

template <bool kTies>
inline Decision decide(const State& s, Threshold t) {
  const __m256i first = pair(s.c0, s.c1), second = pair(s.c2, s.c3);
  const __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);
  const __m256i hi = _mm256_set1_epi16(static_cast<short>(t.hi));
  // There is no unsigned compare: max(u, hi) == u says u >= hi.
  const __m256i dropped = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(even, hi), even),
                                             _mm256_cmpeq_epi16(_mm256_max_epu16(odd, hi), odd));
  Decision result{~static_cast<uint32_t>(_mm256_movemask_epi8(dropped)), 0};
  if constexpr (kTies) {
    const __m256i equal = _mm256_packs_epi16(_mm256_cmpeq_epi16(even, hi), _mm256_cmpeq_epi16(odd, hi));
    result.ties = static_cast<uint32_t>(_mm256_movemask_epi8(equal));
  }
  return result;
}

template <bool kTies>
void draw_words(Key key, Threshold t, uint64_t chunk, int64_t words, uint64_t* bits) {
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  for (int r = 0; r < kPhiloxRounds; ++r) {
    k0[r] = uint32_t(uint32_t(key.seed) + uint32_t(r) * kPhiloxW0);
    k1[r] = uint32_t(uint32_t(key.seed >> 32) + uint32_t(r) * kPhiloxW1);
  }
  const __m256i order = _mm256_setr_epi64x(0, 1, 2, 3);
  const __m256i c0 = _mm256_set1_epi64x(int64_t(key.stream)),
                c1 = _mm256_set1_epi64x(int64_t(key.stream >> 32));
  for (int64_t w = 0; w < words; ++w) {
    State s[2];
    for (int g = 0; g < 2; ++g) {
      const __m256i counter =
          _mm256_and_si256(_mm256_add_epi64(_mm256_set1_epi64x(int64_t(chunk + 8 * w + 4 * g)), order),
                           _mm256_set1_epi64x(int64_t(kChunkMask)));
      s[g] = {c0, c1, counter, _mm256_srli_epi64(counter, 32)};
    }
    for (int r = 0; r < kPhiloxRounds; ++r) {
      const __m256i r0 = _mm256_set1_epi64x(int64_t(k0[r])), r1 = _mm256_set1_epi64x(int64_t(k1[r]));
      for (int g = 0; g < 2; ++g) round(s[g], r0, r1);
    }
    const Decision low = decide<kTies>(s[0], t), high = decide<kTies>(s[1], t);
    uint64_t kept = low.kept | uint64_t{high.kept} << 32;
    if constexpr (kTies) {
      const uint64_t ties = low.ties | uint64_t{high.ties} << 32;
      if (__builtin_expect(ties != 0, 0)) kept |= break_ties(key, t, chunk + 8 * w, ties);
    }
    bits[w] = kept;
  }
}

void draw(Key key, Threshold t, uint64_t chunk, int64_t words, uint64_t* bits) {
  t.lo == 0 ? draw_words<false>(key, t, chunk, words, bits) : draw_words<true>(key, t, chunk, words, bits);
}

}  // namespace

#include "dropout_loops.h"

extern const DropoutKernels kDropoutAvx2 = MODEPROBE_DROPOUT_TABLE;

}  // namespace modeprobe::cpu

MODEPROBE_TARGET_END

#endif
