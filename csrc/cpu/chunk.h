/* The loop: everything the library computes for one chunk, written once and compiled for each instruction set.
 *
 * The including file defines a vector `F` of F::W floats and a vector `D` of as many doubles (see portable.cpp).
 * All multiply-adds are spelled out: with or without sums, an element's update goes through the same operations and
 * ends in the same bits.
 */
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "pass.h"

namespace grgauge {
namespace {

constexpr float kLargest = 1e16f; /* beyond it an element counts as non-finite: its square would not survive float32 */

/* Everything that is the same for all elements of a segment; with AdamW, the scalars of torch's formula. */
struct Scalars {
  F inv_scale, beta, one_minus_beta;
  F decay, weight1, beta2, weight2, step_size, root2, eps, direction;
  double step;
  bool zero_grad;

  Scalars(const grgauge_pass& pass, double step_) : step(step_), zero_grad(pass.zero_grad) {
    inv_scale = F::all(pass.inv_scale ? *pass.inv_scale : 1.0f);
    beta = F::all(float(pass.beta));
    one_minus_beta = F::all(float(1.0 - pass.beta));
    const double correction1 = 1.0 - std::pow(pass.beta1, step);
    const double correction2 = 1.0 - std::pow(pass.beta2, step);
    const float clip = pass.clip ? *pass.clip : 1.0f;
    decay = F::all(float(1.0 - pass.lr * pass.weight_decay));
    weight1 = F::all(float(1.0 - pass.beta1));
    beta2 = F::all(float(pass.beta2));
    weight2 = F::all(float(1.0 - pass.beta2));
    step_size = F::all(float(-pass.lr / correction1));
    root2 = F::all(float(1.0 / std::sqrt(correction2)));
    eps = F::all(float(pass.eps));
    direction = F::all(pass.maximize ? -clip : clip);
  }
};

template <class G, class P>
struct Streams {
  G* grad;
  P* param;
  float *m, *v, *ema, *previous;
};

/* Sums of a few vectors in float, moved into double before seven additions' rounding could add up to 1e-6: a conversion
 * of every vector would cost more than the sums themselves. */
constexpr int kVectors = 8;

struct Sums {
  F grad_sq{}, ema_sq{}, grad_abs{}, delta_sq{}, delta_abs{};
  int64_t nonfinite = 0;
};

struct Totals {
  D grad_sq{}, ema_sq{}, grad_abs{}, delta_sq{}, delta_abs{};
  int64_t nonfinite = 0;

  void add(const Sums& sum, bool states) {
    grad_sq.add(sum.grad_sq);
    ema_sq.add(sum.ema_sq);
    grad_abs.add(sum.grad_abs);
    if (states) delta_sq.add(sum.delta_sq);
    if (states) delta_abs.add(sum.delta_abs);
    nonfinite += sum.nonfinite;
  }
};

/* Fetch what comes this many elements later: the processor's own prefetchers stop at every page, and four streams reach
 * their ends together. Worth an eighth of the time on buffers larger than the caches. */
constexpr int64_t kAhead = 1024;

template <class T>
void prefetch(const T* p, int64_t i) {
  /* As a number: the address may lie past the end of the tensor, where a pointer may not point. */
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + (i + kAhead) * sizeof(T)));
}

template <class G, class P, bool adamw, bool states>
void prefetch(const Streams<G, P>& s, int64_t i) {
  prefetch(s.grad, i);
  if (adamw) prefetch(s.param, i), prefetch(s.m, i), prefetch(s.v, i);
  if (states && s.ema) prefetch(s.ema, i);
  if (states && s.previous) prefetch(s.previous, i);
}

/* The elements from i on that fill one vector. `states`: ema or previous is there. */
template <class G, class P, bool adamw, bool sums, bool states>
inline __attribute__((always_inline)) void visit(const Streams<G, P>& s, int64_t i, const Scalars& a, Sums& sum) {
  const F largest = F::all(kLargest);
  const F g = F::load(s.grad + i) * a.inv_scale;
  const auto finite = F::abs(g) <= largest;
  const F clean = F::select(finite, g);
  F m{};

  if (states && s.ema) {
    const F old = F::load(s.ema + i);
    m = F::select(finite, F::fma(a.beta, old, a.one_minus_beta * clean), old);
    m.store(s.ema + i);
  }
  if (states && s.previous) {
    const F old = F::load(s.previous + i);
    const F delta = F::select(finite, clean - old);
    F::select(finite, clean, old).store(s.previous + i);
    if (sums) {
      sum.delta_sq = F::fma(delta, delta, sum.delta_sq);
      sum.delta_abs = sum.delta_abs + F::abs(delta);
    }
  }
  if (adamw) {
    const F update = g * a.direction;
    const F old = F::load(s.m + i);
    const F exp_avg = F::fma(a.weight1, update - old, old);
    const F exp_avg_sq = F::fma(a.beta2, F::load(s.v + i), a.weight2 * update * update);
    const F denominator = F::fma(F::sqrt(exp_avg_sq), a.root2, a.eps);
    const F param = F::fma(a.step_size, exp_avg / denominator, F::load(s.param + i) * a.decay);
    param.store(s.param + i);
    exp_avg.store(s.m + i);
    exp_avg_sq.store(s.v + i);
    if (a.zero_grad) F::all(0.0f).store(s.grad + i);
    if (sums && !(states && s.ema)) m = F::select(F::abs(exp_avg) <= largest, exp_avg);
  }
  if (sums) {
    sum.grad_sq = F::fma(clean, clean, sum.grad_sq);
    sum.grad_abs = sum.grad_abs + F::abs(clean);
    sum.ema_sq = F::fma(m, m, sum.ema_sq);
    sum.nonfinite += F::W - F::count(finite);
  }
}

