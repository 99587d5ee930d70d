// Four floats in the compiler's own vector type: SSE2 where there is nothing better.
// fma is a product and a sum: without the instruction a fused one is a library call. Included by
// vec.h.
#pragma once

#include "common/half.h"

namespace kvquant::cpu::KVQUANT_ISA {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(4)));

struct Mask {
  Ints v;
};

KVQUANT_INLINE Ints bits(Floats x) {
  Ints i;
  memcpy(&i, &x, 16);
  return i;
}
KVQUANT_INLINE Floats floats(Ints i) {
  Floats x;
  memcpy(&x, &i, 16);
  return x;
}
KVQUANT_INLINE Floats blend(Ints m, Floats a, Floats b) {
  return floats((m & bits(a)) | (~m & bits(b)));
}

// Nearest fp16, ties to even.
KVQUANT_INLINE uint16_t to_half(float x) {
  const uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
  if (mag > 0x7f800000) return uint16_t(sign | 0x7e00 | (mag >> 13 & 0x3ff));
  if (mag >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 rounds to infinity
  if (mag < 0x38800000) {  // subnormal: adding 0.5 leaves units of 2^-24, rounded
    const float units = bits_to_float(mag) + 0.5f;
    return uint16_t(sign | (float_to_bits(units) - 0x3f000000));
  }
  return uint16_t(sign | ((mag - 0x38000000 + 0xfff + (mag >> 13 & 1)) >> 13));
}
KVQUANT_INLINE uint16_t to_bf16(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

struct Vec {
  static constexpr int kWidth = 4;
  Floats v;

  static KVQUANT_INLINE Vec set(float x) { return {Floats{x, x, x, x}}; }
  static KVQUANT_INLINE Vec load(const float* p) {
    Vec x;
    memcpy(&x.v, p, 16);
    return x;
  }
  static KVQUANT_INLINE Vec load(const uint8_t* p) {
    return {Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}};
  }
  static KVQUANT_INLINE Vec load_centered(const uint8_t* p) {
    return {Floats{float(int(p[0]) - 128), float(int(p[1]) - 128), float(int(p[2]) - 128),
                   float(int(p[3]) - 128)}};
  }
  static KVQUANT_INLINE Vec load_nibbles(const uint8_t* p) {
    return {Floats{float(p[0] & 15), float(p[0] >> 4), float(p[1] & 15), float(p[1] >> 4)}};
  }
  static KVQUANT_INLINE Vec load_nibbles_centered(const uint8_t* p) {
    return {load_nibbles(p).v - 8.f};
  }
  static KVQUANT_INLINE Vec load_half(const uint16_t* p) {
    return {
        Floats{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])}};
  }
  static KVQUANT_INLINE Vec load_bf16(const uint16_t* p) {
    return {floats(Ints{int32_t(uint32_t(p[0]) << 16), int32_t(uint32_t(p[1]) << 16),
                        int32_t(uint32_t(p[2]) << 16), int32_t(uint32_t(p[3]) << 16)})};
  }
  static KVQUANT_INLINE Vec iota() { return {Floats{0, 1, 2, 3}}; }
  KVQUANT_INLINE void store(float* p) const { memcpy(p, &v, 16); }
  KVQUANT_INLINE void store4(float* p) const { store(p); }
  KVQUANT_INLINE void store_half(uint16_t* p) const {
    for (int i = 0; i < 4; ++i) p[i] = to_half(v[i]);
  }
  KVQUANT_INLINE void store_bf16(uint16_t* p) const {
    for (int i = 0; i < 4; ++i) p[i] = to_bf16(v[i]);
  }
  // Low bytes of the values (at most 2^21), rounded half to even: the sum's last bit is a one.
  KVQUANT_INLINE void store_codes(uint8_t* p) const {
    const Ints codes = bits(v + 12582912.f);
    for (int i = 0; i < 4; ++i) p[i] = uint8_t(codes[i]);
  }
  KVQUANT_INLINE void store_nibbles(uint8_t* p) const {
    uint8_t codes[4];
    store_codes(codes);
    p[0] = uint8_t(codes[0] | codes[1] << 4), p[1] = uint8_t(codes[2] | codes[3] << 4);
  }
};

