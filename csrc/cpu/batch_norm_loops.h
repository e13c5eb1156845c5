// What the loops of batch_norm_kernels.h share, and its moments; included inside an instruction-set
// namespace, after lanes.h.

constexpr int kUnroll = 8;
constexpr int64_t kRowBlock = 2048;  // elements of a block of rows that is walked column by column

// Calls body(i, lanes) over [0, n) in steps of at most 16, full ones from `head` on. With `again` the last
// step may begin early and repeat elements, which is cheaper than a partial one.
template <class Body>
INLINE void for_span(int64_t n, int64_t head, bool again, const Body& body) {
  int64_t i = 0;
  if (head > 0) {
    i = head < n ? head : n;
    for (int64_t from = 0; from < i; from += kLanes)
      body(from, First{int(i - from < kLanes ? i - from : kLanes)});
  }
  for (; i + kLanes <= n; i += kLanes) body(i, All{});
  if (i == n) return;
  if (again && n >= kLanes) {
    body(n - kLanes, Last{int(n - i)});
  } else {
    body(i, First{int(n - i)});
  }
}

// Where full steps over elements from `begin` may start: on a byte of the bits, on a line of streamed memory.
template <class T>
INLINE int64_t head_of(int64_t begin, bool on_bytes, bool on_lines) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  return on_lines ? -begin & (kLine - 1) : on_bytes ? -begin & 7 : 0;
}

// Calls column(at, rows, j, lanes) for sixteen columns of a block of rows at a time, so that their
// operands stay in registers. Rows of which not all may start a full step go one by one.
template <class T, class Column>
INLINE void for_columns(Rows t, bool on_bytes, bool on_lines, const Column& column) {
  const bool together =
      head_of<T>(t.begin, on_bytes, on_lines) == 0 && head_of<T>(t.width, on_bytes, on_lines) == 0;
  const int64_t block = together && t.width < kRowBlock ? kRowBlock / t.width : 1;
  for (int64_t r = 0; r < t.rows; r += block) {
    const int64_t rows = t.rows - r < block ? t.rows - r : block;
    for_span(t.width, head_of<T>(t.begin + r * t.width, on_bytes, on_lines), false,
             [&](int64_t j, auto lanes) LAMBDA { column(t.begin + r * t.width + j, rows, j, lanes); });
  }
}

// The next block in the order of memory, one line a step: hardware does not foresee a walk by columns.
template <class T>
INLINE void prefetch(const T* block, int64_t step) {
  __builtin_prefetch(block + kRowBlock + step * kLanes);
}

// ---- Sums: eight vectors meet in float, then go into double, so that rounding errors do not pile up ----

template <class V>
INLINE V tree(const V* v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Adds map(i, lanes) over [0, n); what it gives for lanes past the end does not count.
template <class V, class Map>
INLINE D add_span(int64_t n, D sum, const Map& map) {
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    V v[kUnroll];
#pragma GCC unroll 8
    for (int k = 0; k < kUnroll; ++k) v[k] = map(i + k * kLanes, All{});
    sum = sum + widen(tree(v));
  }
  if (i == n) return sum;
  V rest = splat<V>(0);
  for (; i + kLanes <= n; i += kLanes) rest = rest + map(i, All{});
  if (i < n && n >= kLanes) {
    rest = rest + keep_lanes(map(n - kLanes, All{}), Last{int(n - i)});
  } else if (i < n) {
    const First some{int(n - i)};
    rest = rest + keep_lanes(map(i, some), some);
  }
  return sum + widen(rest);
}

template <class V>
INLINE V square(V v) {
  return v * v;
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

// ---- Moments ----

// How far ahead the next image of the tile is: runs are too short for hardware to foresee the next one.
INLINE int64_t next_image(const Planes& t) { return t.images > 1 ? t.image_stride : 0; }

// Images outside, channels inside: neighbouring channels are one run of memory.
template <class T>
void plane_moments(const T* input, Planes t, double* mean, double* m2) {
  using V = typename LanesOf<T>::Type;
  using A = typename V::Scalar;
  const double n = double(t.images * t.length);
  const T* x = input + t.begin;
  D sums[kMaxGroup];
  for (int64_t c = 0; c < t.channels; ++c) sums[c] = splat<D>(0);
  const int64_t ahead = next_image(t);
  for (int64_t i = 0; i < t.images; ++i)
    for (int64_t c = 0; c < t.channels; ++c) {
      const T* run = x + i * t.image_stride + c * t.channel_stride;
      sums[c] = add_span<V>(t.length, sums[c], [&](int64_t k, auto lanes) LAMBDA {
        __builtin_prefetch(run + k + ahead);
        return load(run + k, lanes);
      });
    }
  A near[kMaxGroup];
  for (int64_t c = 0; c < t.channels; ++c) {
    mean[c] = sum_lanes(sums[c]) / n;
    near[c] = A(mean[c]);
    sums[c] = splat<D>(0);
  }
  for (int64_t i = 0; i < t.images; ++i)
    for (int64_t c = 0; c < t.channels; ++c) {
      const T* run = x + i * t.image_stride + c * t.channel_stride;
      const V centre = splat<V>(near[c]);
      sums[c] = add_span<V>(t.length, sums[c], [&](int64_t k, auto lanes) LAMBDA {
        return square(load(run + k, lanes) - centre);
      });
    }
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
    for_span(width, 0, false, [&](int64_t j, auto lanes) LAMBDA {
      V v[kUnroll];
#pragma GCC unroll 8
      for (int k = 0; k < kUnroll; ++k) v[k] = f(load(base + k * width + j, lanes), j);
      store(sum + j, load(sum + j, All{}) + widen(tree(v)), All{});
    });
  }
  for (; r < rows; ++r) {
    const T* base = x + r * width;
    for_span(width, 0, false, [&](int64_t j, auto lanes) LAMBDA {
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
  add_rows(x, t.rows, t.width, m2, [&](V v, int64_t j) LAMBDA { return square(v - operand<V>(near + j)); });
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
