// Where rows are, and rows of the caller's type as floats. For the *.isa.cpp files.
#pragma once

#include "common/age.h"
#include "common/cpu/vec.h"
#include "common/groups.h"
#include "common/hadamard.h"
#include "common/paging.h"
#include "common/rows.h"
#include "cpu/threads.h"
#include "formats/formats_cpu.h"
#include "params.h"
#include "status.h"

namespace kvquant::cpu::KVQUANT_ISA {

constexpr int kMaxDim = 256;

// Calls f(i) for every i in [0, count) on at most `threads` threads.
template <class F>
KVQUANT_INLINE void parallel(int threads, int64_t count, const F& f) {
  run_parallel(
      threads, count, [](void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
      const_cast<F*>(&f));
}

// All threads or one, if that many elements are not worth the waking of the others.
KVQUANT_INLINE int worth(int threads, int64_t elements) { return elements < 32768 ? 1 : threads; }

// The caller's element types as types, so that the loop over a row is compiled for each.
struct Float32 {
  using Word = float;
  static KVQUANT_INLINE Vec load(const Word* p) { return Vec::load(p); }
  static KVQUANT_INLINE void store(Word* p, Vec x) { x.store(p); }
};
struct Float16 {
  using Word = uint16_t;
  static KVQUANT_INLINE Vec load(const Word* p) { return Vec::load_half(p); }
  static KVQUANT_INLINE void store(Word* p, Vec x) { x.store_half(p); }
};
struct BFloat16 {
  using Word = uint16_t;
  static KVQUANT_INLINE Vec load(const Word* p) { return Vec::load_bf16(p); }
  static KVQUANT_INLINE void store(Word* p, Vec x) { x.store_bf16(p); }
};
template <class F>
KVQUANT_INLINE void with_element(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) {
    f(Float32{});
  } else if (dtype == Dtype::kFloat16) {
    f(Float16{});
  } else {
    f(BFloat16{});
  }
}

// The first `count` elements, fewer than a vector, and behind them the last of these again. What
// is beyond the row is not touched. Out of line: inlined, it took the registers of the loops.
template <class E>
__attribute__((noinline, cold)) Vec load_some(E, const typename E::Word* p, int count) {
  typename E::Word words[kWidth];
  for (int i = 0; i < kWidth; ++i) words[i] = p[least(i, count - 1)];
  return E::load(words);
}
template <class E>
KVQUANT_INLINE void store_some(E, typename E::Word* p, int count, Vec x) {
  typename E::Word words[kWidth];
  E::store(words, x);
  memcpy(p, words, size_t(count) * sizeof(words[0]));
}

// `count` elements from element `offset` of a tensor, as floats, and back.
KVQUANT_INLINE void load_row(const void* data, int64_t offset, Dtype dtype, int count, float* to) {
  with_element(dtype, [&](auto e) {
    const auto* const from = static_cast<const typename decltype(e)::Word*>(data) + offset;
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) e.load(from + i).store(to + i);
    if (i < count) store_some(Float32{}, to + i, count - i, load_some(e, from + i, count - i));
  });
}
KVQUANT_INLINE void store_row(void* data, int64_t offset, Dtype dtype, int count,
                              const float* from) {
  with_element(dtype, [&](auto e) {
    auto* const to = static_cast<typename decltype(e)::Word*>(data) + offset;
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) e.store(to + i, Vec::load(from + i));
    if (i < count) {
      store_some(e, to + i, count - i, load_some(Float32{}, from + i, count - i));
    }
  });
}

template <int kStep>
KVQUANT_INLINE Vec butterflies_within(Vec x, int length) {
  if constexpr (kStep < kWidth) {
    if (kStep < length) x = butterfly<kStep>(x);
    return butterflies_within<2 * kStep>(x, length);
  } else {
    return x;
  }
}
// The steps of a rotation that stay within kVecs vectors, and its norm, if these are all.
template <int kVecs>
KVQUANT_INLINE void rotate_within(float* x, int length, Vec norm) {
  Vec v[kVecs];
  for (int i = 0; i < kVecs; ++i) v[i] = butterflies_within<1>(Vec::load(x + i * kWidth), length);
  for (int step = 1; step < kVecs; step *= 2) {
    if (step * kWidth >= length) break;
    for (int i = 0; i < kVecs; ++i) {
      if (i & step) continue;
      const Vec a = v[i], b = v[i + step];
      v[i] = a + b, v[i + step] = a - b;
    }
  }
  for (int i = 0; i < kVecs; ++i) {
    (length <= kVecs * kWidth ? v[i] * norm : v[i]).store(x + i * kWidth);
  }
}
// Orthonormal Hadamard rotation in blocks of `length` channels, a power of two: its own inverse.
// The order of steps is the one that common/hadamard.h fixes. As many vectors as registers hold go
// through their steps together.
template <int kVecs = 8>
KVQUANT_INLINE void rotate(float* x, int dim, int length) {
  constexpr int kChannels = kVecs * kWidth;
  if (length < 2) return;
  if constexpr (kVecs > 1) {
    if (dim % kChannels) return rotate<kVecs / 2>(x, dim, length);
  }
  const Vec norm = Vec::set(hadamard_norm(length));
  for (int c = 0; c < dim; c += kChannels) rotate_within<kVecs>(x + c, length, norm);
  for (int step = kChannels; step < length; step *= 2) {
    const bool is_last = 2 * step == length;
    for (int block = 0; block < dim; block += 2 * step) {
      for (int c = block; c < block + step; c += kWidth) {
        const Vec a = Vec::load(x + c), b = Vec::load(x + c + step);
        const Vec sum = a + b, difference = a - b;
        (is_last ? sum * norm : sum).store(x + c);
        (is_last ? difference * norm : difference).store(x + c + step);
      }
    }
  }
}

// Codes, scale and offset of one row as floats, in the basis they are stored in.
template <class Format>
KVQUANT_INLINE void decode_row(Format, const uint8_t* codes, typename Format::Params params,
                               int dim, const uint16_t* mean, float* to) {
  const RowAffine affine = Format::affine(params);
  const Vec scale = Vec::set(affine.scale), offset = Vec::set(affine.offset);
  for (int c = 0; c < dim; c += kWidth) {
    Vec x = fma(scale, Codes<Format>::load(codes, c), offset);
    if (mean) x = x + Vec::load_half(mean + c);
    x.store(to + c);
  }
}

KVQUANT_INLINE Int8::Params& young_params(const Young& young, bool is_key, int row) {
  static_assert(sizeof(Int8::Params) == 4, "what common/age.h counts with");
  return *reinterpret_cast<Int8::Params*>(young.params(is_key, row));
}

// Smallest, largest and whether every element counts as finite, of what each lane has been shown.
struct Range {
  Vec low = Vec::set(kInfinity), high = Vec::set(-kInfinity);
  Vec nothing = zero();  // or NaN: low and high drop one

  KVQUANT_INLINE void add(Vec x) {
    low = min(x, low);
    high = max(x, high);
    nothing = fma(x, zero(), nothing);
  }
  // Minus infinity in the place of a NaN.
  KVQUANT_INLINE Vec lowest() const { return select(nothing <= zero(), low, Vec::set(-kInfinity)); }
};
KVQUANT_INLINE Mask in_range(Vec lowest, Vec highest) {
  const Vec most = Vec::set(kMaxAbs);
  return both(zero() - most <= lowest, highest <= most);
}

}  // namespace kvquant::cpu::KVQUANT_ISA
