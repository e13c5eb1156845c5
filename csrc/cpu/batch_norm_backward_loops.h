// Both halves of the backward pass; included after batch_norm_forward_loops.h.

// With sign bits the residual does not matter any more.
template <class T>
INLINE Kind kind_of(const Backward<T>& a) {
  const Epilogue<T>& e = a.epilogue;
  if (e.keep_bits) return kAny;
  if (e.activation == kNone) return kPlain;
  if (e.activation == kRelu && e.sign_bits) return kAddRelu;
  return e.activation == kRelu && !e.residual ? kReluAlone : kAny;
}

// dz, the gradient of z + residual, from the gradient of the output.
template <class T, class V, class L>
OUTLINE V any_grad(const Epilogue<T>& e, int64_t at, L lanes, V dz, V x, V mean, V scale, V bias) {
  if (e.keep_bits)
    dz = where_bits(read_bits(e.keep_bits, at, lanes), dz * splat<V>(e.keep_scale), splat<V>(0));
  if (e.activation == kNone) return dz;
  const V below = e.activation == kRelu ? splat<V>(0) : dz * splat<V>(e.slope);
  if (e.sign_bits) return where_bits(read_bits(e.sign_bits, at, lanes), dz, below);
  V z = (x - mean) * scale + bias;
  if (e.residual) z = z + load(e.residual + at, lanes);
  return e.activation > kLeakyRelu ? dz * derivative(z, e.activation) : where_not_positive(z, below, dz);
}

template <Kind kind, class T, class V, class L>
INLINE V grad_of_z(const Backward<T>& a, int64_t at, L lanes, V x, V mean, V scale, V bias) {
  const V grad = load(a.grad_output + at, lanes);
  if constexpr (kind == kPlain) return grad;
  if constexpr (kind == kReluAlone) return where_not_positive((x - mean) * scale + bias, splat<V>(0), grad);
  if constexpr (kind == kAddRelu)
    return where_bits(read_bits(a.epilogue.sign_bits, at, lanes), grad, splat<V>(0));
  return any_grad(a.epilogue, at, lanes, grad, x, mean, scale, bias);
}

template <class V>
INLINE V tree4(const V* v) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}

template <Kind kind, class T>
static void plane_backward_reduce_as(const Backward<T>& args, Planes t, double* sum, double* dot) {
  using V = typename LanesOf<T>::Type;
  constexpr int kMeet = 4;
  const Backward<T> a = args;
  const int64_t ahead = next_image(t);
  D totals[kMaxGroup], products[kMaxGroup];
  for (int64_t c = 0; c < t.channels; ++c) totals[c] = products[c] = splat<D>(0);
  for (int64_t image = 0; image < t.images; ++image) {
    for (int64_t c = 0; c < t.channels; ++c) {
      const V mean = splat<V>(a.mean[c]), scale = splat<V>(a.scale[c]), bias = splat<V>(a.bias[c]);
      const int64_t begin = t.begin + c * t.channel_stride + image * t.image_stride;
      const auto step = [&](int64_t at, auto lanes, V& s, V& p) LAMBDA {
        const V x = load(a.input + at, lanes);
        __builtin_prefetch(a.input + at + ahead);
        __builtin_prefetch(a.grad_output + at + ahead);
        s = grad_of_z<kind>(a, at, lanes, x, mean, scale, bias);
        if (kind != kPlain && a.grad_residual) store(a.grad_residual + at, s, lanes);
        p = s * (x - mean);
      };
      D total = totals[c], product = products[c];
      V rest = splat<V>(0), rest_product = rest;
      const int64_t head = head_of<T>(begin, on_bytes(a.epilogue), false);
      const auto one = [&](int64_t k, auto lanes) LAMBDA {
        V s, p;
        step(begin + k, lanes, s, p);
        rest = rest + keep_lanes(s, lanes);
        rest_product = rest_product + keep_lanes(p, lanes);
      };
      int64_t k = head < t.length ? head : t.length;
      if (k > 0) one(0, First{int(k)});
      for (; k + kMeet * kLanes <= t.length; k += kMeet * kLanes) {
        V s[kMeet], p[kMeet];
#pragma GCC unroll 8
        for (int u = 0; u < kMeet; ++u) step(begin + k + u * kLanes, All{}, s[u], p[u]);
        total = total + widen(tree4(s));
        product = product + widen(tree4(p));
      }
      for (; k + kLanes <= t.length; k += kLanes) one(k, All{});
      if (k < t.length && t.length >= kLanes) {
        one(t.length - kLanes, Last{int(t.length - k)});
      } else if (k < t.length) {
        one(k, First{int(t.length - k)});
      }
      totals[c] = total + widen(rest);
      products[c] = product + widen(rest_product);
    }
  }
  for (int64_t c = 0; c < t.channels; ++c) {
    sum[c] += sum_lanes(totals[c]);
    dot[c] += sum_lanes(products[c]);
  }
}

