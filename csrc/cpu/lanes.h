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

template <class R, class S>
struct Pack {
  using Scalar = S;
  using Register = R;
  static constexpr int kWidth = sizeof(R) / sizeof(S);
  static constexpr int kCount = kLanes / kWidth;
  R r[kCount];
};

using F = Pack<FloatRegister, float>;
using D = Pack<DoubleRegister, double>;

// The lanes that a stored element type is computed in.
template <class T>
struct LanesOf {
  using Type = F;
};
template <>
struct LanesOf<double> {
  using Type = D;
};

// How many of the sixteen lanes an access covers: all, known at compile time, or the first `n`.
struct All {};
struct First {
  int n;
};

#define MODEPROBE_LANEWISE(op)                                                \
  template <class R, class S>                                                 \
  INLINE Pack<R, S> operator op(Pack<R, S> a, Pack<R, S> b) {                 \
    Pack<R, S> out;                                                           \
    for (int k = 0; k < Pack<R, S>::kCount; ++k) out.r[k] = a.r[k] op b.r[k]; \
    return out;                                                               \
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
template <class R, class S>
INLINE Pack<R, S> where_not_positive(Pack<R, S> z, Pack<R, S> a, Pack<R, S> b) {
  Pack<R, S> out;
  for (int k = 0; k < Pack<R, S>::kCount; ++k) out.r[k] = z.r[k] <= R{} ? a.r[k] : b.r[k];
  return out;
}

template <class R, class S>
INLINE Pack<R, S> where_less(Pack<R, S> x, Pack<R, S> y, Pack<R, S> a, Pack<R, S> b) {
  Pack<R, S> out;
  for (int k = 0; k < Pack<R, S>::kCount; ++k) out.r[k] = x.r[k] < y.r[k] ? a.r[k] : b.r[k];
  return out;
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

// Integers as wide as a lane, and in each the bit of its lane.
template <class S>
struct BitsOf {
  using Type = WordRegister;
};
template <>
struct BitsOf<double> {
  typedef uint64_t Type __attribute__((vector_size(kRegisterBytes)));
};

#if MODEPROBE_ISA_WIDTH != 512
template <class R, class S>
INLINE typename BitsOf<S>::Type lane_bits() {
  typename BitsOf<S>::Type out;
  for (int i = 0; i < Pack<R, S>::kWidth; ++i) out[i] = 1u << i;
  return out;
}
#endif

template <class R, class S>
INLINE uint32_t positive_bits(Pack<R, S> z) {  // !(z <= 0)
#if MODEPROBE_ISA_WIDTH == 512
  if constexpr (sizeof(S) == 4) {
    return _mm512_cmp_ps_mask((__m512)z.r[0], _mm512_setzero_ps(), _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask((__m512d)z.r[0], _mm512_setzero_pd(), _CMP_NLE_UQ) |
           uint32_t(_mm512_cmp_pd_mask((__m512d)z.r[1], _mm512_setzero_pd(), _CMP_NLE_UQ)) << 8;
  }
#else
  uint32_t bits = 0;
  for (int k = 0; k < Pack<R, S>::kCount; ++k) {
    uint32_t part = 0;
#if MODEPROBE_ISA_WIDTH == 256
    if constexpr (sizeof(S) == 4) {
      part = _mm256_movemask_ps(_mm256_cmp_ps((__m256)z.r[k], _mm256_setzero_ps(), _CMP_NLE_UQ));
    } else {
      part = _mm256_movemask_pd(_mm256_cmp_pd((__m256d)z.r[k], _mm256_setzero_pd(), _CMP_NLE_UQ));
    }
#elif defined(__SSE2__)
    if constexpr (sizeof(S) == 4) {
      part = _mm_movemask_ps(_mm_cmpnle_ps((__m128)z.r[k], _mm_setzero_ps()));
    } else {
      part = _mm_movemask_pd(_mm_cmpnle_pd((__m128d)z.r[k], _mm_setzero_pd()));
    }
#else
    for (int i = 0; i < Pack<R, S>::kWidth; ++i) part |= uint32_t(!(z.r[k][i] <= 0)) << i;
#endif
    bits |= part << (k * Pack<R, S>::kWidth);
  }
  return bits;
#endif
}

template <class R, class S>
INLINE Pack<R, S> where_bits(uint32_t bits, Pack<R, S> a, Pack<R, S> b) {
  Pack<R, S> out;
#if MODEPROBE_ISA_WIDTH == 512
  if constexpr (sizeof(S) == 4) {
    out.r[0] = (R)_mm512_mask_blend_ps(__mmask16(bits), (__m512)b.r[0], (__m512)a.r[0]);
  } else {
    out.r[0] = (R)_mm512_mask_blend_pd(__mmask8(bits), (__m512d)b.r[0], (__m512d)a.r[0]);
    out.r[1] = (R)_mm512_mask_blend_pd(__mmask8(bits >> 8), (__m512d)b.r[1], (__m512d)a.r[1]);
  }
#else
  using Bits = typename BitsOf<S>::Type;
  const Bits lane = lane_bits<R, S>();
  for (int k = 0; k < Pack<R, S>::kCount; ++k) {
    const Bits all = Bits{} + (bits >> (k * Pack<R, S>::kWidth));
    out.r[k] = (all & lane) == lane ? a.r[k] : b.r[k];
  }
#endif
  return out;
}

template <class V>
INLINE V keep_lanes(V v, All) {
  return v;
}
template <class V>
INLINE V keep_lanes(V v, First f) {
  return where_bits((1u << f.n) - 1, v, splat<V>(0));
}

// ---- Widening to double, for sums ----

INLINE D widen(D v) { return v; }
INLINE D widen(F v) {
  D out;
#if MODEPROBE_ISA_WIDTH == 512
  out.r[0] = (DoubleRegister)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v.r[0]));
  out.r[1] = (DoubleRegister)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v.r[0], 1));
