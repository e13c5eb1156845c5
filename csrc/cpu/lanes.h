// Sixteen lanes of float or double, on whatever registers the translation unit is compiled for.
//
// Included inside an instruction-set namespace and target region; it includes nothing itself. Sixteen
// lanes everywhere, and no contraction to FMA, make results equal on every instruction set.

#define INLINE static inline __attribute__((always_inline))
// Lane by lane, or rare: kept out of the loops, which would grow sixteenfold.
#define OUTLINE static __attribute__((noinline))
#define LAMBDA __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

constexpr int kLanes = 16;
constexpr int kRegisterBytes = MODEPROBE_ISA_WIDTH / 8;

typedef float FloatRegister __attribute__((vector_size(kRegisterBytes)));
typedef double DoubleRegister __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t WordRegister __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t HalfRegister __attribute__((vector_size(kRegisterBytes / 2)));

// In memory order, or split: register 0 holds lanes 0-3 and 8-11, register 1 lanes 4-7 and 12-15.
template <class R, class S, bool split = false>
struct Pack {
  using Scalar = S;
  using Register = R;
  static constexpr bool kSplit = split;
  static constexpr int kWidth = sizeof(R) / sizeof(S);
  static constexpr int kCount = kLanes / kWidth;
  R r[kCount];

  static constexpr int lane(int k, int i) { return kSplit ? i % 4 + i / 4 * 8 + k * 4 : k * kWidth + i; }
};

using F = Pack<FloatRegister, float>;
using D = Pack<DoubleRegister, double>;
// AVX2 unpacks sixteen bfloat16 into halves of registers, and packs them again, without crossing those.
using SplitF = Pack<FloatRegister, float, MODEPROBE_ISA_WIDTH == 256>;

template <class V>
concept FloatLanes = sizeof(typename V::Scalar) == 4;

// The lanes that a stored element type is computed in.
template <class T>
struct LanesOf {
  using Type = F;
};
template <>
struct LanesOf<double> {
  using Type = D;
};
template <>
struct LanesOf<BFloat> {
  using Type = SplitF;
};

// What of the sixteen lanes counts: all, known at compile time; the first `n`, the others not being accessed;
// the last `n`, the others being elements that an earlier step had.
struct All {};
struct First {
  int n;
};
struct Last {
  int n;
};

#define MODEPROBE_LANEWISE(op)                                                     \
  template <class R, class S, bool split>                                          \
  INLINE Pack<R, S, split> operator op(Pack<R, S, split> a, Pack<R, S, split> b) { \
    for (int k = 0; k < a.kCount; ++k) a.r[k] = a.r[k] op b.r[k];                  \
    return a;                                                                      \
  }
MODEPROBE_LANEWISE(+)
MODEPROBE_LANEWISE(-)
MODEPROBE_LANEWISE(*)
MODEPROBE_LANEWISE(/)
#undef MODEPROBE_LANEWISE

template <class V>
INLINE V splat(typename V::Scalar value) {
  V out;
  for (int k = 0; k < V::kCount; ++k) out.r[k] = value - decltype(out.r[k] + out.r[k]){};
  return out;
}

// z <= 0 ? a : b, so that a NaN takes b.
template <class V>
INLINE V where_not_positive(V z, V a, V b) {
  using R = typename V::Register;
  for (int k = 0; k < V::kCount; ++k) z.r[k] = z.r[k] <= R{} ? a.r[k] : b.r[k];
  return z;
}

template <class V>
INLINE V where_less(V x, V y, V a, V b) {
  for (int k = 0; k < V::kCount; ++k) x.r[k] = x.r[k] < y.r[k] ? a.r[k] : b.r[k];
  return x;
}

// One register at a time: a memcpy of the whole pack goes through the stack.
template <class R>
struct Unaligned {
  typedef R Type __attribute__((aligned(1), may_alias));
};

template <class V>
INLINE void to_array(V v, typename V::Scalar* out) {
  using R = typename Unaligned<typename V::Register>::Type;
  for (int k = 0; k < V::kCount; ++k) *(R*)(out + k * V::kWidth) = v.r[k];
}

template <class V>
INLINE V from_array(const typename V::Scalar* in) {
  using R = typename Unaligned<typename V::Register>::Type;
  V out;
  for (int k = 0; k < V::kCount; ++k) out.r[k] = *(const R*)(in + k * V::kWidth);
  return out;
}

// ---- Bits, one per lane ----

#if MODEPROBE_ISA_WIDTH != 512
// Integers as wide as a lane.
template <class S>
struct WordOf {
  using Type = uint32_t;
};
template <>
struct WordOf<double> {
  using Type = uint64_t;
};

