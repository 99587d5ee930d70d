// The scores of one warp's 16 tokens, from a tile in registers. How codes become operands, the
// formats say (formats/formats.cuh).
//
//   Q K^T  of integers: A = query rows, B = tokens. Its C fragment (query g, tokens 2t, 2t + 1) is
//          the B fragment of P V (accumulate.cuh).
//   Tokens within 16: n-tile j, column c is token 4 (c >> 1) + (c & 1) + 2 j, so that a lane's four
//          scores are neighbours and their params one read.
//
// With q' = R q / unit, the score of a token is unit softmax_scale log2(e) times
//   scale q'.q_t + offset sum(q') + q'.mean
#pragma once

#include "kernels/attention/pipeline.cuh"

namespace kvquant::cuda {

// Products of a query's integers and a tile's codes.
template <class Traits>
using Products = int[Traits::kFragments][2][4];

template <class Traits, class Key>
__device__ __forceinline__ void mma_qk(const KeyTile<Key, Traits::kDim>& keys,
                                       const Query<Traits>& query, Products<Traits>& c) {
#pragma unroll
  for (int step = 0; step < Traits::kDim / 32; ++step) {
#pragma unroll
    for (int f = 0; f < Traits::kFragments; ++f) {
      const uint4 a = query.fragment(f, step);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint2 key = keys.operands(j, step);
        if constexpr (!std::is_same_v<Key, typename Traits::Key>) {
          static_assert(KeyTile<Key, Traits::kDim>::kInOrder);
          key = KeyTile<typename Traits::Key, Traits::kDim>::in_order(key);
        }
        mma_16832(c[f][j], a, key.x, key.y);
      }
    }
  }
}

// Scores of the tile's tokens: rows g + 8 r, tokens 4t .. 4t + 3, log2 units.
template <class Params, class Traits>
__device__ __forceinline__ void scale_products(const Products<Traits>& c, const Params& params,
                                               const Query<Traits>& query,
                                               const float (&mean_scores)[Traits::kRowSets],
                                               float (&score)[Traits::kRowSets][4]) {
#pragma unroll
  for (int r = 0; r < Traits::kRowSets; ++r) {
    const auto [sum, gain] = query.scale[r];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const RowAffine affine = params.affine(i);
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

}  // namespace kvquant::cuda
