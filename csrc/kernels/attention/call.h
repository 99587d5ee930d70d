// What one launch of the attention kernel takes: the caller's parameters and what the host makes of
// them.
#pragma once

#include <cstdint>

#include "params.h"
#ifdef __CUDACC__
#include "common/cuda/ptx.cuh"
#endif

namespace kvquant::cuda {

// Division by a number that is known on the host, of dividends below 2^31.
struct Divisor {
  uint32_t divisor, factor, shift;

  static Divisor of(uint32_t divisor) {
    uint32_t shift = 0;
    while ((1ull << shift) < divisor) ++shift;
    const uint64_t factor = ((1ull << 32) * ((1ull << shift) - divisor)) / divisor + 1;
    return {divisor, uint32_t(factor), shift};
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int divide(int x) const {
    return int((__umulhi(uint32_t(x), factor) + uint32_t(x)) >> shift);
  }
#endif
};

// A slab whose strides are counted in 16 bytes: so a block's and a head's place take one
// instruction each.
struct Strided {
  const uint8_t* data;
  uint32_t block, head;

  static Strided of(const Slab& slab) {
    return {slab.data, uint32_t(slab.block_stride >> 4), uint32_t(slab.head_stride >> 4)};
  }
#ifdef __CUDACC__
  __device__ __forceinline__ Strided of_head(int head) const {
    return {offset_by(data, uint32_t(head) * 16u, this->head), block, 0};
  }
  __device__ __forceinline__ const uint8_t* at(int block, int row, int bytes) const {
    return offset_by(offset_by(data, uint32_t(block) * 16u, this->block), row, bytes);
  }
#endif
};

struct AttentionCall : AttentionParams {
  Divisor gqa_group_size;                        // query heads of a KV head
  Divisor divided_by;                            // most splits of a sequence
  int row_tiles;                                 // of a sequence and KV head
  int min_split;                                 // tokens
  int stages;                                    // of a warp's ring
  Strided k_codes, k_params, v_codes, v_params;  // of the cache
  // The call's new rows, where the launch appends them, or the one before it does (data null: they
  // are stored). seq_lens are then without them, and the launch adds them to `advance` if it is not
  // null.
  Rows key, value;
  int32_t* advance;
};

}  // namespace kvquant::cuda
