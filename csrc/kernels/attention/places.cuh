// Where a main loop's tokens are: in the blocks of the table or, young ones of a format by age, in
// the sequence's slab.
#pragma once

#include "common/age.h"

namespace kvquant::cuda {

// Where a loop finds its tokens, which it counts as it takes them.
struct InBlocks {
  static constexpr bool kInOrder = true;  // a block's rows are tokens one after the other
  __device__ __forceinline__ int token(int i) const { return i; }
  __device__ __forceinline__ int block(int found) const { return found; }
  __device__ __forceinline__ int row(const Paging& paging, int i) const { return i & paging.mask; }
};
// Young tokens of a split: of the first group, and behind `hole` others those from `from` on.
// Blocks of their view are sequences, but none where the tokens have none.
struct InSlab {
  static constexpr bool kInOrder = false;
  int group, from, begin, end;  // [begin, end): as they are counted
  int sequence, ring;           // place of `from`

  InSlab() = default;
  // Of tokens [begin, end); those from `from` on are in the ring.
  __device__ __forceinline__ InSlab(int group, int from, int begin, int end, int sequence)
      : group(group), from(max(from, group)), sequence(sequence) {
    this->begin = begin < group ? begin : max(begin, this->from) - hole();
    this->end = end > this->from ? end - hole() : min(end, group);
    ring = this->from % (group + kSpareTokens);
  }
  __device__ __forceinline__ bool any() const { return begin < end; }
  __device__ __forceinline__ int hole() const { return from - group; }
  __device__ __forceinline__ int token(int i) const { return i < group ? i : i + hole(); }
  __device__ __forceinline__ int block(int found) const { return found < 0 ? found : sequence; }
  __device__ __forceinline__ int row(const Paging&, int i) const {
    if (i < group) return i;
    const int at = i + ring, rows = group + kSpareTokens;
    return at < group + rows ? at : at - rows;
  }
};

}  // namespace kvquant::cuda
