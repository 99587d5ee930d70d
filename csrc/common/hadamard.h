// The orthonormal Hadamard rotation of rows: butterflies (a + b, a - b) over neighbours at distance
// 1, 2, 4, ..., then one multiplication by hadamard_norm(length). Every backend takes these steps
// in this order, so that rotated rows have the same bits everywhere.
#pragma once

#include "common/host_device.h"

namespace kvquant {

// 1 / sqrt(length) of a power of two, correctly rounded.
KVQUANT_HD float hadamard_norm(int length) {
  float norm = 1.f;
  for (; length >= 4; length /= 4) norm *= 0.5f;
  return length == 2 ? norm * 0.70710678f : norm;
}

}  // namespace kvquant
