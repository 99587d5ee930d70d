// The two products of attention over a tile of rows of codes (or of floats): the inner loops.
//
// Rows of the tile are given by pointers, so that a tile may lie across pages. Codes are converted
// in registers once for kRows query rows; the loops see integers only, the scales are folded in
// outside.
//
// `ahead` are rows to ask for meanwhile, those of the next tile; null: none. They wait in L2, L1 is
// for what the loop reads now (a token of a KV head with 4 query heads, from memory: 42 ns without,
// 30 into L1, 28 so).
#pragma once

#include "cpu/vec.h"

namespace kvquant::cpu::KVQUANT_ISA {

// Accumulators, converted codes and an operand fit the registers: 32 of them, or 16.
#if defined(KVQUANT_ISA_AVX512) || defined(KVQUANT_ISA_NEON)
constexpr int kQkRows = 4, kPvRows = 4, kPvVecs = 4;
#elif defined(KVQUANT_ISA_AVX2)
constexpr int kQkRows = 2, kPvRows = 4, kPvVecs = 2;
#else
constexpr int kQkRows = 2, kPvRows = 2, kPvVecs = 4;
#endif
constexpr int kQkTokens = 4;  // rows of the tile at once

KVQUANT_INLINE void ask_for(const Centered* x) { __builtin_prefetch(x, 0, 2); }
KVQUANT_INLINE void ask_for_rows(const Centered* const* rows, int count, int dim) {
  for (int t = 0; t < count; ++t) {
    for (int c = 0; c < dim; c += 64) ask_for(rows[t] + c);
  }
}

template <int kRows, class E>
KVQUANT_INLINE void qk_block(const float* x, int x_stride, const E* const* tile, int dim,
                             float* scores, int scores_stride) {
  Vec sum[kRows][kQkTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kQkTokens; ++t) sum[r][t] = zero();
  }
  for (int c = 0; c < dim; c += kWidth) {
    Vec k[kQkTokens];
    for (int t = 0; t < kQkTokens; ++t) k[t] = Vec::load(tile[t] + c);
    for (int r = 0; r < kRows; ++r) {
      const Vec q = Vec::load(x + r * x_stride + c);
      for (int t = 0; t < kQkTokens; ++t) sum[r][t] = fma(q, k[t], sum[r][t]);
    }
  }
  const auto add = [](Vec a, Vec b) { return a + b; };
  for (int r = 0; r < kRows; ++r) {
    reduce4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], add, scores + r * scores_stride);
  }
}

// scores[r][t] = sum over dim of x[r] * tile[t]; dim a multiple of the width, tokens of kQkTokens.
template <class E>
KVQUANT_INLINE void qk_tile(const float* x, int x_stride, int rows, const E* const* tile,
                            int tokens, int dim, const Centered* const* ahead, float* scores,
                            int scores_stride) {
  for (int t = 0; t < tokens; t += kQkTokens) {
    if (ahead) ask_for_rows(ahead + t, kQkTokens, dim);
    int r = 0;
    for (; r + kQkRows <= rows; r += kQkRows) {
      qk_block<kQkRows>(x + r * x_stride, x_stride, tile + t, dim, scores + r * scores_stride + t,
                        scores_stride);
    }
    const float* rest = x + r * x_stride;
    float* const to = scores + r * scores_stride + t;
    if (kQkRows > 3 && rows - r == 3) qk_block<3>(rest, x_stride, tile + t, dim, to, scores_stride);
    if (kQkRows > 2 && rows - r == 2) qk_block<2>(rest, x_stride, tile + t, dim, to, scores_stride);
    if (rows - r == 1) qk_block<1>(rest, x_stride, tile + t, dim, to, scores_stride);
  }
}

template <int kRows, int kVecs, class E>
KVQUANT_INLINE void pv_block(const float* w, int w_stride, const E* const* tile, int tokens,
                             int channel, const Centered* const* ahead, const float* decay,
                             float* out, int out_stride) {
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sum[r][i] = zero();
  }
  for (int t = 0; t < tokens; ++t) {
    if (ahead) ask_for(ahead[t] + channel);
    Vec v[kVecs];
    for (int i = 0; i < kVecs; ++i) v[i] = Vec::load(tile[t] + channel + i * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Vec::set(w[r * w_stride + t]);
      for (int i = 0; i < kVecs; ++i) sum[r][i] = fma(weight, v[i], sum[r][i]);
    }
  }
  // A tile's sum starts from zero: terms added one by one to the long running sum would lose more.
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) {
      float* const to = out + r * out_stride + channel + i * kWidth;
      fma(Vec::load(to), Vec::set(decay[r]), sum[r][i]).store(to);
    }
  }
}

template <int kRows, class E>
KVQUANT_INLINE void pv_rows(const float* w, int w_stride, const E* const* tile, int tokens, int dim,
                            const Centered* const* ahead, const float* decay, float* out,
                            int out_stride) {
  int c = 0;
  for (; c + kPvVecs * kWidth <= dim; c += kPvVecs * kWidth) {
    pv_block<kRows, kPvVecs>(w, w_stride, tile, tokens, c, ahead, decay, out, out_stride);
  }
  for (; c < dim; c += kWidth) {
    pv_block<kRows, 1>(w, w_stride, tile, tokens, c, ahead, decay, out, out_stride);
  }
}

// out[r] = decay[r] * out[r] + sum over tokens of w[r][t] * tile[t]; dim a multiple of the width.
template <class E>
KVQUANT_INLINE void pv_tile(const float* w, int w_stride, int rows, const E* const* tile,
                            int tokens, int dim, const Centered* const* ahead, const float* decay,
                            float* out, int out_stride) {
  int r = 0;
  for (; r + kPvRows <= rows; r += kPvRows) {
    pv_rows<kPvRows>(w + r * w_stride, w_stride, tile, tokens, dim, ahead, decay + r,
                     out + r * out_stride, out_stride);
    ahead = nullptr;
  }
  const float* rest = w + r * w_stride;
  float* const to = out + r * out_stride;
  if (kPvRows > 3 && rows - r == 3) {
    pv_rows<3>(rest, w_stride, tile, tokens, dim, ahead, decay + r, to, out_stride);
  }
  if (kPvRows > 2 && rows - r == 2) {
    pv_rows<2>(rest, w_stride, tile, tokens, dim, ahead, decay + r, to, out_stride);
  }
  if (rows - r == 1)
    pv_rows<1>(rest, w_stride, tile, tokens, dim, ahead, decay + r, to, out_stride);
}

}  // namespace kvquant::cpu::KVQUANT_ISA
