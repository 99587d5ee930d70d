// How the products of a tile are made: of floats, or of bytes where there are instructions for it.
//
// Both have, for `rows` query rows and `tokens` rows of codes, a multiple of 16:
//   set_query   before the first tile: the query rows x [rows, dim], rotated or not, and their sums
//   score       scores [rows, kTokens] = x . (codes - the middle one)
//   add         out [rows, dim] = decay * out + sum over tokens of weight * (code - the middle
//   one),
//               weights [rows, kTokens]
// A row of x that is not finite gets NaNs. With weights that are not finite a row of out may become
// anything, as the sum of these weights says; no other row notices.
#pragma once

#include "cpu/rows.h"
#include "cpu/tile.h"

#if defined(KVQUANT_ISA_AVX512)
#include "cpu/dots.h"
#endif

namespace kvquant::cpu::KVQUANT_ISA {

// From as many query rows on, converting a tile's codes once, into memory, is cheaper than once
// for every few rows in registers.
constexpr int kConvertRows = 3 * kQkRows;

template <int kRows, int kTokens>
class FloatProducts {
 public:
  template <class Format>
  KVQUANT_INLINE void set_query(Format, Dtype, bool, const float* x, const float*, int, int) {
    query_ = x;
  }
  template <class Format>
  KVQUANT_INLINE void score(const CodeRows<Format>& keys, int rows, int tokens, int dim,
                            float* scores) {
    with_rows(keys, rows, tokens, dim, [&](const auto& keys) {
      qk_tile(query_, dim, rows, keys, tokens, dim, scores, kTokens);
    });
  }
  template <class Format>
  KVQUANT_INLINE void add(const CodeRows<Format>& values, const float* weights, int rows,
                          int tokens, int dim, const float* decay, float* out) {
    with_rows(values, rows, tokens, dim, [&](const auto& values) {
      pv_tile(weights, kTokens, rows, values, tokens, dim, decay, out, dim);
    });
  }

 private:
  template <class Rows, class F>
  KVQUANT_INLINE void with_rows(const Rows& codes, int rows, int tokens, int dim, const F& f) {
    if (rows < kConvertRows) return f(codes);
    for (int t = 0; t < tokens; ++t) {
      codes.ask_rows(t, 1, dim);
      float* const to = converted_ + t * dim;
      for (int c = 0; c < dim; c += kWidth) codes.load(t, c).store(to + c);
      floats_[t] = to;
    }
    f(FloatRows{floats_});
  }

  const float* query_;
  const float* floats_[kTokens];
  alignas(64) float converted_[kTokens * kMaxDim];
};

constexpr int kTileRows = 32;  // query rows that share a tile of keys
#if defined(KVQUANT_ISA_AVX512)
// The weights of a tile wait for its scores, so that a tile has a time of its own (a token of a KV
// head with 3 query heads of 64 channels, in cache: 7.5 ns by 64 tokens, 6.6 by 128).
constexpr int kTileTokens = 128;
using Products = ByteProducts<kTileRows, kTileTokens>;
#else
constexpr int kTileTokens = 64;  // 64 rows of codes of 128 channels are 8 KB, K and V half of L1
using Products = FloatProducts<kTileRows, kTileTokens>;
#endif

}  // namespace kvquant::cpu::KVQUANT_ISA
