// A block's query rows: rotated, scaled to log2 units, normalised by a power of two and rounded to
// fp16, in the order that the mma fragments want. Rows are query tokens x heads of one KV head.
#pragma once

#include <type_traits>

#include "formats/int8.h"
#include "kernels/attention/config.h"
#include "kernels/common/cache.cuh"
#include "kernels/common/element.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/row.cuh"

namespace kvquant::cuda {

constexpr float kNoScore = -1e30f;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rotation of a row that a warp holds as x[i] = channel 32 i + lane.
template <int kCount>
__device__ __forceinline__ void rotate_warp(float (&x)[kCount], int length) {
  const int lane = threadIdx.x & 31;
  for (int step = 1; step < min(length, 32); step <<= 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, x[i], step);
      x[i] = lane & step ? other - x[i] : x[i] + other;
    }
  }
#pragma unroll
  for (int step = 1; step < kCount; step <<= 1) {
    if (length < 64 * step) break;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i & step || i + step >= kCount) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b;
      x[i + step] = a - b;
    }
  }
  const float norm = int8::hadamard_norm(length);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= norm;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// The query rows of a block and the tokens that they see.
struct RowTile {
  int64_t first_call_row;  // of the sequence in the caller's tensor
  int sequence, head;      // KV head
  int first, count;        // rows of the sequence and KV head: row = query token * share + head
  int share;               // query heads of a KV head
  int position;            // of the sequence's first query token
  int start, length;       // stored tokens [start, length)
  int begin, end;          // tokens that some row sees; begin is a multiple of the tile
  int all_begin, all_end;  // tokens that every row sees

  __device__ int token_of(int row) const { return (first + row) / share; }
  __device__ int head_of(int row) const { return head * share + (first + row) % share; }
  __device__ int position_of(int row) const { return position + token_of(row); }
  __device__ int first_seen(const AttentionParams& p, int at) const {
    return p.sliding_window ? max(start, max(at, 0) - p.sliding_window + 1) : start;
  }
  __device__ int seen_end(const AttentionParams& p, int at) const {
    return p.causal ? max(0, min(length, at + 1)) : length;
  }
};

// A block's piece of work: rows and one split of the tokens that they see.
struct Item {
  RowTile rows;
  int64_t unit;       // of (sequence, KV head, row tile)
  int split, splits;  // of the unit
  int begin, end;     // tokens of this split
  int whole;          // the block of a contiguous sequence, -1: look it up
  bool there;         // false: no work is left
};

// Item `index` of all: row tiles are fastest (they share the tokens' rows in L2), then splits, KV
// heads, sequences. False where it has no rows or no tokens.
__device__ __forceinline__ bool make_item(const AttentionParams& p, int index, int row_tiles,
                                          int rows_per_tile, Item& item) {
  // The last rows see the most tokens: first.
  const int tile = row_tiles - 1 - index % row_tiles, heads = index / row_tiles / p.splits;
  RowTile& r = item.rows;
  item.split = index / row_tiles % p.splits;
  item.unit = int64_t(heads) * row_tiles + tile;
  r.sequence = heads / p.cache.kv_heads;
  r.head = heads % p.cache.kv_heads;
  const CallRows call = call_rows(p.seqs, r.sequence);
  r.first_call_row = call.first;
  r.share = p.q_heads / p.cache.kv_heads;
  r.first = tile * rows_per_tile;
  r.count = min(rows_per_tile, call.count * r.share - r.first);
  if (r.count <= 0) return false;
  item.whole = p.seqs.max_blocks == 1 ? block_of(p.cache, p.seqs, r.sequence, 0) : -1;
  r.start = first_token(p.seqs, r.sequence);
  r.length = stored_tokens(p.cache, p.seqs, r.sequence);
  r.position = r.length - call.count;
  const int low = r.position_of(0), high = r.position_of(r.count - 1);
  r.begin = r.first_seen(p, low) / kTile * kTile;
  r.end = max(r.begin, r.seen_end(p, high));
  r.all_begin = r.first_seen(p, high);
  r.all_end = r.seen_end(p, low);
  const int span = r.end - r.begin;
  const int length = max(kMinSplit, ((span + p.splits - 1) / p.splits + kStep - 1) / kStep * kStep);
  item.splits = max(1, (span + length - 1) / length);
  item.begin = r.begin + item.split * length;
  item.end = min(r.end, item.begin + length);
  return item.split < item.splits;
}

// The compile-time choices of one instance.
template <int kHeadDim, int kRowCount, class T>
struct AttentionTraits {
  using Element = T;  // of query and output
  // float32 queries and weights are kept as fp16 and what fp16 left of them.
  static constexpr bool kSplit = std::is_same_v<T, float>;
  static constexpr int kDim = kHeadDim;
  static constexpr int kRows = kRowCount;                     // query rows of a block
  static constexpr int kRowSets = kRows / 8;                  // softmax rows of a lane
  static constexpr int kSharedRows = kSplit ? 16 : kRows;     // fp16 rows
  static constexpr int kFragments = (kSharedRows + 15) / 16;  // of 16 rows
  static constexpr int kOutTiles = kSplit ? 2 : kRowSets;     // n-tiles of P V
  static constexpr int kPartialFloats = kRows * (kHeadDim + 2);
  static constexpr int kMinBlocks = min_blocks(kHeadDim, kRowCount, kSplit);
};

template <class Traits>
struct QueryShared {
  __half rows[Traits::kSharedRows][Traits::kDim + kQueryPad];
  // What fp16 left of the rows. Means are large where keys have a bias: their products take both.
  __half rest[Traits::kRows][Traits::kDim + kQueryPad];
};

