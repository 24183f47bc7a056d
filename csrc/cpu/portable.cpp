/* Any processor: short fixed loops that the compiler may vectorise with whatever is always there. Also the plainest
 * definition of what chunk.h expects of F and D. */
#include <cmath>
#include <cstring>

#include "pass.h"

namespace grgauge {
namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float widen(float value) { return value; }
float widen(bf16 value) { return from_bits(uint32_t(value.bits) << 16); }
float widen(f16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13); /* infinite, NaN */
  if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  const float subnormal = float(rest) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

/* To nearest, ties to even; NaN stays NaN. */
void narrow(float value, float* p) { *p = value; }
void narrow(float value, bf16* p) {
  const uint32_t bits = to_bits(value);
  p->bits = std::isnan(value) ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
/* `random`: 16 bits. */
void narrow(float value, sbf16* p, uint32_t random) {
  const uint32_t bits = to_bits(value);
  p->bits = uint16_t((bits + (int(bits & 0x7fffffff) <= kLargestBf16 ? random : 0)) >> 16);
}
void narrow(float value, f16* p) {
  const uint32_t sign = to_bits(value) >> 16 & 0x8000, bits = to_bits(value) & 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00; /* NaN */
  } else if (bits >= 0x477ff000) {
    half = 0x7c00; /* rounds beyond 65504 */
  } else if (bits >= 0x38800000) {
    half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  } else {
    /* Subnormal: adding 1/2 moves the last place of the half to the last place of the float, which rounds for us. */
    half = to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f);
  }
  p->bits = uint16_t(sign | half);
}

struct Mask {
  bool lane[8];
};

struct U {
  uint32_t x[8] = {};

  template <class Element>
  static U make(Element element) {
    U out;
    for (int i = 0; i < 8; ++i) out.x[i] = element(i);
    return out;
  }
  static U all(uint32_t value) {
    return make([=](int) { return value; });
  }
  static U from(uint32_t first) { /* first, first + 1, ... */
    return make([=](int i) { return first + uint32_t(i); });
  }
};

U operator^(const U& a, const U& b) {
  return U::make([&](int i) { return a.x[i] ^ b.x[i]; });
}
U operator&(const U& a, const U& b) {
  return U::make([&](int i) { return a.x[i] & b.x[i]; });
}
U operator*(const U& a, const U& b) {
  return U::make([&](int i) { return a.x[i] * b.x[i]; });
}
U operator>>(const U& a, int n) {
  return U::make([&](int i) { return a.x[i] >> n; });
}

struct F {
  static constexpr int W = 8;
  float x[W] = {};

  template <class Element>
  static F make(Element element) {
    F out;
    for (int i = 0; i < W; ++i) out.x[i] = element(i);
    return out;
  }
  static F all(float value) {
    return make([=](int) { return value; });
  }
  template <class T>
  static F load(const T* p) {
    return make([=](int i) { return widen(p[i]); });
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < W; ++i) narrow(x[i], p + i);
  }
  void store(sbf16* p, const U& random) const {
    for (int i = 0; i < W; ++i) narrow(x[i], p + i, random.x[i]);
  }
  static F fma(const F& a, const F& b, const F& c) { /* two roundings: a fused one is slow where it is no instruction */
    return make([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  static F sqrt(const F& a) {
    return make([&](int i) { return std::sqrt(a.x[i]); });
  }
  static F abs(const F& a) {
    return make([&](int i) { return std::fabs(a.x[i]); });
  }
  static F select(const Mask& mask, const F& yes) { return select(mask, yes, all(0.0f)); }
  static F select(const Mask& mask, const F& yes, const F& no) {
    return make([&](int i) { return mask.lane[i] ? yes.x[i] : no.x[i]; });
  }
  static int count(const Mask& mask) {
    int n = 0;
    for (bool lane : mask.lane) n += lane;
    return n;
  }
};

F operator+(const F& a, const F& b) {
  return F::make([&](int i) { return a.x[i] + b.x[i]; });
}
F operator-(const F& a, const F& b) {
  return F::make([&](int i) { return a.x[i] - b.x[i]; });
}
F operator*(const F& a, const F& b) {
  return F::make([&](int i) { return a.x[i] * b.x[i]; });
}
F operator/(const F& a, const F& b) {
  return F::make([&](int i) { return a.x[i] / b.x[i]; });
}
Mask operator<=(const F& a, const F& b) {
  Mask mask;
  for (int i = 0; i < F::W; ++i) mask.lane[i] = a.x[i] <= b.x[i];
  return mask;
}

struct D {
  double x[F::W] = {};

  void add(const F& a) {
    for (int i = 0; i < F::W; ++i) x[i] += double(a.x[i]);
  }
  double total() const {
    double sum = 0.0;
    for (double lane : x) sum += lane;
    return sum;
  }
};

}  // namespace
}  // namespace grgauge

#include "chunk.h"

grgauge::visit_function grgauge::choose_portable(const grgauge_pass& pass) { return choose(pass); }
