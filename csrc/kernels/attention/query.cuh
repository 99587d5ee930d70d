// A block's query rows: rotated and rounded to integers of two signed bytes (float32: of three), in
// the order that the tensor core's operands want. Rows are query tokens x heads of one KV head.
#pragma once

#include "common/cuda/element.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/row.cuh"
#include "common/cuda/warp_row.cuh"
#include "common/mask.h"
#include "common/paging.h"
#include "common/rows.h"
#include "formats/formats.cuh"
#include "kernels/attention/traits.cuh"

namespace kvquant::cuda {

constexpr float kNoScore = -1e30f;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A number that is the same in all lanes, which the compiler then knows: branches on it do not
// diverge.
__device__ __forceinline__ int uniform(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kFullWarp, x);
#else
  return x;
#endif
}
// An address likewise, in uniform registers: what a reduction gives, the assembler keeps, and does
// not work out anew at each use.
__device__ __forceinline__ const uint8_t* uniform(const uint8_t* p) {
  const auto bits = reinterpret_cast<uintptr_t>(p);
  const uint32_t low = uniform(int(bits)), high = uniform(int(bits >> 32));
  return reinterpret_cast<const uint8_t*>(uintptr_t(high) << 32 | low);
}
// Of what is no NaN.
__device__ __forceinline__ float warp_max(float x) {
#if __CUDA_ARCH__ >= 800
  const auto in_order = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  return __int_as_float(in_order(__reduce_max_sync(kFullWarp, in_order(__float_as_int(x)))));
#else
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
#endif
}
// Of integers, by one instruction where there is one.
__device__ __forceinline__ int warp_sum_int(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullWarp, x);
#else
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
#endif
}
__device__ __forceinline__ uint32_t warp_max_bits(uint32_t x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kFullWarp, x);
#else
#pragma unroll
  for (int step = 16; step; step >>= 1) x = max(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
#endif
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
  int first, count;  // rows of the sequence and KV head: row = query token * group size + head
  int tokens;        // query tokens of the sequence
  Divisor gqa_group_size;  // query heads of a KV head
  int stored;              // tokens before the call's own, where they are not counted yet
  int position;            // of the sequence's first query token
  int start, length;       // stored tokens [start, length)
  int begin, end;          // tokens that some row sees; begin is a multiple of the tile
  int all_begin, all_end;  // tokens that every row sees

  __device__ int token_of(int row) const { return gqa_group_size.divide(first + row); }
  __device__ int head_of(int row) const {
    return (head - token_of(row)) * int(gqa_group_size.divisor) + first + row;
  }
  __device__ int position_of(int row) const { return position + token_of(row); }
  __device__ int first_seen(const AttentionCall& p, int at) const {
    return kvquant::first_seen(p.sliding_window, start, at);
  }
  __device__ int seen_end(const AttentionCall& p, int at) const {
    return kvquant::seen_end(p.causal, length, at);
  }

  // False where there are no rows. `tile` counts tiles of rows_per_tile.
  __device__ __forceinline__ bool find_rows(const AttentionCall& p, int sequence, int head,
                                            int tile, int rows_per_tile) {
    this->sequence = sequence;
    this->head = head;
    const CallRows call = call_rows(p.seqs, sequence);
    first_call_row = call.first;
    tokens = call.count;
    gqa_group_size = p.gqa_group_size;
    first = tile * rows_per_tile;
    count = min(rows_per_tile, tokens * int(gqa_group_size.divisor) - first);
    return count > 0;
  }
  // seq_len: the sequence's, as it is on the device.
  __device__ __forceinline__ void find_tokens(const AttentionCall& p, int seq_len) {
    start = first_token(p.seqs, sequence);
    length = stored_tokens(p.cache, p.seqs, seq_len, p.key.data ? tokens : 0);
    stored = p.key.data ? stored_tokens(p.cache, p.seqs, seq_len) : length;
    position = length - tokens;
    const int low = position_of(0), high = position_of(count - 1);
    begin = first_seen(p, low) / kTile * kTile;
    end = seen_end(p, high);
    if (end <= begin) begin = end = 0;  // nothing is seen: nothing may be read at the start either
    all_begin = first_seen(p, high);
    all_end = seen_end(p, low);
  }
  // Tokens of a split, in whole steps.
  __device__ __forceinline__ int split_length(const AttentionCall& p, int step) const {
    const int even = p.divided_by.divide(end - begin + p.splits - 1);
    return max(p.min_split, (even + step - 1) / step * step);
  }
  __device__ __forceinline__ RowView view(const AttentionCall& p, int row) const {
    if (row >= count) return {};
    const int at = position_of(row);
    const float slope = p.alibi_slopes ? p.alibi_slopes[head_of(row)] * kLog2e : 0.f;
    return {first_seen(p, at), seen_end(p, at), at, slope};
  }
};

