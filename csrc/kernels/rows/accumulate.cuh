// The scores of a tile's tokens for many query rows, the running softmax, and sums of weighted
// values.
#pragma once

#include "kernels/rows/tiles.cuh"

namespace kvquant::cuda {

// A thread's scores of a tile: of its rows, g and g + 8 of the warp's, and of each eight tokens the
// two from 2 t on.
template <class Traits>
using RowScores = float[Traits::kThreadRows][kRowsTile / 4];

// Softcap, ALiBi and the mask on a tile's scores over gain, which become scores. Those of rows that
// see a token whose value is not finite become NaN.
template <class Traits>
__device__ __forceinline__ void mask_rows(const AttentionCall& p, const RowsShared<Traits>& shared,
                                          int token, int stage, int row, int t,
                                          const float (&gain)[Traits::kThreadRows],
                                          RowScores<Traits>& y) {
  const float cap = p.softcap * kLog2e, inverse = __frcp_rn(cap);
  const uint32_t lost = shared.lost[stage];
  RowView views[Traits::kThreadRows];
#pragma unroll
  for (int r = 0; r < Traits::kThreadRows; ++r) views[r] = shared.views[row + 8 * r];
#pragma unroll
  for (int i = 0; i < kRowsTile / 4; ++i) {
    const int at = i / 2 * 8 + 2 * t + i % 2, j = token + at;
    const bool is_there = !(lost >> at / kTile & 1);
    const bool is_finite = half_to_float(shared.v_params[stage][at].scale) <= kMaxAbs;
#pragma unroll
    for (int r = 0; r < Traits::kThreadRows; ++r) {
      float s = y[r][i] * gain[r];
      if (p.softcap > 0.f) s = cap * tanh_approx(s * inverse);
      s -= views[r].slope * fabsf(float(views[r].position - j));
      if (!is_finite) s = NAN;
      if (j < views[r].begin || j >= views[r].end || !is_there) s = -INFINITY;
      y[r][i] = s;
    }
  }
}

// The running softmax of a thread's rows, and their sums of weighted values.
template <class Traits>
class RowsAccumulator {
  static constexpr int kDim = Traits::kDim, kThreadRows = Traits::kThreadRows;
  // Weights carry 2^kRaise when a base moves, so that small ones are no subnormals. Bases follow
  // larger scores only where fp16 might not hold the weights: the sum of a thread's weights, which
  // is needed anyway, tells.
  static constexpr float kRaise = 7.f, kMostSum = 0x1p15f;

 public:
  __device__ __forceinline__ RowsAccumulator() {
#pragma unroll
    for (float& base : base_) base = kNoScore;
  }
  // Weights of a tile: exp2(y by - base), in halves as the product takes them.
  __device__ __forceinline__ void weigh(const RowScores<Traits>& y,
                                        const float (&by)[kThreadRows]) {
    float sum[kThreadRows];
    weigh_once(y, by, sum);
    bool is_large = false;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) is_large |= sum[r] > kMostSum;
    if (__any_sync(kFullWarp, is_large)) {
      rescale(y, by);
      weigh_once(y, by, sum);
    }
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) total_[r] += sum[r];
  }
  // Adds the tile's values, which all threads have written; not waited for.
  __device__ __forceinline__ void add(uint64_t values) {
    keep(out_);
    begin_products();
#pragma unroll
    for (int i = 0; i < kRowsTile / 16; ++i) {
      // Of 32 rows, the other 32 of the operand are none.
      const auto half = [&](int n, int r) { return r < kThreadRows ? weights_[2 * i + n][r] : 0u; };
      multiply_halves(out_, make_uint4(half(0, 0), half(0, 1), half(1, 0), half(1, 1)),
                      values + i * (16 * 128 >> 4));
    }
    close_products();
  }
  __device__ __forceinline__ void wait() {
    wait_products<0>();
    keep(out_);
  }

  // Sums of weights: of all lanes that have tokens of a row.
  __device__ __forceinline__ void sum_lanes() {
#pragma unroll
    for (float& total : total_) {
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
    }
  }
  // Row r's sums, of each 16 channels the four from 4 t on.
  static constexpr int kFours = kDim / 16;
  __device__ __forceinline__ void four(int r, int i, float (&x)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = out_[at(r, i, j)];
  }
  // A row's base, and the sum of its weights.
  struct Weighed {
    float base, sum;
  };
  __device__ __forceinline__ Weighed total(int r) const { return {base_[r], total_[r]}; }
  // Takes in what another split has of row r, whose weights are of another base.
  __device__ __forceinline__ void take_in(int r, const Weighed& total,
                                          const float (&x)[kFours][4]) {
    const float base = fmaxf(base_[r], total.base);
    const float shrink = exp2_approx(base_[r] - base), by = exp2_approx(total.base - base);
    base_[r] = base, total_[r] = fmaf(by, total.sum, total_[r] * shrink);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& out = out_[at(r, i, j)];
        out = fmaf(by, x[i][j], out * shrink);
      }
    }
  }

 private:
  float out_[kDim / 2] = {};
  float base_[kThreadRows], total_[kThreadRows] = {};
  uint32_t weights_[kRowsTile / 8][kThreadRows];  // of each eight tokens, of each row

  static constexpr int at(int r, int i, int j) { return (i + j / 2 * kFours) * 4 + 2 * r + j % 2; }

  __device__ __forceinline__ void weigh_once(const RowScores<Traits>& y,
                                             const float (&by)[kThreadRows],
                                             float (&sum)[kThreadRows]) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      float parts[2] = {};
#pragma unroll
      for (int i = 0; i < kRowsTile / 8; ++i) {
        const float a = exp2_approx(fmaf(y[r][2 * i], by[r], -base_[r])),
                    b = exp2_approx(fmaf(y[r][2 * i + 1], by[r], -base_[r]));
        parts[0] += a, parts[1] += b;
        weights_[i][r] = half2_bits(__floats2half2_rn(a, b));
      }
      sum[r] = parts[0] + parts[1];
    }
  }
  __device__ __forceinline__ void rescale(const RowScores<Traits>& y,
                                          const float (&by)[kThreadRows]) {
    float best[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      best[r] = y[r][0] * by[r];
#pragma unroll
      for (int i = 1; i < kRowsTile / 4; ++i) best[r] = fmaxf(best[r], y[r][i] * by[r]);
    }
    reduce_rows(best);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      const float base = fmaxf(base_[r], best[r] - kRaise);
      const float shrink = exp2_approx(base_[r] - base);
      base_[r] = base;
      total_[r] *= shrink;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        out_[4 * i + 2 * r] *= shrink;
        out_[4 * i + 2 * r + 1] *= shrink;
      }
    }
  }
};

}  // namespace kvquant::cuda
