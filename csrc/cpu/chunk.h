/* The loop: everything the library computes for one chunk, written once and compiled for each instruction set.
 *
 * The including file defines a vector `F` of F::W floats, and of as many doubles `D` and 32-bit words `U` (portable.cpp).
 * All multiply-adds are spelled out: with or without sums, an element's update goes through the same operations and
 * ends in the same bits.
 */
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "pass.h"

namespace grgauge {
namespace {

constexpr float kLargest = 1e16f; /* beyond it an element counts as non-finite: its square would not survive float32 */
constexpr float kSound = 0.99f * kLargest * kLargest; /* a sum of squares up to here has no such element in it */

/* Everything that is the same for all elements of a segment; with AdamW, the scalars of torch's formula. */
struct Scalars {
  F inv_scale, beta, one_minus_beta;
  F decay, weight1, beta2, weight2, step_size, root2, eps, direction;
  double step;
  bool zero_grad, far;

  Scalars(const grgauge_pass& pass, double step_) : step(step_), zero_grad(pass.zero_grad), far(fetches_ahead(pass)) {
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

/* The random bits of stochastic rounding: two words that depend on (seed, step, segment), and a hash of an element's
 * place with them. grgauge_kernels/backends/reference.py says it once more and why it is two rounds. */
constexpr uint32_t kFactor1 = 0x7feb352d, kFactor2 = 0x846ca68b, kGolden = 0x9e3779b1;

struct Key {
  uint32_t first, second;

  static uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * kFactor1;
    x = (x ^ x >> 15) * kFactor2;
    return x ^ x >> 16;
  }
  Key(const grgauge_pass& pass, const grgauge_row& row) {
    first = mix(mix(mix(pass.seed) ^ uint32_t(step_of(pass, row.segment))) ^ uint32_t(row.segment));
    second = mix(first ^ kGolden);
    first += uint32_t(row.offset - (pass.origins ? pass.origins[row.segment] : 0)); /* of the chunk's first element */
  }
  Key(const Key& chunk, int64_t i) : first(chunk.first + uint32_t(i)), second(chunk.second) {}

  U draw(int64_t i) const {
    U x = U::from(first + uint32_t(i));
    x = (x ^ x >> 16) * U::all(kFactor1);
    x = (x ^ x >> 15 ^ U::all(second)) * U::all(kFactor2);
    return x ^ x >> 16;
  }
};

struct NoKey {
  NoKey(const grgauge_pass&, const grgauge_row&) {}
  NoKey(const NoKey&, int64_t) {}
};

/* P and M are what parameters and moments are stored as; sbf16 takes random bits. */
template <class P, class M>
using Bits = std::conditional_t<std::is_same_v<P, sbf16> || std::is_same_v<M, sbf16>, Key, NoKey>;

template <class G, class P, class M>
struct Streams {
  G* grad;
  P* param;
  M *m, *v;
  float *ema, *previous;
  Bits<P, M> bits;
};

template <class T>
void store(F x, T* p, U) {
  x.store(p);
}
void store(F x, sbf16* p, U random) { x.store(p, random); }

/* Sums of a few vectors in float, moved into double before seven additions' rounding could add up to 1e-6: a conversion
 * of every vector would cost more than the sums themselves. */
constexpr int kVectors = 16;

struct Sums {
  F grad_sq{}, ema_sq{}, grad_abs{}, delta_sq{}, delta_abs{};
  int64_t nonfinite = 0;

