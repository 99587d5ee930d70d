// The compile-time choices of an instance.
#pragma once

#include "common/cuda/element.cuh"
#include "formats/formats.cuh"
#include "kernels/attention/call.h"
#include "kernels/attention/config.h"

namespace kvquant::cuda {

// Whether a lane's four channels of every row can be one access.
template <class T>
bool is_aligned(const Rows& rows) {
  const uint64_t any = reinterpret_cast<uintptr_t>(rows.data) / sizeof(T) |
                       uint64_t(rows.batch_stride) | uint64_t(rows.token_stride) |
                       uint64_t(rows.head_stride);
  return any % 4 == 0;
}

template <class Traits>
struct YoungTraits;

// The compile-time choices of one instance. A plain call has none of the rarer features and rows
// that fill the instance; its code is half as long, which a short call waits for.
template <class Formats, int kHeadDim, int kRowCount, class T, bool kIsPlainCall,
          Occupancy kOccupancy>
struct AttentionTraits {
  using Key = typename Formats::Key;
  using Value = typename Formats::Value;
  using Pair = FormatPair<Key, Value>;
  static constexpr bool kPlainCall = kIsPlainCall;
  static constexpr bool kByAge = Formats::kByAge, kIsYoung = false;
  using Element = T;  // of query and output
  // float32 weights are kept as fp16 and what fp16 left of them.
  static constexpr bool kSplit = std::is_same_v<T, float>;
  static constexpr int kQueryLimbs = kSplit ? 3 : 2;  // bytes of a query's integer
  static constexpr InstanceShape kShape = instance_shape(kHeadDim, kRowCount, kSplit, kOccupancy);
  static constexpr int kDim = kHeadDim;
  static constexpr int kRows = kRowCount;  // query rows of a block
  static constexpr int kWarps = kShape.warps;
  static constexpr int kThreads = kShape.threads();
  static constexpr int kStep = kShape.step();        // tokens a block takes at once
  static constexpr int kTiles = kShape.tiles;        // of a warp
  static constexpr bool kHeld = kShape.stages == 0;  // registers hold tokens on their way
  // Pieces that need no look at single tokens have a loop of their own, and what loops read time
  // and again is kept in registers, where a warp's time is that of its instructions. With 8-bit
  // keys at head_dim 128 it waits for memory, and such a loop was measured 1 to 2% slower.
  static constexpr bool kTakesWhole =
      kPlainCall && kHeld && kDim <= 128 &&
      (kByAge || kDim <= 64 || kShape.has_room() || Key::code_bytes(8) + Value::code_bytes(8) <= 8);
  // Columns of a key of Key's format in the products, see KeyTile. Two, so that it is read by whole
  // lines, where memory is the limit and registers suffice: in instances with the one loop, and by
  // age in those with a loop for whole pieces.
  template <class Key>
  static constexpr int kKeyColumns =
      kHeld && kTakesWhole == kByAge ? KeyTile<Key, kDim>::kMostColumns : 1;
  static constexpr int kRowSets = kRows / 8;           // softmax rows of a lane
  static constexpr int kRowsPerWarp = kRows / kWarps;  // to prepare
  // Of 16 rows of bytes: the highest ones of all rows come first.
  static constexpr int kFragments = (kQueryLimbs * kRows + 15) / 16;
  static constexpr int kPartialFloats = partial_floats(kHeadDim, kRowCount);
  // What new tokens become.
  using Appended = std::conditional_t<kByAge, YoungTraits<AttentionTraits>, AttentionTraits>;

  static constexpr int kRotation = kDim & -kDim;  // the longest that fits rows
  static bool serves(const AttentionCall& call) {
    return !kPlainCall ||
           (is_aligned<T>(call.query) && is_aligned<T>(call.out) && is_aligned<T>(call.key) &&
            is_aligned<T>(call.value) && call.cache.k.head_dim == kDim &&
            call.cache.v.head_dim == kDim && is_rotation(call.cache.k.rotation) &&
            is_rotation(call.cache.v.rotation) && !call.seqs.seq_starts &&
            !call.seqs.cu_seqlens_q && !call.sliding_window && call.softcap == 0.f &&
            !call.alibi_slopes && !call.sinks && !call.lse);
  }
  // None, or the longest.
  static bool is_rotation(int length) { return length <= 1 || length == kRotation; }
  // The call, with what is known of it as constants.
  static __device__ __forceinline__ AttentionCall known(AttentionCall call) {
    if constexpr (kPlainCall) {
      call.cache.k.head_dim = call.cache.v.head_dim = kDim;
      call.cache.k.rotation = call.cache.k.rotation > 1 ? kRotation : 1;
      call.cache.v.rotation = call.cache.v.rotation > 1 ? kRotation : 1;
      call.seqs.seq_starts = call.seqs.cu_seqlens_q = nullptr;
      call.sliding_window = 0;
      call.softcap = 0.f;
      call.alibi_slopes = call.sinks = nullptr;
      call.lse = nullptr;
    }
    return call;
  }
};

// Of an instance by age, for its young tokens: the same warps, on rows in 8 bits.
template <class Traits>
struct YoungTraits : Traits {
  using Key = Int8;
  using Value = Int8;
  static constexpr bool kIsYoung = true;
  template <class Key>
  static constexpr int kKeyColumns = 1;  // with two this loop spills
  static constexpr int kTiles = Traits::kDim <= 64 ? Traits::kTiles : 1;
  static constexpr InstanceShape kShape = {kTiles, Traits::kShape.warps, Traits::kShape.blocks,
                                           Traits::kShape.stages};
  static constexpr int kStep = kShape.step();
};

}  // namespace kvquant::cuda
