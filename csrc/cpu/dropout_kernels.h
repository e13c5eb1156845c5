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

struct DropoutKernels {
  // Bit j of bits[w] = keep(8 * chunk + 64 * w + j). Wants 0 < 2^16 * hi + lo and hi < 2^16.
  void (*draw)(Key key, Threshold t, uint64_t chunk, int64_t words, uint64_t* bits);

  // scale: y = keep ? scale * x : +0. affine: all three numbers. stream: y will not be read again soon.
  using Apply = void (*)(const void* x, void* y, int64_t n, const uint64_t* bits, Affine affine, bool stream);
  Apply scale[kDtypes];
  Apply affine[kDtypes];

  // out[j] = bit j, as bool.
  void (*expand)(const uint64_t* bits, int64_t n, uint8_t* out);
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

constexpr int kTile = 4096;  // elements whose decisions are drawn at a time
constexpr int kTileWords = kTile / 64;

// Bit j of bits[w] = keep(first + 64 * w + j) for the n <= kTile elements from `first`, which need not begin
// a chunk; indices wrap at 2^64. bits has kTileWords + 1 words.
void draw_tile(const DropoutKernels& kernels, Key key, Threshold t, uint64_t first, int64_t n,
               uint64_t* bits);

}  // namespace modeprobe::cpu