// This warp's query rows on their way from memory: what a block asks for first.
template <class Traits>
struct RawQuery {
  using Element = typename Traits::Element;
  static constexpr int kCount = Traits::kDim / 32, kPerWarp = Traits::kRows / kAttentionWarps;
  Element x[kPerWarp][kCount];

  __device__ __forceinline__ RawQuery(const AttentionParams& p, const RowTile& tile) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const CallRows call{tile.first_call_row, 0};
    const Element* query = static_cast<const Element*>(p.query.data);
#pragma unroll
    for (int i = 0; i < kPerWarp; ++i) {
      const int row = warp + i * kAttentionWarps;
      const int64_t base = row_offset(p.query, p.seqs, call, tile.sequence, tile.token_of(row)) +
                           tile.head_of(row) * p.query.head_stride;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int c = 32 * k + lane;
        const bool there = row < tile.count && c < p.cache.k_dim;
        x[i][k] = there ? query[base + c] : from_float<Element>(0.f);
      }
    }
  }
};

// Of a row as rounded: its sum, and what its products are multiplied by (the power of two that it
// was divided by, softmax_scale, log2(e)). So a float16 row that is not rotated is exact.
struct RowScale {
  float sum, gain;
};

// Rotates, scales and rounds this warp's rows into shared memory.
template <class Traits>
__device__ __forceinline__ void prepare_query(const AttentionParams& p, const RawQuery<Traits>& raw,
                                              QueryShared<Traits>& shared, RowScale* scales) {
  constexpr int kCount = Traits::kDim / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < RawQuery<Traits>::kPerWarp; ++i) {
    const int row = warp + i * kAttentionWarps;
    float x[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = to_float(raw.x[i][k]);
    if (p.cache.k_rotation > 1) rotate_warp(x, p.cache.k_rotation);
    float most = 0.f;
#pragma unroll
    for (int k = 0; k < kCount; ++k) most = fmaxf(most, fabsf(x[k]));
    most = warp_max(most);
    // The power of two below the largest: its exponent alone.
    const uint32_t exponent = int8::float_to_bits(most) & 0x7f800000u;
    const bool usual = exponent > 0x01000000u && exponent < 0x7e000000u;
    const float gain = usual ? int8::bits_to_float(exponent) : 1.f;
    const float inverse = usual ? int8::bits_to_float(0x7f000000u - exponent) : 1.f;
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float y = x[k] * inverse;
      const __half high = __float2half_rn(y);
      shared.rows[row][32 * k + lane] = high;
      sum += __half2float(high);
      const __half low = __float2half_rn(y - __half2float(high));
      shared.rest[row][32 * k + lane] = low;
      if constexpr (Traits::kSplit) {
        shared.rows[row + 8][32 * k + lane] = low;
        sum += __half2float(low);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) scales[row] = {sum, gain * p.softmax_scale * kLog2e};
  }
}

// A fragment of k-step w: channels as a lane's 16-byte piece of a key has them.
template <int kRows, int kWidth>
__device__ __forceinline__ void read_fragment(const __half (&rows)[kRows][kWidth], int fragment,
                                              int w, int g, int t, uint32_t (&a)[4]) {
  const int c = w / 4 * 64 + t * 16 + w % 4 * 4;
  const uint2 low = *reinterpret_cast<const uint2*>(&rows[16 * fragment + g][c]);
  a[0] = low.x, a[2] = low.y;
  if constexpr (kRows >= 16) {
    const uint2 high = *reinterpret_cast<const uint2*>(&rows[16 * fragment + g + 8][c]);
    a[1] = high.x, a[3] = high.y;
  } else {
    a[1] = a[3] = 0;
  }
}

// What a lane keeps of the query: its fragments in registers where they are few.
template <class Traits>
struct Query {
  static constexpr bool kInRegisters = Traits::kDim * Traits::kSharedRows <= 128 * 8;
  static constexpr int kKept = kInRegisters ? Traits::kDim / 16 : 1;
  static constexpr int kWidth = Traits::kSharedRows >= 16 ? 4 : 2;
  uint32_t kept[kKept][kWidth];
  const QueryShared<Traits>* shared;
  int g, t;
  RowScale scale[Traits::kRowSets];

  __device__ __forceinline__ Query(const QueryShared<Traits>& from, const RowScale* scales, int g,
                                   int t)
      : shared(&from), g(g), t(t) {
#pragma unroll
    for (int r = 0; r < Traits::kRowSets; ++r) scale[r] = scales[g + 8 * r];
    if constexpr (kInRegisters) {
#pragma unroll
      for (int w = 0; w < kKept; ++w) {
        uint32_t a[4];
        read_fragment(from.rows, 0, w, g, t, a);
        kept[w][0] = a[0], kept[w][1] = a[2];
        if constexpr (kWidth == 4) kept[w][2] = a[1], kept[w][3] = a[3];
      }
    }
  }
  __device__ __forceinline__ void fragment(int f, int w, uint32_t (&a)[4]) const {
    if constexpr (!kInRegisters) {
      read_fragment(shared->rows, f, w, g, t, a);
    } else {
      a[0] = kept[w][0], a[2] = kept[w][1];
      if constexpr (kWidth == 4) {
        a[1] = kept[w][2], a[3] = kept[w][3];
      } else {
        a[1] = a[3] = 0;
      }
    }
  }
};

}  // namespace kvquant::cuda