// The bit of each lane, in the order of the registers.
template <class V>
struct LaneBits {
  typename WordOf<typename V::Scalar>::Type bit[kLanes];
  constexpr LaneBits() : bit() {
    for (int k = 0; k < V::kCount; ++k)
      for (int i = 0; i < V::kWidth; ++i) bit[k * V::kWidth + i] = 1u << V::lane(k, i);
  }
};
template <class V>
constexpr LaneBits<V> kLaneBits;
#endif

// A bit for each element of a register, in its order.
#if MODEPROBE_ISA_WIDTH == 512
INLINE uint32_t positive_elements(FloatRegister z) {
  return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_NLE_UQ);
}
INLINE uint32_t positive_elements(DoubleRegister z) {
  return _mm512_cmp_pd_mask((__m512d)z, _mm512_setzero_pd(), _CMP_NLE_UQ);
}
#elif MODEPROBE_ISA_WIDTH == 256
INLINE uint32_t positive_elements(FloatRegister z) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)z, _mm256_setzero_ps(), _CMP_NLE_UQ));
}
INLINE uint32_t positive_elements(DoubleRegister z) {
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)z, _mm256_setzero_pd(), _CMP_NLE_UQ));
}
#elif defined(__SSE2__)
INLINE uint32_t positive_elements(FloatRegister z) {
  return _mm_movemask_ps(_mm_cmpnle_ps((__m128)z, _mm_setzero_ps()));
}
INLINE uint32_t positive_elements(DoubleRegister z) {
  return _mm_movemask_pd(_mm_cmpnle_pd((__m128d)z, _mm_setzero_pd()));
}
#else
template <class R>
INLINE uint32_t positive_elements(R z) {
  uint32_t bits = 0;
  for (unsigned i = 0; i < sizeof(R) / sizeof(z[0]); ++i) bits |= uint32_t(!(z[i] <= 0)) << i;
  return bits;
}
#endif

template <class V>
INLINE uint32_t positive_bits(V z) {  // !(z <= 0)
  if constexpr (V::kSplit) {
    const uint32_t even = positive_elements(z.r[0]), odd = positive_elements(z.r[1]);
    return (even & 0xf) | (odd & 0xf) << 4 | (even & 0xf0) << 4 | (odd & 0xf0) << 8;
  } else {
    uint32_t bits = 0;
    for (int k = 0; k < V::kCount; ++k) bits |= positive_elements(z.r[k]) << (k * V::kWidth);
    return bits;
  }
}

template <class V>
INLINE V where_bits(uint32_t bits, V a, V b) {
  for (int k = 0; k < V::kCount; ++k) {
#if MODEPROBE_ISA_WIDTH == 512
    if constexpr (sizeof(typename V::Scalar) == 4) {
      a.r[k] = (typename V::Register)_mm512_mask_blend_ps(__mmask16(bits), (__m512)b.r[k], (__m512)a.r[k]);
    } else {
      a.r[k] = (typename V::Register)_mm512_mask_blend_pd(__mmask8(bits >> (8 * k)), (__m512d)b.r[k],
                                                          (__m512d)a.r[k]);
    }
#else
    using Word = typename WordOf<typename V::Scalar>::Type;
    typedef Word Words __attribute__((vector_size(kRegisterBytes)));
    Words lane;
    __builtin_memcpy(&lane, kLaneBits<V>.bit + k * V::kWidth, sizeof lane);
    a.r[k] = ((Words{} + Word(bits)) & lane) == lane ? a.r[k] : b.r[k];
#endif
  }
  return a;
}

template <class V>
INLINE V keep_lanes(V v, All) {
  return v;
}
template <class V>
INLINE V keep_lanes(V v, First f) {
  return where_bits((1u << f.n) - 1, v, splat<V>(0));
}
template <class V>
INLINE V keep_lanes(V v, Last l) {
  return where_bits(0xffffu << (kLanes - l.n), v, splat<V>(0));
}

// ---- Widening to double, for sums; in memory order ----

INLINE D widen(D v) { return v; }
template <FloatLanes V>
INLINE D widen(V v) {
  D out;
#if MODEPROBE_ISA_WIDTH == 512
  out.r[0] = (DoubleRegister)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v.r[0]));
  out.r[1] = (DoubleRegister)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v.r[0], 1));
#elif MODEPROBE_ISA_WIDTH == 256
  for (int k = 0; k < 2; ++k) {
    const int low = V::kSplit ? k : 2 * k, high = V::kSplit ? k + 2 : 2 * k + 1;
    out.r[low] = (DoubleRegister)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v.r[k]));
    out.r[high] = (DoubleRegister)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v.r[k], 1));
  }
#else
  typedef float HalfOfFloats __attribute__((vector_size(kRegisterBytes / 2)));
  for (int k = 0; k < V::kCount; ++k) {
    HalfOfFloats half[2];
    __builtin_memcpy(half, &v.r[k], sizeof half);
    for (int i = 0; i < 2; ++i) out.r[2 * k + i] = __builtin_convertvector(half[i], DoubleRegister);
  }
