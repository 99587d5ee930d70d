// Rows into the cache: what a block does to append one head's rows, K or V. Used by the append
// kernels and by the attention kernel's decode step.
#pragma once

#include "common/age.h"
#include "common/groups.h"
#include "common/paging.h"
#include "common/rows.h"
#include "formats/formats.cuh"

namespace kvquant::cuda {

// One head of one sequence, K or V.
template <class Format, class T>
struct Source {
  const CacheView& cache;
  const Sequences& seqs;
  const int64_t* slot_mapping;
  Rows rows;
  Dtype dtype;  // of their elements, T
  bool is_key;
  int sequence, head;
  CallRows call;
  int length;  // tokens stored before the call
  Paging paging;
  int whole = -1;  // the sequence's one block, where it is known; else it is looked up
  int age = 0;     // of a young_view: its tokens a group

  __device__ int dim() const { return is_key ? cache.k.head_dim : cache.v.head_dim; }
  __device__ int rotation() const { return is_key ? cache.k.rotation : cache.v.rotation; }

  __device__ const T* row(int i) const {
    return static_cast<const T*>(rows.data) + row_offset(rows, seqs, call, sequence, i) +
           head * rows.head_stride;
  }
  // Of an incoming row.
  __device__ Place place(int i) const {
    if (slot_mapping) return place_of_slot(cache, slot_mapping[call.first + i]);
    return stored(length + i);
  }
  __device__ Place stored(int token) const {
    const Place at = place_of(cache, seqs, paging, sequence, token, whole);
    return age && at.block >= 0 ? Place{sequence, young_row(age, token)} : at;
  }
  __device__ uint8_t* codes(Place at) const {
    const Slab slab = is_key ? cache.k.codes : cache.v.codes;
    return rows_of<uint8_t>(slab, at.block, head) + int64_t(at.row) * Format::code_bytes(dim());
  }
  __device__ typename Format::Params* params(Place at) const {
    const Slab slab = is_key ? cache.k.params : cache.v.params;
    return rows_of<typename Format::Params>(slab, at.block, head) + at.row;
  }
  // Of a token's group; null: nowhere.
  __device__ __half* mean(int token) const {
    return mean_of<__half>(cache, seqs, paging, sequence, head, token, whole);
  }
};

// Rows are shared out to as many warps whatever the block has, so that sums have one order: those
// of the call, and those that are stored.
constexpr int kRowWarps = 4, kStoredWarps = 8;

// This thread's place among the rows that `warps` warps of a block take at once: `slot` of `slots`.
struct RowSlot : RowLanes {
  int slots, slot;
  int first;  // slot of its warp

  __device__ __forceinline__ RowSlot(int dim, int warp, int warps = kRowWarps) : RowLanes(dim) {
    slots = warps * rows;
    first = warp * rows;
    slot = first + row;
    if (warp >= warps) row = -1;
  }
};

// This thread's sixteen channels of an incoming row on their way, and those of its group's mean.
template <class T>
struct RowInFlight {
  int token;
  Place to;
  Words16<T> row;
  Words16<__half> mean;  // zeros: there is none, or it is not wanted

  // Asks for row `at.slot` of tokens [begin, end).
  template <bool kWithMean, class Format>
  __device__ __forceinline__ void load(const Source<Format, T>& src, const RowSlot& at, int begin,
                                       int end) {
    token = begin + at.slot;
    const int i = token - src.length;
    to = {-1, 0};
    mean = {};
    if (at.row < 0 || token >= end) return;
    row = load_words16(src.row(i) + at.channel());
    if (kWithMean && src.is_key && src.cache.mean_group) {
      const __half* const of_group = src.mean(token);
      if (of_group) mean = load_words16(of_group + at.channel());
    }
    to = src.place(i);
  }
  // The channels, zeros where the row has no place; whether the whole row is finite. All lanes of
  // the warp must call.
  __device__ __forceinline__ bool read(const RowSlot& at, Dtype dtype,
                                       float (&x)[kLaneChannels]) const {
    row.read(x, dtype);
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) x[c] = to.block >= 0 ? x[c] : 0.f;
    return row_all(all_finite(x), at);
  }
};

