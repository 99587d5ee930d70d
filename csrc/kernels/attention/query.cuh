// A block's query rows: rotated and rounded to integers of two signed bytes (float32: of three), in
// the order that the tensor core's operands want. Rows are query tokens x heads of one KV head.
#pragma once

#include <type_traits>

#include "formats/int8.h"
#include "kernels/attention/call.h"
#include "kernels/attention/config.h"
#include "kernels/common/cache.cuh"
#include "kernels/common/element.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/row.cuh"

namespace kvquant::cuda {

constexpr float kNoScore = -1e30f;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Rotation of rows that a warp holds as x[r][i] = channel 32 i + lane.
template <int kRows, int kCount>
__device__ __forceinline__ void rotate_warp(float (&x)[kRows][kCount], int length) {
  for (int step = 1; step < min(length, 32); step <<= 1) {
    const float sign = threadIdx.x & step ? -1.f : 1.f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[r][i] = fmaf(x[r][i], sign, __shfl_xor_sync(kFullWarp, x[r][i], step));
      }
    }
  }
  const float norm = int8::hadamard_norm(length);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int step = 1; step < kCount; step <<= 1) {
      if (length < 64 * step) break;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i & step || i + step >= kCount) continue;
        const float a = x[r][i], b = x[r][i + step];
        x[r][i] = a + b;
        x[r][i + step] = a - b;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[r][i] *= norm;
  }
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// The tokens that one query row sees, and its ALiBi slope in log2 units.
struct alignas(16) RowView {
  int begin, end, position;
  float slope;
};

// The query rows of a block and the tokens that they see.
struct RowTile {
  int64_t first_call_row;  // of the sequence in the caller's tensor
  int sequence, head;      // KV head
  int first, count;        // rows of the sequence and KV head: row = query token * share + head
  int tokens;              // query tokens of the sequence
  Divisor share;           // query heads of a KV head
  int stored;              // tokens before the call's own, where this launch appends them
  int position;            // of the sequence's first query token
  int start, length;       // stored tokens [start, length)
  int begin, end;          // tokens that some row sees; begin is a multiple of the tile
  int all_begin, all_end;  // tokens that every row sees

  __device__ int token_of(int row) const { return share.divide(first + row); }
  __device__ int head_of(int row) const {
    return (head - token_of(row)) * int(share.divisor) + first + row;
  }
  __device__ int position_of(int row) const { return position + token_of(row); }
  __device__ int first_seen(const AttentionCall& p, int at) const {
    return p.sliding_window ? max(start, max(at, 0) - p.sliding_window + 1) : start;
  }
  __device__ int seen_end(const AttentionCall& p, int at) const {
    return p.causal ? max(0, min(length, at + 1)) : length;
  }

  // False where there are no rows. `tile` counts tiles of rows_per_tile.
  __device__ __forceinline__ bool find_rows(const AttentionCall& p, int tile, int rows_per_tile) {
    sequence = blockIdx.z;
    head = blockIdx.y;
    const CallRows call = call_rows(p.seqs, sequence);
    first_call_row = call.first;
    tokens = call.count;
    share = p.share;
    first = tile * rows_per_tile;
    count = min(rows_per_tile, tokens * int(share.divisor) - first);
    return count > 0;
  }
  __device__ __forceinline__ void find_tokens(const AttentionCall& p) {
    start = first_token(p.seqs, sequence);
    length = stored_tokens(p.cache, p.seqs, sequence, p.key.data ? tokens : 0);
    stored = p.key.data ? stored_tokens(p.cache, p.seqs, sequence) : length;
    position = length - tokens;
    const int low = position_of(0), high = position_of(count - 1);
    begin = first_seen(p, low) / kTile * kTile;
    end = max(begin, seen_end(p, high));
    all_begin = first_seen(p, high);
    all_end = seen_end(p, low);
  }
  __device__ __forceinline__ RowView view(const AttentionCall& p, int row) const {
    if (row >= count) return {};
    const int at = position_of(row);
    const float slope = p.alibi_slopes ? p.alibi_slopes[head_of(row)] * kLog2e : 0.f;
    return {first_seen(p, at), seen_end(p, at), at, slope};
  }
};

// The compile-time choices of one instance. A usual call has none of the rarer features and rows
// that fill the instance; its code is half as long, which a short call waits for.
template <int kHeadDim, int kRowCount, class T, bool kUsual, bool kMany>
struct AttentionTraits {
  using Element = T;  // of query and output
  // float32 weights are kept as fp16 and what fp16 left of them.
  static constexpr bool kSplit = std::is_same_v<T, float>;
  static constexpr int kLimbs = kSplit ? 3 : 2;  // bytes of a query's integer
  static constexpr InstanceShape kShape = instance_shape(kHeadDim, kRowCount, kSplit, kMany);
  static constexpr int kDim = kHeadDim;
  static constexpr int kRows = kRowCount;  // query rows of a block
  static constexpr int kWarps = kShape.warps;
  static constexpr int kThreads = kShape.threads();
  static constexpr int kStep = kShape.step();  // tokens a block takes at once
  static constexpr int kTiles = kShape.tiles;  // of a warp
  static constexpr int kRowSets = kRows / 8;   // softmax rows of a lane
  // Of 16 rows of bytes: the highest ones of all rows come first.
  static constexpr int kFragments = (kLimbs * kRows + 15) / 16;
  static constexpr int kOutTiles = kSplit ? 2 : kRowSets;  // n-tiles of P V
  static constexpr int kPartialFloats = partial_floats(kHeadDim, kRowCount);

