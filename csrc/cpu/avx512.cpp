/* 16 floats in a register. */
#include <immintrin.h>

#include "pass.h"

namespace grgauge {
namespace {

struct U {
  __m512i x = _mm512_setzero_si512();

  static U all(uint32_t value) { return {_mm512_set1_epi32(int(value))}; }
  static U from(uint32_t first) { /* first, first + 1, ... */
    return {_mm512_add_epi32(all(first).x, _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))};
  }
};

U operator^(U a, U b) { return {_mm512_xor_si512(a.x, b.x)}; }
U operator&(U a, U b) { return {_mm512_and_si512(a.x, b.x)}; }
U operator*(U a, U b) { return {_mm512_mullo_epi32(a.x, b.x)}; }
U operator>>(U a, int n) { return {_mm512_srli_epi32(a.x, unsigned(n))}; }

struct F {
  static constexpr int W = 16;
  __m512 x = _mm512_setzero_ps();

  static F all(float value) { return {_mm512_set1_ps(value)}; }
  static F load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static F load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, x); }
  void store(f16* p) const {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  void store(bf16* p) const { /* to nearest, ties to even; NaN stays NaN */
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i top = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    top = _mm512_mask_set1_epi32(top, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), 0x7fc00000);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(top, 16)));
  }
  void store(sbf16* p, U random) const { /* `random`: 16 bits an element, less than 2^16 */
    const __m512i bits = _mm512_castps_si512(x), size = _mm512_castps_si512(abs(*this).x);
    const __mmask16 inside = _mm512_cmple_epi32_mask(size, _mm512_set1_epi32(kLargestBf16));
    const __m512i top = _mm512_srli_epi32(_mm512_mask_add_epi32(bits, inside, bits, random.x), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
  }
  static F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
  /* The instruction would keep the divider busy that the update's division needs. An estimate of 1/sqrt(a), good to
   * 2^-14, and one Newton step end within an ulp of it; zero, infinity and NaN are their own roots. */
  static F sqrt(F a) {
    const __m512 estimate = _mm512_rsqrt14_ps(a.x), root = _mm512_mul_ps(a.x, estimate);
    const __m512 half = _mm512_mul_ps(estimate, _mm512_set1_ps(0.5f));
    const __m512 better = _mm512_fmadd_ps(_mm512_fnmadd_ps(root, root, a.x), half, root);
    return {_mm512_mask_mov_ps(better, _mm512_fpclass_ps_mask(a.x, 0x9f), a.x)};
  }
  static F abs(F a) { return {_mm512_abs_ps(a.x)}; }
  static F select(__mmask16 mask, F yes) { return {_mm512_maskz_mov_ps(mask, yes.x)}; }
  static F select(__mmask16 mask, F yes, F no) { return {_mm512_mask_mov_ps(no.x, mask, yes.x)}; }
  static int count(__mmask16 mask) { return __builtin_popcount(mask); }
};

F operator+(F a, F b) { return {_mm512_add_ps(a.x, b.x)}; }
F operator-(F a, F b) { return {_mm512_sub_ps(a.x, b.x)}; }
F operator*(F a, F b) { return {_mm512_mul_ps(a.x, b.x)}; }
F operator/(F a, F b) { return {_mm512_div_ps(a.x, b.x)}; }
__mmask16 operator<=(F a, F b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_LE_OQ); }

struct D {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();

  static __m512d lower(F a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a.x)); }
  static __m512d upper(F a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.x, 1)); }
  void add(F a) {
    low = _mm512_add_pd(low, lower(a));
    high = _mm512_add_pd(high, upper(a));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

}  // namespace
}  // namespace grgauge

#include "chunk.h"

grgauge::visit_function grgauge::choose_avx512(const grgauge_pass& pass) { return choose(pass); }
