// What the append kernels share: a block's source, and the end of a call.
#pragma once

#include "kernels/append/rows.cuh"
#include "kernels/cuda.h"

namespace kvquant::cuda {

Status append_aged(const AppendParams& params, Launch launch);  // of rows by age

// The last block to be done adds the call's tokens to the lengths, which all have read by then.
template <int kThreads>
__device__ void advance_lengths(const AppendParams& p) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    const int blocks = int(gridDim.x * gridDim.y * gridDim.z);
    last = atomicAdd(p.counter, 1) == blocks - 1;
    if (last) *p.counter = 0;
  }
  __syncthreads();
  if (!last) return;
  for (int b = threadIdx.x; b < p.seqs.batch; b += kThreads) {
    p.advance[b] += call_rows(p.seqs, b).count;
  }
}

__device__ inline int only_block(const AppendParams& p, int sequence) {
  const bool one = p.seqs.block_table && p.seqs.max_blocks == 1;
  return one ? block_of(p.cache, p.seqs, sequence, 0) : -1;
}

__device__ inline int stored_before(const AppendParams& p, int sequence) {
  return p.seqs.seq_lens ? checked_length(p.seqs.seq_lens[sequence]) : 0;
}

constexpr int kAppendThreads = kRowWarps * 32;
constexpr int kFewTokens = kSpareTokens;  // of a sequence, up to which a block takes all of them

// What a block of an append takes: a chunk of one head's keys, or of its values. grid: (chunks,
// kv_heads, batch * 2), K and V even and odd in z. Of few tokens all of them, K and V, by half of
// its warps each: then a grid (1, kv_heads, batch).
struct BlockRows {
  int sequence, head;
  bool few;                // the grid is that of few tokens
  bool has_keys, is_key;   // of the block; what this warp takes
  int warp, warps;         // of those that take it
  int length, begin, end;  // tokens stored before; the block's

  static bool are_few(const AppendParams& p) {
    return p.seqs.max_seqlen_q <= kFewTokens && !p.slot_mapping;
  }
  static dim3 grid(const AppendParams& p) {
    const bool few = are_few(p);
    return dim3(unsigned(few ? 1 : chunks_of(p.cache, p.seqs.max_seqlen_q)),
                unsigned(p.cache.num_kv_heads), unsigned(p.seqs.batch * (few ? 1 : 2)));
  }

  __device__ __forceinline__ explicit BlockRows(const AppendParams& p)
      : sequence(blockIdx.z), head(blockIdx.y), warp(threadIdx.x / 32), warps(kRowWarps) {
    has_keys = is_key = true;
    few = int(gridDim.z) == p.seqs.batch;
    if (few) {
      warps /= 2;
      is_key = warp < warps;
      warp -= is_key ? 0 : warps;
    } else {
      sequence /= 2;
      has_keys = is_key = blockIdx.z % 2 == 0;
    }
    length = stored_before(p, sequence);
    const int count = call_rows(p.seqs, sequence).count;
    const Chunk chunk = chunk_of(p.cache, length, count, int(blockIdx.x));
    begin = few ? length : chunk.begin;
    end = few ? length + count : chunk.end;
  }
};

// What a block appends from. `cache`: of the call, or its young rows', with their age.
template <class Format, class T>
__device__ __forceinline__ Source<Format, T> source_of(const AppendParams& p,
                                                       const CacheView& cache, bool is_key,
                                                       int sequence, int head, int age = 0) {
  return {cache,
          p.seqs,
          p.slot_mapping,
          is_key ? p.key : p.value,
          p.dtype,
          is_key,
          sequence,
          head,
          call_rows(p.seqs, sequence),
          stored_before(p, sequence),
          Paging(cache, p.seqs.max_blocks),
          only_block(p, sequence),
          age};
}

}  // namespace kvquant::cuda