template <Kind kind, class T>
static void row_backward_reduce_as(const Backward<T>& args, Rows t, double* sum, double* dot) {
  using V = typename LanesOf<T>::Type;
  constexpr int kMeet = kind == kPlain ? 8 : 4;  // as the registers allow
  const Backward<T> a = args;
  const auto add = [&](double* to, V v, auto lanes)
                       LAMBDA { store(to, load(to, All{}) + widen(keep_lanes(v, lanes)), All{}); };
  for_columns<T>(t, on_bytes(a.epilogue), false, [&](int64_t at, int64_t rows, int64_t j, auto lanes) LAMBDA {
    const V mean = operand<V>(a.mean + j);
    const auto step = [&](int64_t r, V& s, V& p) LAMBDA {
      const int64_t to = at + r * t.width;
      const int64_t index = j / kLanes * rows + r;
      prefetch(a.input + at - j, index);
      prefetch(a.grad_output + at - j, index);
      if (kind != kPlain && a.grad_residual) prefetch(a.grad_residual + at - j, index);
      const V x = load(a.input + to, lanes);
      s = grad_of_z<kind>(a, to, lanes, x, mean, operand<V>(a.scale + j), operand<V>(a.bias + j));
      if (kind != kPlain && a.grad_residual) store(a.grad_residual + to, s, lanes);
      p = s * (x - mean);
    };
    int64_t r = 0;
    for (; r + kMeet <= rows; r += kMeet) {
      V s[kMeet], p[kMeet];
#pragma GCC unroll 8
      for (int u = 0; u < kMeet; ++u) step(r + u, s[u], p[u]);
      V total = tree4(s), product = tree4(p);
      if constexpr (kMeet == 8) {
        total = total + tree4(s + 4);
        product = product + tree4(p + 4);
      }
      add(sum + j, total, lanes);
      add(dot + j, product, lanes);
    }
    if (r == rows) return;
    V total = splat<V>(0), product = total;
    for (; r < rows; ++r) {
      V s, p;
      step(r, s, p);
      total = total + s;
      product = product + p;
    }
    add(sum + j, total, lanes);
    add(dot + j, product, lanes);
  });
}

template <Kind kind, class T, class V, class L>
INLINE void backward_input(const Backward<T>& a, int64_t at, L lanes, V mean, V scale, V bias, V dz_mean,
                           V x_slope) {
  V x{};
  if ((kind != kPlain || a.batch_statistics) && a.input) x = load(a.input + at, lanes);
  V dz = grad_of_z<kind>(a, at, lanes, x, mean, scale, bias);
  if (kind != kPlain && a.grad_residual) store(a.grad_residual + at, dz, lanes);
  if (kind != kPlain && !a.grad_input) return;
  if (a.batch_statistics) dz = dz - dz_mean - (x - mean) * x_slope;
  const V dx = dz * scale;
  if (a.stream) {
    stream(a.grad_input + at, dx, lanes);
  } else {
    store(a.grad_input + at, dx, lanes);
  }
}

template <Kind kind, class T>
static void plane_backward_input_as(const Backward<T>& args, Planes t) {
  using V = typename LanesOf<T>::Type;
  const Backward<T> a = args;
  for (int64_t i = 0; i < t.images; ++i)
    for (int64_t c = 0; c < t.channels; ++c) {
      const int64_t begin = t.begin + i * t.image_stride + c * t.channel_stride;
      const V mean = splat<V>(a.mean[c]), scale = splat<V>(a.scale[c]), bias = splat<V>(a.bias[c]),
              dz_mean = splat<V>(a.dz_mean[c]), x_slope = splat<V>(a.x_slope[c]);
      const bool bits = kind != kPlain && kind != kReluAlone && on_bytes(a.epilogue);
      for_span(t.length, head_of<T>(begin, bits, a.stream), !bits, [&](int64_t k, auto lanes) LAMBDA {
        backward_input<kind>(a, begin + k, lanes, mean, scale, bias, dz_mean, x_slope);
      });
    }
}

template <Kind kind, class T>
static void row_backward_input_as(const Backward<T>& args, Rows t) {
  using V = typename LanesOf<T>::Type;
  const Backward<T> a = args;
  for_columns<T>(
      t, on_bytes(a.epilogue), a.stream, [&](int64_t at, int64_t rows, int64_t j, auto lanes) LAMBDA {
        const V mean = operand<V>(a.mean + j), scale = operand<V>(a.scale + j), bias = operand<V>(a.bias + j),
                dz_mean = operand<V>(a.dz_mean + j), x_slope = operand<V>(a.x_slope + j);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t step = j / kLanes * rows + r;
          prefetch(a.input + at - j, step);
          prefetch(a.grad_output + at - j, step);
          if (!a.stream) prefetch(a.grad_input + at - j, step);
          backward_input<kind>(a, at + r * t.width, lanes, mean, scale, bias, dz_mean, x_slope);
        }
      });
}
