// Four floats in a NEON register of AArch64. Included by vec.h.
#pragma once

#include <arm_neon.h>

namespace kvquant::cpu::KVQUANT_ISA {

struct Mask {
  uint32x4_t v;
};

struct Vec {
  static constexpr int kWidth = 4;
  float32x4_t v;

  static KVQUANT_INLINE Vec set(float x) { return {vdupq_n_f32(x)}; }
  static KVQUANT_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
  static KVQUANT_INLINE Vec load(const uint8_t* p) {
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(p)))))};
  }
  static KVQUANT_INLINE Vec load_centered(const uint8_t* p) {
    const uint8x8_t bytes = four_bytes(reinterpret_cast<const uint8_t*>(p));
    const int8x8_t centered = vreinterpret_s8_u8(veor_u8(bytes, vdup_n_u8(0x80)));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(centered))))};
  }
  static KVQUANT_INLINE Vec load_nibbles(const uint8_t* p) { return {vcvtq_f32_s32(nibbles(p))}; }
  static KVQUANT_INLINE Vec load_nibbles_centered(const uint8_t* p) {
    return {vcvtq_f32_s32(vsubq_s32(nibbles(p), vdupq_n_s32(8)))};
  }
  static KVQUANT_INLINE Vec load_half(const uint16_t* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))};
  }
  static KVQUANT_INLINE Vec load_bf16(const uint16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
  }
  // 0, 1, 2, 3
  static KVQUANT_INLINE Vec iota() {
    const float lanes[4] = {0, 1, 2, 3};
    return load(lanes);
  }
  KVQUANT_INLINE void store(float* p) const { vst1q_f32(p, v); }
  KVQUANT_INLINE void store4(float* p) const { store(p); }
  KVQUANT_INLINE void store_half(uint16_t* p) const {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
  }
  KVQUANT_INLINE void store_bf16(uint16_t* p) const {
    const uint32x4_t u = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t near = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), near, quiet), 16));
  }
  // Low bytes of the values, rounded half to even.
  KVQUANT_INLINE void store_codes(uint8_t* p) const {
    const uint16x4_t words = vmovn_u32(vreinterpretq_u32_s32(vcvtnq_s32_f32(v)));
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
    memcpy(p, &bytes, 4);
  }
  KVQUANT_INLINE void store_nibbles(uint8_t* p) const {
    const int32_t shifts[4] = {0, 4, 8, 12};
    const uint32x4_t codes = vreinterpretq_u32_s32(vcvtnq_s32_f32(v));
    const uint16_t word = uint16_t(vaddvq_u32(vshlq_u32(codes, vld1q_s32(shifts))));
    memcpy(p, &word, 2);
  }

 private:
  static KVQUANT_INLINE int32x4_t nibbles(const uint8_t* p) {
    uint16_t word;
    memcpy(&word, p, 2);
    const int32_t shifts[4] = {0, -4, -8, -12};
    const uint32x4_t apart = vshlq_u32(vdupq_n_u32(word), vld1q_s32(shifts));
    return vreinterpretq_s32_u32(vandq_u32(apart, vdupq_n_u32(15)));
  }
  static KVQUANT_INLINE uint8x8_t four_bytes(const uint8_t* p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return vreinterpret_u8_u32(vdup_n_u32(word));
  }
};

KVQUANT_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
KVQUANT_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
KVQUANT_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
KVQUANT_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
KVQUANT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// The instructions would give NaN where either is.
KVQUANT_INLINE Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
KVQUANT_INLINE Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
KVQUANT_INLINE Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
KVQUANT_INLINE Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
KVQUANT_INLINE Vec copy_sign(Vec a, Vec sign) {
  return {vbslq_f32(vdupq_n_u32(0x80000000), sign.v, a.v)};
}
// a * 2^n of an integral n, -126 <= n <= 127; beyond that, and of a NaN, what exp() discards
KVQUANT_INLINE Vec times_power_of_two(Vec a, Vec n) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}

KVQUANT_INLINE Mask operator<(Vec a, Vec b) { return {vcltq_f32(a.v, b.v)}; }
KVQUANT_INLINE Mask operator<=(Vec a, Vec b) { return {vcleq_f32(a.v, b.v)}; }
KVQUANT_INLINE Mask both(Mask a, Mask b) { return {vandq_u32(a.v, b.v)}; }
KVQUANT_INLINE bool all(Mask m) { return vminvq_u32(m.v) != 0; }
KVQUANT_INLINE Vec select(Mask m, Vec a, Vec b) { return {vbslq_f32(m.v, a.v, b.v)}; }

KVQUANT_INLINE float reduce_add(Vec a) { return vaddvq_f32(a.v); }
KVQUANT_INLINE float reduce_min(Vec a) { return vminvq_f32(a.v); }
KVQUANT_INLINE float reduce_max(Vec a) { return vmaxvq_f32(a.v); }
// Four reductions at once, by any of the operations on two vectors.
template <class Op>
KVQUANT_INLINE Vec reduce4(Vec a, Vec b, Vec c, Vec d, const Op& op) {
  const auto halved = [&](Vec a, Vec b) {
    return op(Vec{vuzp1q_f32(a.v, b.v)}, Vec{vuzp2q_f32(a.v, b.v)});
  };
  return halved(halved(a, b), halved(c, d));
}

// Four vectors' codes, as store_codes4() of vec.h says. The conversion makes a NaN 0.
KVQUANT_INLINE uint8x8_t codes2(Vec a, Vec b, int low, int high) {
  const int16x8_t words =
      vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.v)), vqmovn_s32(vcvtnq_s32_f32(b.v)));
  const int16x8_t least = vdupq_n_s16(int16_t(low)), most = vdupq_n_s16(int16_t(high));
  return vqmovun_s16(vminq_s16(vmaxq_s16(words, least), most));
}
KVQUANT_INLINE void store_codes4(uint8_t* p, Vec a, Vec b, Vec c, Vec d, int low, int high, bool) {
  vst1q_u8(p, vcombine_u8(codes2(a, b, low, high), codes2(c, d, low, high)));
}
KVQUANT_INLINE void end_stores() {}

// One butterfly step: lanes i and i + step become a + b and a - b.
template <int kStep>
KVQUANT_INLINE Vec butterfly(Vec x) {
  const float32x4_t other = kStep == 1 ? vrev64q_f32(x.v) : vextq_f32(x.v, x.v, 2);
  const uint64x2_t upper = kStep == 1 ? vdupq_n_u64(0xffffffff00000000)
                                      : vcombine_u64(vdup_n_u64(0), vdup_n_u64(~uint64_t(0)));
  return {vbslq_f32(vreinterpretq_u32_u64(upper), vsubq_f32(other, x.v), vaddq_f32(x.v, other))};
}

// Four (scale, offset) pairs of fp16.
KVQUANT_INLINE void load_pairs(const uint32_t* p, Vec& scale, Vec& offset) {
  const uint16x4x2_t pairs = vld2_u16(reinterpret_cast<const uint16_t*>(p));
  scale.v = vcvt_f32_f16(vreinterpret_f16_u16(pairs.val[0]));
  offset.v = vcvt_f32_f16(vreinterpret_f16_u16(pairs.val[1]));
}

}  // namespace kvquant::cpu::KVQUANT_ISA
