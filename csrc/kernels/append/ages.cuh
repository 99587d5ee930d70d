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
  // As it is, in a format that has such codes.
  template <class Format, class T>
  __device__ __forceinline__ void store(const Source<Format, T>& to_rows, const RowLanes& at,
                                        Place to) const {
    static_assert(std::is_same_v<typename Format::Params, Int8::Params>);
    if (to.block < 0) return;
    uint8_t* const row = to_rows.codes(to);
    if constexpr (std::is_same_v<Format, Int8>) {
      *reinterpret_cast<uint4*>(row + at.channel()) = codes;
    } else {
      LaneCodes<Format>::template store<kLaneChannels>(
          row, at.channel(), [&](int c) { return word(c / 4) >> c % 4 * 8; });
    }
    if (at.index == 0) *to_rows.params(to) = params;
  }
  // In another format; as it is if it needs no larger codes. All lanes of the warp must call.
  template <class Format, class T>
  __device__ __forceinline__ void narrow(const Source<Format, T>& to_rows, const RowLanes& at,
                                         Place to) const {
    if constexpr (std::is_same_v<Format, Int8>) return store(to_rows, at, to);
    // The row's largest code, and 255 less its smallest one: halves of a word. Scales are positive:
    // so are those of the values.
    uint32_t ends = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t even = word(i) & 0x00ff00ffu, odd = word(i) >> 8 & 0x00ff00ffu;
      const uint32_t high = __vmaxu2(even, odd), low = 0x00ff00ffu - __vminu2(even, odd);
      ends =
          __vmaxu2(ends, __vmaxu2(__byte_perm(high, low, 0x5410), __byte_perm(high, low, 0x7632)));
    }
    ends = row_best(ends, at, [](uint32_t a, uint32_t b) { return __vmaxu2(a, b); });
    const uint32_t largest = ends & 0xffffu;
    const RowAffine affine = Int8::affine(params);
    const auto value = [&](float code) { return fmaf(affine.scale, code, affine.offset); };
    const bool fits = largest <= uint32_t(Format::kMaxCode) || isnan(affine.scale);
    if (fits) store(to_rows, at, to);
    const auto narrowed =
        Format::params(value(float(255 - int(ends >> 16))), value(float(largest)), true);
    if (fits || to.block < 0) return;
    float x[kLaneChannels];
    decode16(codes, x);
    const Encoder<Format> encoder(narrowed);
    LaneCodes<Format>::template store<kLaneChannels>(
        to_rows.codes(to), at.channel(), [&](int c) { return encoder.code(value(x[c])); });
    if (at.index == 0) *to_rows.params(to) = narrowed;
  }

 private:
  __device__ __forceinline__ uint32_t word(int i) const {
    return i == 0 ? codes.x : i == 1 ? codes.y : i == 2 ? codes.z : codes.w;
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
  const bool by_8_bits =
      are_young || ages.had_begun(first);  // a group may close again after a crop
  for_ready_rows(young, begin, end, RowMeans{}, warp, warps,
                 [&](const RowSlot& at, const RowInFlight<T>& from, const auto& x, bool finite) {
                   const auto row = YoungRow::of(x, finite, at);
                   if (are_young) row.store(young, at, from.to);
                   const bool is_old = ages.is_old(from.token & -ages.group);
                   if (!__any_sync(kFullWarp, is_old)) return;
                   with_old([&](const auto& old) {
                     const bool is_there = is_old && from.to.block >= 0;
                     const Place to = is_there ? old.stored(from.token) : Place{-1, 0};
                     if (by_8_bits) {
                       row.narrow(old, at, to);
                     } else {
                       store_row(old, at, to, x, finite);
                     }
                   });
                 });
}

constexpr int kClosedAtOnce = 4;  // of a warp's turns, on their way

// Takes young rows of tokens [begin, end), at most kClosedAtOnce turns of the warp's, to the
// blocks.
template <class Format, class T>
__device__ __forceinline__ void close_rows(const Young& young, const Source<Format, T>& old,
                                           int begin, int end) {
  const RowLanes at(old.dim());
  Place to[kClosedAtOnce];
  YoungRow rows[kClosedAtOnce];
#pragma unroll
  for (int i = 0; i < kClosedAtOnce; ++i) {
    const int token = begin + i * at.rows + at.row;
    to[i] = at.row >= 0 && token < end ? old.stored(token) : Place{-1, 0};
  }
#pragma unroll
  for (int i = 0; i < kClosedAtOnce; ++i) {
    rows[i] = {};
    if (to[i].block < 0) continue;
    const int from = young.row(begin + i * at.rows + at.row);
    rows[i].codes = load_keep(young.codes(old.is_key, from) + at.channel());
    rows[i].params = *reinterpret_cast<const Int8::Params*>(young.params(old.is_key, from));
  }
#pragma unroll 1
  for (int first = begin; first < end; first += at.rows) {
    rows[0].narrow(old, at, to[0]);
#pragma unroll
    for (int i = 1; i < kClosedAtOnce; ++i) rows[i - 1] = rows[i], to[i - 1] = to[i];
  }
}

// Takes a share of the stored rows of a group that closes to the blocks, keys and values. `warp`:
// of the `warps` that have it. with_old(is_key, f) calls f with the source of the rows in blocks.
template <class F>
__device__ __forceinline__ void close_share(const Young& young, const Ages& ages, int share,
                                            int shares, int warp, int warps, F&& with_old) {
  const int count = (ages.close_end() - ages.was_open + shares - 1) / shares;
  const int begin = ages.was_open + share * count, end = min(begin + count, ages.close_end());
  const int rows = 32 * kLaneChannels / max(young.k_dim, young.v_dim);  // of a warp, in a turn
  const int turns = min(kClosedAtOnce, (2 * ((count + rows - 1) / rows) + warps - 1) / warps);
  const int items = (count + turns * rows - 1) / (turns * rows);
#pragma unroll 1
  for (int item = warp; item < 2 * items; item += warps) {
    const bool is_key = item < items;
    const int first = begin + (is_key ? item : item - items) * turns * rows;
    with_old(is_key, [&](const auto& old) {
      close_rows(young, old, first, min(first + turns * rows, end));
    });
  }
}

}  // namespace kvquant::cuda
