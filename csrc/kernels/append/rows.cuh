// Rows into the cache: what a block does to append one head's rows of one group, K or V. Used by
// the append kernel and by the attention kernel's decode step.
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

struct MeanScratch {
  float sums[kStoredWarps * 32 * kLaneChannels];  // [row slot, dim]
  alignas(16) int counts[kStoredWarps * 32];
};

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
  // Leaves this slot's sum, of `count` rows.
  __device__ __forceinline__ void leave(MeanScratch& scratch, const float (&sum)[kLaneChannels],
                                        int count, int dim) const {
    if (row < 0) return;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) scratch.sums[slot * dim + channel() + c] = sum[c];
    if (index == 0) scratch.counts[slot] = count;
  }
};

// Stored rows of one head and group, by value: a function that is called reads a kernel's
// parameters slowly.
struct StoredRows {
  const uint8_t *codes, *params;                     // of block 0, as `means`
  int64_t codes_stride, params_stride, mean_stride;  // bytes of a block
  const uint8_t* means;
  const int32_t* table;
  int whole, num_blocks;
  Paging paging;
  int begin, end;  // tokens, all of them within the table
  int dim;
  int age, sequence, first_row;  // of young rows: where that of `begin` is

  template <class Format, class T>
  __device__ __forceinline__ StoredRows(const Source<Format, T>& src, int begin, int end)
      : whole(src.whole),
        num_blocks(src.cache.num_blocks),
        paging(src.paging),
        begin(begin),
        dim(src.dim()),
        age(src.age),
        sequence(src.sequence),
        first_row(src.age ? young_row(src.age, begin) : 0) {
    const RowsView& own = src.is_key ? src.cache.k : src.cache.v;
    codes = rows_of<const uint8_t>(own.codes, 0, src.head), codes_stride = own.codes.block_stride;
    params = rows_of<const uint8_t>(own.params, 0, src.head);
    params_stride = own.params.block_stride;
    means = rows_of<const uint8_t>(src.cache.mean, 0, src.head);
    mean_stride = src.cache.mean.block_stride;
    table = src.seqs.block_table + src.sequence * src.seqs.block_table_stride;
    this->end = int(least(int64_t(end), int64_t(src.seqs.max_blocks) * src.cache.block_size));
  }
  __device__ __forceinline__ int block_of(int token) const {
    return whole >= 0 ? whole : table[token >> paging.shift];
  }
  // Of a token in that block, or in its sequence's slab.
  __device__ __forceinline__ Place place(int token, int block) const {
    if (!age) return {block, token & paging.mask};
    const int row = first_row + token - begin;
    return {sequence, row < young_rows(age) ? row : row - (age + kSpareTokens)};
  }
};

// Sums the usable ones into the scratch. A decode step waits for it: rows are asked for several at
// a time, without a branch between them.
template <class Format>
__device__ __noinline__ void sum_stored(const StoredRows rows, MeanScratch& scratch, int warps) {
  constexpr int kAsked = 8;
  using Codes = LaneCodes<Format>;
  using Params = typename Format::Params;
  // Of the group, in whose block the mean is; padding may hide it.
  const int start = rows.begin >> rows.paging.group_shift << rows.paging.group_shift;
#pragma unroll 1
  for (int warp = threadIdx.x / 32; warp < kStoredWarps; warp += warps) {
    const RowSlot at(rows.dim, warp, kStoredWarps);
    if (at.row < 0) continue;  // an idle lane, whose slot is none
    const int end = rows.end;
    float sum[kLaneChannels] = {}, offsets = 0.f;
    Words16<__half> mean{};
    int count = 0;
#pragma unroll 1
    for (int first = rows.begin + at.slot; first < end; first += kAsked * at.slots) {
      int block[kAsked], home = rows.block_of(start);
#pragma unroll
      for (int i = 0; i < kAsked; ++i) {
        block[i] = rows.block_of(min(first + i * at.slots, end - 1));
      }
      const auto there = [&](int block) { return unsigned(block) < unsigned(rows.num_blocks); };
      typename Codes::Word codes[kAsked];
      Params params[kAsked];
#pragma unroll
      for (int i = 0; i < kAsked; ++i) {
        const Place from =
            rows.place(min(first + i * at.slots, end - 1), there(block[i]) ? block[i] : 0);
        codes[i] = Codes::ask(rows.codes + from.block * rows.codes_stride +
                                  int64_t(from.row) * Format::code_bytes(rows.dim),
                              at.channel());
        params[i] = reinterpret_cast<const Params*>(rows.params +
                                                    from.block * rows.params_stride)[from.row];
      }
      if (there(home)) {
        const int group = (start & rows.paging.mask) >> rows.paging.group_shift;
        mean = load_words16(reinterpret_cast<const __half*>(rows.means + home * rows.mean_stride) +
                            int64_t(group) * rows.dim + at.channel());
      }
#pragma unroll
      for (int i = 0; i < kAsked; ++i) {
        const RowAffine affine = Format::affine(params[i]);
        if (first + i * at.slots >= end || !there(block[i]) || isnan(affine.scale)) continue;
        float x[kLaneChannels];
        Codes::decode(codes[i], x);
        ++count;
        offsets += affine.offset;
#pragma unroll
        for (int c = 0; c < kLaneChannels; ++c) sum[c] = fmaf(affine.scale, x[c], sum[c]);
      }
    }
    if (count) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) sum[c] += fmaf(float(count), mean[c], offsets);
    }
    at.leave(scratch, sum, count, rows.dim);
  }
}