template <class T>
void copy(T* to, const T* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(T));
}

/* The last, partial vector of a chunk: moved through a zero-padded copy, so its elements see the same operations. */
template <class G, class P, bool adamw, bool sums, bool states>
void visit_tail(const Streams<G, P>& s, int64_t i, int64_t n, const Scalars& a, Sums& sum) {
  G grad[F::W] = {};
  P param[F::W] = {};
  float m[F::W] = {}, v[F::W] = {}, ema[F::W] = {}, previous[F::W] = {};
  const Streams<G, P> padded{grad, param, m, v, s.ema ? ema : nullptr, s.previous ? previous : nullptr};
  copy(grad, s.grad + i, n);
  if (adamw) copy(param, s.param + i, n), copy(m, s.m + i, n), copy(v, s.v + i, n);
  if (s.ema) copy(ema, s.ema + i, n);
  if (s.previous) copy(previous, s.previous + i, n);
  visit<G, P, adamw, sums, states>(padded, 0, a, sum);
  if (adamw) copy(s.param + i, param, n), copy(s.m + i, m, n), copy(s.v + i, v, n);
  if (adamw && a.zero_grad) copy(s.grad + i, grad, n);
  if (s.ema) copy(s.ema + i, ema, n);
  if (s.previous) copy(s.previous + i, previous, n);
}

template <class T>
T* at(void* const* base, int64_t i, int64_t offset) {
  return base ? static_cast<T*>(base[i]) + offset : nullptr;
}

/* Chunks [first, last) of the plan; the sums of chunk i go to partials[i * GRGAUGE_SUMS]. */
template <class G, class P, bool adamw, bool sums, bool states>
void visit_chunks(const grgauge_pass& pass, int64_t first, int64_t last, double* partials) {
  Scalars scalars(pass, adamw && first < last ? step_of(pass, pass.rows[first].segment) : 1.0);

  for (int64_t c = first; c < last; ++c) {
    const grgauge_row row = pass.rows[c];
    const int64_t base = pass.flat ? 0 : row.segment;
    if (adamw && step_of(pass, row.segment) != scalars.step) scalars = Scalars(pass, step_of(pass, row.segment));
    const Streams<G, P> s{at<G>(pass.grads, base, row.offset),
                          at<P>(pass.params, base, row.offset),
                          at<float>(pass.exp_avgs, base, row.offset),
                          at<float>(pass.exp_avg_sqs, base, row.offset),
                          pass.ema ? pass.ema + row.state : nullptr,
                          pass.previous ? pass.previous + row.state : nullptr};
    Totals total;
    const int64_t whole = row.length / F::W * F::W;
    for (int64_t i = 0; i < whole;) {
      Sums sum;
      for (const int64_t end = std::min(whole, i + kVectors * F::W); i < end; i += F::W) {
        prefetch<G, P, adamw, states>(s, i);
        visit<G, P, adamw, sums, states>(s, i, scalars, sum);
      }
      if (sums) total.add(sum, states);
    }
    if (whole < row.length) {
      Sums sum;
      visit_tail<G, P, adamw, sums, states>(s, whole, row.length - whole, scalars, sum);
      if (sums) total.add(sum, states);
    }
    if (sums) {
      double* out = partials + c * GRGAUGE_SUMS;
      out[0] = total.grad_sq.total();
      out[1] = total.ema_sq.total();
      out[2] = total.grad_abs.total();
      out[3] = total.delta_sq.total();
      out[4] = total.delta_abs.total();
      out[5] = double(total.nonfinite);
    }
  }
}

template <class G, class P, bool adamw>
visit_function choose_sums(const grgauge_pass& pass) {
  if (pass.ema || pass.previous) return visit_chunks<G, P, adamw, true, true>;
  if (!adamw || pass.stats) return visit_chunks<G, P, adamw, true, false>;
  return visit_chunks<G, P, adamw, false, false>;
}

template <class G>
visit_function choose_param(const grgauge_pass& pass) {
  if (!pass.params) return choose_sums<G, float, false>(pass);
  switch (pass.param_dtype) {
    case GRGAUGE_F32: return choose_sums<G, float, true>(pass);
    case GRGAUGE_BF16: return choose_sums<G, bf16, true>(pass);
    case GRGAUGE_F16: return choose_sums<G, f16, true>(pass);
  }
  return nullptr;
}

visit_function choose(const grgauge_pass& pass) {
  switch (pass.grad_dtype) {
    case GRGAUGE_F32: return choose_param<float>(pass);
    case GRGAUGE_BF16: return choose_param<bf16>(pass);
    case GRGAUGE_F16: return choose_param<f16>(pass);
  }
  return nullptr;
}

}  // namespace
}  // namespace grgauge
