// Sixteen floats in a zmm register. Included by vec.h.
#pragma once

// GCC 11 and 12 take the intrinsics' undefined operands for a mistake (PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace kvquant::cpu::KVQUANT_ISA {

using Mask = __mmask16;

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  static KVQUANT_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static KVQUANT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static KVQUANT_INLINE Vec load(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
  }
  static KVQUANT_INLINE Vec load_centered(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i centered = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(centered))};
  }
  static KVQUANT_INLINE Vec load_nibbles(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_and_si512(nibbles(p), _mm512_set1_epi32(15)))};
  }
  static KVQUANT_INLINE Vec load_nibbles_centered(const uint8_t* p) {
    // The permutation looks at four bits of each index alone: it is the conversion.
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm512_permutexvar_ps(nibbles(p), codes)};
  }
  static KVQUANT_INLINE Vec load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static KVQUANT_INLINE Vec load_bf16(const uint16_t* p) {
    // One permutation to the upper halves, with zeros below: widening and shifting are two.
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i order = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
    return {_mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, _mm512_castsi256_si512(words)))};
  }
  // 0, 1, 2, ...
  static KVQUANT_INLINE Vec iota() {
    return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  }
  KVQUANT_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  KVQUANT_INLINE void store4(float* p) const { _mm_storeu_ps(p, _mm512_castps512_ps128(v)); }
  KVQUANT_INLINE void store_half(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  KVQUANT_INLINE void store_bf16(uint16_t* p) const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_blend_epi32(nan, near, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  // Low bytes of the values, rounded half to even.
  KVQUANT_INLINE void store_codes(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  KVQUANT_INLINE void store_nibbles(uint8_t* p) const {
    const __m512i codes = _mm512_cvtps_epi32(v);
    const __m512i pairs = _mm512_or_si512(codes, _mm512_srli_epi64(codes, 28));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
  }

 private:
  // Sixteen of four bits each, below others of no meaning.
  static KVQUANT_INLINE __m512i nibbles(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m512i words = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shifts =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    return _mm512_srlv_epi32(_mm512_permutexvar_epi32(words, _mm512_castsi128_si512(bytes)),
                             shifts);
  }
};

KVQUANT_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
KVQUANT_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
KVQUANT_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 0)}; }
KVQUANT_INLINE Vec copy_sign(Vec a, Vec sign) {  // of a >= 0
  return {_mm512_or_ps(a.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.f)))};
}
// a * 2^n of an integral n
KVQUANT_INLINE Vec times_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

KVQUANT_INLINE Mask operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
KVQUANT_INLINE Mask operator<=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
KVQUANT_INLINE Mask both(Mask a, Mask b) { return Mask(a & b); }
KVQUANT_INLINE bool all(Mask m) { return m == 0xffff; }
KVQUANT_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }

KVQUANT_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
KVQUANT_INLINE float reduce_min(Vec a) { return _mm512_reduce_min_ps(a.v); }
KVQUANT_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

// Four reductions at once, by any of the operations on two vectors: a quarter of the shuffles.
template <class Op>
KVQUANT_INLINE Vec reduce4(Vec a, Vec b, Vec c, Vec d, const Op& op) {
  const Vec ab = op(Vec{_mm512_unpacklo_ps(a.v, b.v)}, Vec{_mm512_unpackhi_ps(a.v, b.v)});
  const Vec cd = op(Vec{_mm512_unpacklo_ps(c.v, d.v)}, Vec{_mm512_unpackhi_ps(c.v, d.v)});
  const Vec quads =
      op(Vec{_mm512_shuffle_ps(ab.v, cd.v, 0x44)}, Vec{_mm512_shuffle_ps(ab.v, cd.v, 0xee)});
  const Vec pairs = op(quads, Vec{_mm512_shuffle_f32x4(quads.v, quads.v, 0x4e)});
  return op(pairs, Vec{_mm512_shuffle_f32x4(pairs.v, pairs.v, 0xb1)});
}

// Four vectors' codes, as store_codes4() of vec.h says.
KVQUANT_INLINE void store_codes4(uint8_t* p, Vec a, Vec b, Vec c, Vec d, int low, int high,
                                 bool past_cache) {
  const __m512i least = _mm512_set1_epi16(short(low)), most = _mm512_set1_epi16(short(high));
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c.v), _mm512_cvtps_epi32(d.v));
  const __m512i codes = _mm512_packus_epi16(_mm512_min_epi16(_mm512_max_epi16(ab, least), most),
                                            _mm512_min_epi16(_mm512_max_epi16(cd, least), most));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i packed = _mm512_permutexvar_epi32(order, codes);  // within 128 bits each, before
  if (past_cache && uintptr_t(p) % 64 == 0) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), packed);
  } else {
    _mm512_storeu_si512(p, packed);
  }
}
KVQUANT_INLINE void end_stores() { _mm_sfence(); }

// One butterfly step: lanes i and i + step become a + b and a - b.
template <int kStep>
KVQUANT_INLINE Vec butterfly(Vec x) {
  __m512 other;
  if constexpr (kStep == 1) {
    other = _mm512_permute_ps(x.v, 0xb1);
  } else if constexpr (kStep == 2) {
    other = _mm512_permute_ps(x.v, 0x4e);
  } else if constexpr (kStep == 4) {
    other = _mm512_shuffle_f32x4(x.v, x.v, 0xb1);
  } else {
    other = _mm512_shuffle_f32x4(x.v, x.v, 0x4e);
  }
  // Rounds once: what the multiplication by one or minus one gives is exact.
  constexpr float a = 1.f, b = kStep & 1 ? -1.f : 1.f, c = kStep & 2 ? -1.f : 1.f,
                  d = kStep & 4 ? -1.f : 1.f, e = kStep & 8 ? -1.f : 1.f;
  const __m512 signs = _mm512_setr_ps(a, b, c, b * c, d, d * b, d * c, d * b * c, e, e * b, e * c,
                                      e * b * c, e * d, e * d * b, e * d * c, e * d * b * c);
  return {_mm512_fmadd_ps(x.v, signs, other)};
}

// Sixteen (scale, offset) pairs of fp16.
KVQUANT_INLINE void load_pairs(const uint32_t* p, Vec& scale, Vec& offset) {
  const __m512i pairs = _mm512_loadu_si512(p);
  scale.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
  offset.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}

}  // namespace kvquant::cpu::KVQUANT_ISA