  static constexpr int kRotation = kDim & -kDim;  // the longest that fits rows
  static bool serves(const AttentionCall& call) {
    return !kUsual || (call.cache.k_dim == kDim && call.cache.v_dim == kDim &&
                       (call.cache.k_rotation <= 1 || call.cache.k_rotation == kRotation) &&
                       call.cache.v_rotation <= 1 && !call.seqs.seq_starts &&
                       !call.seqs.cu_seqlens && !call.sliding_window && call.softcap == 0.f &&
                       !call.alibi_slopes && !call.sinks && !call.lse);
  }
  // The call, with what is known of it as constants.
  static __device__ __forceinline__ AttentionCall known(AttentionCall call) {
    if constexpr (kUsual) {
      call.cache.k_dim = call.cache.v_dim = kDim;
      call.cache.k_rotation = call.cache.k_rotation > 1 ? kRotation : 1;
      call.cache.v_rotation = 1;
      call.seqs.seq_starts = call.seqs.cu_seqlens = nullptr;
      call.sliding_window = 0;
      call.softcap = 0.f;
      call.alibi_slopes = call.sinks = nullptr;
      call.lse = nullptr;
    }
    return call;
  }
};

// The query as the tensor core's operands: a lane's four words of each fragment of 16 rows and each
// k-step of 32 channels, which are in the order of a lane's 16-byte pieces of a key.
template <class Traits>
struct QueryShared {
  static constexpr int kSteps = Traits::kDim / 32;
  uint4 words[Traits::kFragments][kSteps][32];

  __device__ __forceinline__ void put(int row, int c, int byte) {
    const int lane = row % 8 * 4 + c % 64 / 16;
    uint4& at = words[row / 16][c / 64 * 2 + c % 16 / 8][lane];
    reinterpret_cast<int8_t*>(&at)[c % 8 / 4 * 8 + row % 16 / 8 * 4 + c % 4] = int8_t(byte);
  }
};

// This warp's query rows on their way from memory: what a block asks for first.
template <class Traits>
struct RawQuery {
  using Element = typename Traits::Element;
  static constexpr int kCount = Traits::kDim / 32, kPerWarp = Traits::kRows / Traits::kWarps;
  Element x[kPerWarp][kCount];

  __device__ __forceinline__ RawQuery(const AttentionCall& p, const RowTile& tile) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const CallRows call{tile.first_call_row, 0};
    const Element* query = static_cast<const Element*>(p.query.data);
#pragma unroll
    for (int i = 0; i < kPerWarp; ++i) {
      const int row = warp + i * Traits::kWarps;
      const int64_t base = row_offset(p.query, p.seqs, call, tile.sequence, tile.token_of(row)) +
                           tile.head_of(row) * p.query.head_stride;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int c = 32 * k + lane;
        const bool there = row < tile.count && c < p.cache.k_dim;
        x[i][k] = from_float<Element>(0.f);
        if (there) x[i][k] = load_early(query + base + c);
      }
    }
  }
};

// Of a row as rounded: its sum, and what its products are multiplied by (the integers' unit,
// softmax_scale, log2(e)).
struct RowScale {
  float sum, gain;
};

// Rotates, scales and rounds this warp's rows into shared memory.
template <class Traits>
__device__ __forceinline__ void prepare_query(const AttentionCall& p, const RawQuery<Traits>& raw,
                                              QueryShared<Traits>& shared, RowScale* scales) {
  constexpr int kCount = Traits::kDim / 32, kPerWarp = RawQuery<Traits>::kPerWarp;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  float x[kPerWarp][kCount];
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[i][k] = to_float(raw.x[i][k]);
  }
  if (p.cache.k_rotation > 1) rotate_warp(x, p.cache.k_rotation);
  float most[kPerWarp];
  bool finite[kPerWarp];
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    most[i] = 0.f;
    finite[i] = true;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      most[i] = fmaxf(most[i], fabsf(x[i][k]));
      finite[i] = finite[i] && isfinite(x[i][k]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) most[i] = warp_max(most[i]);
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    const int row = warp + i * Traits::kWarps;
    constexpr float kLargest = Traits::kLimbs == 3 ? 127.f * 65536.f : 127.f * 256.f;
    // Zeros of any sign, and rows so small that their unit is none, count as zeros.
    const float unit = most[i] / kLargest, inverse = unit > 1e-37f ? 1.f / unit : 0.f;
    int sum = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      int rest = __float2int_rn(x[i][k] * inverse);
      sum += rest;
      if constexpr (Traits::kLimbs == 3) {  // what is left then fits two signed bytes
        const int high = (rest + 0x8080) >> 16;
        shared.put(row, 32 * k + lane, high);
        rest -= high << 16;
      }
      const int high = (rest + 0x80) >> 8;
      shared.put(row + (Traits::kLimbs - 2) * Traits::kRows, 32 * k + lane, high);
      shared.put(row + (Traits::kLimbs - 1) * Traits::kRows, 32 * k + lane, rest - (high << 8));
    }
    sum = warp_sum(sum);
    const bool all_finite = __all_sync(kFullWarp, finite[i]);
    if (lane == 0) {
      scales[row] = {float(sum), all_finite ? unit * p.softmax_scale * kLog2e : NAN};
    }
  }
}

// A lane's view of the query.
template <class Traits>
struct Query {
  const QueryShared<Traits>& shared;
  RowScale scale[Traits::kRowSets];
  int g, t;

  __device__ __forceinline__ Query(const QueryShared<Traits>& from, const RowScale* scales, int g,
                                   int t)
      : shared(from), g(g), t(t) {
#pragma unroll
    for (int r = 0; r < Traits::kRowSets; ++r) scale[r] = scales[g + 8 * r];
  }
  __device__ __forceinline__ uint4 fragment(int f, int step) const {
    return shared.words[f][step][threadIdx.x & 31];
  }
};

}  // namespace kvquant::cuda
