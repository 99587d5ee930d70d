// Means of groups of keys: sums of their rows, those of the call and those that are stored. Used by
// the append kernels and by the attention kernel's decode step.
#pragma once

#include "kernels/append/rows.cuh"

namespace kvquant::cuda {

struct MeanScratch {
  float sums[kStoredWarps * 32 * kLaneChannels];  // [row slot, dim]
  alignas(16) int counts[kStoredWarps * 32];
};

// Leaves a slot's sum, of `count` rows.
__device__ __forceinline__ void leave_sum(const RowSlot& at, MeanScratch& scratch,
                                          const float (&sum)[kLaneChannels], int count, int dim) {
  if (at.row < 0) return;
#pragma unroll
  for (int c = 0; c < kLaneChannels; ++c) scratch.sums[at.slot * dim + at.channel() + c] = sum[c];
  if (at.index == 0) scratch.counts[at.slot] = count;
}

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

// Sums the usable ones into the scratch: those in a block, whose scale is no NaN. A decode step
// waits for it: rows are asked for several at a time, without a branch between them.
template <class Format>
__device__ __noinline__ void sum_stored(const StoredRows rows, MeanScratch& scratch, int warps) {
  constexpr int kAsked = 8;
  using Codes = LaneCodes<Format>;
  using Params = typename Format::Params;
  // The group's first token, in whose block its mean is; padding may end behind it.
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
    leave_sum(at, scratch, sum, count, rows.dim);
  }
}

// Adds the usable incoming rows of tokens [begin, end), not rotated, to this lane's sum; returns
// how many they are.
template <class Format, class T>
__device__ __forceinline__ int sum_incoming(const Source<Format, T>& src, const RowSlot& at,
                                            int begin, int end, float (&sum)[kLaneChannels]) {
  int count = 0;
  for_rows<false>(src, at, begin, end, [&](const RowInFlight<T>& row) {
    float x[kLaneChannels];
    const bool usable = row.read(at, src.dtype, x) && row.to.block >= 0;
    if (!usable) return;
    ++count;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) sum[c] += x[c];
  });
  return count;
}

// The sums of all slots, in their order, into sum[dim]; returns how many rows there are. All
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
  leave_sum(at, scratch, sum, count, dim);
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

// Room to find a mean in.
struct GroupScratch {
  MeanScratch rows;
  float incoming[256], mean[256];
};

// Takes the mean of the group of tokens [start, end), which begins in this call, and stores it: the
// mean of the group before, else of its own rows if they are enough, else zeros.
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
// in this call; null: values, formats without means, and groups whose block is lost.
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

// Takes the means of the groups of tokens [begin, end), a part of the call's own, that begin in the
// call, if the source is keys and has means. All threads must call.
template <int kThreads, class Format, class T>
__device__ __forceinline__ void open_groups(const Source<Format, T>& src, int begin, int end,
                                            GroupScratch& scratch) {
  const int group = src.cache.mean_group, total = src.length + src.call.count;
  if (!src.is_key || !group) return;
#pragma unroll 1
  for (int start = begin & -group; start < end; start += group) {
    if (start < src.length) continue;
    open_group<kThreads>(src, start, min(start + group, total), src.mean(start), scratch);
    __syncthreads();
  }
}

}  // namespace kvquant::cuda
