// The per-token-head int8 format: one row of x as 0..255 with fp16 (scale, offset), for host and
// device. Quantising uses scale and offset as stored: offset is rounded down and scale up, so that
// nothing clips.
//
// Every backend computes a row in the same fp32 steps, without contraction into fused
// multiply-adds, so that all write the same codes:
//   1. rotate: Hadamard butterflies (a + b, a - b) over neighbours at distance 1, 2, 4, ..., then
//      one multiplication by hadamard_norm(length);
//   2. subtract the group's mean;
//   3. min and max of the row, (scale, offset) = row_params(min, max, finite);
//   4. code = clamp(round_half_even((y - offset) * (1 / scale)), 0, 255).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace kvquant::int8 {

constexpr float kMaxAbs = 65504.f;           // larger inputs count as infinite, as in fp16
constexpr float kMinScale = 5.9604645e-08f;  // 2^-24, the smallest positive fp16
constexpr uint16_t kNaN = 0x7e00;
constexpr int kMinMeanRows = 16;  // a first group's own mean needs as many rows

KVQUANT_HD float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
KVQUANT_HD uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

KVQUANT_HD float half_to_float(uint16_t h) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(h));
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, mag = h & 0x7fff;
  if (mag >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (mag & 0x3ff) << 13);
  const float scaled = bits_to_float(mag << 13) * 5.192296858534828e33f;  // 2^112
  return bits_to_float(sign | float_to_bits(scaled));
#endif
}

// The largest fp16 <= x. x beyond the range becomes -inf or the largest finite.
KVQUANT_HD uint16_t half_round_down(float x) {
  const uint32_t bits = float_to_bits(x), mag = bits & 0x7fffffff;
  if (mag > 0x7f800000) return kNaN;
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rd(x));
#else
  const uint32_t sign = bits >> 31;
  uint32_t half, rest;
  if (mag >= 0x477fe001) {  // beyond 65504
    half = 0x7bff, rest = 1;
  } else if (mag < 0x38800000) {  // subnormal fp16: units of 2^-24
    const float units = bits_to_float(mag) * 16777216.f;
    half = uint32_t(units), rest = units != float(half);
  } else {
    half = (mag - 0x38000000) >> 13, rest = mag & 0x1fff;
  }
  return uint16_t(sign ? 0x8000 | (half + (rest != 0)) : half);
#endif
}
KVQUANT_HD uint16_t half_round_up(float x) { return half_round_down(-x) ^ 0x8000; }

// 1 / sqrt(length) of a power of two, correctly rounded.
KVQUANT_HD float hadamard_norm(int length) {
  float norm = 1.f;
  for (; length >= 4; length /= 4) norm *= 0.5f;
  return length == 2 ? norm * 0.70710678f : norm;
}

struct RowParams {
  uint16_t scale, offset;  // fp16
};

// min, max: of the row, in the basis it is stored in. Rotating a finite row, or taking its mean
// off, can lead beyond fp16: such a channel counts as the largest fp16. Not finite: NaN params.
KVQUANT_HD RowParams row_params(float min, float max, bool finite) {
  if (!finite) return {kNaN, kNaN};
  const uint16_t offset = half_round_down(fminf(fmaxf(min, -kMaxAbs), kMaxAbs));
  const float range = fminf(max, kMaxAbs) - half_to_float(offset);
  return {half_round_up(fmaxf(range / 255.f, kMinScale)), offset};
}

}  // namespace kvquant::int8
