// A row across a whole warp.
#pragma once

#include <type_traits>

#include "common/cuda/row.cuh"

namespace kvquant::cuda {

// A row of kDim channels in a warp: of each 128 a lane has four neighbours, of a last 64 two.
template <int kDim>
struct WarpRow {
  static constexpr int kCount = kDim / 32, kWide = kDim / 128 * 4;  // a lane's; those in fours

  static constexpr int width(int i) { return i < kWide ? 4 : 2; }  // of the piece that i is of

  // Calls f(width, i, c) for each piece of this lane: channels c, c + 1, ... are its i-th, ...
  template <class F>
  static __device__ __forceinline__ void pieces(F&& f) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < kWide; i += 4) f(std::integral_constant<int, 4>{}, i, i * 32 + lane * 4);
    if constexpr (kWide < kCount) {
      f(std::integral_constant<int, 2>{}, kWide, kWide * 32 + lane * 2);
    }
  }
};

// Rotation of rows that a warp holds as WarpRow says, in blocks of `length` channels.
template <int kDim, int kRows>
__device__ __forceinline__ void rotate_warp(float (&x)[kRows][kDim / 32], int length) {
  using Row = WarpRow<kDim>;
  const auto butterfly = [&](int i, int j) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float a = x[r][i], b = x[r][j];
      x[r][i] = a + b;
      x[r][j] = a - b;
    }
  };
#pragma unroll
  for (int i = 0; i < Row::kCount; i += 2) butterfly(i, i + 1);
  if (length > 2) {
#pragma unroll
    for (int i = 0; i < Row::kWide; i += 4) butterfly(i, i + 2), butterfly(i + 1, i + 3);
  }
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const float sign = threadIdx.x & step ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < Row::kCount; ++i) {
      if (step * Row::width(i) >= length) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        x[r][i] = fmaf(x[r][i], sign, __shfl_xor_sync(kFullWarp, x[r][i], step));
      }
    }
  }
  if constexpr (Row::kWide == 8) {
    if (length > 128) {
#pragma unroll
      for (int i = 0; i < 4; ++i) butterfly(i, i + 4);
    }
  }
  const float norm = hadamard_norm(length);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < Row::kCount; ++i) x[r][i] *= norm;
  }
}

}  // namespace kvquant::cuda
