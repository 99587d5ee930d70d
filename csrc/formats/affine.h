// What rows of codes 0 .. kMaxCode with an fp16 scale and an fp16 offset a row have in common.
#pragma once

#include "common/half.h"
#include "formats/row_format.h"

namespace kvquant {

struct alignas(4) AffineParams {
  uint16_t scale, offset;  // fp16
};

// Offset is rounded down and scale up, so that nothing clips: codes reach from `below` of the range
// above its minimum (a power of two, or 0) to `steps` scales higher, a share of a step short of its
// maximum. Rotating a finite row, or taking its mean off, can lead beyond fp16: such a channel
// counts as the largest fp16.
KVQUANT_HD AffineParams affine_params(float min, float max, bool finite, float steps, float below) {
  if (!finite) return {kHalfNaN, kHalfNaN};
  const float low = least(most(min, -kMaxAbs), kMaxAbs), high = least(max, kMaxAbs);
  // The product is exact, so that fusing it with the sum changes nothing.
  const uint16_t offset = half_round_down(below > 0.f ? (high - low) * below + low : low);
  const float range = high - half_to_float(offset);
  return {half_round_up(most(range / steps, kMinScale)), offset};
}
KVQUANT_HD RowAffine affine_of(AffineParams params) {
  return {half_to_float(params.scale), half_to_float(params.offset)};
}

}  // namespace kvquant
