// Quantise and dequantise plain tensors: x ~ scale * (q - zero), a pair a token, head or channel.
//
// Two passes over what shares a pair, minimum and maximum first; the second comes from the cache
// where it fits. Rows of any width are taken in pieces of kPiece channels.
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

constexpr int kPiece = 256;

// The steps of the reference, none of them fused.
struct Pairs {
  Vec scale, zero, inverse;
};
KVQUANT_INLINE Pairs make_pairs(Vec low, Vec high, Mask finite, float qmin, float qmax) {
  const Vec range = (high - low) / Vec::set(qmax - qmin);
  const Vec steps = max(abs(low), abs(high)) * Vec::set(0x1p-20f);
  const Vec scale = max(max(range, steps), Vec::set(int8::kMinScale)), nan = Vec::set(kQuietNaN);
  const Vec kept = select(finite, scale, nan);
  return {kept, select(finite, Vec::set(qmin) - low / scale, nan), Vec::set(1.f) / kept};
}
KVQUANT_INLINE Pairs make_pair(const Range& range, float qmin, float qmax) {
  const Vec one = Vec::set(1.f);
  const Mask finite = (range.finite() ? zero() : one) < one;
  return make_pairs(Vec::set(reduce_min(range.low)), Vec::set(reduce_max(range.high)), finite, qmin,
                    qmax);
}
KVQUANT_INLINE Vec code_of(Vec x, const Pairs& pairs, float qmin, float qmax) {
  return clamp(round(x * pairs.inverse + pairs.zero), qmin, qmax);  // a NaN becomes qmin
}

struct Source {
  const QuantizeParams& p;
  int64_t head;  // of batch * heads

  // Channels [c, c + count) of a token, and zeros up to a whole vector.
  KVQUANT_INLINE void load(int token, int c, int count, float* x) const {
    if (count % kWidth) zero().store(x + count / kWidth * kWidth);
    const int64_t offset =
        head / p.heads * p.batch_stride + head % p.heads * p.head_stride + token * p.token_stride;
    load_row(p.x, offset + c, p.dtype, count, x);
  }
  KVQUANT_INLINE uint8_t* codes(int token) const { return p.q + (head * p.tokens + token) * p.dim; }
};

// One pair for tokens [begin, end) of a head.
void quantize_rows(const Source& src, int begin, int end, float* scale, float* zero_point) {
  const QuantizeParams& p = src.p;
  alignas(64) float x[kPiece];
  Range range;
  for (int token = begin; token < end; ++token) {
    for (int c = 0; c < p.dim; c += kPiece) {
      const int count = least(kPiece, p.dim - c), whole = count / kWidth * kWidth;
      src.load(token, c, count, x);
      for (int i = 0; i < whole; i += kWidth) range.add(Vec::load(x + i));
      for (int i = whole; i < count; ++i) range.add(Vec::set(x[i]));
    }
  }
  const Pairs pair = make_pair(range, p.qmin, p.qmax);
  for (int token = begin; token < end; ++token) {
    for (int c = 0; c < p.dim; c += kPiece) {
      const int count = least(kPiece, p.dim - c);
      src.load(token, c, count, x);
      for (int i = 0; i < count; i += kWidth) {
        code_of(Vec::load(x + i), pair, p.qmin, p.qmax).store(x + i);
      }
      store_codes(x, count, src.codes(token) + c);
    }
  }
  alignas(64) float lanes[kWidth];
  pair.scale.store(lanes);
  *scale = lanes[0];
  pair.zero.store(lanes);
  *zero_point = lanes[0];
}