// This thread's sixteen channels of an incoming row on their way.
template <class T>
struct RowInFlight {
  int token;
  Place to;
  Words16<T> row;

  // Asks for row `at.slot` of tokens [begin, end).
  template <class Format>
  __device__ __forceinline__ void load(const Source<Format, T>& src, const RowSlot& at, int begin,
                                       int end) {
    token = begin + at.slot;
    const int i = token - src.length;
    to = {-1, 0};
    if (at.row < 0 || token >= end) return;
    row = load_words16(src.row(i) + at.channel());
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
template <class Format, class T, class F>
__device__ __forceinline__ void for_rows(const Source<Format, T>& src, const RowSlot& at, int begin,
                                         int end, F&& body) {
  RowInFlight<T> next;
#pragma unroll 1
  for (int base = begin - at.slots; base + at.first < end; base += at.slots) {
    const RowInFlight<T> row = next;
    next.load(src, at, base + at.slots, end);
    if (base >= begin) body(row);
  }
}

// Adds the usable incoming rows of tokens [begin, end), not rotated, to this lane's sum.
template <class Format, class T>
__device__ __forceinline__ int sum_incoming(const Source<Format, T>& src, const RowSlot& at,
                                            int begin, int end, float (&sum)[kLaneChannels]) {
  int count = 0;
  for_rows(src, at, begin, end, [&](const RowInFlight<T>& row) {
    float x[kLaneChannels];
    const bool usable = row.read(at, src.dtype, x) && row.to.block >= 0;
    if (!usable) return;
    ++count;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) sum[c] += x[c];
  });
  return count;
}

// The sums of all slots, added in their order to sum[dim]; returns how many rows there are. All
// threads of the block must call.
template <int kThreads>
__device__ __forceinline__ int sum_slots(const MeanScratch& scratch, int slots, int dim,
                                         float* sum) {
  __syncthreads();
  int count = 0;
  for (int s = 0; s < slots; ++s) count += scratch.counts[s];
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    float x = 0.f;
    for (int s = 0; s < slots; ++s) x += scratch.sums[s * dim + c];
    sum[c] = x;
  }
  return count;
}

// Sums the usable stored rows of tokens [begin, end) into sum[dim]; returns how many they are. All
// threads of the block must call.
template <int kThreads, class Format, class T>
__device__ __forceinline__ int sum_of_stored(const Source<Format, T>& src, int begin, int end,
                                             MeanScratch& scratch, float* sum) {
  sum_stored<Format>({src, begin, end}, scratch, kThreads / 32);
  return sum_slots<kThreads>(scratch, RowSlot(src.dim(), 0, kStoredWarps).slots, src.dim(), sum);
}

