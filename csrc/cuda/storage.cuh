/* The storage types, and the two ways in which a thread gets at W elements of a stream: float in registers, whatever
 * is in memory. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace grgauge {
namespace {

constexpr int kThreads = 128; /* a chunk; several chunks share a multiprocessor and hide each other's loads */

using bf16 = __nv_bfloat16;
using f16 = __half;

/* What is stored as bfloat16 with stochastic rounding. */
struct sbf16 {
  bf16 value;
};

inline __device__ float widen(float x) { return x; }
inline __device__ float widen(bf16 x) { return __bfloat162float(x); }
inline __device__ float widen(f16 x) { return __half2float(x); }
inline __device__ float widen(sbf16 x) { return widen(x.value); }

/* To nearest, ties to even; NaN stays NaN. */
inline __device__ void narrow(float x, float& to) { to = x; }
inline __device__ void narrow(float x, bf16& to) { to = __float2bfloat16_rn(x); }
inline __device__ void narrow(float x, f16& to) { to = __float2half_rn(x); }

/* The same, to one of the two neighbours as 16 random bits say; only sbf16 takes them. What is beyond the largest
 * bfloat16, NaN too, is cut off: csrc/cpu/pass.h says why. */
template <class T>
__device__ void narrow(float x, T& to, uint32_t) {
  narrow(x, to);
}
inline __device__ void narrow(float x, sbf16& to, uint32_t random) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t added = (bits & 0x7fffffff) <= 0x7f7f0000 ? random : 0;
  to.value = __ushort_as_bfloat16(static_cast<unsigned short>((bits + added) >> 16));
}

/* No random bits: what is stored with them must not be stored without. */
struct NoBits {
  __device__ uint32_t operator[](int) const { return 0; }
};

/* W elements in the registers of one access. */
template <class T, int W, int bytes = sizeof(T) * W>
union Packed;
template <class T, int W>
union Packed<T, W, 16> {
  uint4 access;
  T element[W];
  __device__ Packed() {}
};
template <class T, int W>
union Packed<T, W, 8> {
  uint2 access;
  T element[W];
  __device__ Packed() {}
};

/* W neighbours at once; p is aligned to all of them. */
struct Neighbours {
  static constexpr uint32_t apart = 1;

  template <class T, int W>
  __device__ void load(const T* p, float (&x)[W]) const {
    Packed<T, W> packed;
    packed.access = *reinterpret_cast<const decltype(packed.access)*>(p);
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] = widen(packed.element[k]);
  }
  template <class T, int W, class Bits = NoBits>
  __device__ void store(T* p, const float (&x)[W], Bits random = {}) const {
    Packed<T, W> packed;
#pragma unroll
    for (int k = 0; k < W; ++k) narrow(x[k], packed.element[k], random[k]);
    *reinterpret_cast<decltype(packed.access)*>(p) = packed.access;
  }
};

/* One at a time, kThreads apart, as far as the chunk goes. Zeros stand for what lies behind: they add to no sum. */
struct Scattered {
  static constexpr uint32_t apart = kThreads;
  int left; /* elements of the chunk from p on */

  template <class T, int W>
  __device__ void load(const T* p, float (&x)[W]) const {
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] = k * kThreads < left ? widen(p[k * kThreads]) : 0.0f;
  }
  template <class T, int W, class Bits = NoBits>
  __device__ void store(T* p, const float (&x)[W], Bits random = {}) const {
#pragma unroll
    for (int k = 0; k < W; ++k)
      if (k * kThreads < left) narrow(x[k], p[k * kThreads], random[k]);
  }
};

}  // namespace
}  // namespace grgauge
