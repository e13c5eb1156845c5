// Dropout with AVX-512 (F, BW, DQ, VL). Run only where capability() found it.
#if defined(__x86_64__)

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <cstring>
#include <limits>

#include "dropout_kernels.h"
#include "target.h"

MODEPROBE_TARGET_AVX512

namespace modeprobe::cpu {
namespace {

constexpr int lanes(float) { return 16; }
constexpr int lanes(double) { return 8; }
inline __m512 broadcast(float value) { return _mm512_set1_ps(value); }
inline __m512d broadcast(double value) { return _mm512_set1_pd(value); }

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512d load(const double* p) { return _mm512_loadu_pd(p); }
inline __m512 load(const c10::Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512 load(const c10::BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(float* p, __m512 value) { _mm512_storeu_ps(p, value); }
inline void store(double* p, __m512d value) { _mm512_storeu_pd(p, value); }
inline void store(void* p, __m256i value) {
  auto* to = static_cast<__m256i*>(p);
  _mm256_storeu_si256(to, value);
}
inline void store(c10::Half* p, __m512 value) {
  store(static_cast<void*>(p), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
// To nearest even. A NaN that stems from bfloat16 data has zeros where the carry would start, so it stays
// one.
inline void store(c10::BFloat16* p, __m512 value) {
  const __m512i word = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
  store(static_cast<void*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// Past the caches; p is aligned to the vector.
inline void store_past(float* p, __m512 value) { _mm512_stream_ps(p, value); }
inline void store_past(double* p, __m512d value) { _mm512_stream_pd(p, value); }
template <class Half>
inline void store_past(Half* p, __m512 value) {
  alignas(__m256i) Half half[16];
  store(half, value);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(half));
}

inline __m512 select(uint64_t kept, int j, __m512 value, __m512 fill) {
  return _mm512_mask_mov_ps(fill, static_cast<__mmask16>(kept >> j), value);
}
inline __m512d select(uint64_t kept, int j, __m512d value, __m512d fill) {
  return _mm512_mask_mov_pd(fill, static_cast<__mmask8>(kept >> j), value);
}

inline __m512 maximum(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
inline __m512d maximum(__m512d a, __m512d b) { return _mm512_max_pd(a, b); }

// exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln 2 / 2: Taylor to degree 7, below one unit in the last
// place. Below -104 the result is zero; NaN stays NaN.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(broadcast(-104.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, broadcast(kInverseLn2)), 0);
  __m512 r = _mm512_fnmadd_ps(n, broadcast(kLn2High), x);
  r = _mm512_fnmadd_ps(n, broadcast(kLn2Low), r);
  __m512 sum = broadcast(kExpTaylor[0]);
#pragma GCC unroll 7
  for (int k = 1; k < 8; ++k) sum = _mm512_fmadd_ps(sum, r, broadcast(kExpTaylor[k]));
  return _mm512_scalef_ps(sum, n);
}
inline __m512d exponential(__m512d x) {
  double lane[8];
  _mm512_storeu_pd(lane, x);
  for (double& value : lane) value = exponential_of(value);
  return _mm512_loadu_pd(lane);
}

// Eight chunks, one per 64-bit lane. Products want 32-bit factors in the low halves and ignore the high ones,
// so a product serves as its own low word, and nothing is ever packed until the rounds are over.
struct State {
  __m512i c0, c1, c2, c3;
};

struct RoundKeys {
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

inline __m512i xor3(__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

inline void round(State& s, __m512i k0, __m512i k1) {
  const __m512i a = _mm512_mul_epu32(s.c0, _mm512_set1_epi64(kPhiloxM0));
  const __m512i b = _mm512_mul_epu32(s.c2, _mm512_set1_epi64(kPhiloxM1));
  s.c0 = xor3(_mm512_srli_epi64(b, 32), s.c1, k0);
  s.c2 = xor3(_mm512_srli_epi64(a, 32), s.c3, k1);
  s.c1 = b;
  s.c3 = a;
}

inline __m512i pair(__m512i low, __m512i high) {
  return _mm512_mask_shuffle_epi32(low, 0xaaaa, high, _MM_PERM_CCAA);
}

template <bool kTies>
inline uint64_t decide(const State& s, Key key, Threshold t, uint64_t chunk) {
  // The lanes hold chunks 0 4 1 5 2 6 3 7: unpacking leaves the draws in memory order.
  const __m512i first = pair(s.c0, s.c1), second = pair(s.c2, s.c3);
  const __m512i front = _mm512_unpacklo_epi64(first, second), back = _mm512_unpackhi_epi64(first, second);
  const __m512i hi = _mm512_set1_epi16(static_cast<short>(t.hi));
  uint64_t kept = _mm512_cmplt_epu16_mask(front, hi) | uint64_t{_mm512_cmplt_epu16_mask(back, hi)} << 32;
  if constexpr (kTies) {
    const uint64_t ties = _mm512_cmpeq_epu16_mask(front, hi) | uint64_t{_mm512_cmpeq_epu16_mask(back, hi)}
                                                                   << 32;
    if (__builtin_expect(ties != 0, 0)) kept |= break_ties(key, t, chunk, ties);
  }
  return kept;
}

template <bool kTies, int kGroups>
inline void draw_groups(Key key, Threshold t, const RoundKeys& keys, uint64_t chunk, uint64_t* bits) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  State s[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    const __m512i counter =
        _mm512_and_si512(_mm512_add_epi64(_mm512_set1_epi64(int64_t(chunk + 8 * g)), order),
                         _mm512_set1_epi64(int64_t(kChunkMask)));
    s[g] = {_mm512_set1_epi64(int64_t(key.stream)), _mm512_set1_epi64(int64_t(key.stream >> 32)), counter,
            _mm512_srli_epi64(counter, 32)};
  }
#pragma GCC unroll 10
  for (int r = 0; r < kPhiloxRounds; ++r) {
    const __m512i k0 = _mm512_set1_epi64(int64_t(keys.k0[r])), k1 = _mm512_set1_epi64(int64_t(keys.k1[r]));
    for (int g = 0; g < kGroups; ++g) round(s[g], k0, k1);
  }
  for (int g = 0; g < kGroups; ++g) bits[g] = decide<kTies>(s[g], key, t, chunk + 8 * g);
}

template <bool kTies>
void draw_words(Key key, Threshold t, uint64_t chunk, int64_t words, uint64_t* bits) {
  RoundKeys keys;
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
  for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    keys.k0[r] = k0;
    keys.k1[r] = k1;
  }
  constexpr int groups = 4;  // independent chains that hide the latency of the products
  int64_t w = 0;
  for (; w + groups <= words; w += groups) draw_groups<kTies, groups>(key, t, keys, chunk + 8 * w, bits + w);
  for (; w < words; ++w) draw_groups<kTies, 1>(key, t, keys, chunk + 8 * w, bits + w);
}

void draw(Key key, Threshold t, uint64_t chunk, int64_t words, uint64_t* bits, const Ahead&) {
  t.lo == 0 ? draw_words<false>(key, t, chunk, words, bits) : draw_words<true>(key, t, chunk, words, bits);
}

}  // namespace

#include "dropout_loops.h"

extern const DropoutKernels kDropoutAvx512 = MODEPROBE_DROPOUT_TABLE;

}  // namespace modeprobe::cpu

MODEPROBE_TARGET_END

#endif
