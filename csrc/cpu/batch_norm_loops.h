// The loops behind batch_norm_kernels.h; included inside an instruction-set namespace, after lanes.h.

constexpr int kUnroll = 8;

// Calls body(i, lanes) over [0, n) in steps of at most 16, full ones from `head` on.
template <class Body>
INLINE void for_span(int64_t n, int64_t head, const Body& body) {
  int64_t i = 0;
  if (head > 0) {
    i = head < n ? head : n;
    for (int64_t from = 0; from < i; from += kLanes)
      body(from, First{int(i - from < kLanes ? i - from : kLanes)});
  }
  for (; i + kLanes <= n; i += kLanes) body(i, All{});
  if (i < n) body(i, First{int(n - i)});
}

// Where full steps over elements from `begin` may start: on a byte of the bits, on a line of streamed memory.
template <class T>
INLINE int64_t head_of(int64_t begin, bool on_bytes, bool on_lines) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  return on_lines ? -begin & (kLine - 1) : on_bytes ? -begin & 7 : 0;
}

// ---- Per-channel operands: one value for a plane, a vector along a row ----

template <class V>
struct OfPlane {
  V value;
  INLINE_MEMBER OfPlane(const typename V::Scalar* p, int64_t channel) : value(splat<V>(p[channel])) {}
  template <class L>
  INLINE_MEMBER V at(int64_t, L) const {
    return value;
  }
};

template <class V>
struct OfRow {
  const typename V::Scalar* p;
  INLINE_MEMBER OfRow(const typename V::Scalar* pointer, int64_t) : p(pointer) {}
  template <class L>
  INLINE_MEMBER V at(int64_t j, L lanes) const {
    return load(p + j, lanes);
  }
};

// ---- Sums: eight vectors in a tree, then into double, so that rounding errors do not pile up ----

template <class V>
INLINE V tree(const V* v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

template <class T>
INLINE D sum_span(const T* x, int64_t n, D sum) {
  using V = typename LanesOf<T>::Type;
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    V v[kUnroll];
    for (int k = 0; k < kUnroll; ++k) v[k] = load(x + i + k * kLanes, All{});
    sum = sum + widen(tree(v));
  }
  for (; i + kLanes <= n; i += kLanes) sum = sum + widen(load(x + i, All{}));
  if (i < n) sum = sum + widen(load(x + i, First{int(n - i)}));
  return sum;
}

template <class V>
INLINE V square(V v) {
  return v * v;
}

template <class T>
INLINE D squares_span(const T* x, int64_t n, typename LanesOf<T>::Type mean, D sum) {
  using V = typename LanesOf<T>::Type;
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    V v[kUnroll];
    for (int k = 0; k < kUnroll; ++k) v[k] = square(load(x + i + k * kLanes, All{}) - mean);
    sum = sum + widen(tree(v));
  }
  for (; i + kLanes <= n; i += kLanes) sum = sum + widen(square(load(x + i, All{}) - mean));
  if (i < n) {
    const First last{int(n - i)};
    sum = sum + widen(keep_lanes(square(load(x + i, last) - mean), last));
  }
  return sum;
}

// Squares that overflow float although the variance does not.
template <class T>
static __attribute__((noinline)) double squares_in_double(const T* x, int64_t n, double mean) {
  D sum = splat<D>(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    const First some{int(n - i < kLanes ? n - i : kLanes)};
    sum = sum + keep_lanes(square(widen(load(x + i, some)) - splat<D>(mean)), some);
  }
  return sum_lanes(sum);
}

