// 64 bytes in a zmm register, and sums of their products. For the *.isa.cpp files.
//
// A register of bytes is also four lanes of 128 bits, and sixteen words of 32 bits.
#pragma once

#include "common/cpu/vec.h"

namespace kvquant::cpu::KVQUANT_ISA {

struct Bytes {
  __m512i v;

  static KVQUANT_INLINE Bytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  // The first `count` bytes, a multiple of 4 below 64, and zeros; nothing beyond is touched.
  static KVQUANT_INLINE Bytes load_some(const uint8_t* p, int count) {
    return {_mm512_maskz_loadu_epi32(__mmask16((1u << (count / 4)) - 1), p)};
  }
  static KVQUANT_INLINE Bytes set(uint8_t x) { return {_mm512_set1_epi8(char(x))}; }
  // Four bytes in every word.
  static KVQUANT_INLINE Bytes repeat(const int8_t* p) {
    int word;
    memcpy(&word, p, 4);
    return {_mm512_set1_epi32(word)};
  }
  KVQUANT_INLINE void store(void* p) const { _mm512_store_si512(p, v); }
  KVQUANT_INLINE Bytes low_nibbles() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
  // Of each eight bytes, the even ones first.
  KVQUANT_INLINE Bytes evens_first() const {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    return {_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(order))};
  }
  KVQUANT_INLINE Bytes high_nibbles() const { return Bytes{_mm512_srli_epi16(v, 4)}.low_nibbles(); }
};

// Sixteen sums, one a word.
struct Sums {
  __m512i v;

  static KVQUANT_INLINE Sums set(int32_t x) { return {_mm512_set1_epi32(x)}; }
  KVQUANT_INLINE void store(int32_t* p) const { _mm512_store_si512(p, v); }
};
// Adds the products of each word's four bytes, those of x unsigned, those of y signed. In assembly:
// GCC 12 moves the accumulators of the intrinsic about at every use.
KVQUANT_INLINE Sums add_products(Sums sum, Bytes x, Bytes y) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(x.v), "v"(y.v));
  return sum;
}
// Minus the totals of up to four; four words are written.
template <int kCount>
KVQUANT_INLINE void negative_totals(const Sums (&x)[kCount], int32_t* to) {
  static_assert(kCount == 2 || kCount == 3);
  const __m512i a = x[0].v, b = x[1].v, c = x[kCount - 1].v;
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cc = _mm512_add_epi32(_mm512_unpacklo_epi32(c, c), _mm512_unpackhi_epi32(c, c));
  const __m512i quads =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cc), _mm512_unpackhi_epi64(ab, cc));
  const __m256i pairs =
      _mm256_add_epi32(_mm512_castsi512_si256(quads), _mm512_extracti64x4_epi64(quads, 1));
  const __m128i all =
      _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_sub_epi32(_mm_setzero_si128(), all));
}
KVQUANT_INLINE Vec load_sums(const int32_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_load_si512(p))};
}

// Signed bytes of 64 integral values, the most significant first: each value is the sum of
// 256^(kDigits - 1 - i) * digits[i], for magnitudes up to 127 * 256^(kDigits - 1).
template <int kDigits>
KVQUANT_INLINE void split_digits(const Vec (&x)[4], Bytes (&digits)[kDigits]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i rest[4], low[4];
  for (int k = 0; k < 4; ++k) rest[k] = _mm512_cvtps_epi32(x[k].v);
  for (int i = kDigits - 1; i >= 0; --i) {
    for (int k = 0; k < 4; ++k) {
      low[k] = _mm512_and_si512(rest[k], _mm512_set1_epi32(255));
      rest[k] = _mm512_srai_epi32(_mm512_add_epi32(rest[k], _mm512_set1_epi32(128)), 8);
    }
    const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(low[0], low[1]),
                                               _mm512_packus_epi32(low[2], low[3]));
    digits[i].v = _mm512_permutexvar_epi32(order, packed);  // within 128 bits each, before
  }
}

