// Where the cache's rows are. Contents of tables and lengths are not trusted: a block out of range
// is reported as -1.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace kvquant::cuda {

// Token to (block, row) without a division: paged block sizes are powers of two, a contiguous
// sequence is one block.
struct Paging {
  int shift, mask;
  int group_shift;  // of a token to its mean's group; 31 without means
  __device__ Paging(const CacheView& cache, int max_blocks) {
    shift = max_blocks > 1 ? __ffs(cache.block_size) - 1 : 31;
    mask = max_blocks > 1 ? cache.block_size - 1 : 0x7fffffff;
    group_shift = cache.group ? __ffs(cache.group) - 1 : 31;
  }
};

__device__ __forceinline__ int checked_block(const CacheView& cache, int block) {
  return unsigned(block) < unsigned(cache.num_blocks) ? block : -1;
}
__device__ __forceinline__ int block_of(const CacheView& cache, const Sequences& seqs, int sequence,
                                        int index) {
  if (index < 0 || index >= seqs.max_blocks) return -1;
  return checked_block(cache, seqs.block_table[sequence * seqs.block_table_stride + index]);
}

template <class T>
__device__ __forceinline__ T* rows_of(const Slab& slab, int block, int head) {
  return reinterpret_cast<T*>(slab.data + block * slab.block_stride + head * slab.head_stride);
}

// The tokens stored for a sequence, whatever its length says, and `more`.
__device__ __forceinline__ int stored_tokens(const CacheView& cache, const Sequences& seqs,
                                             int seq_len, int more = 0) {
  const int capacity = int(min(int64_t(seqs.max_blocks) * cache.block_size, int64_t(1) << 30));
  return min(max(0, min(seq_len, capacity) + more), capacity);
}
__device__ __forceinline__ int first_token(const Sequences& seqs, int sequence) {
  return seqs.seq_starts ? min(max(0, seqs.seq_starts[sequence]), 1 << 30) : 0;
}

// The call's rows of a sequence: the first one, and how many.
struct CallRows {
  int64_t first;
  int count;
};
__device__ __forceinline__ CallRows call_rows(const Sequences& seqs, int sequence) {
  if (!seqs.cu_seqlens) return {int64_t(sequence) * seqs.tokens, seqs.tokens};
  const int begin = max(0, seqs.cu_seqlens[sequence]);
  const int end = max(0, min(seqs.rows, seqs.cu_seqlens[sequence + 1]));
  return {begin, max(0, min(seqs.tokens, end - begin))};
}
// Element offset of row i of a sequence in the caller's tensor.
__device__ __forceinline__ int64_t row_offset(const Rows& rows, const Sequences& seqs,
                                              const CallRows& call, int sequence, int i) {
  return seqs.cu_seqlens ? (call.first + i) * rows.token_stride
                         : sequence * rows.batch_stride + i * rows.token_stride;
}

}  // namespace kvquant::cuda