#elif MODEPROBE_ISA_WIDTH == 256
  for (int k = 0; k < 2; ++k) {
    out.r[2 * k] = (DoubleRegister)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v.r[k]));
    out.r[2 * k + 1] = (DoubleRegister)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v.r[k], 1));
  }
#else
  float lane[kLanes];
  double wide[kLanes];
  to_array(v, lane);
  for (int i = 0; i < kLanes; ++i) wide[i] = lane[i];
  out = from_array<D>(wide);
#endif
  return out;
}

INLINE double sum_lanes(D v) {
  double lane[kLanes];
  to_array(v, lane);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// ---- Loads and stores ----

INLINE F load(const float* p, All) { return from_array<F>(p); }
INLINE D load(const double* p, All) { return from_array<D>(p); }
INLINE void store(float* p, F v, All) { to_array(v, p); }
INLINE void store(double* p, D v, All) { to_array(v, p); }

INLINE F load(const BFloat* p, All) {
  F out;
  for (int k = 0; k < F::kCount; ++k) {
    HalfRegister h;
    __builtin_memcpy(&h, p + k * F::kWidth, sizeof h);
    out.r[k] = (FloatRegister)(__builtin_convertvector(h, WordRegister) << 16);
  }
  return out;
}

// Round to nearest even; every NaN becomes the quiet one.
INLINE void store(BFloat* p, F v, All) {
  WordRegister w[F::kCount];
  for (int k = 0; k < F::kCount; ++k) {
    const WordRegister bits = (WordRegister)v.r[k];
    const WordRegister rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    w[k] = v.r[k] == v.r[k] ? rounded : WordRegister{} + 0x7fc0u;
  }
#if MODEPROBE_ISA_WIDTH == 256
  // packus works within halves of a register.
  const __m256i packed = _mm256_packus_epi32((__m256i)w[0], (__m256i)w[1]);
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
#else
  for (int k = 0; k < F::kCount; ++k) {
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