#endif
  return out;
}

// Lane i meets lane i + 8, then i + 4, and so on: the same sum on every width of registers.
INLINE double sum_lanes(D v) {
  for (int half = D::kCount / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) v.r[k] = v.r[k] + v.r[k + half];
  double lane[D::kWidth];
  __builtin_memcpy(lane, &v.r[0], sizeof lane);
  for (int half = D::kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// ---- Loads and stores ----

INLINE F load(const float* p, All) { return from_array<F>(p); }
INLINE D load(const double* p, All) { return from_array<D>(p); }
INLINE void store(float* p, F v, All) { to_array(v, p); }
INLINE void store(double* p, D v, All) { to_array(v, p); }

// Per-channel operands, in the order of the lanes that they meet.
template <class V>
INLINE V operand(const typename V::Scalar* p) {
#if MODEPROBE_ISA_WIDTH == 256
  if constexpr (V::kSplit)
    return {(FloatRegister)_mm256_loadu2_m128(p + 8, p), (FloatRegister)_mm256_loadu2_m128(p + 12, p + 4)};
#endif
  return from_array<V>(p);
}

INLINE SplitF load(const BFloat* p, All) {
#if MODEPROBE_ISA_WIDTH == 256
  const __m256i words = _mm256_loadu_si256((const __m256i*)p), zero = _mm256_setzero_si256();
  return {(FloatRegister)_mm256_unpacklo_epi16(zero, words),
          (FloatRegister)_mm256_unpackhi_epi16(zero, words)};
#else
  SplitF out;
  for (int k = 0; k < F::kCount; ++k) {
    HalfRegister h;
    __builtin_memcpy(&h, p + k * F::kWidth, sizeof h);
    out.r[k] = (FloatRegister)(__builtin_convertvector(h, WordRegister) << 16);
  }
  return out;
#endif
}

// Round to nearest even; every NaN becomes the quiet one.
INLINE void store(BFloat* p, SplitF v, All) {
  WordRegister w[F::kCount];
  for (int k = 0; k < F::kCount; ++k) {
    const WordRegister bits = (WordRegister)v.r[k];
    w[k] = (bits + (bits >> 16 & 1u) + 0x7fffu) >> 16;
  }
#if MODEPROBE_ISA_WIDTH == 256
  // One comparison tells whether either of two lanes is NaN.
  const __m256 nan = _mm256_cmp_ps((__m256)v.r[0], (__m256)v.r[1], _CMP_UNORD_Q);
  if (__builtin_expect(!_mm256_testz_ps(nan, nan), 0))
    for (int k = 0; k < F::kCount; ++k) w[k] = v.r[k] == v.r[k] ? w[k] : WordRegister{} + 0x7fc0u;
  _mm256_storeu_si256((__m256i*)p, _mm256_packus_epi32((__m256i)w[0], (__m256i)w[1]));
#else
  for (int k = 0; k < F::kCount; ++k) {
    w[k] = v.r[k] == v.r[k] ? w[k] : WordRegister{} + 0x7fc0u;
    const HalfRegister h = __builtin_convertvector(w[k], HalfRegister);
    __builtin_memcpy(p + k * F::kWidth, &h, sizeof h);
  }
#endif
}

#if MODEPROBE_ISA_WIDTH == 512
INLINE F load(const Half* p, All) {
  return {(FloatRegister)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
INLINE void store(Half* p, F v, All) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v.r[0], _MM_FROUND_TO_NEAREST_INT));
}
#elif MODEPROBE_ISA_WIDTH == 256
INLINE F load(const Half* p, All) {
  return {(FloatRegister)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          (FloatRegister)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
INLINE void store(Half* p, F v, All) {
  for (int k = 0; k < 2; ++k)
    _mm_storeu_si128((__m128i*)p + k, _mm256_cvtps_ph((__m256)v.r[k], _MM_FROUND_TO_NEAREST_INT));
}
#else
INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = h & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = rest << 13 | 0x7f800000u;
  } else if (rest >= 0x0400u) {
    bits = (rest << 13) + (112u << 23);
  } else {
    const float tiny = float(rest) * 0x1p-24f;
    __builtin_memcpy(&bits, &tiny, 4);
  }
  bits |= sign;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u | (rest >> 13 & 0x1ffu));
  if (rest >= 0x47800000u) return uint16_t(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // Below the smallest normal half: adding 0.5 puts its last bit at 2^-24, rounded to nearest even.
    float value;
    __builtin_memcpy(&value, &rest, 4);
    value += 0.5f;
    __builtin_memcpy(&bits, &value, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  return uint16_t(sign | ((rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13));
}
OUTLINE void halves_to_floats(const Half* p, float* lane) {
  for (int i = 0; i < kLanes; ++i) lane[i] = half_to_float(p[i].bits);
}
OUTLINE void floats_to_halves(Half* p, const float* lane) {
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(lane[i]);
}
INLINE F load(const Half* p, All) {
  float lane[kLanes];
  halves_to_floats(p, lane);
  return from_array<F>(lane);
}
INLINE void store(Half* p, F v, All) {
  float lane[kLanes];
  to_array(v, lane);
  floats_to_halves(p, lane);
}
#endif

// Past the caches, for memory that is not read again soon: no line is fetched only to be overwritten.
// Wants p aligned to 64 bytes at every full step; fence() before another thread reads.
#if MODEPROBE_ISA_WIDTH >= 256
template <class T>
INLINE void stream(T* p, typename LanesOf<T>::Type v, All) {
  if constexpr (sizeof(T) == 2) {
    alignas(32) T buffer[kLanes];
    store(buffer, v, All{});
    _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)buffer));
  } else {
    for (int k = 0; k < v.kCount; ++k) {
      T* to = p + k * v.kWidth;
#if MODEPROBE_ISA_WIDTH == 512
      _mm512_stream_si512((__m512i*)to, (__m512i)v.r[k]);
#else
      _mm256_stream_si256((__m256i*)to, (__m256i)v.r[k]);
#endif
    }
  }
}
INLINE void fence() { _mm_sfence(); }
#else
template <class T>
INLINE void stream(T* p, typename LanesOf<T>::Type v, All) {
  store(p, v, All{});
}
INLINE void fence() {}
#endif
#if MODEPROBE_ISA_WIDTH != 512
template <int kStep = kLanes, class T>
INLINE void copy_first(T* to, const T* from, int n) {  // n <= 16
  if constexpr (kStep > 0) {
    const int now = n & kStep;
    if (now) __builtin_memcpy(to, from, kStep * sizeof(T));
    copy_first<kStep / 2>(to + now, from + now, n);
  }
}
#endif

