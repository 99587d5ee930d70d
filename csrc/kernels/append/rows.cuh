// Rows into the cache: what a block does to append one head's rows of one group, K or V. Used by
// the append kernel and by the attention kernel's decode step.
#pragma once

#include "formats/int8.h"
#include "kernels/common/cache.cuh"
#include "kernels/common/row.cuh"

namespace kvquant::cuda {

// One head of one sequence, K or V.
template <class T>
struct Source {
  const CacheView& cache;
  const Sequences& seqs;
  const int64_t* slot_mapping;
  Rows rows;
  bool is_key;
  int sequence, head;
  CallRows call;
  int length;  // tokens stored before the call
  Paging paging;
  int whole = -1;  // the sequence's one block, where it is known; else it is looked up

  __device__ int dim() const { return is_key ? cache.k_dim : cache.v_dim; }
  __device__ int rotation() const { return is_key ? cache.k_rotation : cache.v_rotation; }
  __device__ Slab data() const { return is_key ? cache.k_data : cache.v_data; }
  __device__ Slab params() const { return is_key ? cache.k_params : cache.v_params; }

  __device__ const T* row(int i) const {
    return static_cast<const T*>(rows.data) + row_offset(rows, seqs, call, sequence, i) +
           head * rows.head_stride;
  }
  // (block, row) of an incoming row, block -1 where it has no place.
  __device__ int2 place(int i) const {
    if (slot_mapping) {
      const int64_t slot = slot_mapping[call.first + i];
      const int64_t block = slot / cache.block_size;
      if (slot < 0 || block >= cache.num_blocks) return {-1, 0};
      return {int(block), int(slot - block * cache.block_size)};
    }
    return stored(length + i);
  }
  __device__ int2 stored(int token) const {
    if (token < 0 || token >= int64_t(seqs.max_blocks) * cache.block_size) return {-1, 0};
    const int block = whole >= 0 ? whole : block_of(cache, seqs, sequence, token >> paging.shift);
    return {block, token & paging.mask};
  }
};

// Rows are shared out to this many warps whatever the block has, so that sums have one order.
constexpr int kRowWarps = 4;

struct MeanScratch {
  float incoming[kRowWarps * 32 * kLaneChannels];  // [row slot, dim]
  float stored[kRowWarps * 32 * kLaneChannels];
  int counts[kRowWarps * 32];
};

// This thread's place among the rows that kRowWarps warps of a block take at once: `slot` of
// `slots`.
struct RowSlot : RowLanes {
  int slots, slot;
  int first;  // slot of its warp

  __device__ __forceinline__ RowSlot(int dim, int warp) : RowLanes(dim) {
    slots = kRowWarps * rows;
    first = warp * rows;
    slot = first + row;
    if (warp >= kRowWarps) row = -1;
  }
};

// Where the mean of the group that starts at `token` lives; null: nowhere.
template <class T>
__device__ __half* mean_slot(const Source<T>& src, int token) {
  const int2 at = src.stored(token);
  if (at.x < 0) return nullptr;
  return rows_of<__half>(src.cache.k_mean, at.x, src.head) +
         int64_t(at.y / src.cache.group) * src.dim();
}

// Adds the usable stored rows of tokens [begin, end) of one group to this lane's sum.
template <class T>
__device__ int sum_stored(const Source<T>& src, const RowSlot& at, int begin, int end,
                          float (&sum)[kLaneChannels]) {
  int count = 0;
  float offsets = 0.f;
#pragma unroll 4
  for (int token = begin + at.slot; token < end; token += at.slots) {
    const int2 from = src.stored(token);
    if (at.row < 0 || from.x < 0) continue;
    const int64_t row = from.y;
    const float2 affine = __half22float2(rows_of<__half2>(src.params(), from.x, src.head)[row]);
    float x[kLaneChannels];
    decode16(*reinterpret_cast<const uint4*>(rows_of<uint8_t>(src.data(), from.x, src.head) +
                                             row * src.dim() + at.channel()),
             x);
    if (isnan(affine.x)) continue;
    ++count;
    offsets += affine.y;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) sum[c] = fmaf(affine.x, x[c], sum[c]);
  }
  const __half* mean = count ? mean_slot(src, begin & -src.cache.group) : nullptr;
  if (mean) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      sum[c] += fmaf(float(count), __half2float(mean[at.channel() + c]), offsets);
    }
  }
  return count;
}

// This thread's sixteen channels of an incoming row on their way.
template <class T>
struct RowInFlight {
  int2 to;  // (block, row), block -1: nowhere
  Words16<T> row;

  // Asks for row `at.slot` of tokens [begin, end).
  __device__ __forceinline__ void load(const Source<T>& src, const RowSlot& at, int begin,
                                       int end) {
    const int i = begin + at.slot - src.length;
    to = {-1, 0};
    if (at.row < 0 || begin + at.slot >= end) return;
    row = load_words16(src.row(i) + at.channel());
    to = src.place(i);
  }
  // The channels, zeros where the row has no place; whether the whole row is finite. All lanes of
  // the warp must call.
  __device__ __forceinline__ bool read(const RowSlot& at, float (&x)[kLaneChannels]) const {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) x[c] = to.x >= 0 ? row[c] : 0.f;
    return row_max(all_finite(x) ? 0.f : 1.f, at) == 0.f;
  }
};

// Calls body(row) for the rows of tokens [begin, end) that are this thread's, the next one loading
// meanwhile.
template <class T, class F>
__device__ __forceinline__ void for_rows(const Source<T>& src, const RowSlot& at, int begin,
                                         int end, F&& body) {
  RowInFlight<T> next;
  next.load(src, at, begin, end);
  for (int base = begin; base + at.first < end; base += at.slots) {
    const RowInFlight<T> row = next;
    next.load(src, at, base + at.slots, end);
    body(row);
  }
}

