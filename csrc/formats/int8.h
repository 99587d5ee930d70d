// Rows of 8-bit codes: 0 .. 255 with an fp16 scale and an fp16 offset a row.
#pragma once

#include "formats/affine.h"

namespace kvquant {

struct Int8 {
  static constexpr RowFormat kTag = RowFormat::kInt8;
  static constexpr const char* kName = "int8";
  static constexpr float kMaxCode = 255.f, kMiddleCode = 128.f;
  static constexpr bool kSymmetric = false;

  using Params = AffineParams;
  static KVQUANT_HD constexpr int code_bytes(int head_dim) { return head_dim; }
  static KVQUANT_HD Params params(float min, float max, bool finite) {
    return affine_params(min, max, finite, 255.f, 0.f);
  }
  static KVQUANT_HD RowAffine affine(Params params) { return affine_of(params); }
};

}  // namespace kvquant
