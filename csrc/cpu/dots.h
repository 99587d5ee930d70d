// The two products of attention by integer dot products, on the codes as they are stored.
//
// A row of floats, be it a query or a tile's weights, is written as a few lines of signed bytes,
// its digits: x = unit * sum 256^i * byte_i. Codes meet each line by an instruction that multiplies
// and adds four bytes at a time. Its sums are exact, so the one error is that of the lines: half a
// unit. A unit is 2^-15 of the row's largest for two lines, 2^-23 for three.
//
// Codes are woven first: four bytes that are added up, channels of a key or tokens of a channel,
// lie side by side. Then both products are the same loop, dot_lines(). All calls take this way: for
// a prompt's query rows it is faster than floats, too, as weaving serves all rows of a tile.
#pragma once

#include "common/cpu/bytes_avx512.h"
#include "cpu/rows.h"
#include "cpu/tile.h"

namespace kvquant::cpu::KVQUANT_ISA {

// Without it GCC 12 keeps arrays of registers in memory.
#define KVQUANT_UNROLL _Pragma("GCC unroll 16")

constexpr int kMostDigits = 3;
constexpr int kLines = 12;  // of a call
constexpr int kSums = 24;   // vectors of sums at once: with codes and a line they fit 32 registers
constexpr int kColumns = 64;  // of a call

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// A step of woven codes: four bytes of each column.
constexpr int kStepBytes = 4 * kColumns;

// sums[l][column] = start[l] + sum over the steps of four products, for 16 kVecs columns. Codes are
// [steps, kColumns, 4], lines [kCount, stride] with four bytes a step, sums [kCount, kColumns].
template <int kCount, int kVecs>
__attribute__((noinline)) void dot_lines(const uint8_t* codes, int steps, const int8_t* lines,
                                         int stride, const int32_t* start, int32_t* sums) {
  Sums sum[kCount][kVecs];
  KVQUANT_UNROLL for (int l = 0; l < kCount; ++l) {
    KVQUANT_UNROLL for (int i = 0; i < kVecs; ++i) sum[l][i] = Sums::set(start[l]);
  }
  for (int step = 0; step < steps; ++step) {
    Bytes x[kVecs];
    KVQUANT_UNROLL for (int i = 0; i < kVecs; ++i) {
      x[i] = Bytes::load(codes + step * kStepBytes + i * 64);
    }
    KVQUANT_UNROLL for (int l = 0; l < kCount; ++l) {
      const Bytes line = Bytes::repeat(lines + l * stride + 4 * step);
      KVQUANT_UNROLL for (int i = 0; i < kVecs; ++i) {
        sum[l][i] = add_products(sum[l][i], x[i], line);
      }
    }
  }
  KVQUANT_UNROLL for (int l = 0; l < kCount; ++l) {
    KVQUANT_UNROLL for (int i = 0; i < kVecs; ++i) sum[l][i].store(sums + l * kColumns + 16 * i);
  }
}
template <int kVecs>
KVQUANT_INLINE void dot_lines(int count, const uint8_t* codes, int steps, const int8_t* lines,
                              int stride, const int32_t* start, int32_t* sums) {
  const auto dot = [&](auto n) {
    constexpr int kCount = decltype(n)::value, kOnce = kCount * kVecs > kSums ? 2 : kVecs;
    dot_lines<kCount, kOnce>(codes, steps, lines, stride, start, sums);
    if constexpr (kOnce < kVecs) {
      dot_lines<kCount, kVecs - kOnce>(codes + kOnce * 64, steps, lines, stride, start,
                                       sums + kOnce * 16);
    }
  };
  if (count == 2) return dot(Number<2>{});
  if (count == 3) return dot(Number<3>{});
  if (count == 4) return dot(Number<4>{});
  if (count == 6) return dot(Number<6>{});
  if (count == 8) return dot(Number<8>{});
  if (count == 9) return dot(Number<9>{});
  if (count == 10) return dot(Number<10>{});
  dot(Number<12>{});
}

// Rows of up to kCount floats as lines.
template <int kRows, int kCount>
struct Lines {
  alignas(64) int8_t bytes[kRows * kMostDigits * kCount];  // [rows, digits, kCount]
  // Of a line's sums: what makes codes relative to the middle one.
  alignas(64) int32_t start[kRows * kMostDigits + 4];
  alignas(64) float unit[kRows];

