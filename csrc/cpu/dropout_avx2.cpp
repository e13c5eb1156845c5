// Dropout with AVX2, FMA and F16C. Run only where capability() found them.
#if defined(__x86_64__)

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <algorithm>
#include <cstring>
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
// To nearest even, the result in the high half. A NaN that stems from bfloat16 data has zeros where the carry
// would start, so it stays one.
inline __m256i rounded(__m256 value) {
  const __m256i word = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd);
}
inline __m256i halves(__m256i even, __m256i odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}
inline void store(c10::BFloat16* p, __m256 value) {
  const __m256i half = _mm256_srli_epi32(rounded(value), 16);
  store(static_cast<void*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

// Past the caches; p is aligned to the vector.
inline void store_past(float* p, __m256 value) { _mm256_stream_ps(p, value); }
inline void store_past(double* p, __m256d value) { _mm256_stream_pd(p, value); }
template <class Half>
inline void store_past(Half* p, __m256 value) {
  alignas(__m128i) Half half[8];
  store(half, value);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(half));
}

// Bits j, j + 1, ... of `kept`. With j known, vectors that share a half of `kept` share its broadcast.
inline __m256 select(uint64_t kept, int j, __m256 value, __m256 fill) {
  const int at = j & 31;
  const __m256i lane = _mm256_setr_epi32(1 << at, 2 << at, 4 << at, 8 << at, 16 << at, 32 << at, 64 << at,
                                         static_cast<int>(128u << at));
  const __m256i word = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(kept >> (j & 32))), lane);
  return _mm256_blendv_ps(fill, value, _mm256_castsi256_ps(_mm256_cmpeq_epi32(word, lane)));
}
inline __m256d select(uint64_t kept, int j, __m256d value, __m256d fill) {
  const int at = j & 31;
  const __m256i lane = _mm256_setr_epi64x(1ll << at, 2ll << at, 4ll << at, 8ll << at);
  const __m256i word = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(kept >> (j & 32))), lane);
  return _mm256_blendv_pd(fill, value, _mm256_castsi256_pd(_mm256_cmpeq_epi64(word, lane)));
}

// apply_word() of dropout_loops.h for bfloat16: even and odd elements apart, which costs no lane crossing,
// and decisions 16 at a time.
template <bool kShift>
inline void apply_word(const c10::BFloat16* x, c10::BFloat16* y, uint64_t kept, __m256 scale, __m256 shift,
                       __m256 fill) {
  const __m256i lane =
      _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  const auto affine = [&](__m256i word) {
    __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(word), scale);
    if constexpr (kShift) value = value + shift;
    return rounded(value);
  };
  for (int j = 0; j < 64; j += 16) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + j));
    const __m256i even = affine(_mm256_slli_epi32(words, 16));
    const __m256i odd = affine(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000u))));
    const __m256i bits = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(kept >> j)), lane);
    const __m256i selected = _mm256_cmpeq_epi16(bits, lane), value = halves(even, odd);
    __m256i result = _mm256_and_si256(value, selected);
    if constexpr (kShift) result = _mm256_blendv_epi8(halves(rounded(fill), rounded(fill)), value, selected);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + j), result);
  }
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

// What the words of all chunks below 2^32 * (chunk_hi + 1) have in common. The stream and chunk_hi are the
// same for all of them, so the first two rounds come down to one product each, and the first of these is a
// sum: the chunks ascend.
struct Common {
  __m256i k0[kPhiloxRounds], k1[kPhiloxRounds];
  __m256i c0_1, c0_2, c2_2, c1_3;  // words of round 1, 2 and 3 as far as they are the same, keys included
  __m256i limit, bias;
};

inline __m256i each_word(uint32_t value) { return _mm256_set1_epi64x(int64_t{value}); }

