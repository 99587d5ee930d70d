// Quantize and dequantize plain tensors: x ~ scale * (q - zero), a pair a token, head or channel.
//
// Two passes over what shares a pair, minimum and maximum first; the second comes from the cache
// where it fits.
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

constexpr int kPiece = 256;                // channels of an item of work with a pair a channel
constexpr int kItemRows = 64;              // tokens of one with a pair a token
constexpr int kPairRows = 16;              // tokens whose pairs are made together
constexpr int64_t kCachedBytes = 2 << 20;  // of codes; more go past the cache: it would read them
static_assert(kPairRows % kWidth == 0 && kItemRows % kPairRows == 0, "whole vectors of pairs");

// The steps of the reference, none of them fused.
struct Pairs {
  Vec scale, zero, inverse;
};
KVQUANT_INLINE Pairs make_pairs(Vec low, Vec high, Mask finite, float qmin, float qmax) {
  const Vec range = (high - low) / Vec::set(qmax - qmin);
  const Vec steps = max(abs(low), abs(high)) * Vec::set(0x1p-20f);
  const Vec scale = max(max(range, steps), Vec::set(kMinScale)), nan = Vec::set(kQuietNaN);
  const Vec kept = select(finite, scale, nan);
  return {kept, select(finite, Vec::set(qmin) - low / scale, nan), Vec::set(1.f) / kept};
}

KVQUANT_INLINE Vec code_of(Vec x, Vec inverse, Vec zero) { return x * inverse + zero; }

// One head's rows of elements E.
template <class E>
struct Source {
  const QuantizeParams& p;
  const typename E::Word* x;
  uint8_t* q;
  bool past_cache;

  KVQUANT_INLINE Source(const QuantizeParams& p, int64_t head)
      : p(p),
        x(static_cast<const typename E::Word*>(p.x) + head / p.heads * p.batch_stride +
          head % p.heads * p.head_stride),
        q(p.q + head * p.tokens * p.dim),
        past_cache(int64_t(p.batch) * p.heads * p.tokens * p.dim > kCachedBytes) {}
  KVQUANT_INLINE ~Source() {
    if (past_cache) end_stores();
  }

  // Calls f(c, count, elements) for the vectors of channels [begin, end) of a token.
  template <class F>
  KVQUANT_INLINE void each(int token, int begin, int end, const F& f) const {
    const auto* const row = x + token * p.token_stride;
    int c = begin;
    for (; c + kWidth <= end; c += kWidth) f(c, kWidth, E::load(row + c));
    if (c < end) f(c, end - c, load_some(E{}, row + c, end - c));
  }
  // Stores code(c, elements), rounded and clamped, for the channels [begin, end) of a token.
  template <class F>
  KVQUANT_INLINE void store_codes(int token, int begin, int end, const F& code) const {
    const auto* const row = x + token * p.token_stride;
    uint8_t* const to = q + int64_t(token) * p.dim;
    const auto at = [&](int c) { return code(c, E::load(row + c)); };
    const int low = int(p.qmin), high = int(p.qmax);  // here: a byte stored may be anything's
    int c = begin;
    for (; c + 4 * kWidth <= end; c += 4 * kWidth) {
      store_codes4(to + c, at(c), at(c + kWidth), at(c + 2 * kWidth), at(c + 3 * kWidth), low, high,
                   past_cache);
    }
    each(token, c, end, [&](int c, int count, Vec x) {
      uint8_t codes[kWidth];
      clamp(code(c, x), p.qmin, p.qmax).store_codes(codes);
      memcpy(to + c, codes, size_t(count));
    });
  }
  KVQUANT_INLINE void store_row(int token, float inverse, float zero) const {
    const Vec by = Vec::set(inverse), from = Vec::set(zero);
    store_codes(token, 0, p.dim, [=](int, Vec x) { return code_of(x, by, from); });
  }
};

// Ranges of rows, and the pairs that follow.
struct RowPairs {
  alignas(64) float low[kPairRows], high[kPairRows];
  alignas(64) float scale[kPairRows], zero_point[kPairRows], inverse[kPairRows];