KVQUANT_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
KVQUANT_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
KVQUANT_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
KVQUANT_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
KVQUANT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
KVQUANT_INLINE Vec min(Vec a, Vec b) { return {blend(a.v < b.v, a.v, b.v)}; }
KVQUANT_INLINE Vec max(Vec a, Vec b) { return {blend(a.v > b.v, a.v, b.v)}; }
KVQUANT_INLINE Vec abs(Vec a) { return {floats(bits(a.v) & 0x7fffffff)}; }
KVQUANT_INLINE Vec copy_sign(Vec a, Vec sign) {  // of a >= 0
  return {floats(bits(a.v) | (bits(sign.v) & int32_t(0x80000000)))};
}
// 2^23 added and taken away leaves no fraction; larger values have none.
KVQUANT_INLINE Vec round(Vec a) {
  const Floats big = floats((bits(a.v) & int32_t(0x80000000)) | 0x4b000000);
  return {blend(abs(a).v < 8388608.f, (a.v + big) - big, a.v)};
}
// a * 2^n of an integral n, -126 <= n <= 127; beyond that, and of a NaN, what exp() discards
KVQUANT_INLINE Vec times_power_of_two(Vec a, Vec n) {
  const Ints exponent = bits(n.v + 12582912.f) - 0x4b400000 + 127;
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  return {a.v * floats(Ints(Unsigned(exponent) << 23))};
}

KVQUANT_INLINE Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
KVQUANT_INLINE Mask operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
KVQUANT_INLINE Mask both(Mask a, Mask b) { return {a.v & b.v}; }
KVQUANT_INLINE bool all(Mask m) { return m.v[0] & m.v[1] & m.v[2] & m.v[3]; }
KVQUANT_INLINE Vec select(Mask m, Vec a, Vec b) { return {blend(m.v, a.v, b.v)}; }

KVQUANT_INLINE float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
KVQUANT_INLINE float reduce_min(Vec a) {
  const float x = a.v[0] < a.v[2] ? a.v[0] : a.v[2], y = a.v[1] < a.v[3] ? a.v[1] : a.v[3];
  return x < y ? x : y;
}
KVQUANT_INLINE float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
// Four reductions at once, by any of the operations on two vectors.
template <class Op>
KVQUANT_INLINE Vec reduce4(Vec a, Vec b, Vec c, Vec d, const Op& op) {
  const auto lane = [&](int i) { return Vec{Floats{a.v[i], b.v[i], c.v[i], d.v[i]}}; };
  return op(op(lane(0), lane(2)), op(lane(1), lane(3)));
}

// Four vectors' codes, as store_codes4() of vec.h says.
KVQUANT_INLINE void store_codes4(uint8_t* p, Vec a, Vec b, Vec c, Vec d, int low, int high, bool) {
  const Vec least = Vec::set(float(low)), most = Vec::set(float(high));
  min(max(a, least), most).store_codes(p);
  min(max(b, least), most).store_codes(p + 4);
  min(max(c, least), most).store_codes(p + 8);
  min(max(d, least), most).store_codes(p + 12);
}
KVQUANT_INLINE void end_stores() {}

// One butterfly step: lanes i and i + step become a + b and a - b.
template <int kStep>
KVQUANT_INLINE Vec butterfly(Vec x) {
  const Floats v = x.v;
  const Floats a = kStep == 1 ? Floats{v[0], v[0], v[2], v[2]} : Floats{v[0], v[1], v[0], v[1]};
  const Floats b = kStep == 1 ? Floats{v[1], v[1], v[3], v[3]} : Floats{v[2], v[3], v[2], v[3]};
  constexpr int32_t kSign = INT32_MIN;
  const Ints sign = kStep == 1 ? Ints{0, kSign, 0, kSign} : Ints{0, 0, kSign, kSign};
  return {a + floats(bits(b) ^ sign)};
}

// Four (scale, offset) pairs of fp16.
KVQUANT_INLINE void load_pairs(const uint32_t* p, Vec& scale, Vec& offset) {
  uint16_t halves[8];
  memcpy(halves, p, 16);
  for (int i = 0; i < 4; ++i) {
    scale.v[i] = half_to_float(halves[2 * i]);
    offset.v[i] = half_to_float(halves[2 * i + 1]);
  }
}

}  // namespace kvquant::cpu::KVQUANT_ISA