  bool sound() const {
    const F limit = F::all(kSound);
    return F::count(grad_sq <= limit) == F::W && F::count(ema_sq <= limit) == F::W;
  }
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

/* Fetch what comes this many elements later, where `fetches_ahead` says that it pays. */
constexpr int64_t kAhead = 1024;

template <class T>
void prefetch(const T* p, int64_t i) {
  /* As a number: the address may lie past the end of the tensor, where a pointer may not point. */
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + (i + kAhead) * sizeof(T)));
}

/* What a loop is compiled for. With `states` ema or previous is there; `scaled`: gradients are multiplied by something;
 * `masked`: non-finite elements are left out of the sums one by one, else whoever sums looks for them afterwards. */
template <bool adamw_, bool sums_, bool states_, bool scaled_, bool masked_>
struct Kind {
  static constexpr bool adamw = adamw_, sums = sums_, states = states_, scaled = scaled_, masked = masked_;
};

template <class K, class G, class P, class M>
void prefetch(const Streams<G, P, M>& s, int64_t i) {
  prefetch(s.grad, i);
  if (K::adamw) prefetch(s.param, i), prefetch(s.m, i), prefetch(s.v, i);
  if (K::states && s.ema) prefetch(s.ema, i);
  if (K::states && s.previous) prefetch(s.previous, i);
}

/* The elements from i on that fill one vector. */
template <class K, class G, class P, class M>
inline __attribute__((always_inline)) void visit(const Streams<G, P, M>& s, int64_t i, const Scalars& a, Sums& sum) {
  const F largest = F::all(kLargest);
  const F g = K::scaled ? F::load(s.grad + i) * a.inv_scale : F::load(s.grad + i);
  const auto finite = F::abs(g) <= largest;
  const F clean = K::masked ? F::select(finite, g) : g;
  F m{};

  if (K::states && s.ema) {
    const F old = F::load(s.ema + i);
    m = F::select(finite, F::fma(a.beta, old, a.one_minus_beta * clean), old);
    m.store(s.ema + i);
  }
  if (K::states && s.previous) {
    const F old = F::load(s.previous + i);
    const F delta = F::select(finite, clean - old);
    F::select(finite, clean, old).store(s.previous + i);
    if (K::sums) {
      sum.delta_sq = F::fma(delta, delta, sum.delta_sq);
      sum.delta_abs = sum.delta_abs + F::abs(delta);
    }
  }
  if (K::adamw) {
    const F update = K::scaled ? g * a.direction : g;
    const F old = F::load(s.m + i);
    const F exp_avg = F::fma(a.weight1, update - old, old);
    const F exp_avg_sq = F::fma(a.beta2, F::load(s.v + i), a.weight2 * update * update);
    const F denominator = F::fma(F::sqrt(exp_avg_sq), a.root2, a.eps);
    const F param = F::fma(a.step_size, exp_avg / denominator, F::load(s.param + i) * a.decay);
    if constexpr (std::is_same_v<Bits<P, M>, NoKey>) {
      param.store(s.param + i);
      exp_avg.store(s.m + i);
      exp_avg_sq.store(s.v + i);
    } else {
      const U random = s.bits.draw(i);
      store(param, s.param + i, random * U::all(kGolden) >> 16);
      store(exp_avg, s.m + i, random >> 16);
      store(exp_avg_sq, s.v + i, random & U::all(0xffff));
    }
    if (K::masked && a.zero_grad) F::all(0.0f).store(s.grad + i);
    if (!(K::states && s.ema)) m = K::masked ? F::select(F::abs(exp_avg) <= largest, exp_avg) : exp_avg;
  }
  if (K::sums) {
    sum.grad_sq = F::fma(clean, clean, sum.grad_sq);
    sum.grad_abs = sum.grad_abs + F::abs(clean);
    sum.ema_sq = F::fma(m, m, sum.ema_sq);
    if (K::masked) sum.nonfinite += F::W - F::count(finite);
  }
}

/* The sums of [i, end) once more, after an update that found something in there to leave out. */
template <class K, class G, class P, class M>
Sums recount(const Streams<G, P, M>& s, int64_t i, int64_t end, const Scalars& a) {
  const F largest = F::all(kLargest);
  Sums sum;
  for (; i < end; i += F::W) {
    const F g = K::scaled ? F::load(s.grad + i) * a.inv_scale : F::load(s.grad + i);
    const auto finite = F::abs(g) <= largest;
    const F clean = F::select(finite, g);
    sum.grad_sq = F::fma(clean, clean, sum.grad_sq);
    sum.grad_abs = sum.grad_abs + F::abs(clean);
    sum.nonfinite += F::W - F::count(finite);
    if (K::adamw) {
      const F exp_avg = F::load(s.m + i), m = F::select(F::abs(exp_avg) <= largest, exp_avg);
      sum.ema_sq = F::fma(m, m, sum.ema_sq);
    }
  }
  return sum;
}

template <class T>
void copy(T* to, const T* from, int64_t n) {
  std::memcpy(to, from, n * sizeof(T));
}

/* The last, partial vector of a chunk: moved through a zero-padded copy, so its elements see the same operations. One
 * function for all kinds, as where nothing is scaled a multiplication by 1 changes nothing. */
template <class K, class G, class P, class M>
__attribute__((noinline)) void visit_tail(const Streams<G, P, M>& s, int64_t i, int64_t n, const Scalars& a, Sums& sum) {
  G grad[F::W] = {};
  P param[F::W] = {};
  M m[F::W] = {}, v[F::W] = {};
  float ema[F::W] = {}, previous[F::W] = {};
  const Streams<G, P, M> padded{grad, param, m, v, s.ema ? ema : nullptr, s.previous ? previous : nullptr, {s.bits, i}};
  copy(grad, s.grad + i, n);
  if (K::adamw) copy(param, s.param + i, n), copy(m, s.m + i, n), copy(v, s.v + i, n);
  if (s.ema) copy(ema, s.ema + i, n);
  if (s.previous) copy(previous, s.previous + i, n);
  visit<K>(padded, 0, a, sum);
  if (K::adamw) copy(s.param + i, param, n), copy(s.m + i, m, n), copy(s.v + i, v, n);
  if (K::adamw && a.zero_grad) copy(s.grad + i, grad, n);
  if (s.ema) copy(s.ema + i, ema, n);
  if (s.previous) copy(s.previous + i, previous, n);
}

template <class T>
T* at(void* const* base, int64_t i, int64_t offset) {
  return base ? static_cast<T*>(base[i]) + offset : nullptr;
}

/* One chunk's whole vectors. */
template <class K, class G, class P, class M>
void visit_vectors(const Streams<G, P, M>& s, int64_t whole, const Scalars& a, Totals& total) {
  for (int64_t i = 0; i < whole;) {
    const int64_t begin = i, end = std::min(whole, i + kVectors * F::W);
    Sums sum;
    for (; i < end; i += F::W) {
      if (a.far) prefetch<K>(s, i);
      visit<K>(s, i, a, sum);
    }
    if (K::sums && !K::masked && !sum.sound()) sum = recount<K>(s, begin, end, a);
    if (K::sums) total.add(sum, K::states);
  }
}

/* Chunks [first, last) of the plan; the sums of chunk i go to partials[i * GRGAUGE_SUMS]. */
template <class K, class G, class P, class M>
void visit_chunks(const grgauge_pass& pass, int64_t first, int64_t last, double* partials) {
  using Any = Kind<K::adamw, true, true, true, true>;
  Scalars scalars(pass, K::adamw && first < last ? step_of(pass, pass.rows[first].segment) : 1.0);

  for (int64_t c = first; c < last; ++c) {
    const grgauge_row row = pass.rows[c];
    const int64_t base = pass.flat ? 0 : row.segment;
    if (K::adamw && step_of(pass, row.segment) != scalars.step) scalars = Scalars(pass, step_of(pass, row.segment));
    const Streams<G, P, M> s{at<G>(pass.grads, base, row.offset),
                             at<P>(pass.params, base, row.offset),
                             at<M>(pass.exp_avgs, base, row.offset),
                             at<M>(pass.exp_avg_sqs, base, row.offset),
                             pass.ema ? pass.ema + row.state : nullptr,
                             pass.previous ? pass.previous + row.state : nullptr,
                             {pass, row}};
    Totals total;
    const int64_t whole = row.length / F::W * F::W;
    visit_vectors<K>(s, whole, scalars, total);
    if (whole < row.length) {
      Sums sum;
      visit_tail<Any>(s, whole, row.length - whole, scalars, sum);
      if (K::sums) total.add(sum, K::states);
    }
    if (K::sums) {
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

template <class G, class P, bool adamw, bool scaled>
visit_function choose_sums(const grgauge_pass& pass) {
  if (pass.ema || pass.previous) return visit_chunks<Kind<adamw, true, true, scaled, true>, G, P, float>;
  const bool sums = !adamw || pass.stats;
  if (pass.zero_grad && adamw) /* the gradient is gone when somebody would like to look again */
    return sums ? visit_chunks<Kind<adamw, true, false, scaled, true>, G, P, float>
                : visit_chunks<Kind<adamw, false, false, scaled, true>, G, P, float>;
  return sums ? visit_chunks<Kind<adamw, true, false, scaled, false>, G, P, float>
              : visit_chunks<Kind<adamw, false, false, scaled, false>, G, P, float>;
}

template <class G, class P, bool adamw>
visit_function choose_scaled(const grgauge_pass& pass) {
  const bool scaled = pass.inv_scale || (adamw && (pass.clip || pass.maximize));
  return scaled ? choose_sums<G, P, adamw, true>(pass) : choose_sums<G, P, adamw, false>(pass);
}

/* With stochastic rounding, sums are of moments as they were before rounding, which nobody can look for afterwards. */
template <class G, class P, class M, bool scaled>
visit_function choose_rounded(const grgauge_pass& pass) {
  if (pass.ema || pass.previous) return visit_chunks<Kind<true, true, true, scaled, true>, G, P, M>;
  if (pass.stats) return visit_chunks<Kind<true, true, false, scaled, true>, G, P, M>;
  return pass.zero_grad ? visit_chunks<Kind<true, false, false, scaled, true>, G, P, M>
                        : visit_chunks<Kind<true, false, false, scaled, false>, G, P, M>;
}

template <class G, class P, class M>
visit_function choose_rounding(const grgauge_pass& pass) {
  const bool scaled = pass.inv_scale || pass.clip || pass.maximize;
  return scaled ? choose_rounded<G, P, M, true>(pass) : choose_rounded<G, P, M, false>(pass);
}

template <class G>
visit_function choose_param(const grgauge_pass& pass) {
  if (!pass.params) return choose_scaled<G, float, false>(pass);
  const bool small = pass.moment_dtype == GRGAUGE_BF16;
  if (!small && pass.moment_dtype != GRGAUGE_F32) return nullptr;
  switch (pass.param_dtype) {
    case GRGAUGE_F32: return small ? choose_rounding<G, float, sbf16>(pass) : choose_scaled<G, float, true>(pass);
    case GRGAUGE_BF16:
      if (pass.stochastic_rounding)
        return small ? choose_rounding<G, sbf16, sbf16>(pass) : choose_rounding<G, sbf16, float>(pass);
      return small ? choose_rounding<G, bf16, sbf16>(pass) : choose_scaled<G, bf16, true>(pass);
    case GRGAUGE_F16: return small ? choose_rounding<G, f16, sbf16>(pass) : choose_scaled<G, f16, true>(pass);
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
