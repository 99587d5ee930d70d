// The scores of one warp's 16 tokens, from a tile in registers. How codes become operands, the
// formats say (formats/formats.cuh).
//
//   Q K^T  of integers: A = query rows, B = tokens. Its C fragment (query g, columns 2t, 2t + 1)
//          becomes the B fragment of P V (accumulate.cuh).
//   Tokens within 16: n-tile j, column c is token 4 (c >> 1) + (c & 1) + 2 j, so that a lane's four
//          scores are neighbours and their params one read. With two columns a token, columns c
//          and c + 1 of n-tile j, c even, are token 4 (c >> 1) + j.
//
// With q' = R q / unit, the score of a token is unit softmax_scale log2(e) times
//   scale q'.codes + offset sum(q') + q'.mean
#pragma once

#include "kernels/attention/pipeline.cuh"

namespace kvquant::cuda {

// Products of a query's integers and a tile's codes: [..][n-tile][column] sums the k-steps of that
// column of the tokens; of C's columns, those of the other one are of no use.
template <class Traits, int kColumns>
struct Products {
  int c[Traits::kFragments][2 * kColumns][kColumns][4] = {};

  // Of row g of a half of the fragment's 16 rows with token 4 t + i.
  __device__ __forceinline__ int at(int f, int half, int i) const {
    if constexpr (kColumns == 1) {
      return c[f][i / 2][0][half * 2 + i % 2];
    } else {
      return c[f][i][0][half * 2] + c[f][i][1][half * 2 + 1];
    }
  }
};

template <class Traits, class Key, int kColumns>
__device__ __forceinline__ void mma_qk(const KeyTile<Key, Traits::kDim, kColumns>& keys,
                                       const Query<Traits>& query,
                                       Products<Traits, kColumns>& products) {
  using Keys = KeyTile<Key, Traits::kDim, kColumns>;
#pragma unroll
  for (int step = 0; step < Traits::kDim / 32; ++step) {
#pragma unroll
    for (int f = 0; f < Traits::kFragments; ++f) {
      const uint4 a = query.fragment(f, step);
#pragma unroll
      for (int j = 0; j < 2 * kColumns; ++j) {
        uint2 key = keys.operands(j, step);
        if constexpr (!std::is_same_v<Key, typename Traits::Key>) {
          static_assert(Keys::kInOrder);
          key = KeyTile<typename Traits::Key, Traits::kDim>::in_order(key);
        }
        mma_16832(products.c[f][j][Keys::column(step)], a, key.x, key.y);
      }
    }
  }
}

// Scores of the tile's tokens: rows g + 8 r, tokens 4t .. 4t + 3, log2 units.
template <class Params, class Traits, int kColumns>
__device__ __forceinline__ void scale_products(const Products<Traits, kColumns>& products,
                                               const Params& params, const Query<Traits>& query,
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
        return products.at(set / 2, set % 2, i);
      };
      float dot = float(256 * limb(Traits::kQueryLimbs - 2) + limb(Traits::kQueryLimbs - 1));
      if constexpr (Traits::kQueryLimbs == 3) dot = fmaf(65536.f, float(limb(0)), dot);
      score[r][i] = gain * fmaf(affine.scale, dot, fmaf(affine.offset, sum, mean_scores[r]));
    }
  }
}

}  // namespace kvquant::cuda
