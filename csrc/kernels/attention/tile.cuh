// One warp's work on 16 tokens, between the ring and the accumulators.
//
//   Q K^T  A = query rows, B = tokens. A lane reads 16 consecutive bytes of a token's row: with the
//          channels of a k-step permuted alike in A and B, one 32-bit word is one k-step's B
//          fragment (two byte-permutes to two half2 of 1024 + q).
//   P V    A = V^T (rows = channels), B = P^T. The C fragment of Q K^T (query g, tokens 2t, 2t + 1)
//          is this B fragment. A lane reads the same 16 channels of 4 tokens and transposes 4 x 4
//          bytes with byte-permutes.
//   Tokens within 16: n-tile j, column c is token 4 (c >> 1) + (c & 1) + 2 j, so that a lane's four
//          scores are neighbours and their params one 16-byte read.
//
// With q' = R q, the score of a token is softmax_scale log2(e) times
//   scale (q'.(1024 + q_t) - 1024 sum(q')) + offset sum(q') + q'.mean
// Values are taken as q - 128, which is exact, and the middle of their row, 128 v_scale + v_offset,
// with the weight p before it is rounded. So rounding a weight costs in proportion to a value's
// distance from the middle, and nothing that all channels share, which a rotation of the values
// would gather in one of them (measured with the middle times the rounded weight: 1.3e-3 of the
// largest output at head_dim 256). Nor may the bias of 1024 stay in the accumulators: the tensor
// core's adder truncates (relative error 3e-3 after 1k tokens of a warp).
#pragma once

#include "kernels/attention/ring.cuh"

namespace kvquant::cuda {

constexpr float kLazyGrowth = 6.f;  // log2: the running maximum follows only beyond it
constexpr float kScaleHeadroom = 256.f;

__device__ __forceinline__ uint32_t word_of(const uint4& u, int i) {
  return i == 0 ? u.x : i == 1 ? u.y : i == 2 ? u.z : u.w;
}

// What the softmax keeps of one query row (shared by the four lanes of a group).
struct RowState {
  float max = kNoScore;  // log2 units, lazy
  float sum = 0.f;       // of p
  float offsets = 0.f;   // of p * (v_offset + 128 v_scale)
};

template <class Traits>
struct Accumulator {
  // of p' (q - 128). m-tiles of 16 channels; c[0], c[1]: channel g, queries 2t, 2t + 1; c[2], c[3]:
  // the next channel
  float c[Traits::kDim / 16][Traits::kOutTiles][4] = {};
  RowState rows[Traits::kRowSets];
  float value_gain = 1.f;  // power of two that keeps p' in fp16's range whatever V's scale
};

// q' . mean for rows g + 8 r, with what fp16 left of q': the mean is every column of the product.
template <class Traits>
__device__ __forceinline__ void dot_mean(const Stage<Traits::kDim>& stage,
                                         const Query<Traits>& query,
                                         float (&dots)[Traits::kRowSets]) {
  constexpr int kFragments = (Traits::kRows + 15) / 16;
  float c[kFragments][4] = {};
#pragma unroll
  for (int s = 0; s < Traits::kDim / 64; ++s) {
    const uint4 mean[2] = {stage.mean[s * 8 + query.t * 2], stage.mean[s * 8 + query.t * 2 + 1]};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint4& u = mean[w / 2];
      const uint32_t b0 = w % 2 ? u.z : u.x, b1 = w % 2 ? u.w : u.y;
#pragma unroll
      for (int f = 0; f < kFragments; ++f) {
        uint32_t a[4], rest[4];
        query.fragment(f, s * 4 + w, a);
        read_fragment(query.shared->rest, f, s * 4 + w, query.g, query.t, rest);
        mma_16816(c[f], a, b0, b1);
        mma_16816(c[f], rest, b0, b1);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) dots[r] = c[r / 2][2 * (r % 2)];
}

// Scores of the tile's tokens: rows g + 8 r, tokens 4t .. 4t + 3, log2 units.
template <class Traits>
__device__ __forceinline__ void score_tile(const Stage<Traits::kDim>& stage,
                                           const Query<Traits>& query,
                                           const float (&dots)[Traits::kRowSets],
                                           float (&score)[Traits::kRowSets][4]) {
  float c[Traits::kFragments][2][4] = {};
#pragma unroll
  for (int s = 0; s < Traits::kDim / 64; ++s) {
    const uint4 keys[2] = {stage.keys(0, s, query.g, query.t), stage.keys(1, s, query.g, query.t)};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int f = 0; f < Traits::kFragments; ++f) {
        uint32_t a[4];
        query.fragment(f, s * 4 + w, a);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t word = word_of(keys[j], w);
          mma_16816(c[f][j], a, codes_low(word), codes_high(word));
        }
      }
    }
  }
  const uint4 params = stage.k_params[query.t];
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    const auto [sum, gain] = query.scale[r];
    const float bias = -kCodeBias * sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 affine = half2_floats(word_of(params, i));
      float dot = c[r / 2][i / 2][2 * (r % 2) + i % 2];
      if constexpr (Traits::kSplit) dot += c[0][i / 2][2 + i % 2];
      score[r][i] = gain * fmaf(affine.x, dot + bias, fmaf(affine.y, sum, dots[r]));
    }
  }
}

