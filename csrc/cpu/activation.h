// Activations and their derivatives on sixteen lanes; included after lanes.h.

// Lane by lane through libm: the reference for float64, where speed is not the point.
template <class Map>
INLINE D map_lanes(D v, const Map& f) {
  double lane[kLanes];
  to_array(v, lane);
  for (int i = 0; i < kLanes; ++i) lane[i] = f(lane[i]);
  return from_array<D>(lane);
}

INLINE D sigmoid(D z) {
  return map_lanes(z, [](double t) { return 1 / (1 + __builtin_exp(-t)); });
}
INLINE D hyperbolic_tangent(D z) {
  return map_lanes(z, [](double t) { return __builtin_tanh(t); });
}
INLINE D normal_cdf(D z) {
  return map_lanes(z, [](double t) { return 0.5 * __builtin_erfc(-t * 0.70710678118654752440); });
}
INLINE D normal_density(D z) {
  return map_lanes(z, [](double t) { return 0.39894228040143267794 * __builtin_exp(-0.5 * t * t); });
}
INLINE F narrow(D v) {
  double wide[kLanes];
  float lane[kLanes];
  to_array(v, wide);
  for (int i = 0; i < kLanes; ++i) lane[i] = float(wide[i]);
  return from_array<F>(lane);
}
INLINE F sigmoid(F z) { return narrow(sigmoid(widen(z))); }
INLINE F hyperbolic_tangent(F z) { return narrow(hyperbolic_tangent(widen(z))); }
INLINE F normal_cdf(F z) { return narrow(normal_cdf(widen(z))); }
INLINE F normal_density(F z) { return narrow(normal_density(widen(z))); }

constexpr double kTanhScale = 0.79788456080286535588;  // sqrt(2 / pi)
constexpr double kTanhCubic = 0.044715;

template <class V>
static __attribute__((noinline)) V activate(V z, int activation) {
  using S = typename V::Scalar;
  const V half = splat<V>(S(0.5)), one = splat<V>(S(1));
  switch (activation) {
    case kSilu:
      return z * sigmoid(z);
    case kGelu:
      return z * normal_cdf(z);
    default: {
      const V inner = splat<V>(S(kTanhScale)) * (z + splat<V>(S(kTanhCubic)) * z * z * z);
      return half * z * (one + hyperbolic_tangent(inner));
    }
  }
}

template <class V>
static __attribute__((noinline)) V derivative(V z, int activation) {
  using S = typename V::Scalar;
  const V half = splat<V>(S(0.5)), one = splat<V>(S(1));
  switch (activation) {
    case kLeakyRelu:
    case kRelu:
    case kNone:
      return one;
    case kSilu: {
      const V s = sigmoid(z);
      return s * (one + z * (one - s));
    }
    case kGelu:
      return normal_cdf(z) + z * normal_density(z);
    default: {
      const V cubic = splat<V>(S(kTanhCubic));
      const V inner = splat<V>(S(kTanhScale)) * (z + cubic * z * z * z);
      const V slope = splat<V>(S(kTanhScale)) * (one + splat<V>(S(3)) * cubic * z * z);
      const V t = hyperbolic_tangent(inner);
      return half * (one + t) + half * z * (one - t * t) * slope;
    }
  }
}
