// What a row format is: a type that alone knows what the bytes of a stored row mean. See int8.h.
//
//   kTag, kName                its number in params.h, its name in Python
//   kMaxCode, kMiddleCode      codes are 0 .. kMaxCode; the middle one is what values of attention
//                              are taken relative to
//   kSymmetric                 there is no offset: x = scale * (code - kMiddleCode)
//   Params                     what a row keeps beside its codes, 2 or 4 bytes
//   code_bytes(head_dim)       bytes of a row's codes
//   params(min, max, finite)   of a row in the basis it is stored in; not finite: NaN
//   affine(params)             x = scale * code + offset; a NaN scale: the row is not finite
//
// How codes lie in a row, X.cuh and X_cpu.h say, for CUDA and for the CPU's vectors.
//
// Every backend computes a row in the same fp32 steps, without contraction into fused
// multiply-adds, so that all write the same codes:
//   1. rotate, as common/hadamard.h says;
//   2. subtract the group's mean;
//   3. min and max of the row, its params, their affine (scale, offset);
//   4. code = clamp(round_half_even((y - offset) * (1 / scale)), 0, kMaxCode).
#pragma once

#include "common/host_device.h"
#include "params.h"

namespace kvquant {

struct RowAffine {
  float scale, offset;
};

constexpr int kMinMeanRows = 16;  // a first group's own mean needs as many rows

}  // namespace kvquant
