// Activations and their derivatives on sixteen lanes; included after lanes.h.

// Lane by lane through libm: the reference for float64, where speed is not the point.
template <class Map>
INLINE D map_lanes(D v, const Map& f) {
  double lane[kLanes];
  to_array(v, lane);
  for (int i = 0; i < kLanes; ++i) lane[i] = f(lane[i]);
  return from_array<D>(lane);
}

INLINE D exponential(D x) {
  return map_lanes(x, [](double t) { return __builtin_exp(t); });
}
INLINE D normal_cdf(D z) {
  return map_lanes(z, [](double t) { return 0.5 * __builtin_erfc(-t * 0.70710678118654752440); });
}
INLINE D normal_density(D z) {
  return map_lanes(z, [](double t) { return 0.39894228040143267794 * __builtin_exp(-0.5 * t * t); });
}
// exp to about 1 ulp: x = n ln 2 + r, a Taylor polynomial for exp(r), and n into the exponent.
template <FloatLanes V>
INLINE V exponential(V x) {
  const V lowest = splat<V>(-87.33f), highest = splat<V>(88.3f);
  x = where_less(x, lowest, lowest, x);
  x = where_less(highest, x, highest, x);
  const V magic = splat<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const V shifted = x * splat<V>(1.44269504f) + magic;
  const V n = shifted - magic;
  const V r = x - n * splat<V>(0.693359375f) - n * splat<V>(-2.12194440e-4f);
  V p = splat<V>(1.0f / 5040);
  const float inverse_factorials[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : inverse_factorials) p = p * r + splat<V>(c);
  V power;
  for (int k = 0; k < V::kCount; ++k) {
    WordRegister w;
    __builtin_memcpy(&w, &shifted.r[k], sizeof w);
    w = (w + 127u) << 23;
    __builtin_memcpy(&power.r[k], &w, sizeof w);
  }
  return p * power;
}

template <FloatLanes V>
INLINE V normal_density(V z) {
  return splat<V>(0.39894228f) * exponential(splat<V>(-0.5f) * z * z);
}

// Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26: absolute error 1e-7.
template <FloatLanes V>
INLINE V normal_cdf(V z) {
  const V zero = splat<V>(0), one = splat<V>(1);
  const V x = where_less(z, zero, zero - z, z) * splat<V>(0.70710678f);
  const V t = one / (one + splat<V>(0.3275911f) * x);
  V p = splat<V>(1.061405429f);
  const float coefficients[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f};
  for (const float c : coefficients) p = p * t + splat<V>(c);
  const V tail = splat<V>(0.5f) * p * exponential(zero - x * x);
  return where_less(z, zero, tail, one - tail);
}

constexpr double kTanhScale = 0.79788456080286535588;  // sqrt(2 / pi)
constexpr double kTanhCubic = 0.044715;

// sigmoid(v) and 1 - sigmoid(v), without cancellation in either.
template <class V>
struct Sigmoid {
  V value, rest;
};

template <class V>
INLINE Sigmoid<V> sigmoid(V v) {
  const V e = exponential(splat<V>(0) - v), one = splat<V>(1);
  const V s = one / (one + e);
  return {s, e * s};
}

// The tanh form of GELU is z * sigmoid(2 u), u = sqrt(2 / pi) * (z + 0.044715 z^3).
template <class V>
INLINE V twice_tanh_argument(V z) {
  using S = typename V::Scalar;
  return z * (splat<V>(S(2 * kTanhScale)) + splat<V>(S(2 * kTanhScale * kTanhCubic)) * (z * z));
}

template <class V>
OUTLINE V activate(V z, int activation) {
  switch (activation) {
    case kSilu:
      return z * sigmoid(z).value;
    case kGelu:
      return z * normal_cdf(z);
    default:
      return z * sigmoid(twice_tanh_argument(z)).value;
  }
}

template <class V>
OUTLINE V derivative(V z, int activation) {
  using S = typename V::Scalar;
  const V one = splat<V>(S(1));
  switch (activation) {
    case kSilu: {
      const Sigmoid<V> s = sigmoid(z);
      return s.value * (one + z * s.rest);
    }
    case kGelu:
      return normal_cdf(z) + z * normal_density(z);
    default: {
      const Sigmoid<V> s = sigmoid(twice_tanh_argument(z));
      const V slope = splat<V>(S(2 * kTanhScale)) + splat<V>(S(6 * kTanhScale * kTanhCubic)) * (z * z);
      return s.value * (one + z * s.rest * slope);
    }
  }
}