Common common(Key key, Threshold t, uint32_t chunk_hi) {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
    k0[r] = uint32_t(key.seed) + r * kPhiloxW0;
    k1[r] = uint32_t(key.seed >> 32) + r * kPhiloxW1;
  }
  const uint64_t a = multiply_wide(kPhiloxM0, uint32_t(key.stream));
  const uint64_t b = multiply_wide(kPhiloxM1, uint32_t(a >> 32) ^ chunk_hi ^ k1[0]);
  // Draws are compared as signed numbers, there being no unsigned compare: less 2^15, which is one bit. The
  // last key brings it to the low words, `bias` to the high ones.
  constexpr uint32_t bias = 0x80008000u;
  k0[kPhiloxRounds - 1] ^= bias;
  k1[kPhiloxRounds - 1] ^= bias;
  Common same;
  for (int r = 0; r < kPhiloxRounds; ++r) {
    same.k0[r] = each_word(k0[r]);
    same.k1[r] = each_word(k1[r]);
  }
  same.c0_1 = each_word(uint32_t(key.stream >> 32) ^ k0[0]);
  same.c0_2 = each_word(uint32_t(b >> 32) ^ k0[1]);
  same.c2_2 = each_word(uint32_t(a) ^ k1[1]);
  same.c1_3 = each_word(uint32_t(b) ^ k0[2]);
  same.limit = _mm256_set1_epi16(static_cast<short>(t.hi ^ 0x8000u));
  same.bias = _mm256_set1_epi32(int(bias));
  return same;
}

// The high words, in the low halves; as a shuffle it leaves the port of the shifts alone.
inline __m256i high(__m256i product) { return _mm256_shuffle_epi32(product, 0xf5); }
inline __m256i swapped(__m256i product) { return _mm256_shuffle_epi32(product, 0xb1); }

// The 64 draws of eight chunks, less 2^15. Each vector holds one half of four chunks, one per 64-bit lane:
// their first four lanes, or their last.
struct Draws {
  __m256i first[2], second[2];
};

// Products want 32-bit factors in the low halves and ignore the high ones, so a product serves as its own low
// word, and nothing is packed until the rounds are over. `product` is that of round 0. Two chains in step:
// one alone would wait for its products.
inline Draws words_of(const __m256i (&product)[2], const Common& same) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  __m256i a[2], b[2], c0[2], c1[2], c2[2], c3[2];
  for (int g = 0; g < 2; ++g) c3[g] = _mm256_mul_epu32(high(product[g]) ^ same.c0_1, m0);
  for (int g = 0; g < 2; ++g) a[g] = _mm256_mul_epu32(product[g] ^ same.c0_2, m0);
  for (int g = 0; g < 2; ++g) b[g] = _mm256_mul_epu32(high(c3[g]) ^ same.c2_2, m1);
  for (int g = 0; g < 2; ++g) {
    c0[g] = high(b[g]) ^ same.c1_3;
    c2[g] = high(a[g]) ^ c3[g] ^ same.k1[2];
  }
#pragma GCC unroll 10
  for (int r = 3; r < kPhiloxRounds; ++r) {
    for (int g = 0; g < 2; ++g) {
      c1[g] = b[g] ^ same.k0[r];
      c3[g] = a[g] ^ same.k1[r];
      a[g] = _mm256_mul_epu32(c0[g], m0);
      b[g] = _mm256_mul_epu32(c2[g], m1);
    }
    if (r == kPhiloxRounds - 1) break;
    for (int g = 0; g < 2; ++g) {
      c0[g] = high(b[g]) ^ c1[g];
      c2[g] = high(a[g]) ^ c3[g];
    }
  }
  Draws draws;
  for (int g = 0; g < 2; ++g) {
    draws.first[g] = swapped(b[g]) ^ _mm256_blend_epi32(c1[g], same.bias, 0xaa);
    draws.second[g] = swapped(a[g]) ^ _mm256_blend_epi32(c3[g], same.bias, 0xaa);
  }
  return draws;
}

