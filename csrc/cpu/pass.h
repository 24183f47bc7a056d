/* What the instruction sets share: the storage types, and the table from which pass.cpp picks one at load time. */
#pragma once

#include "../grgauge.h"

namespace grgauge {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
/* What is stored as bfloat16 with stochastic rounding. */
struct sbf16 : bf16 {};

/* A number beyond the largest bfloat16 is cut off instead of rounded stochastically: between that and infinity there is
 * no mean to keep. So is NaN, which stays one, for whatever arithmetic has made is a quiet one: a top bit says so. */
constexpr int kLargestBf16 = 0x7f7f0000;

/* Visits chunks [first, last) of a plan, writing one row of partial sums a chunk. */
using visit_function = void (*)(const grgauge_pass& pass, int64_t first, int64_t last, double* partials);

/* The function for the dtypes of a pass; null if there is none. */
visit_function choose_portable(const grgauge_pass& pass);
visit_function choose_avx2(const grgauge_pass& pass);
visit_function choose_avx512(const grgauge_pass& pass);

/* Static, as all that is inline here must be: one copy shared by files of different instruction sets could be any. */
static inline double step_of(const grgauge_pass& pass, int64_t segment) {
  return pass.steps[pass.step_per_segment ? segment : 0];
}

/* True where a pass should fetch memory ahead of its use. */
bool fetches_ahead(const grgauge_pass& pass);

/* Calls task(data, thread, threads) on each of `threads` threads of the OpenMP runtime that the process already has,
 * so that the kernels and torch share one pool; on threads of its own if there is none. */
void parallel(int threads, void (*task)(void* data, int thread, int threads), void* data);

}  // namespace grgauge
