// 8-bit rows in the codes of an old format. See docs/by-age.md.
#pragma once

#include "formats/formats.cuh"

namespace kvquant::cuda {

// Turns a row's 8-bit codes, of which `low` and `high` are the ends, into codes of a format: those
// of its values, which are monotone in the code. A row that needs no larger codes stays as it is.
template <class Format>
struct Narrowing {
  static_assert(std::is_same_v<typename Format::Params, Int8::Params> &&
                Format::kMaxCode < Int8::kMaxCode);
  RowAffine from;
  Int8::Params params;
  Encoder<Format> encoder;

  __device__ __forceinline__ Narrowing(Int8::Params young, float low, float high)
      : from(Int8::affine(young)), params(young), encoder(young) {
    if (high <= Format::kMaxCode || isnan(from.scale)) {
      from = {1.f, 0.f}, encoder.offset = 0.f, encoder.inverse = 1.f;
    } else {
      params = Format::params(value(low), value(high), true);
      encoder = Encoder<Format>(params);
    }
  }
  __device__ __forceinline__ uint32_t code(float young_code) const {
    return encoder.code(value(young_code));
  }

 private:
  __device__ __forceinline__ float value(float code) const {
    return fmaf(from.scale, code, from.offset);
  }
};

}  // namespace kvquant::cuda