// A pair for every one of `count` channels from c, over tokens [begin, end).
void quantize_channels(const Source& src, int begin, int end, int c, int count, float* scale,
                       float* zero_point) {
  constexpr int kVecs = kPiece / kWidth;
  const QuantizeParams& p = src.p;
  alignas(64) float x[kPiece];
  Range ranges[kVecs];
  for (int token = begin; token < end; ++token) {
    src.load(token, c, count, x);
    for (int i = 0; i * kWidth < count; ++i) ranges[i].add(Vec::load(x + i * kWidth));
  }
  Pairs pairs[kVecs];
  alignas(64) float scales[kPiece], zeros[kPiece];
  for (int i = 0; i * kWidth < count; ++i) {
    pairs[i] = make_pairs(ranges[i].low, ranges[i].high, ranges[i].in_range, p.qmin, p.qmax);
    pairs[i].scale.store(scales + i * kWidth);
    pairs[i].zero.store(zeros + i * kWidth);
  }
  memcpy(scale, scales, size_t(count) * 4);
  memcpy(zero_point, zeros, size_t(count) * 4);
  for (int token = begin; token < end; ++token) {
    src.load(token, c, count, x);
    for (int i = 0; i * kWidth < count; ++i) {
      code_of(Vec::load(x + i * kWidth), pairs[i], p.qmin, p.qmax).store(x + i * kWidth);
    }
    store_codes(x, count, src.codes(token) + c);
  }
}

}  // namespace

Status quantize(const QuantizeParams& p, int threads) {
  const int64_t heads = int64_t(p.batch) * p.heads;
  threads = worth(threads, heads * p.tokens * p.dim);
  if (p.granularity == Granularity::kHead) {
    parallel(threads, heads, [&](int64_t head) {
      quantize_rows({p, head}, 0, p.tokens, p.scale + head, p.zero + head);
    });
  } else if (p.granularity == Granularity::kToken) {
    constexpr int kRows = 64;
    const int64_t items = ceil_div(p.tokens, kRows);
    parallel(threads, heads * items, [&](int64_t item) {
      const int64_t head = item / items;
      const int first = int(item % items) * kRows;
      for (int token = first; token < least(first + kRows, p.tokens); ++token) {
        const int64_t row = head * p.tokens + token;
        quantize_rows({p, head}, token, token + 1, p.scale + row, p.zero + row);
      }
    });
  } else {
    const int64_t groups = ceil_div(p.tokens, p.group), pieces = ceil_div(p.dim, kPiece);
    parallel(threads, heads * groups * pieces, [&](int64_t item) {
      const int c = int(item % pieces) * kPiece;
      const int64_t row = item / pieces, begin = row % groups * p.group;
      quantize_channels({p, row / groups}, int(begin),
                        int(least<int64_t>(p.tokens, begin + p.group)), c, least(kPiece, p.dim - c),
                        p.scale + row * p.dim + c, p.zero + row * p.dim + c);
    });
  }
  return Status::ok();
}

Status dequantize(const DequantizeParams& p, int threads) {
  constexpr int kRows = 64;
  const Affine& a = p.affine;
  const int64_t heads = int64_t(p.batch) * p.heads, items = ceil_div(p.tokens, kRows);
  parallel(worth(threads, heads * p.tokens * p.dim), heads * items, [&](int64_t item) {
    const int64_t head = item / items, b = head / p.heads, h = head % p.heads;
    const int first = int(item % items) * kRows;
    alignas(64) float x[kPiece], scales[kPiece], zeros[kPiece];
    alignas(64) uint8_t codes[kPiece] = {};
    for (int token = first; token < least(first + kRows, p.tokens); ++token) {
      const uint8_t* const q =
          p.q + b * p.batch_stride + h * p.head_stride + token * p.token_stride;
      const int64_t pair =
          b * a.batch_stride + h * a.head_stride + token / a.group * a.group_stride;
      for (int c = 0; c < p.dim; c += kPiece) {
        const int count = least(kPiece, p.dim - c);
        memcpy(codes, q + c, size_t(count));
        for (int i = 0; i < round_up(count, kWidth); ++i) {
          const int64_t at = pair + (i < count ? (c + i) * a.channel_stride : 0);
          scales[i] = a.scale[at], zeros[i] = a.zero[at];
        }
        for (int i = 0; i < count; i += kWidth) {
          (Vec::load(scales + i) * (Vec::load(codes + i) - Vec::load(zeros + i))).store(x + i);
        }
        store_row(p.out, (head * p.tokens + token) * p.dim + c, p.dtype, count, x);
      }
    }
  });
  return Status::ok();
}

}  // namespace kvquant::cpu::KVQUANT_ISA
