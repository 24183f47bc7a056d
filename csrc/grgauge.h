/* The C ABI of the kernels: plain pointers and sizes, no Python, no torch. Every entry point returns an error code. */
#ifndef GRGAUGE_H
#define GRGAUGE_H

#include <stdint.h>

#if defined(_WIN32)
#define GRGAUGE_API __declspec(dllexport)
#else
#define GRGAUGE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows with every change below, so that a binding never fills another library's struct. */
#define GRGAUGE_ABI 3

/* Codes from GRGAUGE_CUDA_ERROR on are CUDA's own, that much higher. */
enum { GRGAUGE_OK = 0, GRGAUGE_BAD_DTYPE = 1, GRGAUGE_OUT_OF_MEMORY = 2, GRGAUGE_NO_TENSOR = 3 };
enum { GRGAUGE_CUDA_ERROR = 1000000 };
enum { GRGAUGE_F32 = 0, GRGAUGE_BF16 = 1, GRGAUGE_F16 = 2 };
enum { GRGAUGE_SUMS = 6 }; /* sum g^2, sum m^2, sum |g|, sum delta^2, sum |delta|, count of non-finite g */

/* One chunk: a contiguous run inside one segment. */
typedef struct {
  int64_t segment;
  int64_t offset; /* in elements, from the segment's first element or from the flat buffer's */
  int64_t length;
  int64_t state;  /* elements visited before it: where its part of ema and previous begins */
} grgauge_row;

/* One pass over the chunks of a plan. A null pointer switches the thing it points to off. */
typedef struct {
  const grgauge_row* rows; /* ordered by segment */
  int64_t chunks;
  int64_t segments;
  double* stats; /* out: [segments, GRGAUGE_SUMS] */

  /* One address a segment, or with `flat` one address in all. */
  void* const* grads;
  int32_t flat;
  int32_t grad_dtype;

  float* ema;      /* [visited elements] m <- beta m + (1 - beta) g */
  float* previous; /* [visited elements] delta = g - previous; previous <- g */
  double beta;
  const float* inv_scale; /* g = grad * inv_scale */

  /* AdamW, if params is given. Addresses as for grads. */
  void* const* params;
  void* const* exp_avgs;
  void* const* exp_avg_sqs;
  int32_t param_dtype;
  int32_t step_per_segment; /* 0: steps has one element, 1: one a segment */
  const float* steps;       /* number of this update, from 1 */
  double lr, beta1, beta2, eps, weight_decay;
  const float* found_inf; /* not 0: nothing is changed, stats are NaN */
  const float* clip;      /* the update takes g * clip, the sums see g */
  int32_t zero_grad;
  int32_t maximize;

  /* Both moments: GRGAUGE_F32, or GRGAUGE_BF16 and then rounded stochastically; parameters too, if so wished and if they
   * are GRGAUGE_BF16. The random bits are a hash of (seed, step, segment, place of the element in its segment), and
   * `reference.random_bits` in grgauge_kernels/backends defines them. */
  int32_t moment_dtype;
  int32_t stochastic_rounding;
  uint32_t seed;
  const int64_t* origins; /* [segments], where a segment begins in the flat buffers; null: offsets count from it */
} grgauge_pass;

/* In every library: the ABI it was built for, and what its codes mean. */
GRGAUGE_API int grgauge_abi(void);
GRGAUGE_API const char* grgauge_error(int code);

/* libgrgauge_cpu. Same bits for every `threads`. */
GRGAUGE_API int grgauge_cpu_pass(const grgauge_pass* pass, int threads);
/* The instruction set in use ("avx512", "avx2" or "portable"); choosing a name first switches to it if it can run. */
GRGAUGE_API const char* grgauge_cpu_isa(const char* choose);
/* Of `count` Python tensors: addresses, numbers of elements, and kinds, written to out[3 * count] in this order. Two
 * kinds are equal if dtype, device and strides are; the lower half is 0 where elements are in row-major order. To be
 * called with the interpreter's lock held; GRGAUGE_NO_TENSOR leaves a Python exception set.
 *   exchange_api  a DLPackExchangeAPI of version 1, as torch.Tensor.__dlpack_c_exchange_api__ holds it */
GRGAUGE_API int grgauge_cpu_describe(const void* exchange_api, void* const* objects, int64_t count, uint64_t* out);

/* libgrgauge_cuda. All pointers in the pass point to memory of `device`; the tables of addresses too, and with `flat` a
 * table's place is taken by the one address itself. Enqueues on `stream` and returns at once: the pass may go, what it
 * points to must stay until the stream has come past. Same bits every time.
 *   lr_f32, lr_f64   where the learning rate stands on the device, in one precision or the other; both null: pass->lr
 *   partials         scratch, GRGAUGE_SUMS * chunks floats on the device; null if stats is */
GRGAUGE_API int grgauge_cuda_pass(const grgauge_pass* pass, const float* lr_f32, const double* lr_f64, float* partials,
                                  int device, void* stream);
/* GRGAUGE_OK if the library holds kernels that `device` and its driver can run. */
GRGAUGE_API int grgauge_cuda_check(int device);

#ifdef __cplusplus
}
#endif
#endif