  // x [rows, stride], of which `count` floats a row. kPaired: of each eight, the even ones come
  // first. What is not finite may get any bytes.
  template <int kDigits, bool kPaired>
  KVQUANT_INLINE void set(const float* x, int stride, int rows, int count, int middle_code) {
    constexpr float kLargest = kDigits == 3 ? 127.f * 65536.f : 127.f * 256.f;
    alignas(64) float inverse[round_up(kRows, 4)];
    for (int first = 0; first < rows; first += 4) {
      Vec of[4] = {zero(), zero(), zero(), zero()};
      for (int r = 0; r < least(4, rows - first); ++r) {
        const float* const row = x + (first + r) * stride;
        for (int c = 0; c < count; c += kWidth) of[r] = max(abs(Vec::load(row + c)), of[r]);
      }
      const Vec peak = reduce4(of[0], of[1], of[2], of[3], [](Vec a, Vec b) { return max(a, b); });
      select(Vec::set(1e-30f) < peak, Vec::set(kLargest) / peak, zero()).store4(inverse + first);
      (peak * Vec::set(1.f / kLargest)).store4(unit + first);
    }
    const Bytes middle = Bytes::set(uint8_t(middle_code));
    Sums total[kDigits];
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < kDigits; ++i) total[i] = Sums::set(0);
      const Vec by = Vec::set(inverse[r]);
      for (int c = 0; c < count; c += 64) {
        Vec part[4];
        Bytes digits[kDigits];
        for (int k = 0; k < 4; ++k) {
          const int at = c + k * kWidth;
          part[k] = at < count ? Vec::load(x + r * stride + at) * by : zero();
        }
        split_digits(part, digits);
        for (int i = 0; i < kDigits; ++i) {
          (kPaired ? digits[i].evens_first() : digits[i])
              .store(bytes + (r * kDigits + i) * kCount + c);
          total[i] = add_products(total[i], middle, digits[i]);
        }
      }
      negative_totals(total, start + r * kDigits);
    }
  }
};

// Floats from the sums of a row's lines, but for the unit.
template <int kDigits>
KVQUANT_INLINE Vec join_digits(const int32_t* sums) {
  Vec x = load_sums(sums);
  for (int i = 1; i < kDigits; ++i) x = fma(x, Vec::set(256.f), load_sums(sums + i * kColumns));
  return x;
}

// Bytes [at, at + count) of a row, kCount of them if that is not 0.
template <int kCount>
KVQUANT_INLINE Bytes load_part(const uint8_t* row, int at, int count) {
  return kCount == 64 ? Bytes::load(row + at) : Bytes::load_some(row + at, kCount ? kCount : count);
}

// Sixteen keys as columns, four channels a step; two channels in a byte are in the order of
// Lines, kPaired.
template <class Format, int kCount>
KVQUANT_INLINE void weave_keys_part(const uint8_t* const* rows, int at, int some, uint8_t* to) {
  constexpr int kParts = Codes<Format>::kPerByte;
  const int count = kCount ? kCount : some;
  Bytes words[4][4];  // [four keys][word of the lane]
  KVQUANT_UNROLL for (int i = 0; i < 4; ++i) {
    Bytes x[4];
    KVQUANT_UNROLL for (int t = 0; t < 4; ++t) x[t] = load_part<kCount>(rows[4 * i + t], at, some);
    transpose_words(x, words[i]);
  }
  KVQUANT_UNROLL for (int j = 0; j < 4; ++j) {
    const Bytes x[4] = {words[0][j], words[1][j], words[2][j], words[3][j]};
    Bytes steps[4];
    transpose_lanes(x, steps);
    KVQUANT_UNROLL for (int lane = 0; lane < 4; ++lane) {
      const int word = 4 * lane + j;
      if (4 * word >= count) continue;
      Bytes codes[kParts];
      Codes<Format>::split(steps[lane], codes);
      KVQUANT_UNROLL for (int part = 0; part < kParts; ++part) {
        codes[part].store(to + (word * kParts + part) * kStepBytes);
      }
    }
  }
}
template <class Format>
__attribute__((noinline)) void weave_keys(CodeRows<Format> keys, int tokens, int dim, uint8_t* to) {
  const int bytes = Format::code_bytes(dim);
  for (int t = 0; t < tokens; t += 16) {
    keys.ask_rows(t, 16, dim);
    for (int at = 0; at < bytes; at += 64) {
      uint8_t* const part = to + at / 4 * Codes<Format>::kPerByte * kStepBytes + t * 4;
      if (bytes - at >= 64) {
        weave_keys_part<Format, 64>(keys.rows + t, at, 64, part);
      } else if (bytes - at == 32) {
        weave_keys_part<Format, 32>(keys.rows + t, at, 32, part);
      } else {
        weave_keys_part<Format, 0>(keys.rows + t, at, bytes - at, part);
      }
    }
  }
}

