// Where rows are, and rows of the caller's type as floats. For the *.isa.cpp files.
//
// The contents of tables and lengths are not trusted: a block out of range is reported as -1.
#pragma once

#include "cpu/pool.h"
#include "cpu/vec.h"
#include "formats/int8.h"
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

// Threads worth their waking: one for every `grain` elements.
KVQUANT_INLINE int worth(int threads, int64_t elements, int64_t grain = 32768) {
  return int(most<int64_t>(1, least<int64_t>(threads, 1 + elements / grain)));
}

// Token to (block, row): paged block sizes are powers of two, a contiguous sequence is one block.
struct Place {
  int block;  // -1: nowhere
  int64_t row;
};
KVQUANT_INLINE int block_of(const CacheView& cache, const Sequences& seqs, int sequence,
                            int64_t index) {
  if (index < 0 || index >= seqs.max_blocks) return -1;
  const int block = seqs.block_table[sequence * seqs.block_table_stride + index];
  return block >= 0 && block < cache.num_blocks ? block : -1;
}
KVQUANT_INLINE Place place_of(const CacheView& cache, const Sequences& seqs, int sequence,
                              int64_t token) {
  if (token < 0) return {-1, 0};
  const int64_t index = token / cache.block_size;
  return {block_of(cache, seqs, sequence, index), token - index * cache.block_size};
}
template <class T>
KVQUANT_INLINE T* rows_of(const Slab& slab, int block, int head) {
  return reinterpret_cast<T*>(slab.data + block * slab.block_stride + head * slab.head_stride);
}

// The tokens stored for a sequence, whatever its length says.
KVQUANT_INLINE int stored_tokens(const CacheView& cache, const Sequences& seqs, int sequence) {
  const int64_t capacity = int64_t(seqs.max_blocks) * cache.block_size;
  return int(most<int64_t>(0, least<int64_t>(seqs.seq_lens[sequence], capacity)));
}
KVQUANT_INLINE int first_token(const Sequences& seqs, int sequence) {
  return seqs.seq_starts ? most(0, seqs.seq_starts[sequence]) : 0;
}

// The mean of the group that starts at `token`; null: nowhere, which counts as zero.
KVQUANT_INLINE uint16_t* mean_of(const CacheView& cache, const Sequences& seqs, int sequence,
                                 int head, int64_t token) {
  const Place at = place_of(cache, seqs, sequence, token);
  if (at.block < 0) return nullptr;
  return rows_of<uint16_t>(cache.k_mean, at.block, head) + at.row / cache.group * cache.k_dim;
}

// The call's rows of a sequence: the first one, and how many.
struct CallRows {
  int64_t first;
  int count;
};
KVQUANT_INLINE CallRows call_rows(const Sequences& seqs, int sequence) {
  if (!seqs.cu_seqlens) return {int64_t(sequence) * seqs.tokens, seqs.tokens};
  const int64_t begin = seqs.cu_seqlens[sequence], end = seqs.cu_seqlens[sequence + 1];
  if (begin < 0) return {0, 0};
  return {begin, int(least<int64_t>(seqs.tokens, most<int64_t>(0, end - begin)))};
}
// Element offset of row i of a sequence in the caller's tensor.
KVQUANT_INLINE int64_t row_offset(const Rows& rows, const Sequences& seqs, const CallRows& call,
                                  int sequence, int i) {
  return seqs.cu_seqlens ? (call.first + i) * rows.token_stride
                         : sequence * rows.batch_stride + i * rows.token_stride;
}

KVQUANT_INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

KVQUANT_INLINE Vec load_as(const void* p, int64_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return Vec::load(static_cast<const float*>(p) + i);
  const uint16_t* const words = static_cast<const uint16_t*>(p) + i;
  return dtype == Dtype::kFloat16 ? Vec::load_half(words) : Vec::load_bf16(words);
}
KVQUANT_INLINE void store_as(void* p, int64_t i, Dtype dtype, Vec x) {
  if (dtype == Dtype::kFloat32) return x.store(static_cast<float*>(p) + i);
  uint16_t* const words = static_cast<uint16_t*>(p) + i;
  dtype == Dtype::kFloat16 ? x.store_half(words) : x.store_bf16(words);
}

