// Rows of 4-bit codes: 0 .. 15 with an fp16 scale and an fp16 offset a row. Byte j of a row has
// channel 2 j in its low four bits and channel 2 j + 1 in its high ones.
//
// The range is cut into 16 steps, and codes stand for their middles: no error is larger than a 32nd
// of the range, where codes that reach to both ends leave a 30th. On normally distributed rows of
// 64, 128 and 256 channels the squared error falls by 4, 8 and 10%; the best of six narrower ranges
// would bring 8, 10 and 15%, for six times the work.
#pragma once

#include "formats/affine.h"

namespace kvquant {

struct Int4 {
  static constexpr RowFormat kTag = RowFormat::kInt4;
  static constexpr const char* kName = "int4";
  static constexpr float kMaxCode = 15.f, kMiddleCode = 8.f;
  static constexpr bool kSymmetric = false;

  using Params = AffineParams;
  static KVQUANT_HD constexpr int code_bytes(int head_dim) { return head_dim / 2; }
  static KVQUANT_HD Params params(float min, float max, bool finite) {
    return affine_params(min, max, finite, 15.5f, 0.03125f);
  }
  static KVQUANT_HD RowAffine affine(Params params) { return affine_of(params); }
};

}  // namespace kvquant