// 64 bytes of a row of values, of which 16 kLanes are used, as vectors of sums have them.
template <class Format, int kLanes>
struct ValueBlock {
  static constexpr int kParts = Codes<Format>::kPerByte;
  static constexpr int kAll = kParts * kLanes;       // vectors of 16 channels
  static constexpr int kVecs = kAll < 4 ? kAll : 4;  // of one dot_lines()
  static constexpr int kCalls = kAll / kVecs;

  // [kCalls, tokens / 4, kColumns, 4]: four tokens a step, a channel a column.
  template <int kCount>
  static __attribute__((noinline)) void weave(CodeRows<Format> values, int tokens, int dim, int at,
                                              uint8_t* to) {
    const int count = Format::code_bytes(dim) - at;
    for (int t = 0; t < tokens; t += 4, to += kStepBytes) {
      Bytes x[4], y[4];
      KVQUANT_UNROLL for (int i = 0; i < 4; ++i) {
        values.ask(t + i, at * kParts);
        x[i] = load_part<kCount>(values.rows[t + i], at, count);
      }
      interleave_bytes(x, y);
      if constexpr (kLanes == 2) join_halves(y);
      KVQUANT_UNROLL for (int i = 0; i < kLanes; ++i) {
        Bytes codes[kParts];
        Codes<Format>::split(y[i], codes);
        KVQUANT_UNROLL for (int part = 0; part < kParts; ++part) {
          const int vec = part * kLanes + i;
          codes[part].store(to + vec / kVecs * (tokens / 4 * kStepBytes) + vec % kVecs * 64);
        }
      }
    }
  }
  // Sums of weave()'s vectors as vectors of neighbouring channels.
  static KVQUANT_INLINE void in_order(const Vec (&x)[kAll], Vec (&to)[kAll]) {
    if constexpr (kParts == 1) {
      order_lanes(x, to);
    } else {
      // Of 32 neighbouring channels, the first half and the second.
      Vec half[2][kLanes], ordered[kLanes];
      KVQUANT_UNROLL for (int i = 0; i < kLanes; ++i) {
        Vec* const z = kLanes == 4 ? half[i / 2] + i % 2 * 2 : half[i];
        interleave_words(x[i], x[kLanes + i], z[0], z[1]);
      }
      KVQUANT_UNROLL for (int h = 0; h < 2; ++h) {
        order_lanes(half[h], ordered);
        KVQUANT_UNROLL for (int i = 0; i < kLanes; ++i) {
          to[2 * i + h] = kLanes == 4 ? ordered[i] : swap_lanes(ordered[i]);
        }
      }
    }
  }
};

// Two digits for 16-bit calls, three for float32: errors well below a rounding of the dtype. A
// query whose channels are not mixed by a rotation may have one that dwarfs the others: three
// digits, too.
template <int kRows, int kTokens>
class ByteProducts {
 public:
  template <class Format>
  KVQUANT_INLINE void set_query(Format, Dtype dtype, bool rotated, const float* x, const float* sum,
                                int rows, int dim) {
    weight_digits_ = dtype == Dtype::kFloat32 ? 3 : 2;
    query_digits_ = rotated ? weight_digits_ : 3;
    with_digits(query_digits_, [&](auto digits) {
      constexpr int kDigits = decltype(digits)::value;
      static_assert(int(Format::kTag) < RowFormats::kCount);
      auto& lines = query_[int(Format::kTag)];
      lines.template set<kDigits, Codes<Format>::kPerByte == 2>(x, dim, rows, dim,
                                                                int(Format::kMiddleCode));
      // The sum is a NaN or infinite where a channel is.
      for (int r = 0; r < rows; ++r) lines.unit[r] += 0.f * sum[r];
    });
  }

  template <class Format>
  KVQUANT_INLINE void score(const CodeRows<Format>& keys, int rows, int tokens, int dim,
                            float* scores) {
    const auto& lines = query_[int(Format::kTag)];
    with_digits(query_digits_, [&](auto digits) {
      constexpr int kDigits = decltype(digits)::value;
      for (int from = 0; from < tokens; from += kColumns) {
        const int columns = least(kColumns, tokens - from);
        weave_keys(keys.from(from), columns, dim, woven_);
        each_block<kDigits>(rows, [&](int first, int count) {
          const int at = first * kDigits;
          dot(columns / 16, count * kDigits, woven_, dim / 4, lines.bytes + at * kMaxDim, kMaxDim,
              lines.start + at, sums_);
          for (int r = 0; r < count; ++r) {
            const Vec unit = Vec::set(lines.unit[first + r]);
            float* const to = scores + (first + r) * kTokens + from;
            for (int t = 0; t < columns; t += kWidth) {
              (join_digits<kDigits>(sums_ + r * kDigits * kColumns + t) * unit).store(to + t);
            }
          }
        });
      }
    });
  }

