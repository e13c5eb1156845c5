// The mask contract for kernels: the eight elements of a chunk decided together, without a division, a
// conversion or a branch per element. Agrees bit for bit with keep() of mask.cuh.
#pragma once

#include "mask.cuh"
#include "vector.cuh"

namespace modeprobe {

// A probability made ready: T = round((1 - p) * 2^32) as the largest kept draw, T - 1, and the scale.
template <typename acc>
struct Rate {
  uint32_t limit;      // T - 1, or 0 where T = 0
  uint32_t hi_pair;    // T >> 16, twice: what both draws of a word are searched for
  uint32_t drops_all;  // T = 0
  acc scale;
};

MODEPROBE_HD uint64_t round_half_even(uint64_t value, int shift) {
  if (shift <= 0) return value << -shift;
  if (shift > 63) return 0;
  const uint64_t half = uint64_t{1} << (shift - 1);
  return (value + (half - 1) + (value >> shift & 1)) >> shift;
}

// 1 - p in units of 2^-53, rounded as float64 rounds it, from the bits of a float64 p clamped to [0, 1]:
// integers only, because float64 arithmetic is 64 times slower than float32 on many GPUs.
MODEPROBE_HD uint64_t keep_probability(uint64_t p_bits) {
  constexpr uint64_t kOne = uint64_t{1} << 53;
  const int exponent = int(p_bits >> 52 & 0x7ff);
  if (p_bits >> 63 || exponent == 0) return kOne;
  if (exponent >= 1023) return 0;
  return kOne - round_half_even((p_bits & (kOne / 2 - 1)) | kOne / 2, 1022 - exponent);
}

// 2^53 / q, correctly rounded but for one in a million q: the remainder of the division corrects it.
template <typename acc>
MODEPROBE_HD acc inverse_keep_probability(uint64_t q) {
  if (q == 0) return acc(0);
  if constexpr (sizeof(acc) == 8) return acc(9007199254740992.0) / acc(q);
  const float rounded = float(q), error = float(int64_t(q - uint64_t(rounded)));
  const float inverse = 1.0f / rounded;
  const float remainder = fmaf(-error, inverse, fmaf(-rounded, inverse, 1.0f));
  return fmaf(inverse, remainder, inverse) * 9007199254740992.0f;
}

template <typename acc>
MODEPROBE_HD Rate<acc> make_rate(uint64_t p_bits, bool scaled) {
  const uint64_t q = keep_probability(p_bits), t = round_half_even(q, 21);
  const uint32_t hi = uint32_t(t >> 16);
  return {t > 0 ? uint32_t(t - 1) : 0, (hi & 0xffffu) | hi << 16, t == 0,
          scaled ? inverse_keep_probability<acc>(q) : acc(1)};
}

// p comes from the host, or from one float64 element on the device, which then no host ever reads.
template <typename acc>
struct RateSource {
  Rate<acc> rate;
  const uint64_t* device_bits;
  bool scaled;
};

template <typename acc>
RateSource<acc> rate_source(double p, const void* p_on_device, bool scaled) {
  uint64_t bits;
  memcpy(&bits, &p, sizeof(bits));
  Rate<acc> rate = make_rate<acc>(bits, scaled);
  if (scaled) rate.scale = p < 1.0 ? acc(1.0 / (1.0 - p)) : acc(0);
  return {rate, static_cast<const uint64_t*>(p_on_device), scaled};
}

template <typename acc>
__device__ __forceinline__ Rate<acc> resolve(const RateSource<acc>& source) {
  return source.device_bits ? make_rate<acc>(*source.device_bits, source.scaled) : source.rate;
}

__device__ __forceinline__ Key load_key(const int64_t* key) { return {uint64_t(key[0]), uint64_t(key[1])}; }

// Whether one of the word's two 16-bit halves is zero (it may also say so of a half that is 1 above a zero).
MODEPROBE_HD uint32_t zero_half(uint32_t word) { return (word - 0x00010001u) & ~word & 0x80008000u; }

// Draws of some chunks as 32-bit numbers, to be compared with a Rate's limit. The 16 bits below a lane's own
// draw can only matter in a tie, and are the tie-breaking draw then. Before that an odd lane carries its
// neighbour's bits there: harmless, since they do not reach a decision that is not a tie.
template <int chunks>
struct Lanes {
  uint32_t draw[chunks * kLanesPerChunk];