// The query as the tensor core's operands: a lane's four words of each fragment of 16 rows and each
// k-step of 32 channels, which are in the order in which tiles of keys have them.
template <class Traits>
struct QueryShared {
  static constexpr int kSteps = Traits::kDim / 32;
  uint4 words[Traits::kFragments][kSteps][32];

  // Bytes of neighbouring channels from c on, which is a multiple of their number.
  template <class Bytes>
  __device__ __forceinline__ void put(int row, int c, Bytes bytes) {
    if constexpr (Keys::kInOrder) {
      *reinterpret_cast<Bytes*>(byte(row, c)) = bytes;
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof(Bytes)); ++i) *byte(row, c + i) = uint8_t(bytes >> 8 * i);
    }
  }

 private:
  using Keys = KeyTile<typename Traits::Key, Traits::kDim>;

  __device__ __forceinline__ uint8_t* byte(int row, int c) {
    const OperandPlace place = Keys::place(c);
    uint4& at = words[row / 16][place.step][row % 8 * 4 + place.lane];
    return reinterpret_cast<uint8_t*>(&at) + place.byte / 4 * 8 + row % 16 / 8 * 4 + place.byte % 4;
  }
};

// The query rows as they come from memory, each for the warp that asks for it: what a block asks
// for first.
template <class Traits>
struct RawQuery {
  using Element = typename Traits::Element;
  alignas(16) Element rows[Traits::kRows][Traits::kDim];

  __device__ __forceinline__ void ask(const AttentionCall& p, const RowTile& tile, int warp) {
    const CallRows call{tile.first_call_row, 0};
    const Element* query = static_cast<const Element*>(p.query.data);
    if (warp >= tile.count) return;
#pragma unroll
    for (int row = warp; row < Traits::kRows; row += Traits::kWarps) {
      const int at = min(row, tile.count - 1);  // rows that are none repeat the last one
      const Element* const from =
          query + row_offset(p.query, p.seqs, call, tile.sequence, tile.token_of(at)) +
          tile.head_of(at) * p.query.head_stride;
      WarpRow<Traits::kDim>::pieces([&](auto width, int, int c) {
        if constexpr (Traits::kPlainCall) {
          copy_async<width() * sizeof(Element)>(&rows[row][c], from + c);
        } else {
#pragma unroll
          for (int j = c; j < c + width(); ++j) {
            rows[row][j] = j < p.cache.k.head_dim ? from[j] : Element{};
          }
        }
      });
    }
  }
};

// Of a row as rounded: its sum, and what its products are multiplied by (the integers' unit,
// softmax_scale, log2(e)).
struct RowScale {
  float sum, gain;
};

// Neighbours times `inverse` as integers of two signed bytes: the high ones, the low ones; adds to
// the integers' sum.
template <int kCount>
__device__ __forceinline__ void round_to_bytes(const float* x, float inverse, uint32_t& high,
                                               uint32_t& low, int& sum) {
  // Where a float's last bit is 1, adding rounds to integers: its low half is theirs + 128.
  constexpr float kShift = 0x1.8p23f + 128.f;
  constexpr uint32_t kShiftBits = 0x4b400000u + 128u;
  uint32_t words[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    words[j] = __float_as_uint(fmaf(x[j], inverse, kShift));
    sum += int(words[j] - kShiftBits);
  }
  const auto bytes = [&](uint32_t of_pair) {
    const uint32_t pair = __byte_perm(words[0], words[1], of_pair);
    return kCount == 2
               ? pair
               : __byte_perm(pair, __byte_perm(words[kCount - 2], words[kCount - 1], of_pair),
                             0x5410);
  };
  high = bytes(0x0051), low = bytes(0x0040) ^ 0x80808080u;
}

