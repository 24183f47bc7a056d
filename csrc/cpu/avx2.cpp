/* 8 floats in a register. */
#include <immintrin.h>

#include "pass.h"

namespace grgauge {
namespace {

struct U {
  __m256i x = _mm256_setzero_si256();

  static U all(uint32_t value) { return {_mm256_set1_epi32(int(value))}; }
  static U from(uint32_t first) { /* first, first + 1, ... */
    return {_mm256_add_epi32(all(first).x, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
  }
};

U operator^(U a, U b) { return {_mm256_xor_si256(a.x, b.x)}; }
U operator&(U a, U b) { return {_mm256_and_si256(a.x, b.x)}; }
U operator*(U a, U b) { return {_mm256_mullo_epi32(a.x, b.x)}; }
U operator>>(U a, int n) { return {_mm256_srli_epi32(a.x, n)}; }

struct F {
  static constexpr int W = 8;
  __m256 x = _mm256_setzero_ps();

  static F all(float value) { return {_mm256_set1_ps(value)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static F load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, x); }
  void store(f16* p) const {
    const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
  void store(bf16* p) const { /* to nearest, ties to even; NaN stays NaN */
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    store_top(p, _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan));
  }
  void store(sbf16* p, U random) const { /* `random`: 16 bits an element, less than 2^16 */
    const __m256i largest = _mm256_set1_epi32(kLargestBf16), size = _mm256_castps_si256(abs(*this).x);
    const __m256i added = _mm256_andnot_si256(_mm256_cmpgt_epi32(size, largest), random.x);
    store_top(p, _mm256_add_epi32(_mm256_castps_si256(x), added));
  }
  static void store_top(bf16* p, __m256i bits) {
    const __m256i top = _mm256_srli_epi32(bits, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
  static F sqrt(F a) { return {_mm256_sqrt_ps(a.x)}; }
  static F abs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.x)}; }
  static F select(__m256 mask, F yes) { return {_mm256_and_ps(mask, yes.x)}; }
  static F select(__m256 mask, F yes, F no) { return {_mm256_blendv_ps(no.x, yes.x, mask)}; }
  static int count(__m256 mask) { return __builtin_popcount(_mm256_movemask_ps(mask)); }
};

F operator+(F a, F b) { return {_mm256_add_ps(a.x, b.x)}; }
F operator-(F a, F b) { return {_mm256_sub_ps(a.x, b.x)}; }
F operator*(F a, F b) { return {_mm256_mul_ps(a.x, b.x)}; }
F operator/(F a, F b) { return {_mm256_div_ps(a.x, b.x)}; }
__m256 operator<=(F a, F b) { return _mm256_cmp_ps(a.x, b.x, _CMP_LE_OQ); }

struct D {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();

  static __m256d lower(F a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a.x)); }
  static __m256d upper(F a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a.x, 1)); }
  void add(F a) {
    low = _mm256_add_pd(low, lower(a));
    high = _mm256_add_pd(high, upper(a));
  }
  double total() const {
    alignas(32) double lane[4];
    _mm256_store_pd(lane, _mm256_add_pd(low, high));
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
  }
};

}  // namespace
}  // namespace grgauge

#include "chunk.h"

grgauge::visit_function grgauge::choose_avx2(const grgauge_pass& pass) { return choose(pass); }