// Lets maxima and the value gain follow where they must; rescales what was summed before.
template <class Traits>
__device__ __forceinline__ void follow(Accumulator<Traits>& acc,
                                       const float (&best)[Traits::kRowSets], float v_scale,
                                       int t) {
  bool grows = v_scale * acc.value_gain > kScaleHeadroom, first = true;
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    grows |= best[r] > acc.rows[r].max + kLazyGrowth;
    first &= acc.rows[r].max == kNoScore;
  }
  if (!__any_sync(kFullWarp, grows)) return;
  v_scale = warp_max(v_scale);
  float change = 1.f;
  if (__all_sync(kFullWarp, first) || v_scale * acc.value_gain > kScaleHeadroom) {
    const float gain = v_scale > 0.f ? exp2f(4.f - float(ilogbf(v_scale))) : 1.f;
    change = gain / acc.value_gain;
    acc.value_gain = gain;
  }
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    RowState& row = acc.rows[r];
    const float max = fmaxf(row.max, best[r]), shrink = exp2_approx(row.max - max);
    row.max = max;
    row.sum *= shrink;
    row.offsets *= shrink;
    const float z0 = change * __shfl_sync(kFullWarp, shrink, t * 8);
    const float z1 = change * __shfl_sync(kFullWarp, shrink, t * 8 + 4);
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

// Adds the tile's values, weighted by exp2(score - max).
template <class Traits>
__device__ __forceinline__ void add_values(Accumulator<Traits>& acc,
                                           const Stage<Traits::kDim>& stage, const uint4& params,
                                           int g, int t,
                                           const float (&score)[Traits::kRowSets][4]) {
  uint32_t weight[Traits::kOutTiles][2];
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    RowState& row = acc.rows[r];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float w[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float p = exp2_approx(score[r][2 * pair + i] - row.max);
        // A token that this row does not see may hold NaN.
        const float2 affine =
            p > 0.f ? half2_floats(word_of(params, 2 * pair + i)) : make_float2(0.f, 0.f);
        row.sum += p;
        row.offsets = fmaf(p, fmaf(128.f, affine.x, affine.y), row.offsets);
        w[i] = p * (affine.x * acc.value_gain);
      }
      const __half2 rounded = __floats2half2_rn(w[0], w[1]);
      weight[r][pair] = half2_bits(rounded);
      if constexpr (Traits::kSplit) {
        const float2 seen = __half22float2(rounded);
        weight[1][pair] = half2_bits(__floats2half2_rn(w[0] - seen.x, w[1] - seen.y));
      }
    }
  }
  constexpr int kWords = Traits::kDim / 32;
  uint32_t v[4][kWords];
#pragma unroll
  for (int i = 0; i < 4; ++i) stage.values(i, g, t, v[i]);
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint32_t low01 = __byte_perm(v[0][w], v[1][w], 0x5140);
    const uint32_t high01 = __byte_perm(v[0][w], v[1][w], 0x7362);
    const uint32_t low23 = __byte_perm(v[2][w], v[3][w], 0x5140);
    const uint32_t high23 = __byte_perm(v[2][w], v[3][w], 0x7362);
    uint32_t a[2][4] = {
        {codes_low(low01), codes_high(low01), codes_low(low23), codes_high(low23)},
        {codes_low(high01), codes_high(high01), codes_low(high23), codes_high(high23)}};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t& x = a[i / 4][i % 4];
      asm("sub.f16x2 %0, %0, %1;" : "+r"(x) : "r"(0x64806480u));
    }
#pragma unroll
    for (int n = 0; n < Traits::kOutTiles; ++n) {
      mma_16816(acc.c[2 * w][n], a[0], weight[n][0], weight[n][1]);
      mma_16816(acc.c[2 * w + 1][n], a[1], weight[n][0], weight[n][1]);
    }
  }
}

}  // namespace kvquant::cuda
