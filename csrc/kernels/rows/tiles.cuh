// What a block of rows_kernel has in shared memory, and how it gets there: the query, and tiles of
// 64 tokens, which come by the copy engine and whose values become fp16.
#pragma once

#include "kernels/attention/combine.cuh"
#include "kernels/rows/config.h"
#include "kernels/rows/query.cuh"

namespace kvquant::cuda {

// What codes of a value's row become halves with, each in both halves: (code - middle code) scale +
// middle.
struct ValueSteps {
  uint32_t scale, middle;
};
constexpr uint32_t kNanHalves = 0x7e007e00u;

template <class Traits>
struct RowsShared {
  static constexpr int kDim = Traits::kDim, kStages = Traits::kStages;
  using Codes = uint8_t[kStages][kRowsTile * kDim];

  RowsQuery<Traits> query;
  alignas(1024) Codes k;
  alignas(1024) __half values[kRowsTile * kDim];
  alignas(1024) Codes v;
  alignas(128) AffineParams k_params[kStages][kRowsTile];
  alignas(128) AffineParams v_params[kStages][kRowsTile];
  // Of the tile that is multiplied: keys' params as floats, values' as pairs of halves.
  alignas(16) RowAffine keys[kRowsTile];
  alignas(16) ValueSteps steps[kRowsTile];
  uint64_t full[kStages];  // barriers: the stage's tile is there
  uint32_t lost[kStages];  // pieces of the stage's tile that have no block: a bit each
  int is_clean[kStages];   // no score of the stage's tile needs a look
  RowView views[Traits::kRows];
  RowTile rows;
};

// The cache as the copy engine takes it, codes as [block, head, row, channel], params as [block,
// head, 1, row]; in boxes of a whole tile where blocks hold them, else codes alone, of 16 tokens.
struct RowsMaps {
  CUtensorMap k, v, k_params, v_params;
};

// Which tokens of a split are stored, and which tiles need no look at single scores: those that
// begin from clean_begin to clean_end.
struct RowsSpan {
  int begin, end, first_stored, clean_begin, clean_end;
};

// Tiles on their way, as a whole where a block of the cache holds them, else in pieces of 16
// tokens. Two warps ask for them in turn, those that have less to do in prepare_params.
template <class Traits>
class RowsPipeline {
  static constexpr int kDim = Traits::kDim, kPieces = kRowsTile / kTile;
  static constexpr int kParams = sizeof(AffineParams);
  static constexpr int kAskers = 2;

 public:
  __device__ __forceinline__ RowsPipeline(const AttentionCall& p, const RowsMaps& maps,
                                          const Paging& paging, RowsShared<Traits>& shared,
                                          const RowTile& rows, const RowsSpan& span, int warp)
      : p_(p), maps_(maps), paging_(paging), shared_(shared), head_(rows.head), span_(span) {
    table_ = p.seqs.block_table + rows.sequence * p.seqs.block_table_stride;
    is_whole_ = paging.shift >= log2_of(kRowsTile);
    next_ = warp < kAskers ? span.begin + warp * kRowsTile : 1 << 30;
    if (next_ < span.end) ask_entries();
#pragma unroll
    for (int i = 0; i < Traits::kStages; ++i) load(span.begin + i * kRowsTile, i);
  }
  // Asks for the tile at `token`, behind the one that was asked for last.
  __device__ __forceinline__ void load(int token, int stage) {
    if (token != next_ || token >= span_.end) return;
    const int found = checked_block(p_.cache, entry_), block = max(found, 0);
    const uint32_t lost = __ballot_sync(kFullWarp, found < 0) & ((1u << kPieces) - 1);
    const uint32_t barrier = shared_address(&shared_.full[stage]);
    const int pieces = is_whole_ ? kPieces : min(kPieces, (span_.end - token + kTile - 1) / kTile);
    if (is_elected()) {
      shared_.lost[stage] = lost;
      shared_.is_clean[stage] = token >= span_.clean_begin && token <= span_.clean_end && !lost;
      expect_bytes(barrier, pieces * kTile * 2 * (kDim + kParams));
    }
    if (is_whole_) {
      const int from = uniform(block), row = token & paging_.mask;
      if (is_elected()) {
        copy_codes(stage, 0, from, row, barrier);
        const auto copy = [&](auto* to, const CUtensorMap& map) {
          copy_box(shared_address(to) + stage * kRowsTile * kParams, map, row, 0, head_, from,
                   barrier);
        };
        copy(shared_.k_params, maps_.k_params);
        copy(shared_.v_params, maps_.v_params);
      }
    } else {
#pragma unroll 1
      for (int piece = 0; piece < pieces; ++piece) {
        const int from = uniform(__shfl_sync(kFullWarp, block, piece)), first = piece * kTile;
        if (is_elected()) copy_piece(stage, first, from, (token + first) & paging_.mask, barrier);
        __syncwarp();
      }
    }
    next_ += kAskers * kRowsTile;
    ask_entries();
  }

 private:
  const AttentionCall& p_;
  const RowsMaps& maps_;
  const Paging& paging_;
  RowsShared<Traits>& shared_;
  const int32_t* table_;  // of the sequence
  int head_;
  const RowsSpan& span_;
  bool is_whole_;
  int next_;   // token of the tile that this warp asks for next
  int entry_;  // of the table, for that tile: of piece lane % 4