// Bit by bit the signs of first[0], second[0], first[1] and second[1], 16 bits wide, in memory order.
inline uint32_t signs(__m256i first, __m256i second) {
  const __m256i bytes = _mm256_shuffle_epi32(_mm256_packs_epi16(first, second), 0xd8);
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
inline uint64_t below(const Draws& d, __m256i limit) {
  const uint32_t low = signs(_mm256_cmpgt_epi16(limit, d.first[0]), _mm256_cmpgt_epi16(limit, d.second[0]));
  const uint32_t high = signs(_mm256_cmpgt_epi16(limit, d.first[1]), _mm256_cmpgt_epi16(limit, d.second[1]));
  return low | uint64_t{high} << 32;
}
inline uint64_t equal(const Draws& d, __m256i limit) {
  __m256i first[2], second[2];
  for (int g = 0; g < 2; ++g) {
    first[g] = _mm256_cmpeq_epi16(limit, d.first[g]);
    second[g] = _mm256_cmpeq_epi16(limit, d.second[g]);
  }
  const __m256i any = (first[0] | second[0]) | (first[1] | second[1]);
  if (__builtin_expect(_mm256_movemask_epi8(any) == 0, 1)) return 0;
  return signs(first[0], second[0]) | uint64_t{signs(first[1], second[1])} << 32;
}

template <bool kTies>
void draw_words(Key key, Threshold t, uint64_t chunk, int64_t words, uint64_t* bits, Ahead ahead) {
  const Common same = common(key, t, uint32_t(chunk >> 32));
  const __m256i start = _mm256_set1_epi64x(int64_t(uint32_t(chunk))), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i step = _mm256_set1_epi64x(8 * int64_t{kPhiloxM1});
  __m256i product[2] = {_mm256_mul_epu32(_mm256_add_epi64(start, _mm256_setr_epi64x(0, 1, 2, 3)), m1),
                        _mm256_mul_epu32(_mm256_add_epi64(start, _mm256_setr_epi64x(4, 5, 6, 7)), m1)};
  for (int64_t w = 0; w < words; ++w) {
    for (const char*& p : ahead.at) {
      if (p == nullptr) continue;
      for (const char* end = p + ahead.step; p < end; p += 64) __builtin_prefetch(p);
    }
    const Draws draws = words_of(product, same);
    for (__m256i& next : product) next = _mm256_add_epi64(next, step);
    uint64_t kept = below(draws, same.limit);
    if constexpr (kTies) {
      const uint64_t ties = equal(draws, same.limit);
      if (__builtin_expect(ties != 0, 0)) kept |= break_ties(key, t, chunk + 8 * w, ties);
    }
    bits[w] = kept;
  }
}

void draw(Key key, Threshold t, uint64_t chunk, int64_t words, uint64_t* bits, const Ahead& ahead) {
  for (int64_t done = 0; words > 0;) {
    chunk &= kChunkMask;
    // As many words as have the high half of their chunks in common; where it changes, one word in plain C++.
    const int64_t before = int64_t((uint64_t{1} << 32) - uint32_t(chunk)) / kLanesPerChunk;
    const int64_t n = std::min(words, std::max<int64_t>(before, 1));
    if (before == 0) {
      kDropoutPortable.draw(key, t, chunk, n, bits, {});
    } else if (t.lo == 0) {
      draw_words<false>(key, t, chunk, n, bits, ahead.from(done));
    } else {
      draw_words<true>(key, t, chunk, n, bits, ahead.from(done));
    }
    chunk += uint64_t(kLanesPerChunk * n);
    bits += n;
    done += n;
    words -= n;
  }
}

}  // namespace

#include "dropout_loops.h"

extern const DropoutKernels kDropoutAvx2 = MODEPROBE_DROPOUT_TABLE;

}  // namespace modeprobe::cpu

MODEPROBE_TARGET_END

#endif
