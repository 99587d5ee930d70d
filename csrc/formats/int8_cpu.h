// 8-bit rows as the CPU's vectors have them: a byte a channel.
#pragma once

#include "common/cpu/vec.h"
#include "formats/int8.h"

namespace kvquant::cpu::KVQUANT_ISA {

template <>
struct Codes<Int8> {
  static KVQUANT_INLINE Vec load(const uint8_t* row, int channel) {
    return Vec::load(row + channel);
  }
  static KVQUANT_INLINE Vec load_centered(const uint8_t* row, int channel) {
    return Vec::load_centered(row + channel);
  }
  static KVQUANT_INLINE void store(uint8_t* row, int channel, Vec codes) {
    codes.store_codes(row + channel);
  }
  static KVQUANT_INLINE void load_affine(const Int8::Params* params, Vec& scale, Vec& middle) {
    load_middle(params, Int8::kMiddleCode, scale, middle);
  }
  static constexpr int kPerByte = 1;
  template <class Bytes>
  static KVQUANT_INLINE void split(Bytes packed, Bytes (&codes)[kPerByte]) {
    codes[0] = packed;
  }
};

}  // namespace kvquant::cpu::KVQUANT_ISA
