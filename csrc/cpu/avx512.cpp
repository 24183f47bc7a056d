/* 32 floats in two registers: as many bfloat16s fill one, which two instructions take apart and one puts together. */
#include <immintrin.h>

#include "pass.h"

namespace grgauge {
namespace {

/* first, first + step, ... */
__m512i places(int first, int step) {
  const __m512i k = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_mullo_epi32(k, _mm512_set1_epi32(step)));
}

struct U {
  __m512i a = _mm512_setzero_si512(), b = _mm512_setzero_si512();

  static U all(uint32_t value) { return {_mm512_set1_epi32(int(value)), _mm512_set1_epi32(int(value))}; }
  static U from(uint32_t first) { /* first, first + 1, ... */
    const __m512i begin = _mm512_set1_epi32(int(first));
    return {_mm512_add_epi32(begin, places(0, 1)), _mm512_add_epi32(begin, places(16, 1))};
  }
};

U operator^(U x, U y) { return {_mm512_xor_si512(x.a, y.a), _mm512_xor_si512(x.b, y.b)}; }
U operator&(U x, U y) { return {_mm512_and_si512(x.a, y.a), _mm512_and_si512(x.b, y.b)}; }
U operator*(U x, U y) { return {_mm512_mullo_epi32(x.a, y.a), _mm512_mullo_epi32(x.b, y.b)}; }
U operator>>(U x, int n) { return {_mm512_srli_epi32(x.a, unsigned(n)), _mm512_srli_epi32(x.b, unsigned(n))}; }

struct Mask {
  __mmask16 a, b;
};

struct F {
  static constexpr int W = 32;
  __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();

  static F all(float value) { return {_mm512_set1_ps(value), _mm512_set1_ps(value)}; }
  static F load(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
  static F load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
            _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)))};
  }
  static F load(const bf16* p) {
    const __m512i words = _mm512_loadu_si512(p);
    return {uppers(words, places(0, 1)), uppers(words, places(16, 1))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, a), _mm512_storeu_ps(p + 16, b); }
  void store(f16* p) const { half(a, p), half(b, p + 16); }
  void store(bf16* p) const { tops(nearest(a), nearest(b), p); }
  void store(sbf16* p, U random) const { /* `random`: 16 bits an element, less than 2^16 */
    tops(stochastic(a, random.a), stochastic(b, random.b), p);
  }
  static F fma(F x, F y, F z) { return {_mm512_fmadd_ps(x.a, y.a, z.a), _mm512_fmadd_ps(x.b, y.b, z.b)}; }
  static F sqrt(F x) { return {root(x.a), root(x.b)}; }
  static F abs(F x) { return {_mm512_abs_ps(x.a), _mm512_abs_ps(x.b)}; }
  static F select(Mask mask, F yes) {
    return {_mm512_maskz_mov_ps(mask.a, yes.a), _mm512_maskz_mov_ps(mask.b, yes.b)};
  }
  static F select(Mask mask, F yes, F no) {
    return {_mm512_mask_mov_ps(no.a, mask.a, yes.a), _mm512_mask_mov_ps(no.b, mask.b, yes.b)};
  }
  static int count(Mask mask) { return __builtin_popcount(_mm512_kunpackw(mask.a, mask.b)); }

 private:
  static void half(__m512 x, f16* p) {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  static __m512 uppers(__m512i words, __m512i which) { /* these of 32 words, as upper halves of numbers */
    const __m512i from = _mm512_slli_epi32(which, 16);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, words));
  }
  static void tops(__m512i x, __m512i y, bf16* p) { /* the upper halves of 32 numbers */
    const __m512i odd = _mm512_or_si512(places(1, 4), _mm512_slli_epi32(places(3, 4), 16));
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(x, odd, y));
  }
  static __m512i nearest(__m512 x) { /* ties to even; NaN stays NaN */
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i top = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_set1_epi32(top, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), 0x7fc00000);
  }
  static __m512i stochastic(__m512 x, __m512i random) {
    const __m512i bits = _mm512_castps_si512(x), size = _mm512_castps_si512(_mm512_abs_ps(x));
    return _mm512_mask_add_epi32(bits, _mm512_cmple_epi32_mask(size, _mm512_set1_epi32(kLargestBf16)), bits, random);
  }
  /* The instruction would keep the divider busy that the update's division needs. An estimate of 1/sqrt(x), good to
   * 2^-14, and one Newton step end within an ulp of it; zero, infinity and NaN are their own roots. */
  static __m512 root(__m512 x) {
    const __m512 estimate = _mm512_rsqrt14_ps(x), root = _mm512_mul_ps(x, estimate);
    const __m512 half = _mm512_mul_ps(estimate, _mm512_set1_ps(0.5f));
    const __m512 better = _mm512_fmadd_ps(_mm512_fnmadd_ps(root, root, x), half, root);
    return _mm512_mask_mov_ps(better, _mm512_fpclass_ps_mask(x, 0x9f), x);
  }
};

F operator+(F x, F y) { return {_mm512_add_ps(x.a, y.a), _mm512_add_ps(x.b, y.b)}; }
F operator-(F x, F y) { return {_mm512_sub_ps(x.a, y.a), _mm512_sub_ps(x.b, y.b)}; }
F operator*(F x, F y) { return {_mm512_mul_ps(x.a, y.a), _mm512_mul_ps(x.b, y.b)}; }
F operator/(F x, F y) { return {_mm512_div_ps(x.a, y.a), _mm512_div_ps(x.b, y.b)}; }
Mask operator<=(F x, F y) { return {_mm512_cmp_ps_mask(x.a, y.a, _CMP_LE_OQ), _mm512_cmp_ps_mask(x.b, y.b, _CMP_LE_OQ)}; }

struct D {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();

  void add(F x) { add(x.a), add(x.b); }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }

 private:
  void add(__m512 x) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
  }
};

}  // namespace
}  // namespace grgauge

#include "chunk.h"

grgauge::visit_function grgauge::choose_avx512(const grgauge_pass& pass) { return choose(pass); }
