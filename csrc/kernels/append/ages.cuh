// New rows of formats by age. See common/age.h and docs/by-age.md.
#pragma once

#include "kernels/append/narrowing.cuh"
#include "kernels/append/rows.cuh"

namespace kvquant::cuda {

// What becomes of the rows of tokens [length, length + count), which a call appends.
struct Ages {
  int group, length;
  int was_open, is_open;  // first tokens of the open groups, before and after

  __device__ __forceinline__ Ages(const CacheView& cache, int length, int count)
      : group(chunk_tokens(cache)),
        length(length),
        was_open(open_start(group, length)),
        is_open(open_start(group, length + count)),
        kept_(kept_from(group, length + count)) {}

  // Of the group that begins at `start`: whether the ring or group 0 keeps its rows.
  __device__ __forceinline__ bool is_young(int start) const {
    return start < group || start >= kept_;
  }
  __device__ __forceinline__ bool had_begun(int start) const {
    return length > 0 && start <= was_open;
  }
  // Whether the call begins a group.
  __device__ __forceinline__ bool opens() const { return is_open >= length; }

 private:
  int kept_;
};

// A row of this lane's sixteen channels in 8 bits, as it is stored.
struct YoungRow {
  uint4 codes;
  Int8::Params params;

  __device__ __forceinline__ static YoungRow of(const float (&x)[kLaneChannels], bool finite,
                                                const RowLanes& at) {
    const auto params = row_params<Int8>(x, finite, at);
    const Encoder<Int8> encoder(params);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = pack_bytes(encoder.code(x[4 * i]), encoder.code(x[4 * i + 1]),
                            encoder.code(x[4 * i + 2]), encoder.code(x[4 * i + 3]));
    }
    return {make_uint4(words[0], words[1], words[2], words[3]), params};
  }
  template <class T>
  __device__ __forceinline__ void store(const Source<Int8, T>& to_rows, const RowLanes& at,
                                        Place to) const {
    if (to.block < 0) return;
    *reinterpret_cast<uint4*>(to_rows.codes(to) + at.channel()) = codes;
    if (at.index == 0) *to_rows.params(to) = params;
  }
  // In another format. All lanes of the warp must call.
  template <class Format, class T>
  __device__ __forceinline__ void narrow(const Source<Format, T>& to_rows, const RowLanes& at,
                                         Place to) const {
    if constexpr (std::is_same_v<Format, Int8>) {
      store(to_rows, at, to);
    } else {
      float x[kLaneChannels], low = INFINITY, high = -INFINITY;
      decode16(codes, x);
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) low = fminf(low, x[c]), high = fmaxf(high, x[c]);
      low = -row_max(-low, at);
      const Narrowing<Format> narrowing(params, low, row_max(high, at));
      if (to.block < 0) return;
      LaneCodes<Format>::template store<kLaneChannels>(to_rows.codes(to), at.channel(),
                                                       [&](int c) { return narrowing.code(x[c]); });
      if (at.index == 0) *to_rows.params(to) = narrowing.params;
    }
  }
};

// Writes new rows, of tokens [begin, end), to where their age asks for them: as few as the ring has
// room for besides, or of one group. with_old(f) calls f with the source of the same rows in
// blocks.
template <class T, class F>
__device__ __forceinline__ void write_aged(const Source<Int8, T>& young, F&& with_old,
                                           const Ages& ages, bool are_few, int begin, int end,
                                           int warp, int warps) {
  const int first = begin & -ages.group;
  const bool are_young = are_few || ages.is_young(first);
  const bool by_8_bits = are_young || ages.had_begun(first);  // so that cuts make no difference
  for_ready_rows(young, begin, end, RowMeans{}, warp, warps,
                 [&](const RowSlot& at, const RowInFlight<T>& from, const auto& x, bool finite) {
                   const auto row = YoungRow::of(x, finite, at);
                   if (are_young) row.store(young, at, from.to);
                   const bool is_old = from.to.block >= 0 && from.token >= ages.group;
                   if (!__any_sync(kFullWarp, is_old)) return;
                   with_old([&](const auto& old) {
                     const Place to = is_old ? old.stored(from.token) : Place{-1, 0};
                     if (by_8_bits) {
                       row.narrow(old, at, to);
                     } else {
                       store_row(old, at, to, x, finite);
                     }
                   });
                 });
}

}  // namespace kvquant::cuda