// Images outside, channels inside: neighbouring channels are one run of memory.
template <class T>
void plane_moments(const T* input, Planes t, double* mean, double* m2) {
  using V = typename LanesOf<T>::Type;
  using A = typename V::Scalar;
  const double n = double(t.images * t.length);
  const T* x = input + t.begin;
  D sums[kMaxGroup];
  for (int64_t c = 0; c < t.channels; ++c) sums[c] = splat<D>(0);
  for (int64_t i = 0; i < t.images; ++i)
    for (int64_t c = 0; c < t.channels; ++c)
      sums[c] = sum_span(x + i * t.image_stride + c * t.channel_stride, t.length, sums[c]);
  A near[kMaxGroup];
  for (int64_t c = 0; c < t.channels; ++c) {
    mean[c] = sum_lanes(sums[c]) / n;
    near[c] = A(mean[c]);
    sums[c] = splat<D>(0);
  }
  for (int64_t i = 0; i < t.images; ++i)
    for (int64_t c = 0; c < t.channels; ++c)
      sums[c] =
          squares_span(x + i * t.image_stride + c * t.channel_stride, t.length, splat<V>(near[c]), sums[c]);
  for (int64_t c = 0; c < t.channels; ++c) {
    m2[c] = sum_lanes(sums[c]);
    if (sizeof(A) == 4 && !__builtin_isfinite(m2[c]) && __builtin_isfinite(mean[c])) {
      m2[c] = 0;
      for (int64_t i = 0; i < t.images; ++i)
        m2[c] += squares_in_double(x + i * t.image_stride + c * t.channel_stride, t.length, mean[c]);
    } else {
      // sum((x - near)^2) = M2 + n * (mean - near)^2, `near` being the mean as rounded for the loop.
      const double off = mean[c] - double(near[c]);
      m2[c] -= n * off * off;
      if (m2[c] < 0) m2[c] = 0;
    }
  }
}

// Adds f(load) of every row to sum[0, width), eight rows at a time.
template <class T, class Map>
INLINE void add_rows(const T* x, int64_t rows, int64_t width, double* sum, const Map& f) {
  using V = typename LanesOf<T>::Type;
  int64_t r = 0;
  for (; r + kUnroll <= rows; r += kUnroll) {
    const T* base = x + r * width;
    for_span(width, 0, [&](int64_t j, auto lanes) LAMBDA {
      V v[kUnroll];
      for (int k = 0; k < kUnroll; ++k) v[k] = f(load(base + k * width + j, lanes), j);
      store(sum + j, load(sum + j, All{}) + widen(tree(v)), All{});
    });
  }
  for (; r < rows; ++r) {
    const T* base = x + r * width;
    for_span(width, 0, [&](int64_t j, auto lanes) LAMBDA {
      store(sum + j, load(sum + j, All{}) + widen(f(load(base + j, lanes), j)), All{});
    });
  }
}

template <class T>
void row_moments(const T* input, Rows t, double* mean, double* m2, acc_t<T>* near) {
  using V = typename LanesOf<T>::Type;
  using A = typename V::Scalar;
  const T* x = input + t.begin;
  const int64_t padded = (t.width + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = 0; j < padded; ++j) mean[j] = m2[j] = 0;
  add_rows(x, t.rows, t.width, mean, [](V v, int64_t) LAMBDA { return v; });
  const double n = double(t.rows);
  for (int64_t j = 0; j < padded; ++j) {
    mean[j] /= n;
    near[j] = A(mean[j]);
  }
  add_rows(x, t.rows, t.width, m2, [&](V v, int64_t j) LAMBDA { return square(v - load(near + j, All{})); });
  bool finite = true;
  for (int64_t j = 0; j < t.width; ++j) finite &= bool(__builtin_isfinite(m2[j]));
  for (int64_t j = 0; j < t.width; ++j) {
    const double off = mean[j] - double(near[j]);
    const double corrected = m2[j] - n * off * off;
    m2[j] = corrected < 0 ? 0 : corrected;
  }
  if (sizeof(A) == 8 || finite) return;
  for (int64_t j = 0; j < t.width; ++j) {
    if (__builtin_isfinite(m2[j]) || !__builtin_isfinite(mean[j])) continue;
    m2[j] = 0;
    for (int64_t r = 0; r < t.rows; ++r) m2[j] += squares_in_double(x + r * t.width + j, 1, mean[j]);
  }
}

