/* The loop: everything the library computes for one chunk, written once and compiled for each instruction set.
 *
 * The including file defines a vector `F` of F::W floats and a vector `D` of as many doubles (see portable.cpp).
 * Sums are double from the first addition, so a chunk's sums carry no rounding worth naming. All multiply-adds are
 * spelled out: with or without sums, an element's update goes through the same operations and ends in the same bits.
 */
#include <cmath>
#include <cstring>
#include <limits>

#include "pass.h"

namespace grgauge {
namespace {

constexpr float kLargest = 1e16f; /* beyond it an element counts as non-finite: its square would not survive float32 */

/* What AdamW needs of a segment: the scalars of torch's formula. */
struct Adamw {
  F decay, weight1, beta2, weight2, step_size, root2, eps, direction;
  double step;

  Adamw(const grgauge_pass& pass, double step_) : step(step_) {
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

  Streams at(int64_t i) const {
    return {grad + i, param ? param + i : nullptr, m ? m + i : nullptr, v ? v + i : nullptr,
            ema ? ema + i : nullptr, previous ? previous + i : nullptr};
  }
};

struct Sums {
  D grad_sq{}, ema_sq{}, grad_abs{}, delta_sq{}, delta_abs{};
  int64_t nonfinite = 0;
};

template <class G, class P, bool adamw, bool sums>
inline __attribute__((always_inline)) void visit(const Streams<G, P>& s, const grgauge_pass& pass, F inv_scale,
                                                 F beta, F one_minus_beta, const Adamw* a, Sums& sum) {
  const F largest = F::all(kLargest);
  const F g = F::load(s.grad) * inv_scale;
  const auto finite = F::abs(g) <= largest;
  const F clean = F::select(finite, g);
  F m{};

  if (s.ema) {
    const F old = F::load(s.ema);
    m = F::select(finite, F::fma(beta, old, one_minus_beta * clean), old);
    m.store(s.ema);
  }
  if (s.previous) {
    const F old = F::load(s.previous);
    const F delta = F::select(finite, clean - old);
    F::select(finite, clean, old).store(s.previous);
    if (sums) {
      sum.delta_sq.add_square(delta);
      sum.delta_abs.add(F::abs(delta));
    }
  }
  if (adamw) {
    const F update = g * a->direction;
    const F old = F::load(s.m);
    const F exp_avg = F::fma(a->weight1, update - old, old);
    const F exp_avg_sq = F::fma(a->beta2, F::load(s.v), a->weight2 * update * update);
    const F denominator = F::fma(F::sqrt(exp_avg_sq), a->root2, a->eps);
    const F param = F::fma(a->step_size, exp_avg / denominator, F::load(s.param) * a->decay);
    param.store(s.param);
    exp_avg.store(s.m);
    exp_avg_sq.store(s.v);
    if (pass.zero_grad) F::all(0.0f).store(s.grad);
    if (sums && !s.ema) m = F::select(F::abs(exp_avg) <= largest, exp_avg);
  }
  if (sums) {
    sum.grad_sq.add_square(clean);
    sum.grad_abs.add(F::abs(clean));
    if (adamw || s.ema) sum.ema_sq.add_square(m);
    sum.nonfinite += F::W - F::count(finite);
  }
}

/* The last, partial vector of a chunk: moved through a zero-padded copy, so its elements see the same operations. */
template <class G, class P, bool adamw, bool sums>
void visit_tail(const Streams<G, P>& s, int64_t n, const grgauge_pass& pass, F inv_scale, F beta, F one_minus_beta,
                const Adamw* a, Sums& sum) {
  G grad[F::W] = {};
  P param[F::W] = {};
  float m[F::W] = {}, v[F::W] = {}, ema[F::W] = {}, previous[F::W] = {};
  std::memcpy(grad, s.grad, n * sizeof(G));
  if (adamw) std::memcpy(param, s.param, n * sizeof(P));
  if (adamw) std::memcpy(m, s.m, n * sizeof(float));
  if (adamw) std::memcpy(v, s.v, n * sizeof(float));
  if (s.ema) std::memcpy(ema, s.ema, n * sizeof(float));
  if (s.previous) std::memcpy(previous, s.previous, n * sizeof(float));
  const Streams<G, P> padded{grad, param, m, v, s.ema ? ema : nullptr, s.previous ? previous : nullptr};
  visit<G, P, adamw, sums>(padded, pass, inv_scale, beta, one_minus_beta, a, sum);
  if (adamw) std::memcpy(s.param, param, n * sizeof(P));
  if (adamw) std::memcpy(s.m, m, n * sizeof(float));
  if (adamw) std::memcpy(s.v, v, n * sizeof(float));
  if (adamw && pass.zero_grad) std::memcpy(s.grad, grad, n * sizeof(G));
  if (s.ema) std::memcpy(s.ema, ema, n * sizeof(float));
  if (s.previous) std::memcpy(s.previous, previous, n * sizeof(float));
}

template <class T>
T* at(void* const* base, int64_t i, int64_t offset) {
  return base ? static_cast<T*>(base[i]) + offset : nullptr;
}

/* Chunks [first, last) of the plan; the sums of chunk i go to partials[i * GRGAUGE_SUMS]. */
template <class G, class P, bool adamw, bool sums>
void visit_chunks(const grgauge_pass& pass, int64_t first, int64_t last, double* partials) {
  const F inv_scale = F::all(pass.inv_scale ? *pass.inv_scale : 1.0f);
  const F beta = F::all(float(pass.beta)), one_minus_beta = F::all(float(1.0 - pass.beta));
  Adamw scalars(pass, adamw && first < last ? step_of(pass, pass.rows[first].segment) : 1.0);

  for (int64_t c = first; c < last; ++c) {
    const grgauge_row row = pass.rows[c];
    const int64_t base = pass.flat ? 0 : row.segment;
    if (adamw && step_of(pass, row.segment) != scalars.step) scalars = Adamw(pass, step_of(pass, row.segment));
    const Streams<G, P> s{at<G>(pass.grads, base, row.offset),
                          at<P>(pass.params, base, row.offset),
                          at<float>(pass.exp_avgs, base, row.offset),
                          at<float>(pass.exp_avg_sqs, base, row.offset),
                          pass.ema ? pass.ema + row.state : nullptr,
                          pass.previous ? pass.previous + row.state : nullptr};
    Sums sum;
    const int64_t whole = row.length / F::W * F::W;
    for (int64_t i = 0; i < whole; i += F::W)
      visit<G, P, adamw, sums>(s.at(i), pass, inv_scale, beta, one_minus_beta, &scalars, sum);
    if (whole < row.length)
      visit_tail<G, P, adamw, sums>(s.at(whole), row.length - whole, pass, inv_scale, beta, one_minus_beta, &scalars,
                                    sum);
    if (sums) {
      double* out = partials + c * GRGAUGE_SUMS;
      out[0] = sum.grad_sq.total();
      out[1] = sum.ema_sq.total();
      out[2] = sum.grad_abs.total();
      out[3] = sum.delta_sq.total();
      out[4] = sum.delta_abs.total();
      out[5] = double(sum.nonfinite);
    }
  }
}

template <class G, class P>
visit_function choose_sums(const grgauge_pass& pass) {
  return pass.stats ? visit_chunks<G, P, true, true> : visit_chunks<G, P, true, false>;
}

template <class G>
visit_function choose_param(const grgauge_pass& pass) {
  if (!pass.params) return visit_chunks<G, float, false, true>;
  switch (pass.param_dtype) {
    case GRGAUGE_F32: return choose_sums<G, float>(pass);
    case GRGAUGE_BF16: return choose_sums<G, bf16>(pass);
    case GRGAUGE_F16: return choose_sums<G, f16>(pass);
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
