// The loops of every instruction set, written once on its vectors; included by
// dropout_{avx512,avx2,portable}.cpp inside their target region, after load(), store(), broadcast() and
// select(). All of it has internal linkage: a function that may hold AVX-512 code must never be the copy that
// the linker keeps for another file.

namespace {

template <class T>
struct Traits {
  using Acc = float;
};
template <>
struct Traits<double> {
  using Acc = double;
};

template <class T, bool kShift>
void apply_words(const T* x, T* y, int64_t words, const uint64_t* bits, Affine affine) {
  using Acc = typename Traits<T>::Acc;
  constexpr int width = lanes(Acc{});
  const auto scale = broadcast(Acc(affine.scale)), shift = broadcast(Acc(affine.shift)),
             fill = broadcast(Acc(affine.fill));
  for (int64_t w = 0; w < words; ++w) {
    const uint64_t kept = bits[w];
    for (int j = 0; j < 64; j += width) {
      auto value = load(x + 64 * w + j) * scale;
      if constexpr (kShift) value = value + shift;
      store(y + 64 * w + j, select(kept >> j, value, fill));
    }
  }
}

template <class T, bool kShift>
void apply(const void* from, void* to, int64_t n, const uint64_t* bits, Affine affine) {
  using Acc = typename Traits<T>::Acc;
  const T* x = static_cast<const T*>(from);
  T* y = static_cast<T*>(to);
  const int64_t words = n / 64;
  apply_words<T, kShift>(x, y, words, bits, affine);
  const Acc scale = Acc(affine.scale), shift = Acc(affine.shift), fill = Acc(affine.fill);
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

void expand(const uint64_t* bits, int64_t n, uint8_t* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = bits[j >> 6] >> (j & 63) & 1;
}

}  // namespace

#include "dropout_fused_loops.h"

#define MODEPROBE_EACH_DTYPE(f) {f<float>, f<double>, f<c10::Half>, f<c10::BFloat16>}
#define MODEPROBE_DROPOUT_TABLE        \
  {draw,                               \
   MODEPROBE_EACH_DTYPE(apply_scale),  \
   MODEPROBE_EACH_DTYPE(apply_affine), \
   expand,                             \
   MODEPROBE_EACH_DTYPE(bias_add),     \
   MODEPROBE_EACH_DTYPE(bias_sum),     \
   MODEPROBE_EACH_DTYPE(softmax_row),  \
   MODEPROBE_EACH_DTYPE(softmax_drop), \
   MODEPROBE_EACH_DTYPE(softmax_dot),  \
   MODEPROBE_EACH_DTYPE(softmax_grad)}
