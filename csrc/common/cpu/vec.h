// The vector of floats that the kernels are written in, one width an instruction set. A source
// that includes this is compiled once an instruction set, with KVQUANT_ISA as its namespace.
//
// Functions of the same name in objects of different instruction sets are merged by the linker
// where they are inline. So everything here is in the namespace KVQUANT_ISA and always inlined,
// and the *.isa.cpp files use no std:: templates.
//
// min(a, b) and max(a, b) give b where either is NaN, as the instructions do: min(x, bound) drops
// a NaN, min(bound, x) keeps it.
//
// load_centered() reads bytes as q - 128. load_nibbles() reads kWidth / 2 bytes as twice as many
// codes, the low four bits of each byte first; load_nibbles_centered() as q - 8; store_nibbles()
// writes codes from 0 to 15 like that.
//
// reduce4(a, b, c, d, op) has four reductions by an operation in the first four lanes, which
// store4() stores; the other lanes mean nothing.
//
// store_codes4(p, a, b, c, d, low, high) stores four vectors side by side as bytes, rounded half to
// even and then within [low, high], 0 to 255. They are at most 2^21, or a NaN, which becomes low.
// With `past_cache`, straight to memory where the instruction set and the address allow;
// end_stores() then comes before another thread may look.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

#if !defined(KVQUANT_ISA)
#error "vec.h belongs to sources that are compiled once an instruction set (*.isa.cpp)"
#endif

#if defined(KVQUANT_ISA_AVX512)
#include "common/cpu/vec_avx512.h"
#elif defined(KVQUANT_ISA_AVX2)
#include "common/cpu/vec_avx2.h"
#elif defined(KVQUANT_ISA_NEON)
#include "common/cpu/vec_neon.h"
#else
#include "common/cpu/vec_portable.h"
#endif

namespace kvquant::cpu::KVQUANT_ISA {

constexpr int kWidth = Vec::kWidth;
static_assert(16 % kWidth == 0, "head_dims are multiples of 16");

constexpr float kInfinity = __builtin_inff();
constexpr float kQuietNaN = __builtin_nanf("");

KVQUANT_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KVQUANT_INLINE constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

KVQUANT_INLINE Vec zero() { return Vec::set(0.f); }
KVQUANT_INLINE Vec clamp(Vec x, float low, float high) {  // a NaN becomes low
  return min(max(x, Vec::set(low)), Vec::set(high));
}

// e^x for x <= 88, within 1e-7 of it; below -87.3 it is 0. A NaN stays.
KVQUANT_INLINE Vec exp(Vec x) {
  const Vec in = max(Vec::set(-110.f), x);
  const Vec n = round(in * Vec::set(1.44269504f));
  Vec r = fma(n, Vec::set(-0.693145752f), in);  // ln 2 in two parts: the first product is exact
  r = fma(n, Vec::set(-1.42860677e-6f), r);
  Vec p = fma(r, Vec::set(1.98412698e-4f), Vec::set(1.38888889e-3f));
  p = fma(p, r, Vec::set(8.33333333e-3f));
  p = fma(p, r, Vec::set(4.16666667e-2f));
  p = fma(p, r, Vec::set(1.66666667e-1f));
  p = fma(p, r, Vec::set(0.5f));
  p = fma(p, r, Vec::set(1.f));
  p = fma(p, r, Vec::set(1.f));
  return select(in < Vec::set(-87.3f), zero(), times_power_of_two(p, n));
}

KVQUANT_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x), aa = x * x;
  const Vec one = Vec::set(1.f), two_a = min(Vec::set(20.f), a + a);
  const Vec large = one - Vec::set(2.f) / (exp(two_a) + one);
  // The quotient cancels near 0; there a few terms of the series do.
  Vec p = fma(aa, Vec::set(-5.39682540e-2f), Vec::set(1.33333333e-1f));
  p = fma(aa, p, Vec::set(-3.33333333e-1f));
  const Vec small = fma(aa * p, x, x);
  return select(a < Vec::set(0.2f), small, copy_sign(large, x));
}

}  // namespace kvquant::cpu::KVQUANT_ISA
