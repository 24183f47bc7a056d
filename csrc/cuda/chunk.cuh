/* The loop of csrc/cpu/chunk.h for a block of threads: everything the library computes for one chunk, written once.
 *
 * Compiled without contraction; all multiply-adds are spelled out. So an element's update goes through the same
 * operations, and ends in the same bits, with or without gauges and wherever in a chunk it stands.
 */
#pragma once

#include <type_traits>

#include "pass.cuh"
#include "storage.cuh"

namespace grgauge {
namespace {

constexpr float kLargest = 1e16f; /* beyond it an element counts as non-finite: its square would not survive float32 */

/* What a chunk's elements have in common. AdamW's part comes from double: 1 - 0.999 is off by 5e-5 in float. */
struct Scalars {
  float inv_scale;
  float decay, step_size, root2, direction;

  __device__ static float read(const float* p) { return p ? *p : 1.0f; }

  __device__ void measure(const grgauge_pass& pass) { inv_scale = read(pass.inv_scale); }

  __device__ void adamw(const Task& task, int64_t segment) {
    const grgauge_pass& pass = task.pass;
    const double step = pass.steps[pass.step_per_segment ? segment : 0];
    const double lr = task.lr_f64 ? *task.lr_f64 : task.lr_f32 ? double(*task.lr_f32) : pass.lr;
    const double correction1 = -expm1(step * task.log_beta1); /* 1 - beta1^step */
    const double correction2 = -expm1(step * task.log_beta2);
    const float clip = read(pass.clip);
    decay = float(1.0 - lr * pass.weight_decay);
    step_size = float(-lr / correction1);
    root2 = float(1.0 / sqrt(correction2));
    direction = pass.maximize ? -clip : clip;
  }
};

/* The random bits of stochastic rounding, as in csrc/cpu/chunk.h: two words for a chunk, and a hash of an element's
 * place with them. */
constexpr uint32_t kFactor1 = 0x7feb352d, kFactor2 = 0x846ca68b, kGolden = 0x9e3779b1;

struct Key {
  uint32_t first, second;

  __device__ static uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * kFactor1;
    x = (x ^ x >> 15) * kFactor2;
    return x ^ x >> 16;
  }
  __device__ void of(const grgauge_pass& pass, const grgauge_row& row) {
    const float step = pass.steps[pass.step_per_segment ? row.segment : 0];
    first = mix(mix(mix(pass.seed) ^ uint32_t(step)) ^ uint32_t(row.segment));
    second = mix(first ^ kGolden);
    first += uint32_t(row.offset - (pass.origins ? pass.origins[row.segment] : 0)); /* of the chunk's first element */
  }
  __device__ uint32_t draw(uint32_t i) const {
    uint32_t x = first + i;
    x = (x ^ x >> 16) * kFactor1;
    x = (x ^ x >> 15 ^ second) * kFactor2;
    return x ^ x >> 16;
  }
};

/* Which 16 of an element's 32 random bits a stream takes; the parameter's are the top of their product. */
template <int W>
struct OfParam {
  const uint32_t (&x)[W];
  __device__ uint32_t operator[](int k) const { return x[k] * kGolden >> 16; }
};
template <int W>
struct OfM {
  const uint32_t (&x)[W];
  __device__ uint32_t operator[](int k) const { return x[k] >> 16; }
};
template <int W>
struct OfV {
  const uint32_t (&x)[W];
  __device__ uint32_t operator[](int k) const { return x[k] & 0xffff; }
};

/* P and M are what parameters and moments are stored as. */
template <class P, class M>
constexpr bool draws = std::is_same<P, sbf16>::value || std::is_same<M, sbf16>::value;

template <class G, class P, class M>
struct Streams {
  G* grad;
  P* param;
  M *m, *v;
  int64_t state; /* of ema and previous, whose addresses need no registers of their own: they stand in the task */

  __device__ void advance(int n) { grad += n, param += n, m += n, v += n, state += n; } /* or not given, not followed */
  __device__ float* ema(const Task& task) const { return task.pass.ema + state; }
  __device__ float* previous(const Task& task) const { return task.pass.previous + state; }
};

/* True if W elements at p can be moved in one access, or if there is nothing to move. */
template <int W, class T>
__device__ bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * W) == 0;
}

/* A thread adds W elements among themselves before it adds them to what it has: fewer roundings in a row. */
template <int W>
__device__ float squares(const float (&x)[W]) {
  float sum = x[0] * x[0];
#pragma unroll
  for (int k = 1; k < W; ++k) sum = fmaf(x[k], x[k], sum);
  return sum;
}

template <int W>
__device__ float sizes(const float (&x)[W]) {
  float sum = fabsf(x[0]);
#pragma unroll
  for (int k = 1; k < W; ++k) sum += fabsf(x[k]);
  return sum;
}

struct Sums {
  float of[GRGAUGE_SUMS] = {}; /* in the order of the columns */

