// Token to block and row as kernels need it at every tile.
#pragma once

#include <cuda_runtime.h>

#include "common/paging.h"
#include "common/rows.h"

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

}  // namespace kvquant::cuda
