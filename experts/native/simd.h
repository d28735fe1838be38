// One vector of floats, `Vf`, and the arithmetic the kernels need, for two instruction sets.
//
//   avx512bf16   16 floats; bf16 pairs multiply with vdpbf16ps
//   avx2         8 floats; bf16 pairs are widened to float32 and multiply with two FMAs
//
// Both read the same packed weights (gemm.h). The instruction set is fixed by the compiler's -m
// flags (build.py); nothing here asks the CPU. Contraction is off (-ffp-contract=off): an FMA stands
// where `fma` is written and nowhere else, so a result never depends on how a loop was vectorised.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace em {

using bf16 = uint16_t;

inline float widen(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
inline bf16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512BF16__)

struct Vf {
  static constexpr int W = 16;
  __m512 v;
};
inline __mmask16 lanes(int n) { return __mmask16((1u << n) - 1); }
inline Vf zero() { return {_mm512_setzero_ps()}; }
inline Vf set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vf load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline Vf load(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline Vf load(const bf16* p, int n) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p)), 16))};
}
inline void store(float* p, Vf a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vf a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
inline __m256i narrow(Vf a) {  // integer rounding, so denormals survive as they do in torch
  __m512i bits = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
inline void store(bf16* p, Vf a) { _mm256_storeu_si256((__m256i*)p, narrow(a)); }
inline void store(bf16* p, Vf a, int n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow(a)); }
inline Vf operator+(Vf a, Vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vf operator-(Vf a, Vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vf operator*(Vf a, Vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vf operator/(Vf a, Vf b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vf fma(Vf a, Vf b, Vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vf fnma(Vf a, Vf b, Vf c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vf max(Vf a, Vf b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
inline Vf min(Vf a, Vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vf sqrt(Vf a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vf round(Vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | 8)}; }
inline Vf scale2(Vf a, Vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n
inline float sum(Vf a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vf a) { return _mm512_reduce_max_ps(a.v); }
// Keep lane i where `first + i <= last`, else `other`.
inline Vf keep_up_to(Vf a, int64_t first, int64_t last, Vf other) {
  int64_t n = last - first + 1;
  __mmask16 m = n >= 16 ? 0xffff : n <= 0 ? 0 : lanes(int(n));
  return {_mm512_mask_mov_ps(other.v, m, a.v)};
}

// One 32-bit word of weights for each of W columns, times one word of x, added to W sums.
struct PairBf16 {
  using Elem = bf16;
  static constexpr int K = 2;  // inputs in a word
  struct Word {
    __m512bh v;
  };
  static Word weights(const uint32_t* w) { return {(__m512bh)_mm512_loadu_si512(w)}; }
  static Word input(const uint32_t* x) { return {(__m512bh)_mm512_set1_epi32(int(*x))}; }
  static void multiply(Vf& acc, Word w, Word x) { acc.v = _mm512_dpbf16_ps(acc.v, w.v, x.v); }
};

#else

struct Vf {
  static constexpr int W = 8;
  __m256 v;
};
inline __m256i lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vf zero() { return {_mm256_setzero_ps()}; }
inline Vf set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vf load(const float* p, int n) { return {_mm256_maskload_ps(p, lanes(n))}; }
inline Vf load(const bf16* p) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
}
inline Vf load(const bf16* p, int n) {
  bf16 part[8] = {};
  std::memcpy(part, p, size_t(n) * 2);
  return load(part);
}
inline void store(float* p, Vf a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vf a, int n) { _mm256_maskstore_ps(p, lanes(n), a.v); }
inline void store(bf16* p, Vf a) {
  __m256i bits = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  up = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(up),
                                                 _mm256_extracti128_si256(up, 1)));
}
inline void store(bf16* p, Vf a, int n) {
  bf16 part[8];
  store(part, a);
  std::memcpy(p, part, size_t(n) * 2);
}
inline Vf operator+(Vf a, Vf b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vf operator-(Vf a, Vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vf operator*(Vf a, Vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vf operator/(Vf a, Vf b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vf fma(Vf a, Vf b, Vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vf fnma(Vf a, Vf b, Vf c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vf max(Vf a, Vf b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vf min(Vf a, Vf b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vf sqrt(Vf a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vf round(Vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | 8)}; }
inline Vf scale2(Vf a, Vf n) {  // in two steps, so that 2^n may be denormal or overflow
  __m256i e = _mm256_cvtps_epi32(n.v);
  __m256i half = _mm256_srai_epi32(e, 1), rest = _mm256_sub_epi32(e, half);
  auto power = [](__m256i i) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(rest))};
}
inline float sum(Vf a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float largest(Vf a) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline Vf keep_up_to(Vf a, int64_t first, int64_t last, Vf other) {
  int64_t n = last - first + 1;
  __m256i m = lanes(n >= 8 ? 8 : n <= 0 ? 0 : int(n));
  return {_mm256_blendv_ps(other.v, a.v, _mm256_castsi256_ps(m))};
}

struct PairBf16 {
  using Elem = bf16;
  static constexpr int K = 2;
  struct Word {
    Vf even, odd;
  };
  static Word split(__m256i pair) {
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(int(0xffff0000))))}};
  }
  static Word weights(const uint32_t* w) { return split(_mm256_loadu_si256((const __m256i*)w)); }
  static Word input(const uint32_t* x) { return split(_mm256_set1_epi32(int(*x))); }
  static void multiply(Vf& acc, Word w, Word x) {
    acc = fma(w.odd, x.odd, fma(w.even, x.even, acc));
  }
};

#endif

struct OneFloat {
  using Elem = float;
  static constexpr int K = 1;
  using Word = Vf;
  static Word weights(const uint32_t* w) { return load((const float*)w); }
  static Word input(const uint32_t* x) {
    float value;
    std::memcpy(&value, x, 4);
    return set1(value);
  }
  static void multiply(Vf& acc, Word w, Word x) { acc = fma(w, x, acc); }
};

// e^x to about one unit in the last place; 0 below -104, inf above 89, NaN stays NaN.
// Source: the polynomial of Cephes' expf.
inline Vf exp(Vf x) {
  x = max(set1(-104.0f), min(set1(89.0f), x));
  Vf n = round(x * set1(1.44269504088896341f));
  Vf r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));
  Vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return scale2(fma(p, r * r, r + set1(1.0f)), n);
}

inline Vf sigmoid(Vf x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }
inline Vf silu(Vf x) { return x / (set1(1.0f) + exp(zero() - x)); }

// Call `step(i, n)` for vectors that cover [0, count): n is W, and less in the last one.
template <class Step>
inline void for_vectors(int64_t count, Step&& step) {
  int64_t i = 0;
  for (; i + Vf::W <= count; i += Vf::W) step(i, Vf::W);
  if (i < count) step(i, int(count - i));
}
template <class T>
inline Vf load_up_to(const T* p, int n) {
  return n == Vf::W ? load(p) : load(p, n);
}
template <class T>
inline void store_up_to(T* p, Vf a, int n) {
  n == Vf::W ? store(p, a) : store(p, a, n);
}

}  // namespace em