  __device__ void grad(float sq, float abs) { of[0] += sq, of[2] += abs; }
  __device__ void ema(float sq) { of[1] += sq; }
  __device__ void delta(float sq, float abs) { of[3] += sq, of[4] += abs; }
  __device__ void nonfinite(bool is) { of[5] += is ? 1.0f : 0.0f; }

  /* Over the block, along a fixed tree, into column k's place for this chunk: out[k * stride]. */
  __device__ void store(float* out, int64_t stride) {
    constexpr int warps = kThreads / 32;
    __shared__ float of_warp[GRGAUGE_SUMS][warps];
#pragma unroll
    for (int k = 0; k < GRGAUGE_SUMS; ++k) {
#pragma unroll
      for (int lane = 16; lane; lane /= 2) of[k] += __shfl_xor_sync(0xffffffff, of[k], lane);
      if (threadIdx.x % 32 == 0) of_warp[k][threadIdx.x / 32] = of[k];
    }
    __syncthreads();
    if (threadIdx.x < GRGAUGE_SUMS) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < warps; ++warp) sum += of_warp[threadIdx.x][warp];
      out[threadIdx.x * stride] = sum;
    }
  }
};

/* W elements of a thread, the first one the chunk's i-th. All that AdamW reads is asked for before anything is waited for; ema and previous are not,
 * since that costs ten registers and with them the chunks that run meanwhile. */
template <class G, class P, class M, bool adamw, bool states, int W, class Access>
__device__ __forceinline__ void visit(const Streams<G, P, M>& s, int i, Access access, const Task& task,
                                      const Scalars& a, const Key& key, Sums& sum) {
  float g[W], clean[W], param[W], exp_avg[W], exp_avg_sq[W];
  bool finite[W];
  access.load(s.grad, g);
  if constexpr (adamw) {
    access.load(s.param, param);
    access.load(s.m, exp_avg);
    access.load(s.v, exp_avg_sq);
  }

#pragma unroll
  for (int k = 0; k < W; ++k) {
    g[k] *= a.inv_scale;
    finite[k] = fabsf(g[k]) <= kLargest;
    clean[k] = finite[k] ? g[k] : 0.0f;
    sum.nonfinite(!finite[k]);
  }
  sum.grad(squares(clean), sizes(clean));

  if constexpr (states) {
    if (task.pass.ema) {
      float ema[W];
      access.load(s.ema(task), ema);
#pragma unroll
      for (int k = 0; k < W; ++k)
        ema[k] = finite[k] ? fmaf(task.beta, ema[k], task.one_minus_beta * clean[k]) : ema[k];
      access.store(s.ema(task), ema);
      sum.ema(squares(ema));
    }
    if (task.pass.previous) {
      float previous[W], delta[W];
      access.load(s.previous(task), previous);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        delta[k] = finite[k] ? clean[k] - previous[k] : 0.0f;
        previous[k] = finite[k] ? clean[k] : previous[k];
      }
      access.store(s.previous(task), previous);
      sum.delta(squares(delta), sizes(delta));
    }
  }
  if constexpr (adamw) {
#pragma unroll
    for (int k = 0; k < W; ++k) {
      const float update = g[k] * a.direction;
      exp_avg[k] = fmaf(task.weight1, update - exp_avg[k], exp_avg[k]);
      exp_avg_sq[k] = fmaf(task.beta2, exp_avg_sq[k], task.weight2 * update * update);
      const float denominator = fmaf(sqrtf(exp_avg_sq[k]), a.root2, task.eps);
      param[k] = fmaf(a.step_size, exp_avg[k] / denominator, param[k] * a.decay);
    }
    if constexpr (draws<P, M>) {
      uint32_t random[W];
#pragma unroll
      for (int k = 0; k < W; ++k) random[k] = key.draw(uint32_t(i) + k * Access::apart);
      /* The one order or the other, or ptxas spills a register on sm_100. */
      if constexpr (!states) access.store(s.param, param, OfParam<W>{random});
      access.store(s.m, exp_avg, OfM<W>{random});
      access.store(s.v, exp_avg_sq, OfV<W>{random});
      if constexpr (states) access.store(s.param, param, OfParam<W>{random});
    } else {
      access.store(s.param, param);
      access.store(s.m, exp_avg);
      access.store(s.v, exp_avg_sq);
    }
    if (task.pass.zero_grad) {
      const float zeros[W] = {};
      access.store(s.grad, zeros);
    }
    if (!states || !task.pass.ema) {
#pragma unroll
      for (int k = 0; k < W; ++k) exp_avg[k] = fabsf(exp_avg[k]) <= kLargest ? exp_avg[k] : 0.0f;
      sum.ema(squares(exp_avg));
    }
  }
}

