// Where a cache's rows are. What tables hold is not trusted: a block out of range is reported as
// -1.
#pragma once

#include "common/host_device.h"
#include "params.h"

namespace kvquant {

KVQUANT_HD int checked_block(const CacheView& cache, int block) {
  return unsigned(block) < unsigned(cache.num_blocks) ? block : -1;
}
// Of a sequence, by the index in its row of the table.
template <class Index>
KVQUANT_HD int block_of(const CacheView& cache, const Sequences& seqs, int sequence, Index index) {
  if (index < 0 || index >= seqs.max_blocks) return -1;
  return checked_block(cache, seqs.block_table[sequence * seqs.block_table_stride + index]);
}

template <class T>
KVQUANT_HD T* rows_of(const Slab& slab, int block, int head) {
  return reinterpret_cast<T*>(slab.data + block * slab.block_stride + head * slab.head_stride);
}

}  // namespace kvquant