// ---- Forward ----

// Which epilogue a loop is compiled for: none, a rectifier, or any (activation and dropout at run time).
enum Kind { kPlain, kRectifier, kAny };

template <class T>
INLINE Kind kind_of(const Epilogue<T>& e) {
  if (e.keep_bits || e.activation > kLeakyRelu) return kAny;
  return e.activation == kNone && !e.residual ? kPlain : kRectifier;
}

INLINE uint32_t read_bits(const uint8_t* bits, int64_t at, All) {
  uint16_t word;
  __builtin_memcpy(&word, bits + (at >> 3), 2);
  return word;
}
INLINE uint32_t read_bits(const uint8_t* bits, int64_t at, First f) {
  uint32_t word = bits[at >> 3] >> (at & 7);
  for (int bit = 8 - int(at & 7), next = 1; bit < f.n; bit += 8, ++next)
    word |= uint32_t(bits[(at >> 3) + next]) << bit;
  return word;
}

INLINE void write_bits(uint8_t* bits, int64_t at, uint32_t word, All) {
  const uint16_t half = uint16_t(word);
  __builtin_memcpy(bits + (at >> 3), &half, 2);
}
// A partial step may share its bytes with a neighbour on another thread; the bits start as zeros.
INLINE void write_bits(uint8_t* bits, int64_t at, uint32_t word, First f) {
  word = (word & ((1u << f.n) - 1)) << (at & 7);
  for (uint8_t* byte = bits + (at >> 3); word != 0; word >>= 8)
    __atomic_fetch_or(byte++, uint8_t(word), __ATOMIC_RELAXED);
}

template <class T, class V, class L>
INLINE V rectified(const Normalize<T>& a, int64_t at, L lanes, V z) {
  const Epilogue<T>& e = a.epilogue;
  if (e.residual) z = z + load(e.residual + at, lanes);
  if (e.sign_bits) write_bits(e.sign_bits, at, positive_bits(z), lanes);
  if (e.activation == kRelu) return where_not_positive(z, splat<V>(0), z);
  if (e.activation == kLeakyRelu) return where_not_positive(z, z * splat<V>(e.slope), z);
  return z;
}

template <class T, class V, class L>
OUTLINE V any_epilogue(const Normalize<T>& a, int64_t at, L lanes, V z) {
  const Epilogue<T>& e = a.epilogue;
  z = rectified(a, at, lanes, z);
  if (e.activation > kLeakyRelu) z = activate(z, e.activation);
  if (e.keep_bits) z = where_bits(read_bits(e.keep_bits, at, lanes), z * splat<V>(e.keep_scale), splat<V>(0));
  return z;
}

template <Kind kind, class T, template <class> class Operand>
INLINE void normalize_span(const Normalize<T>& a, int64_t begin, int64_t n, int64_t channel) {
  using V = typename LanesOf<T>::Type;
  const Operand<V> mean(a.mean, channel), scale(a.scale, channel), bias(a.bias, channel);
  const Epilogue<T>& e = a.epilogue;
  const bool on_bytes = kind != kPlain && (e.sign_bits || e.keep_bits);
  for_span(n, head_of<T>(begin, on_bytes, a.stream), [&](int64_t i, auto lanes) LAMBDA {
    const int64_t at = begin + i;
    V z = (load(a.input + at, lanes) - mean.at(i, lanes)) * scale.at(i, lanes) + bias.at(i, lanes);
    if constexpr (kind == kRectifier) z = rectified(a, at, lanes, z);
    if constexpr (kind == kAny) z = any_epilogue(a, at, lanes, z);
    if (a.stream) {
      stream(a.output + at, z, lanes);
    } else {
      store(a.output + at, z, lanes);
    }
  });
}

