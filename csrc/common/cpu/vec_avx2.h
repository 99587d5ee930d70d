// Eight floats in a ymm register. Included by vec.h.
#pragma once

#include <immintrin.h>

namespace kvquant::cpu::KVQUANT_ISA {

struct Mask {
  __m256 v;
};

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  static KVQUANT_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static KVQUANT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static KVQUANT_INLINE Vec load(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
  }
  static KVQUANT_INLINE Vec load_centered(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i centered = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(centered))};
  }
  static KVQUANT_INLINE Vec load_nibbles(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(nibbles(p))};
  }
  static KVQUANT_INLINE Vec load_nibbles_centered(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles(p), _mm256_set1_epi32(8)))};
  }
  static KVQUANT_INLINE Vec load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static KVQUANT_INLINE Vec load_bf16(const uint16_t* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16))};
  }
  static KVQUANT_INLINE Vec iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
  KVQUANT_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  KVQUANT_INLINE void store4(float* p) const { _mm_storeu_ps(p, _mm256_castps256_ps128(v)); }
  KVQUANT_INLINE void store_half(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  KVQUANT_INLINE void store_bf16(uint16_t* p) const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(near, quiet, nan), 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
  }
  // Low bytes of the values, rounded half to even.
  KVQUANT_INLINE void store_codes(uint8_t* p) const {
    const __m256i codes = _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_set1_epi32(0xff));
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  KVQUANT_INLINE void store_nibbles(uint8_t* p) const {
    const __m256i codes = _mm256_cvtps_epi32(v);
    const __m256i pairs = _mm256_or_si256(codes, _mm256_srli_epi64(codes, 28));
    const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
    const __m128i first = _mm_unpacklo_epi8(low, high);  // bytes 0 1 . .: of qwords 0 and 2
    const __m128i second = _mm_unpackhi_epi8(low, high);
    const __m128i all = _mm_unpacklo_epi8(first, second);  // 0 1 2 3
    const int word = _mm_cvtsi128_si32(all);
    memcpy(p, &word, 4);
  }

 private:
  static KVQUANT_INLINE __m256i nibbles(const uint8_t* p) {
    int word;
    memcpy(&word, p, 4);
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts),
                            _mm256_set1_epi32(15));
  }
};

KVQUANT_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
KVQUANT_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
KVQUANT_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
KVQUANT_INLINE Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
KVQUANT_INLINE Vec copy_sign(Vec a, Vec sign) {  // of a >= 0
  return {_mm256_or_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.f)))};
}
// a * 2^n of an integral n, -126 <= n <= 127; beyond that, and of a NaN, what exp() discards
KVQUANT_INLINE Vec times_power_of_two(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}

KVQUANT_INLINE Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
KVQUANT_INLINE Mask operator<=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
KVQUANT_INLINE Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
KVQUANT_INLINE bool all(Mask m) { return _mm256_movemask_ps(m.v) == 0xff; }
KVQUANT_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }

KVQUANT_INLINE float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
KVQUANT_INLINE float reduce_min(Vec a) {
  __m128 x = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_min_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)));
}
KVQUANT_INLINE float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Four reductions at once, by any of the operations on two vectors.
template <class Op>
KVQUANT_INLINE Vec reduce4(Vec a, Vec b, Vec c, Vec d, const Op& op) {
  const auto halved = [&](Vec a, Vec b) {
    return op(Vec{_mm256_shuffle_ps(a.v, b.v, 0x88)}, Vec{_mm256_shuffle_ps(a.v, b.v, 0xdd)});
  };
  const Vec quads = halved(halved(a, b), halved(c, d));
  return op(quads, Vec{_mm256_permute2f128_ps(quads.v, quads.v, 1)});
}

// Four vectors' codes, as store_codes4() of vec.h says.
KVQUANT_INLINE void store_codes4(uint8_t* p, Vec a, Vec b, Vec c, Vec d, int low, int high,
                                 bool past_cache) {
  const __m256i least = _mm256_set1_epi16(short(low)), most = _mm256_set1_epi16(short(high));
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a.v), _mm256_cvtps_epi32(b.v));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c.v), _mm256_cvtps_epi32(d.v));
  const __m256i codes = _mm256_packus_epi16(_mm256_min_epi16(_mm256_max_epi16(ab, least), most),
                                            _mm256_min_epi16(_mm256_max_epi16(cd, least), most));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packed within 128 bits each
  const __m256i packed = _mm256_permutevar8x32_epi32(codes, order);
  if (past_cache && uintptr_t(p) % 32 == 0) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), packed);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
}
KVQUANT_INLINE void end_stores() { _mm_sfence(); }

// One butterfly step: lanes i and i + step become a + b and a - b.
template <int kStep>
KVQUANT_INLINE Vec butterfly(Vec x) {
  __m256 other;
  if constexpr (kStep == 1) {
    other = _mm256_permute_ps(x.v, 0xb1);
  } else if constexpr (kStep == 2) {
    other = _mm256_permute_ps(x.v, 0x4e);
  } else {
    other = _mm256_permute2f128_ps(x.v, x.v, 1);
  }
  // Rounds once: what the multiplication by one or minus one gives is exact.
  constexpr float b = kStep & 1 ? -1.f : 1.f, c = kStep & 2 ? -1.f : 1.f,
                  d = kStep & 4 ? -1.f : 1.f;
  return {
      _mm256_fmadd_ps(x.v, _mm256_setr_ps(1.f, b, c, b * c, d, d * b, d * c, d * b * c), other)};
}

// Eight (scale, offset) pairs of fp16.
KVQUANT_INLINE void load_pairs(const uint32_t* p, Vec& scale, Vec& offset) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff));
  const __m256i high = _mm256_srli_epi32(pairs, 16);
  scale.v = _mm256_cvtph_ps(
      _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
  offset.v = _mm256_cvtph_ps(
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

}  // namespace kvquant::cpu::KVQUANT_ISA
