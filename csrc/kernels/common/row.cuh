// Rows in a warp: dim / 16 neighbouring lanes hold one row, sixteen channels each, so that every
// head_dim that is a multiple of 16 has the same code and a lane's codes are one 16-byte store.
#pragma once

#include "formats/int8.h"
#include "kernels/common/element.cuh"

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
    rows = 32 / lanes;
    const int r = lane / lanes;
    first = r * lanes;
    index = lane - first;
    row = r < rows ? r : -1;
  }
  __device__ __forceinline__ int channel() const { return index * kLaneChannels; }
};

// A row's maximum, in each of its lanes. All lanes of the warp must call.
__device__ __forceinline__ float row_max(float x, const RowLanes& at) {
  if ((at.lanes & (at.lanes - 1)) == 0) {
    for (int step = 1; step < at.lanes; step <<= 1) {
      x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
    }
    return x;
  }
  float best = x;
  for (int i = 1; i < at.lanes; ++i) {
    const int from = at.index + i < at.lanes ? at.index + i : at.index + i - at.lanes;
    best = fmaxf(best, __shfl_sync(kFullWarp, x, at.first + from));
  }
  return best;
}

// Orthonormal Hadamard rotation in blocks of `length` channels (its own inverse), in the order of
// steps that formats/int8.h fixes. All lanes of the warp must call.
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
  for (int step = 1; step < length / kLaneChannels; step <<= 1) {
    const bool upper = at.index & step;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, x[i], step);
      x[i] = upper ? other - x[i] : x[i] + other;
    }
  }
  const float norm = int8::hadamard_norm(length);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) x[i] = __fmul_rn(x[i], norm);
}

__device__ __forceinline__ bool all_finite(const float (&x)[kLaneChannels]) {
  bool ok = true;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) ok = ok && fabsf(x[i]) <= int8::kMaxAbs;
  return ok;
}

__device__ __forceinline__ uint32_t pack4(const float* code) {
  return uint32_t(code[0]) | uint32_t(code[1]) << 8 | uint32_t(code[2]) << 16 |
         uint32_t(code[3]) << 24;
}

// A lane's sixteen codes, by a function that gives one as a float.
template <class F>
__device__ __forceinline__ uint4 encode16(const float (&x)[kLaneChannels], F&& code) {
  float c[kLaneChannels];
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) c[i] = code(x[i]);
  return make_uint4(pack4(c), pack4(c + 4), pack4(c + 8), pack4(c + 12));
}
__device__ __forceinline__ void decode16(uint4 word, float (&x)[kLaneChannels]) {
  const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) x[i] = float((words[i / 4] >> (8 * (i % 4))) & 0xff);
}

}  // namespace kvquant::cuda