  KVQUANT_INLINE void set4(int i, const Range (&of)[4]) {
    reduce4(of[0].lowest(), of[1].lowest(), of[2].lowest(), of[3].lowest(), [](Vec a, Vec b) {
      return min(a, b);
    }).store4(low + i);
    reduce4(of[0].high, of[1].high, of[2].high, of[3].high, [](Vec a, Vec b) {
      return max(a, b);
    }).store4(high + i);
  }
  KVQUANT_INLINE void make(float qmin, float qmax) {
    for (int i = 0; i < kPairRows; i += kWidth) {
      const Vec lowest = Vec::load(low + i), highest = Vec::load(high + i);
      const Pairs pairs = make_pairs(lowest, highest, in_range(lowest, highest), qmin, qmax);
      pairs.scale.store(scale + i);
      pairs.zero.store(zero_point + i);
      pairs.inverse.store(inverse + i);
    }
  }
};

// A pair for each of tokens [begin, end), at most kPairRows.
template <class E>
void quantize_tokens(const Source<E>& src, int begin, int end, float* scale, float* zero_point) {
  const QuantizeParams& p = src.p;
  const int count = end - begin;
  RowPairs pairs{};
  for (int i = 0; i < count; i += 4) {
    Range ranges[4];
    for (int k = 0; k < 4; ++k) {  // beyond the last token: that one again
      src.each(least(begin + i + k, end - 1), 0, p.dim, [&](int, int, Vec x) { ranges[k].add(x); });
    }
    pairs.set4(i, ranges);
  }
  pairs.make(p.qmin, p.qmax);
  for (int i = 0; i < count; ++i) src.store_row(begin + i, pairs.inverse[i], pairs.zero_point[i]);
  memcpy(scale, pairs.scale, size_t(count) * 4);
  memcpy(zero_point, pairs.zero_point, size_t(count) * 4);
}

// One pair for all of a head.
template <class E>
void quantize_head(const Source<E>& src, float* scale, float* zero_point) {
  const QuantizeParams& p = src.p;
  Range range;
  for (int token = 0; token < p.tokens; ++token) {
    src.each(token, 0, p.dim, [&](int, int, Vec x) { range.add(x); });
  }
  RowPairs pairs{};
  pairs.low[0] = reduce_min(range.lowest()), pairs.high[0] = reduce_max(range.high);
  pairs.make(p.qmin, p.qmax);
  for (int token = 0; token < p.tokens; ++token) {
    src.store_row(token, pairs.inverse[0], pairs.zero_point[0]);
  }
  *scale = pairs.scale[0], *zero_point = pairs.zero_point[0];
}

// A pair for every channel of [first, last), at most kPiece, over tokens [begin, end).
template <class E>
void quantize_channels(const Source<E>& src, int begin, int end, int first, int last, float* scale,
                       float* zero_point) {
  const QuantizeParams& p = src.p;
  Range ranges[kPiece / kWidth];
  for (int token = begin; token < end; ++token) {
    src.each(token, first, last, [&](int c, int, Vec x) { ranges[(c - first) / kWidth].add(x); });
  }
  Pairs pairs[kPiece / kWidth];
  for (int c = first; c < last; c += kWidth) {
    const Range& range = ranges[(c - first) / kWidth];
    Pairs& pair = pairs[(c - first) / kWidth];
    const Vec lowest = range.lowest();
    pair = make_pairs(lowest, range.high, in_range(lowest, range.high), p.qmin, p.qmax);
    store_some(Float32{}, scale + c, least(kWidth, last - c), pair.scale);
    store_some(Float32{}, zero_point + c, least(kWidth, last - c), pair.zero);
  }
  for (int token = begin; token < end; ++token) {
    src.store_codes(token, first, last, [&](int c, Vec x) {
      const Pairs& pair = pairs[(c - first) / kWidth];
      return code_of(x, pair.inverse, pair.zero);
    });
  }
}

