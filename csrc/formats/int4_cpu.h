// 4-bit rows as the CPU's vectors have them: two channels in a byte.
#pragma once

#include "common/cpu/vec.h"
#include "formats/int4.h"

namespace kvquant::cpu::KVQUANT_ISA {

template <>
struct Codes<Int4> {
  static KVQUANT_INLINE Vec load(const uint8_t* row, int channel) {
    return Vec::load_nibbles(row + channel / 2);
  }
  static KVQUANT_INLINE Vec load_centered(const uint8_t* row, int channel) {
    return Vec::load_nibbles_centered(row + channel / 2);
  }
  static KVQUANT_INLINE void store(uint8_t* row, int channel, Vec codes) {
    codes.store_nibbles(row + channel / 2);
  }
  static KVQUANT_INLINE void load_affine(const Int4::Params* params, Vec& scale, Vec& middle) {
    load_middle(params, Int4::kMiddleCode, scale, middle);
  }
  static constexpr int kPerByte = 2;
  template <class Bytes>
  static KVQUANT_INLINE void split(Bytes packed, Bytes (&codes)[kPerByte]) {
    codes[0] = packed.low_nibbles(), codes[1] = packed.high_nibbles();
  }
};

}  // namespace kvquant::cpu::KVQUANT_ISA