template <Kind kind, class T>
static void plane_normalize_as(const Normalize<T>& a, Planes t) {
  for (int64_t i = 0; i < t.images; ++i)
    for (int64_t c = 0; c < t.channels; ++c)
      normalize_span<kind, T, OfPlane>(a, t.begin + i * t.image_stride + c * t.channel_stride, t.length, c);
}

template <Kind kind, class T>
static void row_normalize_as(const Normalize<T>& a, Rows t) {
  for (int64_t r = 0; r < t.rows; ++r) normalize_span<kind, T, OfRow>(a, t.begin + r * t.width, t.width, 0);
}

// ---- Backward ----

// dz, the gradient of z + residual, from the gradient of the output: behind a rectifier.
template <class T, class V, class L>
INLINE V rectified_grad(const Backward<T>& a, int64_t at, L lanes, V dz, V x, V mean, V scale, V bias) {
  const Epilogue<T>& e = a.epilogue;
  if (e.activation == kNone) return dz;
  const V below = e.activation == kRelu ? splat<V>(0) : dz * splat<V>(e.slope);
  if (e.sign_bits) return where_bits(read_bits(e.sign_bits, at, lanes), dz, below);
  V z = (x - mean) * scale + bias;
  if (e.residual) z = z + load(e.residual + at, lanes);
  return where_not_positive(z, below, dz);
}

// The same behind any activation and dropout.
template <class T, class V, class L>
OUTLINE V any_grad(const Backward<T>& a, int64_t at, L lanes, V dz, V x, V mean, V scale, V bias) {
  const Epilogue<T>& e = a.epilogue;
  if (e.keep_bits)
    dz = where_bits(read_bits(e.keep_bits, at, lanes), dz * splat<V>(e.keep_scale), splat<V>(0));
  if (e.activation <= kLeakyRelu) return rectified_grad(a, at, lanes, dz, x, mean, scale, bias);
  V z = (x - mean) * scale + bias;
  if (e.residual) z = z + load(e.residual + at, lanes);
  return dz * derivative(z, e.activation);
}

template <Kind kind, class T, template <class> class Operand>
struct BackwardOperands {
  using V = typename LanesOf<T>::Type;
  const Backward<T>& a;
  Operand<V> mean, scale, bias;
  bool on_bytes;
  INLINE_MEMBER BackwardOperands(const Backward<T>& args, int64_t channel)
      : a(args),
        mean(args.mean, channel),
        scale(args.scale, channel),
        bias(args.bias, channel),
        on_bytes(kind != kPlain && (args.epilogue.sign_bits || args.epilogue.keep_bits)) {}

  template <class L>
  INLINE_MEMBER V dz(int64_t at, int64_t j, L lanes, V x, V m) const {
    const V grad = load(a.grad_output + at, lanes);
    if constexpr (kind == kPlain) return grad;
    if constexpr (kind == kRectifier)
      return rectified_grad(a, at, lanes, grad, x, m, scale.at(j, lanes), bias.at(j, lanes));
    return any_grad(a, at, lanes, grad, x, m, scale.at(j, lanes), bias.at(j, lanes));
  }
};