// Rotates, scales and rounds this warp's rows, of `count`. Scores of rows that are none are zero
// or a NaN, and belong to nobody.
template <class Traits>
__device__ __forceinline__ void prepare_query(const AttentionCall& p, const RawQuery<Traits>& raw,
                                              int warp, int count, QueryShared<Traits>& shared,
                                              RowScale* scales) {
  using Row = WarpRow<Traits::kDim>;
  constexpr int kPerWarp = Traits::kRowsPerWarp;
  const int lane = threadIdx.x & 31;
  if (warp >= count) {
    if (lane < kPerWarp) scales[warp + lane * Traits::kWarps] = {};
    return;
  }
  float x[kPerWarp][Row::kCount];
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    Row::pieces([&](auto width, int k, int c) {
#pragma unroll
      for (int j = 0; j < width(); ++j) {
        x[i][k + j] = to_float(raw.rows[warp + i * Traits::kWarps][c + j], p.dtype);
      }
    });
  }
  if (p.cache.k.rotation > 1) {
    rotate_warp<Traits::kDim>(x, Traits::kPlainCall ? Traits::kRotation : p.cache.k.rotation);
  }
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    const int row = warp + i * Traits::kWarps;
    uint32_t most = 0;  // of magnitudes, whose bits are in their order; beyond infinity: a NaN
#pragma unroll
    for (int k = 0; k < Row::kCount; ++k) most = max(most, __float_as_uint(x[i][k]) & 0x7fffffffu);
    most = warp_max_bits(most);
    constexpr float kLargest = Traits::kQueryLimbs == 3 ? 127.f * 65536.f : 127.f * 256.f;
    // Zeros of any sign, and rows so small that their unit is none, count as zeros.
    const float unit = __uint_as_float(most) * (1.f / kLargest);
    const float inverse = unit > 1e-37f ? 1.f / unit : 0.f;
    int sum = 0;
    Row::pieces([&](auto width, int k, int c) {
      uint32_t bytes[Traits::kQueryLimbs] = {};  // of each limb, the highest one first
      if constexpr (Traits::kQueryLimbs == 2) {
        round_to_bytes<width()>(x[i] + k, inverse, bytes[0], bytes[1], sum);
      } else {
#pragma unroll
        for (int j = 0; j < width(); ++j) {
          int rest = __float2int_rn(x[i][k + j] * inverse);
          sum += rest;
#pragma unroll
          for (int n = 0; n < Traits::kQueryLimbs; ++n) {
            const int shift = 8 * (Traits::kQueryLimbs - 1 - n),
                      half = shift ? 0x8080 >> (16 - shift) : 0;
            const int limb = (rest + half) >> shift;
            rest -= limb << shift;
            bytes[n] |= uint32_t(limb & 0xff) << (8 * j);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < Traits::kQueryLimbs; ++n) {
        const int at = row + n * Traits::kRows;
        if constexpr (width() == 4) {
          shared.put(at, c, bytes[n]);
        } else {
          shared.put(at, c, uint16_t(bytes[n]));
        }
      }
    });
    sum = warp_sum_int(sum);
    if (lane == 0) {
      const bool finite = most < 0x7f800000u;
      scales[row] = {float(sum), finite ? unit * p.softmax_scale * kLog2e : NAN};
    }
  }
}

// A lane's view of the query.
template <class Traits>
struct Query {
  const QueryShared<Traits>& shared;
  uint32_t words;  // kTakesWhole: where this lane's are in shared memory
  RowScale scale[Traits::kRowSets];
  int g, t;

  __device__ __forceinline__ Query(const QueryShared<Traits>& from, const RowScale* scales, int g,
                                   int t)
      : shared(from), g(g), t(t) {
    if constexpr (Traits::kTakesWhole) {
      words = kept(shared_address(&from.words[0][0][threadIdx.x & 31]));
    }
#pragma unroll
    for (int r = 0; r < Traits::kRowSets; ++r) scale[r] = scales[g + 8 * r];
  }
  __device__ __forceinline__ uint4 fragment(int f, int step) const {
    if constexpr (Traits::kTakesWhole) {
      return load_shared(words + (f * QueryShared<Traits>::kSteps + step) * 32 * sizeof(uint4));
    } else {
      return shared.words[f][step][threadIdx.x & 31];
    }
  }
};

}  // namespace kvquant::cuda