// The lanes past f.n read as zero and are not touched in memory.
template <class T>
INLINE typename LanesOf<T>::Type load(const T* p, First f) {
#if MODEPROBE_ISA_WIDTH == 512
  const __mmask16 mask = __mmask16((1u << f.n) - 1);
  if constexpr (sizeof(T) == 4) {
    return {(FloatRegister)_mm512_maskz_loadu_ps(mask, p)};
  } else if constexpr (sizeof(T) == 8) {
    return {(DoubleRegister)_mm512_maskz_loadu_pd(__mmask8(mask), p),
            (DoubleRegister)_mm512_maskz_loadu_pd(__mmask8(mask >> 8), p + 8)};
  } else {
    T buffer[kLanes];
    _mm256_storeu_si256((__m256i*)buffer, _mm256_maskz_loadu_epi16(mask, p));
    return load(buffer, All{});
  }
#else
#if MODEPROBE_ISA_WIDTH == 256
  if constexpr (sizeof(T) >= 4) {
    typename LanesOf<T>::Type out;
    for (int k = 0; k < out.kCount; ++k) {
      const int left = f.n - k * out.kWidth;
      if constexpr (sizeof(T) == 4) {
        const __m256i mask =
            _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        out.r[k] = (FloatRegister)_mm256_maskload_ps(p + k * out.kWidth, mask);
      } else {
        const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(left), _mm256_setr_epi64x(0, 1, 2, 3));
        out.r[k] = (DoubleRegister)_mm256_maskload_pd(p + k * out.kWidth, mask);
      }
    }
    return out;
  }
#endif
  T buffer[kLanes] = {};
  copy_first(buffer, p, f.n);
  return load(buffer, All{});
#endif
}

template <class T>
INLINE void store(T* p, typename LanesOf<T>::Type v, First f) {
#if MODEPROBE_ISA_WIDTH == 512
  const __mmask16 mask = __mmask16((1u << f.n) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, (__m512)v.r[0]);
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v.r[0]);
    _mm512_mask_storeu_pd(p + 8, __mmask8(mask >> 8), (__m512d)v.r[1]);
  } else {
    T buffer[kLanes];
    store(buffer, v, All{});
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256((const __m256i*)buffer));
  }
#else
  T buffer[kLanes];
  store(buffer, v, All{});
  copy_first(p, buffer, f.n);
#endif
}

template <class T>
INLINE void stream(T* p, typename LanesOf<T>::Type v, First f) {
  store(p, v, f);
}

template <class T>
INLINE typename LanesOf<T>::Type load(const T* p, Last) {
  return load(p, All{});
}
template <class T>
INLINE void store(T* p, typename LanesOf<T>::Type v, Last) {
  store(p, v, All{});
}
template <class T>
INLINE void stream(T* p, typename LanesOf<T>::Type v, Last) {
  store(p, v, All{});
}
