// Where a cache's rows are. What tables hold is not trusted: a block out of range is reported as
// -1.
#pragma once

#include "common/host_device.h"
#include "params.h"

namespace kvquant {

// The exponent of a power of two.
KVQUANT_HD int log2_of(int x) {
#ifdef __CUDA_ARCH__
  return __ffs(x) - 1;
#else
  return __builtin_ctz(unsigned(x));
#endif
}

// Token to block and row, and to its mean's group, without a division: paged block sizes are powers
// of two, a contiguous sequence is one block.
struct Paging {
  int shift, mask;
  int group_shift;  // 31 without means
  KVQUANT_HD Paging(const CacheView& cache, int max_blocks) {
    shift = max_blocks > 1 ? log2_of(cache.block_size) : 31;
    mask = max_blocks > 1 ? cache.block_size - 1 : 0x7fffffff;
    group_shift = cache.mean_group ? log2_of(cache.mean_group) : 31;
  }
};

KVQUANT_HD int checked_block(const CacheView& cache, int block) {
  return unsigned(block) < unsigned(cache.num_blocks) ? block : -1;
}
// Of a sequence, by the index in its row of the table.
KVQUANT_HD int block_of(const CacheView& cache, const Sequences& seqs, int sequence, int index) {
  if (index < 0 || index >= seqs.max_blocks) return -1;
  return checked_block(cache, seqs.block_table[sequence * seqs.block_table_stride + index]);
}

struct Place {
  int block, row;  // block -1: nowhere
};
// Of a sequence's token. `whole`: its one block, where that is known.
template <class Token>
KVQUANT_HD Place place_of(const CacheView& cache, const Sequences& seqs, const Paging& paging,
                          int sequence, Token token, int whole = -1) {
  if (token < 0 || token >= int64_t(seqs.max_blocks) * cache.block_size) return {-1, 0};
  const int block =
      whole >= 0 ? whole : block_of(cache, seqs, sequence, int(token >> paging.shift));
  return {block, int(token & paging.mask)};
}
// Of a slot, block * block_size + row.
KVQUANT_HD Place place_of_slot(const CacheView& cache, int64_t slot) {
  const int64_t block = slot / cache.block_size;
  if (slot < 0 || block >= cache.num_blocks) return {-1, 0};
  return {int(block), int(slot - block * cache.block_size)};
}

template <class T>
KVQUANT_HD T* rows_of(const Slab& slab, int block, int head) {
  return reinterpret_cast<T*>(slab.data + block * slab.block_stride + head * slab.head_stride);
}
// The mean, fp16, of a token's group; null: it has no place, which counts as zero.
template <class T, class Token>
KVQUANT_HD T* mean_of(const CacheView& cache, const Sequences& seqs, const Paging& paging,
                      int sequence, int head, Token token, int whole = -1) {
  const Token first = token & -Token(cache.mean_group);  // it lives in the block of that token
  const Place at = place_of(cache, seqs, paging, sequence, first, whole);
  if (at.block < 0) return nullptr;
  return rows_of<T>(cache.mean, at.block, head) +
         int64_t(at.row >> paging.group_shift) * cache.k.head_dim;
}

}  // namespace kvquant
