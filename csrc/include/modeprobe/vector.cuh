// 16-byte access to global memory, and the type that arithmetic on a storage type is done in.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace modeprobe {

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

constexpr int kPacketBytes = 16;

// Elements of T in one 16-byte access.
template <typename T>
constexpr int kPacket = kPacketBytes / int(sizeof(T));

struct Packet {
  uint32_t w[4];
};

template <typename To, typename From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kPacketBytes == 0;
}

__device__ __forceinline__ Packet load_packet(const void* from) {
  MODEPROBE_CHECK_ALIGNED(from, kPacketBytes);
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ void store_packet(void* to, Packet packet) {
  MODEPROBE_CHECK_ALIGNED(to, kPacketBytes);
  // The intrinsic, because nvcc takes a plain assignment apart into four narrow stores.
  __stwb(static_cast<uint4*>(to), make_uint4(packet.w[0], packet.w[1], packet.w[2], packet.w[3]));
}

// From global into shared memory, past the registers. Copies form groups, in the order of the calls; waiting
// makes a group visible to the thread that asked for it, and to no other. Past L1, too, unless a neighbouring
// packet is copied next: the 32 bytes that the two share would be fetched twice.
template <bool with_neighbour>
__device__ __forceinline__ void copy_packet_async(Packet* shared, const void* from) {
  MODEPROBE_CHECK_ALIGNED(from, kPacketBytes);
  MODEPROBE_CHECK_ALIGNED(shared, kPacketBytes);
#if defined(__CUDA_ARCH__)
  if constexpr (with_neighbour) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(__cvta_generic_to_global(from))
                 : "memory");
    return;
  }
#endif
  __pipeline_memcpy_async(shared, from, kPacketBytes);
}
__device__ __forceinline__ void end_copy_group() { __pipeline_commit(); }

// For all of the thread's groups but the last `pending`.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_wait_prior(pending);
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(acc_t<T> x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double narrow<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// kPacket<T> elements of a packet, in the accumulate type.
template <typename T>
__device__ __forceinline__ void unpack(Packet packet, acc_t<T>* out) {
  if constexpr (sizeof(T) == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      out[i] = bits_as<double>(uint64_t{packet.w[2 * i + 1]} << 32 | packet.w[2 * i]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = bits_as<float>(packet.w[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = widen(bits_as<T>(uint16_t(packet.w[i])));
      out[2 * i + 1] = widen(bits_as<T>(uint16_t(packet.w[i] >> 16)));
    }
  }
}

// bfloat16 is the upper half of a float32: a shift and a mask, no conversion.
template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(Packet packet, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = bits_as<float>(packet.w[i] << 16);
    out[2 * i + 1] = bits_as<float>(packet.w[i] & 0xffff0000u);
  }
}

// Rounds to nearest even; narrow types are converted two at a time.
template <typename T>
__device__ __forceinline__ Packet pack(const acc_t<T>* in) {
  Packet packet;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 8)
      packet.w[i] = uint32_t(bits_as<uint64_t>(in[i / 2]) >> (32 * (i & 1)));
    else if constexpr (sizeof(T) == 4)
      packet.w[i] = bits_as<uint32_t>(in[i]);
    else if constexpr (std::is_same_v<T, __half>)
      packet.w[i] = bits_as<uint32_t>(__floats2half2_rn(in[2 * i], in[2 * i + 1]));
    else
      packet.w[i] = bits_as<uint32_t>(__floats2bfloat162_rn(in[2 * i], in[2 * i + 1]));
  }
  return packet;
}

// `count` elements (a multiple of a packet) at a 16-byte aligned address.
template <typename T, int count>
__device__ __forceinline__ void load_elements(const T* from, acc_t<T>* out) {
  static_assert(count % kPacket<T> == 0);
  Packet packets[count / kPacket<T>];
#pragma unroll
  for (int i = 0; i < count / kPacket<T>; ++i) packets[i] = load_packet(from + i * kPacket<T>);
#pragma unroll
  for (int i = 0; i < count / kPacket<T>; ++i) unpack<T>(packets[i], out + i * kPacket<T>);
}

template <typename T, int count>
__device__ __forceinline__ void store_elements(T* to, const acc_t<T>* in) {
  static_assert(count % kPacket<T> == 0);
#pragma unroll
  for (int i = 0; i < count / kPacket<T>; ++i)
    store_packet(to + i * kPacket<T>, pack<T>(in + i * kPacket<T>));
}

}  // namespace modeprobe