  template <class Format>
  KVQUANT_INLINE void add(const CodeRows<Format>& values, const float* weights, int rows,
                          int tokens, int dim, const float* decay, float* out) {
    with_digits(weight_digits_, [&](auto digits) {
      constexpr int kDigits = decltype(digits)::value;
      weights_.template set<kDigits, false>(weights, kTokens, rows, tokens,
                                            int(Format::kMiddleCode));
      const int bytes = Format::code_bytes(dim);
      int at = 0;
      for (; bytes - at > 32; at += 64) {
        add_block<Format, 4, kDigits>(values, rows, tokens, at, dim, decay, out);
      }
      if (at < bytes) add_block<Format, 2, kDigits>(values, rows, tokens, at, dim, decay, out);
    });
  }

 private:
  template <class Format, int kLanes, int kDigits>
  KVQUANT_INLINE void add_block(const CodeRows<Format>& values, int rows, int tokens, int at,
                                int dim, const float* decay, float* out) {
    using Block = ValueBlock<Format, kLanes>;
    constexpr int kCallSums = kLines * kColumns;
    const int bytes = Format::code_bytes(dim) - at;
    if (bytes >= 16 * kLanes) {
      Block::template weave<16 * kLanes>(values, tokens, dim, at, woven_);
    } else {
      Block::template weave<0>(values, tokens, dim, at, woven_);
    }
    each_block<kDigits>(rows, [&](int first, int count) {
      const int line = first * kDigits, steps = tokens / 4;
      for (int call = 0; call < Block::kCalls; ++call) {
        dot_lines<Block::kVecs>(count * kDigits, woven_ + call * steps * kStepBytes, steps,
                                weights_.bytes + line * kTokens, kTokens, weights_.start + line,
                                sums_ + call * kCallSums);
      }
      for (int r = 0; r < count; ++r) {
        Vec x[Block::kAll], ordered[Block::kAll];
        KVQUANT_UNROLL for (int i = 0; i < Block::kAll; ++i) {
          x[i] = join_digits<kDigits>(sums_ + i / Block::kVecs * kCallSums +
                                      r * kDigits * kColumns + i % Block::kVecs * kWidth);
        }
        Block::in_order(x, ordered);
        const Vec unit = Vec::set(weights_.unit[first + r]), fall = Vec::set(decay[first + r]);
        const int channel = at * Block::kParts;
        float* const to = out + (first + r) * dim + channel;
        for (int i = 0; i < Block::kAll && channel + i * kWidth < dim; ++i) {
          float* const here = to + i * kWidth;
          fma(Vec::load(here), fall, ordered[i] * unit).store(here);
        }
      }
    });
  }
  // f(first, count) for blocks of rows, as many as have kLines lines.
  template <int kDigits, class F>
  static KVQUANT_INLINE void each_block(int rows, const F& f) {
    constexpr int kMost = kLines / kDigits;
    for (int first = 0, count; first < rows; first += count) {
      const int blocks = int(ceil_div(rows - first, kMost));
      count = int(ceil_div(rows - first, blocks));
      f(first, count);
    }
  }
  static KVQUANT_INLINE void dot(int vecs, int count, const uint8_t* codes, int steps,
                                 const int8_t* lines, int stride, const int32_t* start,
                                 int32_t* sums) {
    if (vecs == 4) return dot_lines<4>(count, codes, steps, lines, stride, start, sums);
    if (vecs == 3) return dot_lines<3>(count, codes, steps, lines, stride, start, sums);
    if (vecs == 2) return dot_lines<2>(count, codes, steps, lines, stride, start, sums);
    return dot_lines<1>(count, codes, steps, lines, stride, start, sums);
  }
  template <class F>
  static KVQUANT_INLINE void with_digits(int digits, const F& f) {
    if (digits == 2) {
      f(Number<2>{});
    } else {
      f(Number<3>{});
    }
  }

  int query_digits_ = 2, weight_digits_ = 2;
  // As each format's keys have their channels, by tag.
  Lines<kRows, kMaxDim> query_[RowFormats::kCount];
  Lines<kRows, kTokens> weights_;
  alignas(64) int32_t sums_[2 * kLines * kColumns];  // of two calls, [kLines, kColumns]
  // A part of the tile: kColumns keys, or two times kColumns channels of all values.
  alignas(64) uint8_t woven_[kColumns * most(kMaxDim, 2 * kTokens)];
};

}  // namespace kvquant::cpu::KVQUANT_ISA
