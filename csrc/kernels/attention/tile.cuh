// One warp's work on 16 tokens, from a tile in registers to the accumulators. How codes become
// operands, the formats say (formats/formats.cuh).
//
//   Q K^T  of integers: A = query rows, B = tokens.
//   P V    A = V^T (rows = channels), B = P^T. The C fragment of Q K^T (query g, tokens 2t, 2t + 1)
//          is this B fragment.
//   Tokens within 16: n-tile j, column c is token 4 (c >> 1) + (c & 1) + 2 j, so that a lane's four
//          scores are neighbours and their params one read.
//
// With q' = R q / unit, the score of a token is unit softmax_scale log2(e) times
//   scale q'.q_t + offset sum(q') + q'.mean
// Values are taken relative to the middle code, and the middle of their row, 128 v_scale + v_offset
// in 8 bits, with the weight p before it is rounded. So rounding a weight costs in proportion to a
// value's distance from the middle, and nothing that all channels share, which a rotation of the
// values would gather in one of them (measured with the middle times the rounded weight: 1.3e-3 of
// the largest output at head_dim 256). Nor may the bias of 1024 stay in the accumulators: the
// tensor core's adder truncates (relative error 3e-3 after 1k tokens of a warp).
#pragma once

#include "kernels/attention/pipeline.cuh"

namespace kvquant::cuda {

constexpr float kLazyGrowth = 6.f;  // log2: bases follow larger scores only beyond it
constexpr float kScaleHeadroom = 256.f;

// What the softmax keeps of one query row (shared by the four lanes of a group), in units of
// p = exp2(score - base).
struct RowState {
  float base = kNoScore;
  float sum = 0.f;      // of p
  float offsets = 0.f;  // of p * the middle of the value's row
};

template <class Traits>
struct Accumulator {
  // of p v_scale times value operands. m-tiles of 16 rows; c[0], c[1]: row g, queries 2t, 2t + 1;
  // c[2], c[3]: row g + 8
  float c[Traits::kDim / 16][Traits::kOutTiles][4] = {};
  RowState rows[Traits::kRowSets];
  // Bases stand this far below the largest scores, so that p v_scale fits fp16 whatever V's scale.
  float lift = 0.f;
  float scale_limit = 0.f;  // the largest v_scale that `lift` serves
};

// Scores of the tile's tokens: rows g + 8 r, tokens 4t .. 4t + 3, log2 units.
template <class Traits>
__device__ __forceinline__ void mma_qk(const KeyTile<typename Traits::Key, Traits::kDim>& keys,
                                       const Query<Traits>& query,
                                       const float (&mean_scores)[Traits::kRowSets],
                                       float (&score)[Traits::kRowSets][4]) {
  int c[Traits::kFragments][2][4] = {};
#pragma unroll
  for (int step = 0; step < Traits::kDim / 32; ++step) {
#pragma unroll
    for (int f = 0; f < Traits::kFragments; ++f) {
      const uint4 a = query.fragment(f, step);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint2 key = keys.operands(j, step);
        mma_16832(c[f][j], a, key.x, key.y);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    const auto [sum, gain] = query.scale[r];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const RowAffine affine = keys.params.affine(i);
      const auto limb = [&](int n) {
        const int set = n * Traits::kRowSets + r;  // of eight rows
        return c[set / 2][i / 2][set % 2 * 2 + i % 2];
      };
      float dot = float(256 * limb(Traits::kQueryLimbs - 2) + limb(Traits::kQueryLimbs - 1));
      if constexpr (Traits::kQueryLimbs == 3) dot = fmaf(65536.f, float(limb(0)), dot);
      score[r][i] = gain * fmaf(affine.scale, dot, fmaf(affine.offset, sum, mean_scores[r]));
    }
  }
}

// Lets bases follow where they must; rescales what was summed before.
template <class Traits>
__device__ __forceinline__ void rescale(Accumulator<Traits>& acc,
                                        const float (&best)[Traits::kRowSets], float v_scale,
                                        int t) {
  bool grows = v_scale > acc.scale_limit;
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    grows |= best[r] > acc.rows[r].base + (acc.lift + kLazyGrowth);
  }
  if (!__any_sync(kFullWarp, grows)) return;
  v_scale = fminf(warp_max(v_scale), kMaxAbs);  // an infinite scale erases nobody's rows
  const float before = acc.lift;
  if (v_scale > acc.scale_limit) {
    acc.lift = 4.f - float(ilogbf(v_scale));
    acc.scale_limit = kScaleHeadroom * exp2f(-acc.lift);
  }
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    RowState& row = acc.rows[r];
    const float base = fmaxf(row.base + before, best[r]) - acc.lift;
    const float shrink = exp2_approx(row.base - base);
    row.base = base;
    row.sum *= shrink;
    row.offsets *= shrink;
    const float z0 = __shfl_sync(kFullWarp, shrink, t * 8);
    const float z1 = __shfl_sync(kFullWarp, shrink, t * 8 + 4);
#pragma unroll
    for (int i = 0; i < Traits::kDim / 16; ++i) {
#pragma unroll
      for (int n = 0; n < Traits::kOutTiles; ++n) {
        if (!Traits::kSplit && n != r) continue;  // a row set has its own n-tile, or both
        acc.c[i][n][0] *= z0, acc.c[i][n][1] *= z1;
        acc.c[i][n][2] *= z0, acc.c[i][n][3] *= z1;
      }
    }
  }
}

// Weights of the tile's values in fp16, exp2(score - base) v_scale. kMasked: tokens that a row does
// not see, whose score is -inf, may hold anything.
template <bool kMasked, class Traits>
__device__ __forceinline__ void softmax_weights(Accumulator<Traits>& acc,
                                                const TileParams<typename Traits::Value>& v_params,
                                                const float (&score)[Traits::kRowSets][4],
                                                uint32_t (&weight)[Traits::kOutTiles][2]) {
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    RowState& row = acc.rows[r];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float w[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p = exp2_approx(score[r][2 * pair + i] - row.base);
        const bool seen = !kMasked || score[r][2 * pair + i] != -INFINITY;
        const RowAffine affine = v_params.affine(2 * pair + i, seen);
        const float middle = fmaf(Traits::Value::kMiddleCode, affine.scale, affine.offset);
        row.sum += p;
        row.offsets = fmaf(p, middle, row.offsets);
        w[i] = p * affine.scale;
      }
      const __half2 rounded = __floats2half2_rn(w[0], w[1]);
      weight[r][pair] = half2_bits(rounded);
      if constexpr (Traits::kSplit) {
        const float2 seen = __half22float2(rounded);
        weight[1][pair] = half2_bits(__floats2half2_rn(w[0] - seen.x, w[1] - seen.y));
      }
    }
  }
}

// Adds the tile's weighted values.
template <class Traits>
__device__ __forceinline__ void mma_pv(
    Accumulator<Traits>& acc, const ValueTile<typename Traits::Value, Traits::kDim>& values,
    const uint32_t (&weight)[Traits::kOutTiles][2]) {
  values.for_operands([&](int w, const uint4& even, const uint4& odd) {
#pragma unroll
    for (int n = 0; n < Traits::kOutTiles; ++n) {
      mma_16816(acc.c[2 * w][n], even, weight[n][0], weight[n][1]);
      mma_16816(acc.c[2 * w + 1][n], odd, weight[n][0], weight[n][1]);
    }
  });
}

}  // namespace kvquant::cuda
