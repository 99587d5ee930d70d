// Rows of 8-bit codes: 0 .. 255 with an fp16 scale and an fp16 offset a row.
#pragma once

#include <cmath>

#include "common/half.h"
#include "formats/row_format.h"

namespace kvquant {

struct Int8 {
  static constexpr RowFormat kTag = RowFormat::kInt8;
  static constexpr const char* kName = "int8";
  static constexpr float kMaxCode = 255.f, kMiddleCode = 128.f;
  static constexpr bool kSymmetric = false;

  struct alignas(4) Params {
    uint16_t scale, offset;  // fp16
  };
  static KVQUANT_HD constexpr int code_bytes(int head_dim) { return head_dim; }

  // Offset is rounded down and scale up, so that nothing clips. Rotating a finite row, or taking
  // its mean off, can lead beyond fp16: such a channel counts as the largest fp16.
  static KVQUANT_HD Params params(float min, float max, bool finite) {
    if (!finite) return {kHalfNaN, kHalfNaN};
    const uint16_t offset = half_round_down(fminf(fmaxf(min, -kMaxAbs), kMaxAbs));
    const float range = fminf(max, kMaxAbs) - half_to_float(offset);
    return {half_round_up(fmaxf(range / kMaxCode, kMinScale)), offset};
  }
  static KVQUANT_HD RowAffine affine(Params params) {
    return {half_to_float(params.scale), half_to_float(params.offset)};
  }
};

}  // namespace kvquant
