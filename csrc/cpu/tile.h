// The two products of attention over a tile of rows of codes (or of floats): the inner loops.
//
// Rows of the tile are given by pointers, so that a tile may lie across pages. Codes are converted
// in registers once for kRows query rows; the loops see integers only, the scales are folded in
// outside.
//
// The next tile's rows are asked for meanwhile. They wait in L2, L1 is for what the loop reads now
// (a token of a KV head with 4 query heads, from memory: 42 ns without, 30 into L1, 28 so).
#pragma once

#include "formats/formats_cpu.h"

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

// A tile's rows as floats, and the rows of the next tile that are asked for meanwhile, if any.
struct FloatRows {
  const float* const* rows;

  KVQUANT_INLINE Vec load(int t, int channel) const { return Vec::load(rows[t] + channel); }
  KVQUANT_INLINE void ask_rows(int, int, int) const {}
  KVQUANT_INLINE void ask(int, int) const {}
  KVQUANT_INLINE FloatRows asked() const { return *this; }
};
struct ByteRows {
  const uint8_t* const* rows;

  KVQUANT_INLINE Vec load(int t, int channel) const { return Vec::load(rows[t] + channel); }
  KVQUANT_INLINE void ask_rows(int, int, int) const {}
  KVQUANT_INLINE void ask(int, int) const {}
  KVQUANT_INLINE ByteRows asked() const { return *this; }
};
template <class Format>
struct CodeRows {
  const uint8_t* const* rows;
  const uint8_t* const* ahead;  // null: none

  KVQUANT_INLINE Vec load(int t, int channel) const {
    return Codes<Format>::load_centered(rows[t], channel);
  }
  KVQUANT_INLINE void ask_rows(int first, int count, int dim) const {
    if (!ahead) return;
    for (int t = first; t < first + count; ++t) {
      for (int i = 0; i < Format::code_bytes(dim); i += 64) __builtin_prefetch(ahead[t] + i, 0, 2);
    }
  }
  KVQUANT_INLINE void ask(int t, int channel) const {
    if (ahead) __builtin_prefetch(ahead[t] + Format::code_bytes(channel), 0, 2);
  }
  KVQUANT_INLINE CodeRows asked() const { return {rows, nullptr}; }
  KVQUANT_INLINE CodeRows from(int t) const { return {rows + t, ahead ? ahead + t : nullptr}; }
};

template <int kRows, class Rows>
KVQUANT_INLINE void qk_block(const float* x, int x_stride, const Rows& tile, int first, int dim,
                             float* scores, int scores_stride) {
  Vec sum[kRows][kQkTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kQkTokens; ++t) sum[r][t] = zero();
  }
  for (int c = 0; c < dim; c += kWidth) {
    Vec k[kQkTokens];
    for (int t = 0; t < kQkTokens; ++t) k[t] = tile.load(first + t, c);
    for (int r = 0; r < kRows; ++r) {
      const Vec q = Vec::load(x + r * x_stride + c);
      for (int t = 0; t < kQkTokens; ++t) sum[r][t] = fma(q, k[t], sum[r][t]);
    }
  }
  const auto add = [](Vec a, Vec b) { return a + b; };
  for (int r = 0; r < kRows; ++r) {
    reduce4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], add).store4(scores + r * scores_stride);
  }
}

// scores[r][t] = sum over dim of x[r] * tile[t]; dim a multiple of the width, tokens of kQkTokens.
template <class Rows>
KVQUANT_INLINE void qk_tile(const float* x, int x_stride, int rows, const Rows& tile, int tokens,
                            int dim, float* scores, int scores_stride) {
  for (int t = 0; t < tokens; t += kQkTokens) {
    tile.ask_rows(t, kQkTokens, dim);
    int r = 0;
    for (; r + kQkRows <= rows; r += kQkRows) {
      qk_block<kQkRows>(x + r * x_stride, x_stride, tile, t, dim, scores + r * scores_stride + t,
                        scores_stride);
    }
    const float* rest = x + r * x_stride;
    float* const to = scores + r * scores_stride + t;
    if (kQkRows > 3 && rows - r == 3) qk_block<3>(rest, x_stride, tile, t, dim, to, scores_stride);
    if (kQkRows > 2 && rows - r == 2) qk_block<2>(rest, x_stride, tile, t, dim, to, scores_stride);
    if (rows - r == 1) qk_block<1>(rest, x_stride, tile, t, dim, to, scores_stride);
  }
}

template <int kRows, int kVecs, class Rows>
KVQUANT_INLINE void pv_block(const float* w, int w_stride, const Rows& tile, int tokens,
                             int channel, const float* decay, float* out, int out_stride) {
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sum[r][i] = zero();
  }
  for (int t = 0; t < tokens; ++t) {
    tile.ask(t, channel);
    Vec v[kVecs];
    for (int i = 0; i < kVecs; ++i) v[i] = tile.load(t, channel + i * kWidth);
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

template <int kRows, class Rows>
KVQUANT_INLINE void pv_rows(const float* w, int w_stride, const Rows& tile, int tokens, int dim,
                            const float* decay, float* out, int out_stride) {
  int c = 0;
  for (; c + kPvVecs * kWidth <= dim; c += kPvVecs * kWidth) {
    pv_block<kRows, kPvVecs>(w, w_stride, tile, tokens, c, decay, out, out_stride);
  }
  for (; c < dim; c += kWidth) {
    pv_block<kRows, 1>(w, w_stride, tile, tokens, c, decay, out, out_stride);
  }
}

// out[r] = decay[r] * out[r] + sum over tokens of w[r][t] * tile[t]; dim a multiple of the width.
template <class Rows>
KVQUANT_INLINE void pv_tile(const float* w, int w_stride, int rows, Rows tile, int tokens, int dim,
                            const float* decay, float* out, int out_stride) {
  int r = 0;
  for (; r + kPvRows <= rows; r += kPvRows) {
    pv_rows<kPvRows>(w + r * w_stride, w_stride, tile, tokens, dim, decay + r, out + r * out_stride,
                     out_stride);
    tile = tile.asked();
  }
  const float* rest = w + r * w_stride;
  float* const to = out + r * out_stride;
  if (kPvRows > 3 && rows - r == 3) {
    pv_rows<3>(rest, w_stride, tile, tokens, dim, decay + r, to, out_stride);
  }
  if (kPvRows > 2 && rows - r == 2) {
    pv_rows<2>(rest, w_stride, tile, tokens, dim, decay + r, to, out_stride);
  }
  if (rows - r == 1) pv_rows<1>(rest, w_stride, tile, tokens, dim, decay + r, to, out_stride);
}

}  // namespace kvquant::cpu::KVQUANT_ISA
