// The loops of every instruction set, written once on its vectors; included by
// dropout_{avx512,avx2,portable}.cpp inside their target region, after load(), store(), store_past(),
// broadcast() and select(). All of it has internal linkage: a function that may hold AVX-512 code must never
// be the copy that the linker keeps for another file.

namespace {

template <class T>
struct Traits {
  using Acc = float;
};
template <>
struct Traits<double> {
  using Acc = double;
};

// 64 elements. An instruction set may have a better one for a T.
template <bool kShift, class T, class Vector>
inline void apply_word(const T* x, T* y, uint64_t kept, Vector scale, Vector shift, Vector fill) {
  for (int j = 0; j < 64; j += lanes(typename Traits<T>::Acc{})) {
    auto value = load(x + j) * scale;
    if constexpr (kShift) value = value + shift;
    store(y + j, select(kept, j, value, fill));
  }
}

template <class T, bool kShift>
void apply(const void* from, void* to, int64_t n, const uint64_t* bits, Affine affine) {
  using Acc = typename Traits<T>::Acc;
  const T* x = static_cast<const T*>(from);
  T* y = static_cast<T*>(to);
  const int64_t words = n / 64;
  const Acc scale = Acc(affine.scale), shift = Acc(affine.shift), fill = kShift ? Acc(affine.fill) : Acc(0);
  const auto scales = broadcast(scale), shifts = broadcast(shift), fills = broadcast(fill);
  for (int64_t w = 0; w < words; ++w) {
    apply_word<kShift>(x + 64 * w, y + 64 * w, bits[w], scales, shifts, fills);
  }
  for (int64_t j = 64 * words; j < n; ++j) {
    const bool kept = bits[j >> 6] >> (j & 63) & 1;
    Acc value = Acc(x[j]) * scale;
    if constexpr (kShift) value = value + shift;
    y[j] = T(kept ? value : fill);
  }
}

template <class T>
void apply_scale(const void* x, void* y, int64_t n, const uint64_t* bits, Affine affine) {
  apply<T, false>(x, y, n, bits, affine);
}

template <class T>
void apply_affine(const void* x, void* y, int64_t n, const uint64_t* bits, Affine affine) {
  apply<T, true>(x, y, n, bits, affine);
}

template <class T>
void stream(const void* from, void* to, int64_t n, double factor) {
  using Acc = typename Traits<T>::Acc;
  constexpr int width = lanes(Acc{});
  constexpr int64_t ahead = 512;  // bytes; a hint that does not fill the outer caches
  const T* x = static_cast<const T*>(from);
  T* y = static_cast<T*>(to);
  const Acc scale = Acc(factor);
  const auto scales = broadcast(scale), zero = broadcast(Acc(0));
  const auto one = [&](int64_t j) { y[j] = x ? T(Acc(x[j]) * scale) : T(0.0f); };
  int64_t j = 0;
  for (; j < n && reinterpret_cast<uintptr_t>(y + j) % 64 != 0; ++j) one(j);
  constexpr int64_t line = 64 / sizeof(T);
  for (; j + line <= n; j += line) {
    if (x) __builtin_prefetch(reinterpret_cast<const char*>(x + j) + ahead, 0, 0);
    for (int k = 0; k < line; k += width) store_past(y + j + k, x ? load(x + j + k) * scales : zero);
  }
  for (; j < n; ++j) one(j);
}

void expand(const uint64_t* bits, int64_t n, uint8_t* out) {
  constexpr uint64_t ones = 0x0101010101010101u;
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    // Byte k gets bit k; adding 127 brings it to the top, whichever it is.
    const uint64_t each = (bits[j >> 6] >> (j & 63) & 0xff) * ones & 0x8040201008040201u;
    const uint64_t bytes = (each + 127 * ones) >> 7 & ones;
    std::memcpy(out + j, &bytes, 8);
  }
  for (; j < n; ++j) out[j] = bits[j >> 6] >> (j & 63) & 1;
}

}  // namespace

#include "dropout_fused_loops.h"

#define MODEPROBE_EACH_DTYPE(f) {f<float>, f<double>, f<c10::Half>, f<c10::BFloat16>}
#define MODEPROBE_DROPOUT_TABLE        \
  {draw,                               \
   MODEPROBE_EACH_DTYPE(apply_scale),  \
   MODEPROBE_EACH_DTYPE(apply_affine), \
   MODEPROBE_EACH_DTYPE(stream),       \
   expand,                             \
   MODEPROBE_EACH_DTYPE(bias_add),     \
   MODEPROBE_EACH_DTYPE(bias_sum),     \
   MODEPROBE_EACH_DTYPE(softmax_row),  \
   MODEPROBE_EACH_DTYPE(softmax_drop), \
   MODEPROBE_EACH_DTYPE(softmax_dot),  \
   MODEPROBE_EACH_DTYPE(softmax_grad)}