template <Kind kind, class T>
static void plane_backward_reduce_as(const Backward<T>& a, Planes t, double* sum, double* dot) {
  using V = typename LanesOf<T>::Type;
  constexpr int kSteps = 4;
  D totals[kMaxGroup], products[kMaxGroup];
  for (int64_t c = 0; c < t.channels; ++c) totals[c] = products[c] = splat<D>(0);
  for (int64_t image = 0; image < t.images; ++image) {
    for (int64_t c = 0; c < t.channels; ++c) {
      const BackwardOperands<kind, T, OfPlane> o(a, c);
      const V mean = o.mean.value;
      D total = totals[c], product = products[c];
      const auto step = [&](int64_t at, auto lanes, V& s, V& p) LAMBDA {
        const V x = load(a.input + at, lanes);
        const V dz = keep_lanes(o.dz(at, 0, lanes, x, mean), lanes);
        if (kind != kPlain && a.grad_residual) store(a.grad_residual + at, dz, lanes);
        s = dz;
        p = keep_lanes(dz * (x - mean), lanes);
      };
      const int64_t begin = t.begin + c * t.channel_stride + image * t.image_stride;
      int64_t k = 0;
      V s[kSteps], p[kSteps];
      if (!o.on_bytes || (begin & 7) == 0) {
        for (; k + kSteps * kLanes <= t.length; k += kSteps * kLanes) {
          for (int u = 0; u < kSteps; ++u) step(begin + k + u * kLanes, All{}, s[u], p[u]);
          total = total + widen((s[0] + s[1]) + (s[2] + s[3]));
          product = product + widen((p[0] + p[1]) + (p[2] + p[3]));
        }
      }
      for_span(t.length - k, head_of<T>(begin + k, o.on_bytes, false), [&](int64_t j, auto lanes) LAMBDA {
        step(begin + k + j, lanes, s[0], p[0]);
        total = total + widen(s[0]);
        product = product + widen(p[0]);
      });
      totals[c] = total;
      products[c] = product;
    }
  }
  for (int64_t c = 0; c < t.channels; ++c) {
    sum[c] += sum_lanes(totals[c]);
    dot[c] += sum_lanes(products[c]);
  }
}

template <Kind kind, class T>
static void row_backward_reduce_as(const Backward<T>& a, Rows t, double* sum, double* dot) {
  using V = typename LanesOf<T>::Type;
  constexpr int kSteps = kPlain == kind ? 8 : 4;  // as the registers allow
  const BackwardOperands<kind, T, OfRow> o(a, 0);
  const auto step = [&](int64_t at, int64_t j, auto lanes, V mean, V& s, V& p) LAMBDA {
    const V x = load(a.input + at, lanes);
    s = o.dz(at, j, lanes, x, mean);
    if (kind != kPlain && a.grad_residual) store(a.grad_residual + at, s, lanes);
    p = s * (x - mean);
  };
  const auto add = [&](double* to, int64_t j, V v, auto lanes)
                       LAMBDA { store(to + j, load(to + j, All{}) + widen(keep_lanes(v, lanes)), All{}); };
  int64_t r = 0;
  if (!o.on_bytes || ((t.begin | t.width) & 7) == 0) {
    for (; r + kSteps <= t.rows; r += kSteps) {
      const int64_t begin = t.begin + r * t.width;
      for_span(t.width, 0, [&](int64_t j, auto lanes) LAMBDA {
        const V mean = o.mean.at(j, lanes);
        V s[kSteps], p[kSteps];
        for (int u = 0; u < kSteps; ++u) step(begin + u * t.width + j, j, lanes, mean, s[u], p[u]);
        V total = (s[0] + s[1]) + (s[2] + s[3]), product = (p[0] + p[1]) + (p[2] + p[3]);
        if constexpr (kSteps == 8) {
          total = total + ((s[4] + s[5]) + (s[6] + s[7]));
          product = product + ((p[4] + p[5]) + (p[6] + p[7]));
        }
        add(sum, j, total, lanes);
        add(dot, j, product, lanes);
      });
    }
  }
  for (; r < t.rows; ++r) {
    const int64_t begin = t.begin + r * t.width;
    for_span(t.width, head_of<T>(begin, o.on_bytes, false), [&](int64_t j, auto lanes) LAMBDA {
      V s, p;
      step(begin + j, j, lanes, o.mean.at(j, lanes), s, p);
      add(sum, j, s, lanes);
      add(dot, j, p, lanes);
    });
  }
}

