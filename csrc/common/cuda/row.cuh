// Rows in a warp: dim / 16 neighbouring lanes hold one row, sixteen channels each, so that every
// head_dim that is a multiple of 16 has the same code and a lane's codes are one 16-byte store.
#pragma once

#include "common/cuda/element.cuh"
#include "common/hadamard.h"
#include "common/half.h"

namespace kvquant::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

struct RowLanes {
  int lanes;  // a row's
  int rows;   // a warp's
  int row;    // this lane's row of the warp, -1: idle
  int first;  // first lane of the row
  int index;  // of this lane within the row

  __device__ __forceinline__ explicit RowLanes(int dim) {
    const int lane = threadIdx.x & 31;
    lanes = dim / kLaneChannels;
    const unsigned part = (65535u + lanes) / lanes;  // of a row, in 2^16: exact enough up to 32
    rows = int(32 * part >> 16);
    const int r = int(lane * part >> 16);
    first = r * lanes;
    index = lane - first;
    row = r < rows ? r : -1;
  }
  __device__ __forceinline__ int channel() const { return index * kLaneChannels; }
};

// The maximum of all lanes of a row, in each of them: it does not mind the order, nor meeting one
// twice. All lanes of the warp must call.
__device__ __forceinline__ float row_max(float x, const RowLanes& at) {
  if ((at.lanes & (at.lanes - 1)) == 0) {
#pragma unroll 1
    for (int step = 1; step < at.lanes; step <<= 1) {
      x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
    }
    return x;
  }
  // x: of as many lanes as `step` from this one on, in a ring.
#pragma unroll 1
  for (int step = 1; step < at.lanes; step <<= 1) {
    const int from = at.index + step < at.lanes ? at.index + step : at.index + step - at.lanes;
    x = fmaxf(x, __shfl_sync(kFullWarp, x, at.first + from));
  }
  return x;
}
// Whether something holds for all lanes of a row, of which each learns it. All lanes of the warp
// must call.
__device__ __forceinline__ bool row_all(bool holds, const RowLanes& at) {
  const unsigned fail = __ballot_sync(kFullWarp, !holds) >> at.first;
  return (fail & (0xffffffffu >> (32 - at.lanes))) == 0;
}

// Orthonormal Hadamard rotation in blocks of `length` channels (its own inverse), in the order of
// steps that common/hadamard.h fixes. All lanes of the warp must call.
__device__ __forceinline__ void rotate(float (&x)[kLaneChannels], int length, const RowLanes& at) {
  if (length < 2) return;
#pragma unroll
  for (int step = 1; step < kLaneChannels; step <<= 1) {
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b;
      x[i + step] = a - b;
    }
  }
#pragma unroll 1
  for (int step = 1; step < length / kLaneChannels; step <<= 1) {
    const float sign = at.index & step ? -1.f : 1.f;
    // Rounds once: what the multiplication gives is exact.
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      x[i] = fmaf(x[i], sign, __shfl_xor_sync(kFullWarp, x[i], step));
    }
  }
  const float norm = hadamard_norm(length);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) x[i] = __fmul_rn(x[i], norm);
}

__device__ __forceinline__ bool all_finite(const float (&x)[kLaneChannels]) {
  bool ok = true;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) ok = ok && fabsf(x[i]) <= kMaxAbs;
  return ok;
}

// The integer nearest to x, half to even, clamped to [low, high], which are whole numbers, in the
// low bits; a NaN becomes `low`. By adding 1.5 * 2^23: rounding and conversion instructions run at
// an eighth of the speed.
__device__ __forceinline__ uint32_t round_code(float x, float low, float high) {
  return __float_as_uint(fminf(fmaxf(x, low), high) + 12582912.f);
}

// Of an x that is in range.
__device__ __forceinline__ uint32_t round_code(float x) {
  return __float_as_uint(__fadd_rn(x, 12582912.f));
}

// The low bytes of four words.
__device__ __forceinline__ uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
// A lane's sixteen codes: `code` of each channel, rounded.
template <class F>
__device__ __forceinline__ uint4 encode16(const float (&x)[kLaneChannels], float low, float high,
                                          F&& code) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bits[j] = round_code(code(x[4 * i + j]), low, high);
    }
    words[i] = pack_bytes(bits[0], bits[1], bits[2], bits[3]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ void decode16(uint4 word, float (&x)[kLaneChannels]) {
  const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {  // 2^23 + code, less 2^23
    x[i] = __uint_as_float(__byte_perm(words[i / 4], 0x4b000000u, 0x7440 + i % 4)) - 8388608.f;
  }
}

}  // namespace kvquant::cuda