template <class E>
void quantize_as(const QuantizeParams& p, int threads) {
  const int64_t heads = int64_t(p.batch) * p.heads;
  threads = worth(threads, heads * p.tokens * p.dim);
  if (p.granularity == Granularity::kHead) {
    parallel(threads, heads, [&](int64_t head) {
      quantize_head(Source<E>(p, head), p.scale + head, p.zero + head);
    });
  } else if (p.granularity == Granularity::kToken) {
    const int64_t items = ceil_div(p.tokens, kItemRows);
    parallel(threads, heads * items, [&](int64_t item) {
      const Source<E> src(p, item / items);
      const int first = int(item % items) * kItemRows, last = least(first + kItemRows, p.tokens);
      for (int token = first; token < last; token += kPairRows) {
        const int64_t row = item / items * p.tokens + token;
        quantize_tokens(src, token, least(token + kPairRows, last), p.scale + row, p.zero + row);
      }
    });
  } else {
    const int64_t groups = ceil_div(p.tokens, p.group), pieces = ceil_div(p.dim, kPiece);
    parallel(threads, heads * groups * pieces, [&](int64_t item) {
      const int c = int(item % pieces) * kPiece;
      const int64_t row = item / pieces, begin = row % groups * p.group;
      quantize_channels(Source<E>(p, row / groups), int(begin),
                        int(least<int64_t>(p.tokens, begin + p.group)), c, least(c + kPiece, p.dim),
                        p.scale + row * p.dim, p.zero + row * p.dim);
    });
  }
}

// A pair for every channel, spread out, of the group of tokens at hand.
struct ChannelPairs {
  alignas(64) float scale[kPiece], zero_point[kPiece];
  int64_t at = -1;

  KVQUANT_INLINE void load(const Affine& a, int64_t pair, int c, int count) {
    if (at == pair) return;
    at = pair;
    for (int i = 0; i < count; ++i) {
      scale[i] = a.scale[pair + (c + i) * a.channel_stride];
      zero_point[i] = a.zero[pair + (c + i) * a.channel_stride];
    }
  }
};

// scale * (q - zero) of up to a vector of channels.
template <class E>
KVQUANT_INLINE void dequantize_vec(E e, const uint8_t* q, int count, Vec scale, Vec zero_point,
                                   typename E::Word* to) {
  if (count >= kWidth) return e.store(to, scale * (Vec::load(q) - zero_point));
  uint8_t codes[kWidth] = {};
  memcpy(codes, q, size_t(count));
  store_some(e, to, count, scale * (Vec::load(codes) - zero_point));
}

}  // namespace

Status quantize(const QuantizeParams& p, int threads) {
  with_element(p.dtype, [&](auto e) { quantize_as<decltype(e)>(p, threads); });
  return Status::ok();
}

Status dequantize(const DequantizeParams& p, int threads) {
  const Affine& a = p.affine;
  const int64_t heads = int64_t(p.batch) * p.heads, items = ceil_div(p.tokens, kItemRows);
  const int64_t pieces = ceil_div(p.dim, kPiece);
  with_element(p.dtype, [&](auto e) {
    auto* const out = static_cast<typename decltype(e)::Word*>(p.out);
    parallel(worth(threads, heads * p.tokens * p.dim), heads * items * pieces, [&](int64_t item) {
      const int first_channel = int(item % pieces) * kPiece;
      const int count = least(kPiece, p.dim - first_channel);
      const int64_t head = item / pieces / items, b = head / p.heads, h = head % p.heads;
      const int first = int(item / pieces % items) * kItemRows;
      ChannelPairs channels;
      for (int token = first; token < least(first + kItemRows, p.tokens); ++token) {
        const uint8_t* const q =
            p.q + b * p.batch_stride + h * p.head_stride + token * p.token_stride + first_channel;
        auto* const to = out + (head * p.tokens + token) * p.dim + first_channel;
        const int64_t pair =
            b * a.batch_stride + h * a.head_stride + token / a.group * a.group_stride;
        if (a.channel_stride) {
          channels.load(a, pair, first_channel, count);
          for (int c = 0; c < count; c += kWidth) {
            dequantize_vec(e, q + c, count - c, Vec::load(channels.scale + c),
                           Vec::load(channels.zero_point + c), to + c);
          }
        } else {
          const Vec scale = Vec::set(a.scale[pair]), zero_point = Vec::set(a.zero[pair]);
          for (int c = 0; c < count; c += kWidth) {
            dequantize_vec(e, q + c, count - c, scale, zero_point, to + c);
          }
        }
      }
    });
  });
  return Status::ok();
}

}  // namespace kvquant::cpu::KVQUANT_ISA
