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
template <class Format>
struct Codes;

}  // namespace kvquant::cpu::KVQUANT_ISA

#include "formats/int8_cpu.h"