// Four registers' lanes: lane i of output j is lane j of input i.
KVQUANT_INLINE void transpose_lanes(const Bytes (&x)[4], Bytes (&to)[4]) {
  const __m512i ab = _mm512_shuffle_i32x4(x[0].v, x[1].v, 0x44);
  const __m512i cd = _mm512_shuffle_i32x4(x[2].v, x[3].v, 0x44);
  const __m512i ef = _mm512_shuffle_i32x4(x[0].v, x[1].v, 0xee);
  const __m512i gh = _mm512_shuffle_i32x4(x[2].v, x[3].v, 0xee);
  to[0].v = _mm512_shuffle_i32x4(ab, cd, 0x88), to[1].v = _mm512_shuffle_i32x4(ab, cd, 0xdd);
  to[2].v = _mm512_shuffle_i32x4(ef, gh, 0x88), to[3].v = _mm512_shuffle_i32x4(ef, gh, 0xdd);
}

// Within each lane, four registers' words: word i of output j is word j of input i.
KVQUANT_INLINE void transpose_words(const Bytes (&x)[4], Bytes (&to)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(x[0].v, x[1].v),
                b = _mm512_unpackhi_epi32(x[0].v, x[1].v);
  const __m512i c = _mm512_unpacklo_epi32(x[2].v, x[3].v),
                d = _mm512_unpackhi_epi32(x[2].v, x[3].v);
  to[0].v = _mm512_unpacklo_epi64(a, c), to[1].v = _mm512_unpackhi_epi64(a, c);
  to[2].v = _mm512_unpacklo_epi64(b, d), to[3].v = _mm512_unpackhi_epi64(b, d);
}

// Within each lane, four registers' bytes: word m of output j has byte 4 j + m of each input.
KVQUANT_INLINE void interleave_bytes(const Bytes (&x)[4], Bytes (&to)[4]) {
  const __m512i a = _mm512_unpacklo_epi8(x[0].v, x[1].v), b = _mm512_unpackhi_epi8(x[0].v, x[1].v);
  const __m512i c = _mm512_unpacklo_epi8(x[2].v, x[3].v), d = _mm512_unpackhi_epi8(x[2].v, x[3].v);
  to[0].v = _mm512_unpacklo_epi16(a, c), to[1].v = _mm512_unpackhi_epi16(a, c);
  to[2].v = _mm512_unpacklo_epi16(b, d), to[3].v = _mm512_unpackhi_epi16(b, d);
}

// Lanes 0 and 1 of four registers in two: of 0 and 1, of 2 and 3.
KVQUANT_INLINE void join_halves(Bytes (&x)[4]) {
  x[0].v = _mm512_shuffle_i64x2(x[0].v, x[1].v, 0x44);
  x[1].v = _mm512_shuffle_i64x2(x[2].v, x[3].v, 0x44);
}

// What takes the sums of interleaved bytes back to the bytes' order.

// Four registers as transpose_lanes() does.
KVQUANT_INLINE void order_lanes(const Vec (&x)[4], Vec (&to)[4]) {
  const __m512 ab = _mm512_shuffle_f32x4(x[0].v, x[1].v, 0x44);
  const __m512 cd = _mm512_shuffle_f32x4(x[2].v, x[3].v, 0x44);
  const __m512 ef = _mm512_shuffle_f32x4(x[0].v, x[1].v, 0xee);
  const __m512 gh = _mm512_shuffle_f32x4(x[2].v, x[3].v, 0xee);
  to[0].v = _mm512_shuffle_f32x4(ab, cd, 0x88), to[1].v = _mm512_shuffle_f32x4(ab, cd, 0xdd);
  to[2].v = _mm512_shuffle_f32x4(ef, gh, 0x88), to[3].v = _mm512_shuffle_f32x4(ef, gh, 0xdd);
}
// After join_halves(): lanes 0 and 2 of both registers, lanes 1 and 3.
KVQUANT_INLINE void order_lanes(const Vec (&x)[2], Vec (&to)[2]) {
  to[0].v = _mm512_shuffle_f32x4(x[0].v, x[1].v, 0x88);
  to[1].v = _mm512_shuffle_f32x4(x[0].v, x[1].v, 0xdd);
}
// Within each lane, words of a and b in turns: of the first halves, of the second.
KVQUANT_INLINE void interleave_words(Vec a, Vec b, Vec& first, Vec& second) {
  first.v = _mm512_unpacklo_ps(a.v, b.v), second.v = _mm512_unpackhi_ps(a.v, b.v);
}
// Lanes 1 and 2 change places.
KVQUANT_INLINE Vec swap_lanes(Vec x) { return {_mm512_shuffle_f32x4(x.v, x.v, 0xd8)}; }

}  // namespace kvquant::cpu::KVQUANT_ISA