// Sums the usable rows of tokens [begin, end) of one group into mean[dim] and divides by their
// number, which it returns; this thread finds its channels there. incoming[dim]: scratch, too.
template <int kThreads, class Format, class T>
__device__ int mean_rows(const Source<Format, T>& src, int begin, int end, MeanScratch& scratch,
                         float* incoming, float* mean) {
  const int dim = src.dim();
  const int first = max(begin, first_token(src.seqs, src.sequence));
  const int last = min(end, src.length + src.call.count);
  int total = 0;
  __syncthreads();  // the scratch may still be read
  if (first < src.length) {
    total = sum_of_stored<kThreads>(src, first, min(last, src.length), scratch, mean);
    if (last <= src.length) {
      for (int c = threadIdx.x; c < dim; c += kThreads) mean[c] /= float(total);
      return total;
    }
    __syncthreads();
  } else {
    for (int c = threadIdx.x; c < dim; c += kThreads) mean[c] = 0.f;
  }
  const RowSlot at(dim, threadIdx.x / 32);
  float sum[kLaneChannels] = {};
  const int count = sum_incoming(src, at, max(first, src.length), last, sum);
  at.leave(scratch, sum, count, dim);
  total += sum_slots<kThreads>(scratch, at.slots, dim, incoming);
  __syncthreads();
  if (threadIdx.x < 32) {  // the sum of rotated rows is the rotated sum
    float x[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) x[c] = at.row >= 0 ? incoming[at.channel() + c] : 0.f;
    rotate(x, src.rotation(), at);
    if (at.row == 0) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        float& of = mean[at.channel() + c];
        of = (x[c] + of) / float(total);
      }
    }
  }
  __syncthreads();
  return total;
}

__device__ __forceinline__ __half stored_mean(float mean) {
  return __float2half_rn(fminf(fmaxf(mean, -kMaxAbs), kMaxAbs));
}

// Means as they are found.
struct GroupScratch {
  MeanScratch rows;
  float incoming[256], mean[256];
};

// Takes the mean of the group of tokens [start, end), which begins in this call, and stores it: the
// mean of the group before, else of its own rows if they are enough, else none.
template <int kThreads, class Format, class T>
__device__ __forceinline__ void open_group(const Source<Format, T>& src, int start, int end,
                                           __half* slot, GroupScratch& scratch) {
  const int before = max(0, start - src.cache.mean_group);
  int found = 0;
#pragma unroll 1
  for (int from = before; from <= start && !found; from += src.cache.mean_group) {
    found = mean_rows<kThreads>(src, from, from < start ? start : end, scratch.rows,
                                scratch.incoming, scratch.mean);
    if (from == start && found < kMinMeanRows) found = 0;
  }
  if (!slot) return;
  for (int c = threadIdx.x; c < src.dim(); c += kThreads) {
    slot[c] = found ? stored_mean(scratch.mean[c]) : __half(0.f);
  }
}

// Where the keys of the group of tokens [start, end) have their mean, taken now if the group begins
// in this call; null: they have none.
template <int kThreads, class Format, class T>
__device__ __forceinline__ const __half* find_mean(const Source<Format, T>& src, int start, int end,
                                                   GroupScratch& scratch) {
  if (!src.is_key || !src.cache.mean_group) return nullptr;
  __half* const slot = src.mean(start);
  if (start >= src.length) {
    open_group<kThreads>(src, start, end, slot, scratch);
    __syncthreads();
  }
  return slot;
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

// This thread's channels of a group's mean.
struct LaneMean {
  Words16<__half> x;
  bool any;

  __device__ __forceinline__ void load(const __half* mean, const RowSlot& at) {
    any = mean;
    if (any && at.row >= 0) x = load_words16(mean + at.channel());
  }
};

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

// Rotates the rows of tokens [begin, end) of the source, subtracts the group's mean, and calls
// store(lanes, row, channels, whether the row is finite). `warp`: of the block.
template <class Format, class T, class F>
__device__ __forceinline__ void for_ready_rows(const Source<Format, T>& src, int begin, int end,
                                               const __half* group_mean, int warp, F&& store) {
  const RowSlot at(src.dim(), warp);
  LaneMean mean;
  mean.load(group_mean, at);
  for_rows(src, at, begin, end, [&](const RowInFlight<T>& row) {
    float x[kLaneChannels];
    const bool finite = row.read(at, src.dtype, x);
    rotate(x, src.rotation(), at);
    if (mean.any) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) x[c] = __fsub_rn(x[c], mean.x[c]);
    }
    store(at, row, x, finite);
  });
}

// Rotates the rows of tokens [begin, end) of the source, subtracts the group's mean, quantizes and
// stores them. `warp`: of the block.
template <class Format, class T>
__device__ __forceinline__ void write_rows(const Source<Format, T>& src, int begin, int end,
                                           const __half* group_mean, int warp) {
  for_ready_rows(src, begin, end, group_mean, warp,
                 [&](const RowSlot& at, const RowInFlight<T>& row, const auto& x, bool finite) {
                   store_row(src, at, row.to, x, finite);
                 });
}

}  // namespace kvquant::cuda