template <Kind kind, class T, template <class> class Operand>
INLINE void backward_input_span(const Backward<T>& a, int64_t begin, int64_t n, int64_t channel) {
  using V = typename LanesOf<T>::Type;
  const BackwardOperands<kind, T, Operand> o(a, channel);
  const Operand<V> dz_mean(a.dz_mean, channel), x_slope(a.x_slope, channel);
  const bool centred = a.batch_statistics;
  for_span(n, head_of<T>(begin, o.on_bytes, a.stream), [&](int64_t i, auto lanes) LAMBDA {
    const int64_t at = begin + i;
    const V mean = o.mean.at(i, lanes);
    V x{}, dz;
    if (centred || kind != kPlain) {
      if (a.input) x = load(a.input + at, lanes);
    }
    dz = o.dz(at, i, lanes, x, mean);
    if (kind != kPlain && a.grad_residual) store(a.grad_residual + at, dz, lanes);
    if (kind != kPlain && !a.grad_input) return;
    if (centred) dz = dz - dz_mean.at(i, lanes) - (x - mean) * x_slope.at(i, lanes);
    const V dx = dz * o.scale.at(i, lanes);
    if (a.stream) {
      stream(a.grad_input + at, dx, lanes);
    } else {
      store(a.grad_input + at, dx, lanes);
    }
  });
}

template <Kind kind, class T>
static void plane_backward_input_as(const Backward<T>& a, Planes t) {
  for (int64_t i = 0; i < t.images; ++i)
    for (int64_t c = 0; c < t.channels; ++c)
      backward_input_span<kind, T, OfPlane>(a, t.begin + i * t.image_stride + c * t.channel_stride, t.length,
                                            c);
}

template <Kind kind, class T>
static void row_backward_input_as(const Backward<T>& a, Rows t) {
  for (int64_t r = 0; r < t.rows; ++r)
    backward_input_span<kind, T, OfRow>(a, t.begin + r * t.width, t.width, 0);
}

// ---- The table ----

#define MODEPROBE_BY_KIND(name, ...)    \
  switch (kind_of(a.epilogue)) {        \
    case kPlain:                        \
      name<kPlain, T>(__VA_ARGS__);     \
      break;                            \
    case kRectifier:                    \
      name<kRectifier, T>(__VA_ARGS__); \
      break;                            \
    default:                            \
      name<kAny, T>(__VA_ARGS__);       \
  }

template <class T>
void plane_normalize(const Normalize<T>& a, Planes t) {
  MODEPROBE_BY_KIND(plane_normalize_as, a, t)
  if (a.stream) fence();
}
template <class T>
void row_normalize(const Normalize<T>& a, Rows t) {
  MODEPROBE_BY_KIND(row_normalize_as, a, t)
  if (a.stream) fence();
}
template <class T>
void plane_backward_reduce(const Backward<T>& a, Planes t, double* sum, double* dot) {
  MODEPROBE_BY_KIND(plane_backward_reduce_as, a, t, sum, dot)
}
template <class T>
void row_backward_reduce(const Backward<T>& a, Rows t, double* sum, double* dot) {
  MODEPROBE_BY_KIND(row_backward_reduce_as, a, t, sum, dot)
}
template <class T>
void plane_backward_input(const Backward<T>& a, Planes t) {
  MODEPROBE_BY_KIND(plane_backward_input_as, a, t)
  if (a.stream) fence();
}
template <class T>
void row_backward_input(const Backward<T>& a, Rows t) {
  MODEPROBE_BY_KIND(row_backward_input_as, a, t)
  if (a.stream) fence();
}
#undef MODEPROBE_BY_KIND

template <class T>
constexpr KernelTable<T> table() {
  return {plane_moments<T>,         row_moments<T>,         plane_normalize<T>,      row_normalize<T>,
          plane_backward_reduce<T>, row_backward_reduce<T>, plane_backward_input<T>, row_backward_input<T>};
}

static constexpr Kernels kKernels = {table<float>(), table<double>(), table<Half>(), table<BFloat>()};