// Calls body(row) for the rows of tokens [begin, end) that are this thread's, the next one loading
// meanwhile. One place loads: its code is long.
template <bool kWithMean, class Format, class T, class F>
__device__ __forceinline__ void for_rows(const Source<Format, T>& src, const RowSlot& at, int begin,
                                         int end, F&& body) {
  RowInFlight<T> next;
#pragma unroll 1
  for (int base = begin - at.slots; base + at.first < end; base += at.slots) {
    const RowInFlight<T> row = next;
    next.template load<kWithMean>(src, at, base + at.slots, end);
    if (base >= begin) body(row);
  }
}

// The params of a row whose lanes have its channels. All lanes of the warp must call.
template <class Format>
__device__ __forceinline__ typename Format::Params row_params(const float (&x)[kLaneChannels],
                                                              bool finite, const RowLanes& at) {
  float low = INFINITY, high = -INFINITY;
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) low = fminf(low, x[c]), high = fmaxf(high, x[c]);
  low = -row_max(-low, at);
  high = row_max(high, at);
  return Format::params(low, high, finite);
}

// Quantizes a row, whose lanes have its channels, and stores it. All lanes of the warp must call.
template <class Format, class T>
__device__ __forceinline__ void store_row(const Source<Format, T>& src, const RowLanes& at,
                                          Place to, const float (&x)[kLaneChannels], bool finite) {
  const auto params = row_params<Format>(x, finite, at);
  const Encoder<Format> encoder(params);
  if (to.block < 0) return;
  LaneCodes<Format>::template store<kLaneChannels>(src.codes(to), at.channel(),
                                                   [&](int c) { return encoder.code(x[c]); });
  if (at.index == 0) *src.params(to) = params;
}

// What is subtracted from rows: the mean of the one group that they are of, null: none, or of each
// row its own group's, which is there.
struct GroupMean {
  const __half* of_group;
};
struct RowMeans {};

// This thread's channels of a group's mean.
struct LaneMean {
  Words16<__half> x;
  bool any;

  __device__ __forceinline__ void load(GroupMean mean, const RowSlot& at) {
    any = mean.of_group;
    if (any && at.row >= 0) x = load_words16(mean.of_group + at.channel());
  }
};

// Rotates the rows of tokens [begin, end) of the source, subtracts means, and calls store(lanes,
// row, channels, whether the row is finite). `warp`: of the `warps` that share them.
template <class Format, class T, class Means, class F>
__device__ __forceinline__ void for_ready_rows(const Source<Format, T>& src, int begin, int end,
                                               Means means, int warp, int warps, F&& store) {
  constexpr bool kOfRows = std::is_same_v<Means, RowMeans>;
  const RowSlot at(src.dim(), warp, warps);
  LaneMean mean;
  if constexpr (!kOfRows) mean.load(means, at);
  for_rows<kOfRows>(src, at, begin, end, [&](const RowInFlight<T>& row) {
    float x[kLaneChannels];
    const bool finite = row.read(at, src.dtype, x);
    rotate(x, src.rotation(), at);
    if constexpr (kOfRows) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) x[c] = __fsub_rn(x[c], row.mean[c]);
    } else if (mean.any) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) x[c] = __fsub_rn(x[c], mean.x[c]);
    }
    store(at, row, x, finite);
  });
}

// Likewise, with each row's own group's mean, and quantizes and stores them.
template <class Format, class T>
__device__ __forceinline__ void write_rows(const Source<Format, T>& src, int begin, int end,
                                           int warp, int warps) {
  for_ready_rows(src, begin, end, RowMeans{}, warp, warps,
                 [&](const RowSlot& at, const RowInFlight<T>& row, const auto& x, bool finite) {
                   store_row(src, at, row.to, x, finite);
                 });
}

}  // namespace kvquant::cuda
