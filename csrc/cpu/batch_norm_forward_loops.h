// Normalisation and its epilogue; included after batch_norm_loops.h.

// Which epilogue a loop is compiled for; kAny decides at run time.
enum Kind { kPlain, kReluAlone, kAddRelu, kAny };

template <class T>
INLINE Kind kind_of(const Normalize<T>& a) {
  const Epilogue<T>& e = a.epilogue;
  if (e.keep_bits) return kAny;
  if (e.activation == kNone && !e.residual) return kPlain;
  if (e.activation == kRelu && !e.residual && !e.sign_bits) return kReluAlone;
  return e.activation == kRelu && e.residual ? kAddRelu : kAny;
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

INLINE uint32_t read_bits(const uint8_t* bits, int64_t at, Last) {
  return read_bits(bits, at, First{kLanes});
}
INLINE void write_bits(uint8_t* bits, int64_t at, uint32_t word, Last l) {
  const int had = kLanes - l.n;
  write_bits(bits, at + had, word >> had, First{l.n});
}

template <class T, class V, class L>
OUTLINE V any_epilogue(const Epilogue<T>& e, int64_t at, L lanes, V z) {
  if (e.residual) z = z + load(e.residual + at, lanes);
  if (e.sign_bits) write_bits(e.sign_bits, at, positive_bits(z), lanes);
  if (e.activation == kRelu) z = where_not_positive(z, splat<V>(0), z);
  if (e.activation == kLeakyRelu) z = where_not_positive(z, z * splat<V>(e.slope), z);
  if (e.activation > kLeakyRelu) z = activate(z, e.activation);
  if (e.keep_bits) z = where_bits(read_bits(e.keep_bits, at, lanes), z * splat<V>(e.keep_scale), splat<V>(0));
  return z;
}

template <Kind kind, class T, class V, class L>
INLINE void normalize(const Normalize<T>& a, int64_t at, L lanes, V mean, V scale, V bias) {
  V z = (load(a.input + at, lanes) - mean) * scale + bias;
  if constexpr (kind == kAddRelu) {
    z = z + load(a.epilogue.residual + at, lanes);
    if (a.epilogue.sign_bits) write_bits(a.epilogue.sign_bits, at, positive_bits(z), lanes);
  }
  if constexpr (kind == kReluAlone || kind == kAddRelu) z = where_not_positive(z, splat<V>(0), z);
  if constexpr (kind == kAny) z = any_epilogue(a.epilogue, at, lanes, z);
  if (a.stream) {
    stream(a.output + at, z, lanes);
  } else {
    store(a.output + at, z, lanes);
  }
}

template <class T>
INLINE bool on_bytes(const Epilogue<T>& e) {
  return e.sign_bits || e.keep_bits;
}

// The arguments are copied: nothing that is stored could change them, so they stay in registers.
template <Kind kind, class T>
static void plane_normalize_as(const Normalize<T>& args, Planes t) {
  using V = typename LanesOf<T>::Type;
  const Normalize<T> a = args;
  for (int64_t i = 0; i < t.images; ++i)
    for (int64_t c = 0; c < t.channels; ++c) {
      const int64_t begin = t.begin + i * t.image_stride + c * t.channel_stride;
      const V mean = splat<V>(a.mean[c]), scale = splat<V>(a.scale[c]), bias = splat<V>(a.bias[c]);
      const bool bits = kind != kPlain && kind != kReluAlone && on_bytes(a.epilogue);
      for_span(t.length, head_of<T>(begin, bits, a.stream), !bits, [&](int64_t k, auto lanes) LAMBDA {
        normalize<kind>(a, begin + k, lanes, mean, scale, bias);
      });
    }
}

template <Kind kind, class T>
static void row_normalize_as(const Normalize<T>& args, Rows t) {
  using V = typename LanesOf<T>::Type;
  const Normalize<T> a = args;
  for_columns<T>(
      t, on_bytes(a.epilogue), a.stream, [&](int64_t at, int64_t rows, int64_t j, auto lanes) LAMBDA {
        const V mean = operand<V>(a.mean + j), scale = operand<V>(a.scale + j), bias = operand<V>(a.bias + j);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t step = j / kLanes * rows + r;
          prefetch(a.input + at - j, step);
          if (!a.stream) prefetch(a.output + at - j, step);
          if (kind == kAddRelu) prefetch(a.epilogue.residual + at - j, step);
          normalize<kind>(a, at + r * t.width, lanes, mean, scale, bias);
        }
      });
}
