// What the append kernels share: a block's source, and the end of a call.
#pragma once

#include "kernels/append/rows.cuh"
#include "kernels/cuda.h"

namespace kvquant::cuda {

// Of rows by age.
Status append_aged(const AppendParams& params, Launch launch);

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
          p.seqs.seq_lens ? checked_length(p.seqs.seq_lens[sequence]) : 0,
          Paging(cache, p.seqs.max_blocks),
          only_block(p, sequence),
          age};
}

}  // namespace kvquant::cuda