// Adds the usable incoming rows of tokens [begin, end), not rotated, to this lane's sum.
template <class T>
__device__ __forceinline__ int sum_incoming(const Source<T>& src, const RowSlot& at, int begin,
                                            int end, float (&sum)[kLaneChannels]) {
  int count = 0;
  for_rows(src, at, begin, end, [&](const RowInFlight<T>& row) {
    float x[kLaneChannels];
    const bool usable = row.read(at, x) && row.to.x >= 0;
    if (!usable) return;
    ++count;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) sum[c] += x[c];
  });
  return count;
}

// Sums the usable rows of tokens [begin, end) into mean[dim]; returns how many there were.
template <int kThreads, class T>
__device__ int sum_rows(const Source<T>& src, int begin, int end, MeanScratch& scratch,
                        float* mean) {
  const RowSlot at(src.dim(), threadIdx.x / 32);
  const int first = max(begin, first_token(src.seqs, src.sequence));
  const int last = min(end, src.length + src.call.count);
  float incoming[kLaneChannels] = {}, stored[kLaneChannels] = {};
  const int count = sum_stored(src, at, first, min(last, src.length), stored) +
                    sum_incoming(src, at, max(first, src.length), last, incoming);
  __syncthreads();  // the scratch may still be read
  if (at.row >= 0) {
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      scratch.incoming[at.slot * src.dim() + at.channel() + c] = incoming[c];
      scratch.stored[at.slot * src.dim() + at.channel() + c] = stored[c];
    }
    if (at.index == 0) scratch.counts[at.slot] = count;
  }
  __syncthreads();
  int total = 0;
  for (int s = 0; s < at.slots; ++s) total += scratch.counts[s];
  if (total == 0) return 0;
  for (int c = threadIdx.x; c < src.dim(); c += kThreads) {
    float in = 0.f, old = 0.f;
    for (int s = 0; s < at.slots; ++s) {
      in += scratch.incoming[s * src.dim() + c];
      old += scratch.stored[s * src.dim() + c];
    }
    scratch.incoming[c] = in;
    mean[c] = old;
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // the sum of rotated rows is the rotated sum
    float x[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      x[c] = at.row >= 0 ? scratch.incoming[at.channel() + c] : 0.f;
    }
    rotate(x, src.rotation(), at);
    if (at.row == 0) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        float& sum = mean[at.channel() + c];
        sum = (x[c] + sum) / total;
      }
    }
  }
  __syncthreads();
  return total;
}

// Takes the mean of the group of tokens [start, end), which begins in this call, and stores it: the
// mean of the group before, else of its own rows if they are enough, else none.
template <int kThreads, class T>
__device__ __forceinline__ void open_group(const Source<T>& src, int start, int end, __half* slot,
                                           MeanScratch& scratch, float* mean) {
  const int before = max(0, start - src.cache.group);
  int found = 0;
  for (int from = before; from <= start && !found; from += src.cache.group) {
    found = sum_rows<kThreads>(src, from, from < start ? start : end, scratch, mean);
    if (from == start && found < int8::kMinMeanRows) found = 0;
  }
  __syncthreads();
  if (!slot) return;
  for (int c = threadIdx.x; c < src.dim(); c += kThreads) {
    const float x = found ? mean[c] : 0.f;
    slot[c] = __float2half_rn(fminf(fmaxf(x, -int8::kMaxAbs), int8::kMaxAbs));
  }
}

// Where the keys of the group of tokens [start, end) have their mean, taken now if the group begins
// in this call; null: they have none.
template <int kThreads, class T>
__device__ __forceinline__ const __half* find_mean(const Source<T>& src, int start, int end,
                                                   MeanScratch& scratch, float* mean) {
  if (!src.is_key || !src.cache.group) return nullptr;
  __half* const slot = mean_slot(src, start);
  if (start >= src.length) {
    open_group<kThreads>(src, start, end, slot, scratch, mean);
    __syncthreads();
  }
  return slot;
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

// Rotates the rows of tokens [begin, end) of the source, subtracts the group's mean, quantises and
// stores them. `warp`: of the block.
template <class T>
__device__ __forceinline__ void write_rows(const Source<T>& src, int begin, int end,
                                           const __half* group_mean, int warp) {
  const RowSlot at(src.dim(), warp);
  LaneMean mean;
  mean.load(group_mean, at);
  for_rows(src, at, begin, end, [&](const RowInFlight<T>& row) {
    float x[kLaneChannels];
    const bool finite = row.read(at, x);
    rotate(x, src.rotation(), at);
    if (mean.any) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) x[c] = __fsub_rn(x[c], mean.x[c]);
    }
    float low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) low = fminf(low, x[c]), high = fmaxf(high, x[c]);
    low = -row_max(-low, at);
    high = row_max(high, at);
    const int8::RowParams affine = int8::row_params(low, high, finite);
    const float offset = int8::half_to_float(affine.offset);
    const float inverse = __fdiv_rn(1.f, int8::half_to_float(affine.scale));
    const uint4 codes =
        encode16(x, 0.f, 255.f, [&](float y) { return __fmul_rn(__fsub_rn(y, offset), inverse); });
    if (row.to.x < 0) return;
    *reinterpret_cast<uint4*>(rows_of<uint8_t>(src.data(), row.to.x, src.head) +
                              int64_t(row.to.y) * src.dim() + at.channel()) = codes;
    if (at.index == 0) {
      rows_of<uint32_t>(src.params(), row.to.x, src.head)[row.to.y] =
          uint32_t(affine.scale) | uint32_t(affine.offset) << 16;
    }
  });
}

}  // namespace kvquant::cuda
