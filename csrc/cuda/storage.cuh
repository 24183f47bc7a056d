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

inline __device__ float widen(float x) { return x; }
inline __device__ float widen(bf16 x) { return __bfloat162float(x); }
inline __device__ float widen(f16 x) { return __half2float(x); }

/* To nearest, ties to even; NaN stays NaN. */
inline __device__ void narrow(float x, float& to) { to = x; }
inline __device__ void narrow(float x, bf16& to) { to = __float2bfloat16_rn(x); }
inline __device__ void narrow(float x, f16& to) { to = __float2half_rn(x); }

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
  template <class T, int W>
  __device__ void load(const T* p, float (&x)[W]) const {
    Packed<T, W> packed;
    packed.access = *reinterpret_cast<const decltype(packed.access)*>(p);
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] = widen(packed.element[k]);
  }
  template <class T, int W>
  __device__ void store(T* p, const float (&x)[W]) const {
    Packed<T, W> packed;
#pragma unroll
    for (int k = 0; k < W; ++k) narrow(x[k], packed.element[k]);
    *reinterpret_cast<decltype(packed.access)*>(p) = packed.access;
  }
};

/* One at a time, kThreads apart, as far as the chunk goes. Zeros stand for what lies behind: they add to no sum. */
struct Scattered {
  int left; /* elements of the chunk from p on */

  template <class T, int W>
  __device__ void load(const T* p, float (&x)[W]) const {
#pragma unroll
    for (int k = 0; k < W; ++k) x[k] = k * kThreads < left ? widen(p[k * kThreads]) : 0.0f;
  }
  template <class T, int W>
  __device__ void store(T* p, const float (&x)[W]) const {
#pragma unroll
    for (int k = 0; k < W; ++k)
      if (k * kThreads < left) narrow(x[k], p[k * kThreads]);
  }
};

}  // namespace
}  // namespace grgauge
