// Rows of formats by age: what becomes of 8-bit ones when their group closes. See common/age.h and
// docs/by-age.md.
#pragma once

#include "kernels/append/rows.cuh"

namespace kvquant::cuda {

// What an append of tokens [length, total) does with the groups of a sequence.
struct Ages {
  int group, length;
  int was_open, is_open;  // first tokens of the open groups, before and after

  __device__ __forceinline__ Ages(const CacheView& cache, int length, int count)
      : group(chunk_tokens(cache)),
        length(length),
        was_open(open_start(group, length)),
        is_open(open_start(group, length + count)),
        kept_(kept_from(group, length + count)) {}

  // Of the group that begins at `start`: whether the ring or group 0 keeps its rows, the blocks
  // have them, and they were 8-bit ones before they went there.
  __device__ __forceinline__ bool is_young(int start) const {
    return start < group || start >= kept_;
  }
  __device__ __forceinline__ bool is_old(int start) const {
    return start >= group && start < is_open;
  }
  __device__ __forceinline__ bool had_begun(int start) const {
    return length > 0 && start <= was_open;
  }
  // Whether the call begins a group.
  __device__ __forceinline__ bool opens() const { return is_open >= length; }
  __device__ __forceinline__ bool closes() const { return close_end() > was_open; }
  // Stored rows [was_open, close_end()) go to the blocks.
  __device__ __forceinline__ int close_end() const {
    return was_open >= group && was_open < is_open ? length : was_open;
  }

 private:
  int kept_;
};

// An 8-bit row in another format, where `to` is. One that needs no larger codes than the format's
// stays as it is. All lanes of the warp must call.
template <class Format, class T>
__device__ __forceinline__ void narrow_row(const Source<Format, T>& src, const RowLanes& at,
                                           Place to, const float (&codes)[kLaneChannels],
                                           Int8::Params young) {
  static_assert(std::is_same_v<typename Format::Params, Int8::Params>);
  const RowAffine affine = Int8::affine(young);
  float x[kLaneChannels], largest = 0.f;
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) {
    largest = fmaxf(largest, codes[c]);
    x[c] = fmaf(affine.scale, codes[c], affine.offset);
  }
  const bool fits = row_max(largest, at) <= Format::kMaxCode || isnan(affine.scale);
  const auto params = row_params<Format>(x, true, at);
  const Encoder<Format> encoder(params);
  if (to.block < 0) return;
  LaneCodes<Format>::template store<kLaneChannels>(src.codes(to), at.channel(), [&](int c) {
    return fits ? round_code(codes[c], 0.f, Format::kMaxCode) : encoder.code(x[c]);
  });
  if (at.index == 0) *src.params(to) = fits ? young : params;
}

// Takes a share of the stored rows of a group that closes from the slab to the blocks. warps: of
// the block.
template <class Format, class T>
__device__ __forceinline__ void close_share(const Source<Int8, T>& young,
                                            const Source<Format, T>& old, const Ages& ages,
                                            int share, int shares, int warps) {
  constexpr int kAtOnce = 4;  // on their way
  const RowLanes at(young.dim());
  const int rows = (ages.close_end() - ages.was_open + shares - 1) / shares;
  const int begin = ages.was_open + share * rows, end = min(begin + rows, ages.close_end());
  const int step = at.rows * kAtOnce;
  for (int first = begin + int(threadIdx.x / 32) * step; first < end; first += warps * step) {
    float codes[kAtOnce][kLaneChannels] = {};
    Int8::Params params[kAtOnce] = {};
    Place to[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int token = first + i * at.rows + at.row;
      to[i] = {-1, 0};
      if (at.row < 0 || token >= end) continue;
      const Place from = young.stored(token);
      to[i] = old.stored(token);
      if (from.block < 0) continue;
      LaneCodes<Int8>::load(young.codes(from), at.channel(), codes[i]);
      params[i] = *young.params(from);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) narrow_row(old, at, to[i], codes[i], params[i]);
  }
}

// As write_rows, of rows that go to the blocks by way of 8 bits.
template <class Format, class T>
__device__ __forceinline__ void write_narrowed(const Source<Format, T>& src, int begin, int end,
                                               const __half* group_mean, int warp) {
  for_ready_rows(src, begin, end, group_mean, warp,
                 [&](const RowSlot& at, Place to, const float (&x)[kLaneChannels], bool finite) {
                   const auto params = row_params<Int8>(x, finite, at);
                   const Encoder<Int8> encoder(params);
                   float codes[kLaneChannels];
#pragma unroll
                   for (int c = 0; c < kLaneChannels; ++c) {
                     codes[c] = float(encoder.code(x[c]) & 0xffu);
                   }
                   narrow_row(src, at, to, codes, params);
                 });
}

// Writes new rows of one group, [begin, end) of that which begins at `start`, to where their age
// asks for them. `young` and `old` are sources of the same rows.
template <class Format, class T>
__device__ __forceinline__ void write_aged(const Source<Int8, T>& young,
                                           const Source<Format, T>& old, const Ages& ages,
                                           int start, int begin, int end, const __half* mean,
                                           int warp) {
  if (ages.is_young(start)) write_rows(young, begin, end, mean, warp);
  if (!ages.is_old(start)) return;
  if (ages.had_begun(start)) {
    write_narrowed(old, begin, end, mean, warp);
  } else {
    write_rows(old, begin, end, mean, warp);
  }
}

}  // namespace kvquant::cuda
