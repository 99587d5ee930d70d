// fp16 as bits, with directed rounding, for host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace kvquant {

constexpr float kMaxAbs = 65504.f;           // the largest fp16; larger inputs count as infinite
constexpr float kMinScale = 5.9604645e-08f;  // 2^-24, the smallest positive fp16
constexpr uint16_t kHalfNaN = 0x7e00;

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
#elif defined(__F16C__)
  return _cvtsh_ss(h);
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
  if (mag > 0x7f800000) return kHalfNaN;
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rd(x));
#elif defined(__F16C__)
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEG_INF));
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

}  // namespace kvquant
