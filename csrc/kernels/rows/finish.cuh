// What becomes of a block of many query rows: splits' blocks take in what others have left, as a
// tree whose root is the last split's, which writes the rows.
#pragma once

#include "kernels/rows/accumulate.cuh"

namespace kvquant::cuda {

// Where a block leaves its sums: each thread's fours, and a row's (base, sum of weights).
template <class Traits>
class RowsPartial {
  using Accumulator = RowsAccumulator<Traits>;
  using Weighed = typename Accumulator::Weighed;
  static constexpr int kFours = Accumulator::kFours;

 public:
  __device__ __forceinline__ RowsPartial(const AttentionCall& p, int64_t unit)
      : unit_(p.partial + unit * p.splits * Traits::kPartialFloats) {}

  // `is_row`: whether a thread's row is one.
  __device__ __forceinline__ void leave(const Accumulator& acc, int split, int row,
                                        const bool (&is_row)[Traits::kThreadRows]) const {
#pragma unroll
    for (int r = 0; r < Traits::kThreadRows; ++r) {
      if (!is_row[r]) continue;
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        float x[4];
        acc.four(r, i, x);
        leave_floats<4>(four(split, r, i), x);
      }
      const Weighed total = acc.total(r);
      const float words[2] = {total.base, total.sum};
      if (threadIdx.x % 4 == 0) leave_floats<2>(this->total(split, row + 8 * r), words);
    }
  }
  // Adds what a split leaves, as it arrives, and leaves its place as it was.
  __device__ __forceinline__ void take(Accumulator& acc, int split, int row,
                                       const bool (&is_row)[Traits::kThreadRows]) const {
#pragma unroll
    for (int r = 0; r < Traits::kThreadRows; ++r) take_row(acc, split, is_row[r], r, row + 8 * r);
  }

 private:
  float* unit_;  // splits one after the other

  __device__ __forceinline__ float* four(int split, int r, int i) const {
    return unit_ + int64_t(split) * Traits::kPartialFloats +
           ((r * kFours + i) * Traits::kThreads + threadIdx.x) * 4;
  }
  __device__ __forceinline__ float* total(int split, int row) const {
    return unit_ + int64_t(split) * Traits::kPartialFloats + Traits::kRows * Traits::kDim + row * 2;
  }
  __device__ __forceinline__ void take_row(Accumulator& acc, int split, bool is_row, int r,
                                           int row) const {
    float x[kFours][4] = {};
    Weighed total{kNoScore, 0.f};
    for (int looks = kMostLooks; looks; --looks) {
      if (is_row) {
#pragma unroll
        for (int i = 0; i < kFours; ++i) look_at_floats<4>(four(split, r, i), x[i]);
        look_at_floats<2>(this->total(split, row), &total.base);
      }
      uint32_t most = max(__float_as_uint(total.base), __float_as_uint(total.sum));
#pragma unroll
      for (const auto& four : x) {
#pragma unroll
        for (float y : four) most = max(most, __float_as_uint(y));
      }
      if (__all_sync(kFullWarp, most != kNothing)) break;
    }
    acc.take_in(r, total, x);
    if (!is_row) return;
    const float nothing[4] = {__uint_as_float(kNothing), __uint_as_float(kNothing),
                              __uint_as_float(kNothing), __uint_as_float(kNothing)};
#pragma unroll
    for (int i = 0; i < kFours; ++i) leave_floats<4>(four(split, r, i), nothing);
    if (threadIdx.x % 4 == 0) leave_floats<2>(this->total(split, row), nothing);
  }
};

// Rotates a thread's rows back, of which it has four neighbours of each 16 channels, its quad the
// others. Not normalized.
template <int kThreadRows, int kFours>
__device__ __forceinline__ void rotate_quads(float (&x)[kThreadRows][kFours][4]) {
  const auto butterfly = [](float& a, float& b) {
    const float sum = a + b;
    b = a - b, a = sum;
  };
#pragma unroll
  for (auto& row : x) {
#pragma unroll
    for (auto& four : row) {
      butterfly(four[0], four[1]), butterfly(four[2], four[3]);
      butterfly(four[0], four[2]), butterfly(four[1], four[3]);
#pragma unroll
      for (int step = 1; step < 4; step <<= 1) {
        const float sign = threadIdx.x & step ? -1.f : 1.f;
#pragma unroll
        for (float& y : four) y = fmaf(y, sign, __shfl_xor_sync(kFullWarp, y, step));
      }
    }
  }
  rotate_sixteens(x);
}

// Writes the block's rows, or leaves them for another split of the unit. row: the thread's first
// one.
template <class Traits>
__device__ __forceinline__ void finish_rows(const AttentionCall& p, const RowTile& rows,
                                            RowsAccumulator<Traits>& acc, int64_t unit, int split,
                                            int splits, int row, int t) {
  using Element = typename Traits::Element;
  constexpr int kThreadRows = Traits::kThreadRows, kFours = RowsAccumulator<Traits>::kFours;
  const RowsPartial<Traits> partial(p, unit);
  bool is_row[kThreadRows];
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) is_row[r] = row + 8 * r < rows.count;
  acc.sum_lanes();
  // Blocks start in the order of their splits, so the root is the last one, and those that are
  // waited for run, or have run.
  const int place = splits - 1 - split;
#pragma unroll 1
  for (int step = 1; place % (2 * step) == 0 && place + step < splits; step *= 2) {
    partial.take(acc, split - step, row, is_row);
  }
  if (place > 0) return partial.leave(acc, split, row, is_row);
  const float norm = hadamard_norm(p.cache.v.rotation);
  float x[kThreadRows][kFours][4];
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    const auto [base, sum] = acc.total(r);
    const float factor =
        is_row[r] ? norm * normalize(p, rows, row + 8 * r, base, sum, t == 0) : 0.f;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      acc.four(r, i, x[r][i]);
#pragma unroll
      for (float& y : x[r][i]) y *= factor;
    }
  }
  if (p.cache.v.rotation > 1) rotate_quads(x);
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (!is_row[r]) continue;
    Element* const out = output_of<Element>(p, rows, row + 8 * r) + 4 * t;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      alignas(16) Element y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = from_float<Element>(x[r][i][j], p.dtype);
      if constexpr (Traits::kAligned) {
        store_vector<4>(out + 16 * i, y);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[16 * i + j] = y[j];
      }
    }
  }
}

}  // namespace kvquant::cuda
