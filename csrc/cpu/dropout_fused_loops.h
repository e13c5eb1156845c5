// Dropout in one pass with its neighbours: bias and residual, softmax. Part of dropout_loops.h.

namespace {

inline bool bit(const uint64_t* bits, int64_t j) { return bits[j >> 6] >> (j & 63) & 1; }

// Calls vector(j, word, k), lane l decided by bit k + l of word, for whole vectors in [0, n) and scalar(j,
// bit) for the rest.
template <int kWidth, class Vector, class Scalar>
inline void with_bits(int64_t n, const uint64_t* bits, Vector vector, Scalar scalar) {
  int64_t j = 0;
  if constexpr (kWidth > 1) {
    for (; j + 64 <= n; j += 64) {
      for (int k = 0; k < 64; k += kWidth) vector(j + k, bits[j >> 6], k);
    }
    for (; j + kWidth <= n; j += kWidth) vector(j, bits[j >> 6] >> (j & 63), 0);
  }
  for (; j < n; ++j) scalar(j, bit(bits, j));
}

template <class T>
void bias_add(const void* x_, const void* bias_, const void* residual_, void* y_, int64_t n,
              const uint64_t* bits, double scale_) {
  using Acc = typename Traits<T>::Acc;
  const T *x = static_cast<const T*>(x_), *residual = static_cast<const T*>(residual_);
  const Acc* bias = static_cast<const Acc*>(bias_);
  T* y = static_cast<T*>(y_);
  const Acc scale = Acc(scale_);
  const auto scales = broadcast(scale), zero = broadcast(Acc(0));
  with_bits<lanes(Acc{})>(
      n, bits,
      [&](int64_t j, uint64_t kept, int k) {
        auto value = load(x + j);
        if (bias) value = value + load(bias + j);
        store(y + j, select(kept, k, value * scales, zero) + load(residual + j));
      },
      [&](int64_t j, bool kept) {
        const Acc value = bias ? Acc(x[j]) + bias[j] : Acc(x[j]);
        y[j] = T((kept ? value * scale : Acc(0)) + Acc(residual[j]));
      });
}

template <class T>
void bias_sum(const void* dy_, void* dx_, void* sums_, int64_t n, const uint64_t* bits, double scale_) {
  using Acc = typename Traits<T>::Acc;
  const T* dy = static_cast<const T*>(dy_);
  T* dx = static_cast<T*>(dx_);
  Acc* sums = static_cast<Acc*>(sums_);
  const Acc scale = Acc(scale_);
  const auto scales = broadcast(scale), zero = broadcast(Acc(0));
  with_bits<lanes(Acc{})>(
      n, bits,
      [&](int64_t j, uint64_t kept, int k) {
        const auto value = select(kept, k, load(dy + j) * scales, zero);
        store(dx + j, value);
        store(sums + j, load(sums + j) + value);
      },
      [&](int64_t j, bool kept) {
        const Acc value = kept ? Acc(dy[j]) * scale : Acc(0);
        dx[j] = T(value);
        sums[j] += value;
      });
}

template <class Acc>
Acc row_max(const Acc* row, int64_t n) {
  constexpr int width = lanes(Acc{});
  Acc highest = -std::numeric_limits<Acc>::infinity();
  int64_t j = 0;
  if (n >= width) {
    auto many = broadcast(highest);
    for (; j + width <= n; j += width) many = maximum(many, load(row + j));
    Acc lane[width];
    store(lane, many);
    for (int k = 0; k < width; ++k) highest = lane[k] > highest ? lane[k] : highest;
  }
  for (; j < n; ++j) highest = row[j] > highest ? row[j] : highest;
  return highest;
}

template <class T>
double softmax_row(const void* scores_, const RowMask& mask, int64_t n, void* buffer) {
  using Acc = typename Traits<T>::Acc;
  constexpr int width = lanes(Acc{});
  constexpr Acc none = -std::numeric_limits<Acc>::infinity();
  const T* scores = static_cast<const T*>(scores_);
  Acc* row = static_cast<Acc*>(buffer);
  int64_t j = 0;
  for (; j + width <= n; j += width) store(row + j, load(scores + j));
  for (; j < n; ++j) row[j] = Acc(scores[j]);
  if (mask.kind == RowMask::kBool) {
    const auto* part = static_cast<const uint8_t*>(mask.data);
    if (mask.stride == 1) {
      for (j = 0; j < n; ++j) row[j] = part[j] ? row[j] : none;
    } else {
      for (j = 0; j < n; ++j) row[j] = part[j * mask.stride] ? row[j] : none;
    }
  } else if (mask.kind == RowMask::kAdd) {
    const T* added = static_cast<const T*>(mask.data);
    j = 0;
    if (mask.stride == 1) {
      for (; j + width <= n; j += width) store(row + j, load(row + j) + load(added + j));
    }
    for (; j < n; ++j) row[j] += Acc(added[j * mask.stride]);
  }
  const Acc highest = row_max(row, n);
  if (highest == none) {
    bool nan = false;
    for (j = 0; j < n; ++j) nan |= row[j] != row[j];
    if (!nan) {
      for (j = 0; j < n; ++j) row[j] = 0;
      return 0.0;
    }
  }
  double sum = 0;  // what a vector's lanes add up to is rounded once, whatever their number
  j = 0;
  if (width > 1 && n >= width) {
    const auto shift = broadcast(highest);
    auto sums = broadcast(Acc(0));
    for (; j + width <= n; j += width) {
      const auto value = exponential(load(row + j) - shift);
      store(row + j, value);
      sums = sums + value;
    }
    Acc lane[width];
    store(lane, sums);
    for (int k = 0; k < width; ++k) sum += lane[k];
  }
  for (; j < n; ++j) sum += row[j] = exponential_of(row[j] - highest);
  return 1.0 / sum;
}

template <class T>
void softmax_drop(const void* buffer, double factor_, void* probabilities_, void* out_, int64_t n,
                  const uint64_t* bits, double scale_) {
  using Acc = typename Traits<T>::Acc;
  const Acc* row = static_cast<const Acc*>(buffer);
  T *probabilities = static_cast<T*>(probabilities_), *out = static_cast<T*>(out_);
  const Acc factor = Acc(factor_), scale = Acc(scale_);
  const auto factors = broadcast(factor), scales = broadcast(scale), zero = broadcast(Acc(0));
  with_bits<lanes(Acc{})>(
      n, bits,
      [&](int64_t j, uint64_t kept, int k) {
        const auto value = load(row + j) * factors;
        if (probabilities) store(probabilities + j, value);
        store(out + j, select(kept, k, value * scales, zero));
      },
      [&](int64_t j, bool kept) {
        const Acc value = row[j] * factor;
        if (probabilities) probabilities[j] = T(value);
        out[j] = T(kept ? value * scale : Acc(0));
      });
}

template <class T>
double softmax_dot(const void* dy_, const void* probabilities_, int64_t n, const uint64_t* bits,
                   double scale_, void* buffer) {
  using Acc = typename Traits<T>::Acc;
  constexpr int width = lanes(Acc{});
  const T *dy = static_cast<const T*>(dy_), *probabilities = static_cast<const T*>(probabilities_);
  Acc* row = static_cast<Acc*>(buffer);
  const Acc scale = Acc(scale_);
  const auto scales = broadcast(scale), zero = broadcast(Acc(0));
  auto dots = zero;
  double dot = 0;
  with_bits<width>(
      n, bits,
      [&](int64_t j, uint64_t kept, int k) {
        const auto value = select(kept, k, load(dy + j) * scales, zero);
        store(row + j, value);
        dots = dots + value * load(probabilities + j);
      },
      [&](int64_t j, bool kept) {
        row[j] = kept ? Acc(dy[j]) * scale : Acc(0);
        dot += double(row[j]) * double(probabilities[j]);
      });
  Acc lane[width];
  store(lane, dots);
  for (int k = 0; k < width; ++k) dot += lane[k];
  return dot;
}

template <class T>
void softmax_grad(const void* buffer, const void* probabilities_, double dot_, void* dx_, int64_t n) {
  using Acc = typename Traits<T>::Acc;
  constexpr int width = lanes(Acc{});
  const Acc* row = static_cast<const Acc*>(buffer);
  const T* probabilities = static_cast<const T*>(probabilities_);
  T* dx = static_cast<T*>(dx_);
  const Acc dot = Acc(dot_);
  const auto dots = broadcast(dot);
  int64_t j = 0;
  for (; j + width <= n; j += width) {
    store(dx + j, load(probabilities + j) * (load(row + j) - dots));
  }
  for (; j < n; ++j) dx[j] = T(Acc(probabilities[j]) * (row[j] - dot));
}

}  // namespace
