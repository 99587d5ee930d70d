// How the CPU's vectors read and write the codes of each row format. For the *.isa.cpp files.
#pragma once

#include "common/cpu/vec.h"
#include "formats/formats.h"

namespace kvquant::cpu::KVQUANT_ISA {

// Of kWidth channels of a row from `channel` on, a multiple of kWidth:
//   load             codes
//   load_centered    codes less kMiddleCode: sums of such terms lose less to rounding
//   store            codes, which are rounded half to even
// and of kWidth neighbouring rows:
//   load_affine      x = scale * (code - kMiddleCode) + middle
// and of a register of bytes, for instruction sets that multiply these:
//   kPerByte         codes in a byte
//   split            codes with a byte each: codes[i] has those of channels i, kPerByte + i, ...
template <class Format>
struct Codes;

// load_affine of rows with AffineParams.
KVQUANT_INLINE void load_middle(const AffineParams* params, float middle_code, Vec& scale,
                                Vec& middle) {
  Vec offset;
  load_pairs(reinterpret_cast<const uint32_t*>(params), scale, offset);
  middle = fma(scale, Vec::set(middle_code), offset);
}

}  // namespace kvquant::cpu::KVQUANT_ISA

#include "formats/int4_cpu.h"
#include "formats/int8_cpu.h"