// `count` elements from element `offset` of a tensor, as floats, and back. What is left of a
// vector passes through a copy, so that nothing beyond the row is touched.
KVQUANT_INLINE void load_row(const void* data, int64_t offset, Dtype dtype, int count, float* to) {
  const char* const from = static_cast<const char*>(data) + offset * size_of(dtype);
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) load_as(from, i, dtype).store(to + i);
  if (i == count) return;
  alignas(64) char rest[kWidth * 4] = {};
  memcpy(rest, from + i * size_of(dtype), size_t((count - i) * size_of(dtype)));
  alignas(64) float x[kWidth];
  load_as(rest, 0, dtype).store(x);
  for (int k = 0; i + k < count; ++k) to[i + k] = x[k];
}
KVQUANT_INLINE void store_row(void* data, int64_t offset, Dtype dtype, int count,
                              const float* from) {
  char* const to = static_cast<char*>(data) + offset * size_of(dtype);
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) store_as(to, i, dtype, Vec::load(from + i));
  if (i == count) return;
  alignas(64) float x[kWidth] = {};
  for (int k = 0; i + k < count; ++k) x[k] = from[i + k];
  alignas(64) char rest[kWidth * 4];
  store_as(rest, 0, dtype, Vec::load(x));
  memcpy(to + i * size_of(dtype), rest, size_t((count - i) * size_of(dtype)));
}
// Codes of `count` channels; x has room for a whole number of vectors.
KVQUANT_INLINE void store_codes(const float* x, int count, uint8_t* to) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) Vec::load(x + i).store_codes(to + i);
  if (i == count) return;
  uint8_t rest[kWidth];
  Vec::load(x + i).store_codes(rest);
  memcpy(to + i, rest, size_t(count - i));
}

template <int kStep>
KVQUANT_INLINE void butterflies_within(float* x, int dim, int length) {
  if constexpr (kStep < kWidth) {
    if (kStep < length) {
      for (int c = 0; c < dim; c += kWidth) butterfly<kStep>(Vec::load(x + c)).store(x + c);
    }
    butterflies_within<2 * kStep>(x, dim, length);
  }
}
// Orthonormal Hadamard rotation in blocks of `length` channels, a power of two: its own inverse.
// The order of steps is the one that formats/int8.h fixes.
KVQUANT_INLINE void rotate(float* x, int dim, int length) {
  if (length < 2) return;
  butterflies_within<1>(x, dim, length);
  for (int step = kWidth; step < length; step *= 2) {
    for (int block = 0; block < dim; block += 2 * step) {
      for (int c = block; c < block + step; c += kWidth) {
        const Vec a = Vec::load(x + c), b = Vec::load(x + c + step);
        (a + b).store(x + c);
        (a - b).store(x + c + step);
      }
    }
  }
  const Vec norm = Vec::set(int8::hadamard_norm(length));
  for (int c = 0; c < dim; c += kWidth) (Vec::load(x + c) * norm).store(x + c);
}

// Codes, scale and offset of one row as floats, in the basis they are stored in.
KVQUANT_INLINE void decode_row(const uint8_t* q, const uint16_t* params, int dim,
                               const uint16_t* mean, float* to) {
  const Vec scale = Vec::set(int8::half_to_float(params[0]));
  const Vec offset = Vec::set(int8::half_to_float(params[1]));
  for (int c = 0; c < dim; c += kWidth) {
    Vec x = fma(scale, Vec::load(q + c), offset);
    if (mean) x = x + Vec::load_half(mean + c);
    x.store(to + c);
  }
}

// Smallest, largest and whether every element counts as finite, over what it has been shown.
struct Range {
  Vec low = Vec::set(kInfinity), high = Vec::set(-kInfinity);
  Mask in_range = zero() <= zero();  // false for a NaN

  KVQUANT_INLINE void add(Vec x) {
    low = min(x, low);
    high = max(x, high);
    in_range = both(in_range, abs(x) <= Vec::set(int8::kMaxAbs));
  }
  KVQUANT_INLINE bool finite() const { return all(in_range); }
};

}  // namespace kvquant::cpu::KVQUANT_ISA