  __device__ __forceinline__ void ask_entries() {
    const int at = next_ + (threadIdx.x & (kPieces - 1)) * kTile;
    entry_ = load_early(table_ + min(at >> paging_.shift, p_.seqs.max_blocks - 1));
  }
  // To the rows of the stage from `first` on. A box may reach beyond a block's end, where it has
  // zeros.
  __device__ __forceinline__ void copy_codes(int stage, int first, int block, int row,
                                             uint32_t barrier) const {
    const int place = (stage * kRowsTile + first) * kDim;
    copy_box(shared_address(shared_.k) + place, maps_.k, 0, row, head_, block, barrier);
    copy_box(shared_address(shared_.v) + place, maps_.v, 0, row, head_, block, barrier);
  }
  __device__ __forceinline__ void copy_piece(int stage, int first, int block, int row,
                                             uint32_t barrier) const {
    copy_codes(stage, first, block, row, barrier);
    // Boxes go to multiples of 128 bytes.
    const auto copy = [&](auto* to, const Strided& from) {
      copy_bulk(shared_address(to) + (stage * kRowsTile + first) * kParams,
                from.of_head(head_).at(block, row, kParams), kTile * kParams, barrier);
    };
    copy(shared_.k_params, p_.k_params);
    copy(shared_.v_params, p_.v_params);
  }
};

// A tile's params, as its keys and values are multiplied with, by a thread each. Values that may
// not be read count as zero. Those that are not finite are NaN where every row sees them, else
// zero: mask_rows tells who sees them.
template <class Traits>
__device__ __forceinline__ void prepare_params(RowsShared<Traits>& shared, int stage, int token,
                                               const RowsSpan& span) {
  static_assert(Traits::kThreads == 2 * kRowsTile);
  const int row = threadIdx.x % kRowsTile;
  if (threadIdx.x < kRowsTile) {
    shared.keys[row] = Traits::Key::affine(shared.k_params[stage][row]);
    return;
  }
  const RowAffine affine = Traits::Value::affine(shared.v_params[stage][row]);
  constexpr float kMiddle = Traits::Value::kMiddleCode;
  const __half middle =
      __float2half_rn(fminf(fmaxf(fmaf(kMiddle, affine.scale, affine.offset), -kMaxAbs), kMaxAbs));
  // A code may stand for more than fp16 holds, by less than a step: then steps are shorter.
  const float most = (kMaxAbs - fabsf(__half2float(middle))) * (1.f / kMiddle);
  ValueSteps steps{half2_bits(__half2half2(__float2half_rz(fminf(affine.scale, most)))),
                   half2_bits(__half2half2(middle))};
  const bool is_finite = affine.scale <= kMaxAbs;
  if (!is_finite) steps = {kNanHalves, kNanHalves};
  if (!shared.is_clean[stage]) {
    const bool is_there = token + row >= span.first_stored && token + row < span.end &&
                          !(shared.lost[stage] >> row / kTile & 1);
    if (!is_there || !is_finite) steps = {};
  }
  shared.steps[row] = steps;
}

// A tile's values in fp16: a row a token, of 64 columns; of 128 channels in two halves. Of each
// four channels the first two are among the left half of the columns, the others among the right
// one: so a thread's sums are of four neighbours. A thread converts 16 neighbouring channels of a
// row; threads that write at once meet different banks.
template <class Traits>
struct RowsValues {
  static constexpr int kDim = Traits::kDim, kPieces = kDim / 16;  // of a row
  static constexpr int kRowsAtOnce = Traits::kThreads / kPieces;
  static constexpr int kHalfBytes = kRowsTile * 128;

  // A thread's codes of half of a tile, 0 or 1.
  static constexpr int kTurns = kRowsTile / kRowsAtOnce / 2;
  struct Half {
    uint4 codes[kTurns];
    ValueSteps steps[kTurns];
  };
  static __device__ __forceinline__ void ask(const RowsShared<Traits>& shared, int stage, int half,
                                             Half& x) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = row_of(half * kTurns + i);
      x.codes[i] =
          load_shared(shared_address(shared.v[stage] + row * kDim + threadIdx.x % kPieces * 16));
      x.steps[i] = shared.steps[row];
    }
  }
  static __device__ __forceinline__ void convert(RowsShared<Traits>& shared, int half,
                                                 const Half& x) {
    const int piece = threadIdx.x % kPieces;
    uint8_t* const to = reinterpret_cast<uint8_t*>(shared.values);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int row = row_of(half * kTurns + i);
      const __half2 scale = bits_half2(x.steps[i].scale), middle = bits_half2(x.steps[i].middle);
      const uint32_t words[4] = {x.codes[i].x, x.codes[i].y, x.codes[i].z, x.codes[i].w};
      uint32_t left[4], right[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const auto value = [&](uint32_t code) {
          return half2_bits(__hfma2(bits_half2(centered(code)), scale, middle));
        };
        left[w] = value(codes_low(words[w])), right[w] = value(codes_high(words[w]));
      }
      const auto store = [&](int place, const uint32_t (&x)[4]) {
        *reinterpret_cast<uint4*>(to + place) = make_uint4(x[0], x[1], x[2], x[3]);
      };
      store(Swizzle<128>::place(row, piece), left);
      store(kDim == 128 ? kHalfBytes + Swizzle<128>::place(row, piece)
                        : Swizzle<128>::place(row, piece + kPieces),
            right);
    }
  }

 private:
  // Of 64 channels, lanes that write at once have rows r and r + 4.
  static __device__ __forceinline__ int row_of(int turn) {
    const int tid = threadIdx.x;
    const int first = kDim == 64 ? tid / 32 * 8 + tid / 8 % 4 + (tid & 4) : tid / kPieces;
    return turn * kRowsAtOnce + first;
  }
  static __device__ __forceinline__ __half2 bits_half2(uint32_t u) {
    __half2 h;
    memcpy(&h, &u, 4);
    return h;
  }
};

}  // namespace kvquant::cuda