  template <typename acc>
  __device__ __forceinline__ bool kept(int lane, const Rate<acc>& rate) const {
    return draw[lane] <= rate.limit;
  }

  // Returns whether the k-th chunk needs break_ties(), as something other than 0.
  template <typename acc>
  __device__ __forceinline__ uint32_t set(int k, const Words& words, const Rate<acc>& rate) {
    uint32_t tie = rate.drops_all;  // every chunk takes the rare path then
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      draw[k * kLanesPerChunk + 2 * i] = words.w[i] << 16;
      draw[k * kLanesPerChunk + 2 * i + 1] = words.w[i];
      tie |= zero_half(words.w[i] ^ rate.hi_pair);
    }
    return tie;
  }

  template <typename acc>
  __device__ __forceinline__ void break_ties(int k, const Words& second, const Rate<acc>& rate) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t &even = draw[k * kLanesPerChunk + 2 * i], &odd = draw[k * kLanesPerChunk + 2 * i + 1];
      even |= rate.drops_all ? ~0u : second.w[i] & 0xffffu;
      odd = rate.drops_all ? ~0u : (odd & 0xffff0000u) | second.w[i] >> 16;
    }
  }
};

// Several chunks at once, `stride` apart: they share the round keys and the test for ties.
template <int chunks, typename acc>
__device__ __forceinline__ Lanes<chunks> decide(Key key, const Rate<acc>& rate, uint64_t chunk,
                                                uint64_t stride = 0) {
  Lanes<chunks> lanes;
  uint32_t tie = 0;
#pragma unroll
  for (int k = 0; k < chunks; ++k)
    tie |= lanes.set(k, chunk_words(key, (chunk + k * stride) & kChunkMask, 0), rate);
  if (__builtin_expect(tie != 0, 0)) {
#pragma unroll
    for (int k = 0; k < chunks; ++k)
      lanes.break_ties(k, chunk_words(key, (chunk + k * stride) & kChunkMask, 1), rate);
  }
  return lanes;
}

// Where a 16-byte packet is half a chunk, a warp takes 32 chunks as two rows of 32 packets, so that each
// access of a lane continues its neighbour's: lane l has half l & 1 of chunk l / 2 of either row. It draws
// for the one of these chunks that paired_chunk() names, and exchanges halves with the lane that draws for
// the other.
__device__ __forceinline__ int paired_chunk(int lane) { return lane / 2 + (lane & 1) * (kWarp / 2); }

__device__ __forceinline__ Words exchange_halves(const Words& own, int lane) {
  const bool odd = lane & 1;
  Words rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? own.w[i] : own.w[i + 2], 1);
    rows.w[i] = odd ? other : own.w[i];
    rows.w[i + 2] = odd ? own.w[i + 2] : other;
  }
  return rows;
}

// The four decisions of the first row, then those of the second. For whole warps; `chunk` is the one that the
// lane draws for.
template <typename acc>
__device__ __forceinline__ Lanes<1> decide_paired(Key key, const Rate<acc>& rate, uint64_t chunk, int lane) {
  Lanes<1> lanes;
  const uint32_t tie = lanes.set(0, exchange_halves(chunk_words(key, chunk & kChunkMask, 0), lane), rate);
  if (__builtin_expect(__any_sync(~0u, tie != 0), 0))
    lanes.break_ties(0, exchange_halves(chunk_words(key, chunk & kChunkMask, 1), lane), rate);
  return lanes;
}

// The decisions of one chunk, bit k for element 8 * chunk + k.
template <typename acc>
__device__ __forceinline__ uint32_t keep_byte(Key key, const Rate<acc>& rate, uint64_t chunk) {
  const auto lanes = decide<1>(key, rate, chunk);
  uint32_t bits = 0;
#pragma unroll
  for (int lane = 0; lane < kLanesPerChunk; ++lane) bits |= uint32_t(lanes.kept(lane, rate)) << lane;
  return bits;
}

// The decisions of eight elements from i on, which may reach into the next chunk.
template <typename acc>
__device__ __forceinline__ uint32_t keep_bits_from(Key key, const Rate<acc>& rate, uint64_t i) {
  const int lane = int(i % kLanesPerChunk);
  uint32_t bits = keep_byte(key, rate, i / kLanesPerChunk) >> lane;
  if (lane) bits |= keep_byte(key, rate, i / kLanesPerChunk + 1) << (kLanesPerChunk - lane);
  return bits;
}

}  // namespace modeprobe
