// The dropout kernels of one instruction set, as a table. Every table decides the same bits.
//
// Drawing and applying are apart: the decisions of a tile go to a few hundred bytes on the stack, one bit per
// element, and every operation of the family reads them from there.
#pragma once

#include <cstdint>

#include "modeprobe/mask.cuh"

namespace modeprobe::cpu {

enum Dtype { kFloat, kDouble, kHalf, kBFloat16, kDtypes };

// y = keep ? scale * x + shift : fill.
struct Affine {
  double scale, shift, fill;
};

// One row of an attention mask: bool (false takes no part) or of the scores' type (added).
struct RowMask {
  enum Kind { kNone, kBool, kAdd } kind;
  const void* data;
  int64_t stride;
};

// Memory that the elements under a mask are read from or written to; null: none. Drawing leaves the memory
// idle, so it may ask for the lines that will be wanted next, a few at a time: asked for all at once, they
// are waited for.
struct Ahead {
  const char* at[3] = {};
  int64_t step = 0;  // bytes of 64 elements

  Ahead from(int64_t word) const {
    Ahead later = *this;
    for (const char*& p : later.at) p = p ? p + word * step : p;
    return later;
  }
};

struct DropoutKernels {
  // Bit j of bits[w] = keep(8 * chunk + 64 * w + j). Wants 0 < 2^16 * hi + lo and hi < 2^16.
  void (*draw)(Key key, Threshold t, uint64_t chunk, int64_t words, uint64_t* bits, const Ahead& ahead);

  // scale: y = keep ? scale * x : +0. affine: all three numbers.
  using Apply = void (*)(const void* x, void* y, int64_t n, const uint64_t* bits, Affine affine);
  Apply scale[kDtypes];
  Apply affine[kDtypes];

  // y = scale * x, and y = 0 for a null x: past the caches, without reading what it overwrites. Wants drain()
  // before another thread reads.
  using Stream = void (*)(const void* x, void* y, int64_t n, double scale);
  Stream stream[kDtypes];

  // out[j] = bit j, as bool.
  void (*expand)(const uint64_t* bits, int64_t n, uint8_t* out);

  // In what follows acc is float, for double data double; buffers and sums are of this type.

  // y = residual + (keep ? scale * (x + bias) : 0), rounded once. bias: acc, or null.
  using BiasAdd = void (*)(const void* x, const void* bias, const void* residual, void* y, int64_t n,
                           const uint64_t* bits, double scale);
  BiasAdd bias_add[kDtypes];
  // dx = keep ? scale * dy : 0 and sums += dx, before rounding.
  using BiasSum = void (*)(const void* dy, void* dx, void* sums, int64_t n, const uint64_t* bits,
                           double scale);
  BiasSum bias_sum[kDtypes];

  // buffer = exp(s - max(s)), s = scores + mask; returns 1 / sum(buffer), or 0 if all of s is -inf.
  using SoftmaxRow = double (*)(const void* scores, const RowMask& mask, int64_t n, void* buffer);
  SoftmaxRow softmax_row[kDtypes];
  // probabilities (may be null) = factor * buffer, out = keep ? scale * factor * buffer : +0.
  using SoftmaxDrop = void (*)(const void* buffer, double factor, void* probabilities, void* out, int64_t n,
                               const uint64_t* bits, double scale);
  SoftmaxDrop softmax_drop[kDtypes];
  // buffer = d = keep ? scale * dy : 0; returns sum(d * probabilities).
  using SoftmaxDot = double (*)(const void* dy, const void* probabilities, int64_t n, const uint64_t* bits,
                                double scale, void* buffer);
  SoftmaxDot softmax_dot[kDtypes];
  // dx = probabilities * (buffer - dot).
  using SoftmaxGrad = void (*)(const void* buffer, const void* probabilities, double dot, void* dx,
                               int64_t n);
  SoftmaxGrad softmax_grad[kDtypes];
};

extern const DropoutKernels kDropoutPortable;
#if defined(__x86_64__)
extern const DropoutKernels kDropoutAvx2, kDropoutAvx512;
#endif

// The table that capability() asks for.
const DropoutKernels& dropout_kernels();

// The bits of `ties` (draws equal to t.hi, at 8 * chunk + j) that the second draw keeps. One element in
// 65,536.
uint64_t break_ties(Key key, Threshold t, uint64_t chunk, uint64_t ties);

// exp() compiled for any processor, for what is left over by vectors.
float exponential_of(float x);
double exponential_of(double x);

constexpr float kInverseLn2 = 1.44269504088896341f, kLn2High = 0.693145751953125f,
                kLn2Low = 1.42860682030941723e-6f;
constexpr float kExpTaylor[8] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};

constexpr int kTile = 4096;  // elements whose decisions are drawn at a time
constexpr int kTileWords = kTile / 64;

// Bit j of bits[w] = keep(first + 64 * w + j) for the n <= kTile elements from `first`, which need not begin
// a chunk; indices wrap at 2^64. bits has kTileWords + 1 words.
void draw_tile(const DropoutKernels& kernels, Key key, Threshold t, uint64_t first, int64_t n, uint64_t* bits,
               const Ahead& ahead = {});

// out bit j = bit from + j of bits, for j < n; bits has a word beyond the last that is read.
inline void copy_bits(const uint64_t* bits, int64_t from, int64_t n, uint64_t* out) {
  const int shift = int(from & 63);
  const uint64_t* word = bits + (from >> 6);
  for (int64_t w = 0; w < (n + 63) / 64; ++w) {
    out[w] = shift == 0 ? word[w] : word[w] >> shift | word[w + 1] << (64 - shift);
  }
}

}  // namespace modeprobe::cpu