/* `table` holds an address a segment; for flat streams it is the one address itself. */
template <class T>
__device__ T* at(void* const* table, const grgauge_pass& pass, const grgauge_row& row) {
  const size_t base = reinterpret_cast<size_t>(pass.flat ? static_cast<const void*>(table) : table[row.segment]);
  /* Tells the compiler what it cannot know of an address that was itself loaded: it is in global memory. */
  return static_cast<T*>(__cvta_global_to_generic(base)) + row.offset;
}

template <class G, class P, class M, bool adamw>
__device__ Streams<G, P, M> streams(const grgauge_pass& pass, const grgauge_row& row) {
  G* const grad = at<G>(pass.grads, pass, row);
  if constexpr (!adamw) return {grad, nullptr, nullptr, nullptr, row.state};
  return {grad, at<P>(pass.params, pass, row), at<M>(pass.exp_avgs, pass, row),
          at<M>(pass.exp_avg_sqs, pass, row), row.state};
}

/* A block, a chunk; 64 registers a thread at most, so that eight chunks fit a multiprocessor. */
template <class G, class P, class M, bool adamw, bool states, int W>
__global__ void __launch_bounds__(kThreads, 8) visit_chunk(const __grid_constant__ Task task) {
  const grgauge_pass& pass = task.pass;
  const grgauge_row row = pass.rows[blockIdx.x];
  if (adamw && pass.found_inf && *pass.found_inf != 0.0f) return;

  auto s = streams<G, P, M, adamw>(pass, row);
  const bool together = aligned<W>(s.grad) && aligned<W>(s.param) && aligned<W>(s.m) && aligned<W>(s.v) &&
                        (!pass.ema || aligned<W>(s.ema(task))) && (!pass.previous || aligned<W>(s.previous(task)));
  const int length = int(row.length), whole = together ? length / W * W : 0;
  const int first = threadIdx.x * W;
  s.advance(first);

  __shared__ Scalars scalars;
  __shared__ Key bits;
  if (threadIdx.x == 0) {
    scalars.measure(pass);
    if (adamw) scalars.adamw(task, row.segment);
    if (draws<P, M>) bits.of(pass, row);
  }
  __syncthreads();
  const Scalars a = scalars;
  const Key key = draws<P, M> ? bits : Key{};

  Sums sum;
#pragma unroll 1
  for (int i = first; i < whole; i += kThreads * W, s.advance(kThreads * W))
    visit<G, P, M, adamw, states, W>(s, i, Neighbours{}, task, a, key, sum);

  /* What is left of the chunk, or all of it if it is not aligned. The places are looked up again: to keep them would
   * cost registers in the loop above. */
  s = streams<G, P, M, adamw>(pass, row);
  s.advance(whole + threadIdx.x);
#pragma unroll 1
  for (int i = whole + threadIdx.x; i < length; i += kThreads * W, s.advance(kThreads * W))
    visit<G, P, M, adamw, states, W>(s, i, Scattered{length - i}, task, a, key, sum);
  if (task.partials) sum.store(task.partials + blockIdx.x, pass.chunks);
}

template <class G, class P, class M, bool adamw, bool states, int W>
cudaError_t launch(const Task& task, cudaStream_t stream) {
  if (task.pass.chunks > INT32_MAX) return cudaErrorInvalidConfiguration;
  visit_chunk<G, P, M, adamw, states, W><<<unsigned(task.pass.chunks), kThreads, 0, stream>>>(task);
  return cudaGetLastError();
}

/* 16 bytes an access. Two-byte streams beside float ones move 8: a warp's accesses then lie side by side in every
 * stream, where 16 would leave gaps of 16 bytes between those to the float ones. */
template <class G, class P, class M>
cudaError_t launch_adamw(const Task& task, cudaStream_t stream) {
  if constexpr (sizeof(G) == 2 && sizeof(P) == 2 && sizeof(M) == 2)
    if (!task.pass.ema && !task.pass.previous) return launch<G, P, M, true, false, 8>(task, stream);
  return launch<G, P, M, true, true, 4>(task, stream);
}

template <class G, class P>
cudaError_t launch_moments(const Task& task, cudaStream_t stream) {
  if (task.pass.moment_dtype == GRGAUGE_BF16) return launch_adamw<G, P, sbf16>(task, stream);
  return launch_adamw<G, P, float>(task, stream);
}

template <class G>
cudaError_t visit_chunks(const Task& task, cudaStream_t stream) {
  const grgauge_pass& pass = task.pass;
  if (!pass.params) {
    if (pass.ema || pass.previous) return launch<G, float, float, false, true, 4>(task, stream);
    return launch<G, float, float, false, false, 16 / sizeof(G)>(task, stream);
  }
  switch (pass.param_dtype) {
    case GRGAUGE_F32: return launch_moments<G, float>(task, stream);
    case GRGAUGE_BF16:
      return pass.stochastic_rounding ? launch_moments<G, sbf16>(task, stream) : launch_moments<G, bf16>(task, stream);
    default: return launch_moments<G, f16>(task, stream);
  }
}

}  // namespace
}  // namespace grgauge
