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

// A row of this lane's sixteen channels in 8 bits.
struct YoungRow {
  float codes[kLaneChannels];
  Int8::Params params;

  __device__ __forceinline__ void encode(const float (&x)[kLaneChannels], bool finite,
                                         const RowLanes& at) {
    params = row_params<Int8>(x, finite, at);
    const Encoder<Int8> encoder(params);
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) codes[c] = float(encoder.code(x[c]) & 0xffu);
  }
  // As it is, in a format that has such codes.
  template <class Format, class T>
  __device__ __forceinline__ void store(const Source<Format, T>& to_rows, const RowLanes& at,
                                        Place to) const {
    static_assert(std::is_same_v<typename Format::Params, Int8::Params>);
    if (to.block < 0) return;
    LaneCodes<Format>::template store<kLaneChannels>(to_rows.codes(to), at.channel(), [&](int c) {
      return round_code(codes[c], 0.f, Format::kMaxCode);
    });
    if (at.index == 0) *to_rows.params(to) = params;
  }
  // In another format; as it is if it needs no larger codes. All lanes of the warp must call.
  template <class Format, class T>
  __device__ __forceinline__ void narrow(const Source<Format, T>& to_rows, const RowLanes& at,
                                         Place to) const {
    if constexpr (std::is_same_v<Format, Int8>) return store(to_rows, at, to);
    const RowAffine affine = Int8::affine(params);
    float x[kLaneChannels], largest = 0.f;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      largest = fmaxf(largest, codes[c]);
      x[c] = fmaf(affine.scale, codes[c], affine.offset);
    }
    const bool fits = row_max(largest, at) <= Format::kMaxCode || isnan(affine.scale);
    if (fits) store(to_rows, at, to);
    store_row(to_rows, at, fits ? Place{-1, 0} : to, x, true);
  }
};

// Writes new rows of one group, [begin, end) of that which begins at `start`, to where their age
// asks for them. with_old(f) calls f with the source of the same rows in blocks. kIsStep: rows are
// as many as the ring has room for.
template <bool kIsStep, class T, class F>
__device__ __forceinline__ void write_aged(const Source<Int8, T>& young, F&& with_old,
                                           const Ages& ages, int start, int begin, int end,
                                           const __half* mean, int warp) {
  const bool is_young = kIsStep || ages.is_young(start), is_old = ages.is_old(start);
  const bool by_8_bits = is_young || ages.had_begun(start);  // a group may close again after a crop
  for_ready_rows(young, begin, end, mean, warp,
                 [&](const RowSlot& at, const RowInFlight<T>& from, const auto& x, bool finite) {
                   YoungRow row;
                   row.encode(x, finite, at);
                   if (is_young) row.store(young, at, from.to);
                   if (!is_old) return;
                   with_old([&](const auto& old) {
                     const Place to = from.to.block < 0 ? from.to : old.stored(from.token);
                     if (by_8_bits) {
                       row.narrow(old, at, to);
                     } else {
                       store_row(old, at, to, x, finite);
                     }
                   });
                 });
}

constexpr int kClosedAtOnce = 4;  // of a warp's rows, on their way

// 8-bit rows of a warp that are on their way to be closed.
struct ClosingRows {
  alignas(16) uint4 codes[kClosedAtOnce][32];
};

// Takes a share of the stored rows of a group that closes from the slab to the blocks. `rows`: of
// each of the `warps` of the block, in shared memory.
template <class Format, class T>
__device__ __forceinline__ void close_share(const Source<Int8, T>& young,
                                            const Source<Format, T>& old, const Ages& ages,
                                            int share, int shares, ClosingRows* rows, int warps) {
  const RowLanes at(young.dim());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int count = (ages.close_end() - ages.was_open + shares - 1) / shares;
  const int begin = ages.was_open + share * count, end = min(begin + count, ages.close_end());
  const int step = at.rows * kClosedAtOnce;
  for (int first = begin + warp * step; first < end; first += warps * step) {
    const auto place = [&](int i) {
      const int token = first + i * at.rows + at.row;
      return at.row >= 0 && token < end ? young.stored(token) : Place{-1, 0};
    };
#pragma unroll 1
    for (int i = 0; i < kClosedAtOnce; ++i) {
      const Place from = place(i);
      if (from.block < 0) continue;
      copy_async<16>(&rows[warp].codes[i][lane], young.codes(from) + at.channel());
    }
    close_copies();
    wait_copies<0>(0);
#pragma unroll 1
    for (int i = 0; i < kClosedAtOnce; ++i) {
      const Place from = place(i);
      YoungRow row{};
      Place to{-1, 0};
      if (from.block >= 0) {
        row.params = *young.params(from);
        LaneCodes<Int8>::load(reinterpret_cast<const uint8_t*>(&rows[warp].codes[i][lane]), 0,
                              row.codes);
        to = old.stored(first + i * at.rows + at.row);
      }
      row.narrow(old, at, to);
    }
  }
}

}  // namespace kvquant::cuda
